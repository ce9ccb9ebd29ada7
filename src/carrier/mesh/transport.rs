//! The transports of a mesh's links: sockets, or memory.

use std::sync::Arc;

use crate::discovery::local;
use crate::engine::TargetKey;
use crate::link::memory::MemoryPort;
use crate::link::{Acceptor, DialError};
use crate::peer::Address;
use crate::tunnel::FrontDoor;

pub(super) enum Transport {
    Sockets(Arc<FrontDoor>),
    Memory {
        port: MemoryPort,
        /// The network holds only a weak reference to it.
        _acceptor: Arc<dyn Acceptor>,
    },
}

impl Transport {
    /// Dials a target. Returns when the link has been passed to the node.
    pub(super) async fn dial(
        &self,
        target: &TargetKey,
        addresses: &[Address],
    ) -> Result<(), DialError> {
        match (self, addresses.first()) {
            (Self::Sockets(door), _) => {
                let dialled = door.dial(target, addresses).await;
                if let Err(DialError::DeadSocket(path)) = &dialled {
                    local::remove_if_stale(path);
                }
                dialled
            }
            (Self::Memory { port, .. }, Some(Address::Memory(number))) => {
                port.dial(target, *number)
            }
            (Self::Memory { .. }, _) => {
                Err(DialError::Failed("this node is on an in-memory network".into()))
            }
        }
    }

    pub(super) async fn close(&self) {
        match self {
            Self::Sockets(door) => door.close().await,
            Self::Memory { port, .. } => port.leave(),
        }
    }
}
