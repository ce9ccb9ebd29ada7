//! Links move batches between two nodes. What is in them is the engine's business.
//!
//! [`zmq`] does it over the `zeromq` crate, [`memory`] within one process. `conformance` is what
//! both must do.

#[cfg(test)]
mod conformance;
pub(crate) mod memory;
mod private;
pub(crate) mod zmq;

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::engine::Connection;

/// This side of a connection, for sending.
pub(crate) trait Link: Send + Sync {
    /// Hands over the frames of one batch. It never waits: who sends bounds what it hands over
    /// by watching the frames' owners being dropped. What is sent on a link that has ended is
    /// dropped.
    fn send(&self, frames: Vec<Bytes>);

    /// Ends the connection when what was handed over is written, or can't be.
    fn close(&self);

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
#[error("{0}")]
pub(crate) struct DialError(pub(crate) String);
