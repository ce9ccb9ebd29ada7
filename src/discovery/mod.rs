//! Discovery: finds the addresses of other nodes. Its reports are hints; the handshake establishes
//! who is there, and the link whether that node is alive.

pub(crate) mod fixed;
pub(crate) mod local;
pub(crate) mod mdns;
pub(crate) mod names;

use std::sync::Arc;

use crate::engine::{Sighting, TargetKey};
use crate::peer::Address;

/// A report of a discovery source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Discovered {
    Seen(Sighting),
    /// The addresses that a configured name currently has.
    Resolved {
        name: Address,
        addresses: Vec<Address>,
    },
    /// The node is no longer announced. This does not cut a live link.
    Gone(TargetKey),
}

/// The receiver of reports.
pub(crate) type Sink = Arc<dyn Fn(Discovered) + Send + Sync>;
