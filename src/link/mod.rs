//! Links move batches between two nodes. The engine handles their contents.
//!
//! The front door ([`crate::tunnel`]) provides links over TCP and over Unix sockets of this host,
//! [`memory`] within one process. `conformance` tests what all of them must do.

#[cfg(test)]
mod conformance;
pub(crate) mod memory;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::engine::Connection;
use crate::identity::{NodeId, random_bytes};

/// The sending side of a connection.
pub(crate) trait Link: Send + Sync {
    /// Queues the frames of one batch. Never waits: the sender bounds what it queues by watching
    /// the frames' owners being dropped. Frames sent on a closed link are dropped.
    fn send(&self, frames: Vec<Bytes>);

    /// Closes the connection once the queued frames are written, or can't be.
    fn close(&self);

    /// Notifies the link that the peer's hello was accepted. Before that, it accepts small batches
    /// only.
    fn admit(&self) {}

    /// Notifies the link that it carried a message: it makes room for no other.
    fn prove(&self) {}

    /// The time at which bytes last arrived, if the link sees more than whole batches.
    fn last_heard(&self) -> Option<Instant> {
        None
    }
}

/// The time that the batches of a connection take before other tasks have their turn. A peer can
/// make them as expensive as it likes, and its bytes may never end.
pub(crate) const SLICE: Duration = Duration::from_micros(200);

/// Receives the batches of a connection, in order, from one task.
pub(crate) trait Receiver: Send + Sync {
    /// Handles a batch, or as much of it as is due at once. Must not block.
    ///
    /// A returned future handles the rest, and yields to other tasks in between. It must be awaited
    /// before the next batch; if it is dropped, the rest is lost.
    fn handle_batch(&self, frames: Vec<Bytes>) -> Option<BoxFuture<'_, ()>>;

    /// Handles the end of the connection; called once, and last.
    fn handle_closed(&self);
}

/// Accepts new connections, whichever side dialled.
pub(crate) trait Acceptor: Send + Sync {
    fn handle_connected(&self, link: Arc<dyn Link>, connection: Connection) -> Arc<dyn Receiver>;
}

/// An address that could not be dialled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// The Unix socket's file exists, but no process listens on it.
    #[error("unix:{}: no process listens on the socket", .0.display())]
    DeadSocket(PathBuf),
    #[error("{0}")]
    Failed(String),
}

/// A connection's ZMTP identity: the node's id and 16 random bytes, so that it is unique.
pub(crate) fn new_identity(id: &NodeId) -> Bytes {
    let mut identity = Vec::with_capacity(NodeId::LEN + 16);
    identity.extend_from_slice(id.as_bytes());
    identity.extend_from_slice(&random_bytes::<16>());
    identity.into()
}
