//! Links move batches between two nodes. What is in them is the engine's business.
//!
//! The front door ([`crate::tunnel`]) does it over TCP and over this host's Unix sockets,
//! [`memory`] within one process. `conformance` is what all of them must do.

#[cfg(test)]
mod conformance;
pub(crate) mod memory;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::engine::Connection;
use crate::identity::{NodeId, random_bytes};

/// This side of a connection, for sending.
pub(crate) trait Link: Send + Sync {
    /// Hands over the frames of one batch. It never waits: who sends bounds what it hands over
    /// by watching the frames' owners being dropped. What is sent on a link that has ended is
    /// dropped.
    fn send(&self, frames: Vec<Bytes>);

    /// Ends the connection when what was handed over is written, or can't be.
    fn close(&self);

    /// The peer's hello is accepted. Until then a link takes small batches only.
    fn admit(&self) {}

    /// When bytes last arrived, where the link sees more than whole batches.
    fn last_heard(&self) -> Option<Instant> {
        None
    }
}

/// Takes what a connection brings, in order, from one task.
pub(crate) trait Receiver: Send + Sync {
    /// A batch arrived. Must not block.
    fn handle_batch(&self, frames: Vec<Bytes>);

    /// The connection is gone; told once, and last.
    fn handle_closed(&self);
}

/// Takes new connections, whichever side dialled.
pub(crate) trait Acceptor: Send + Sync {
    fn handle_connected(&self, link: Arc<dyn Link>, connection: Connection) -> Arc<dyn Receiver>;
}

/// An address that could not be dialled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// The Unix socket's file is there, but its process is not.
    #[error("unix:{}: nobody listens on the socket", .0.display())]
    DeadSocket(PathBuf),
    #[error("{0}")]
    Failed(String),
}

/// A connection's ZMTP identity: the node's id and 16 random bytes, so that no two share one.
pub(crate) fn new_identity(id: &NodeId) -> Bytes {
    let mut identity = Vec::with_capacity(NodeId::LEN + 16);
    identity.extend_from_slice(id.as_bytes());
    identity.extend_from_slice(&random_bytes::<16>());
    identity.into()
}
