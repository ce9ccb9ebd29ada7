//! Discovery: where other nodes may be found. What it reports are hints; who is there is settled
//! in the handshake, and who is alive by the link.

pub(crate) mod fixed;
pub(crate) mod local;
pub(crate) mod mdns;

use std::sync::Arc;

use crate::engine::{Sighting, TargetKey};

/// What a source of sightings reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Discovered {
    Seen(Sighting),
    /// It is no longer announced. A live link is not cut by this.
    Gone(TargetKey),
}

/// Where sources report to.
pub(crate) type Sink = Arc<dyn Fn(Discovered) + Send + Sync>;
