//! The ways in which a node reaches others.

use std::sync::Arc;

use crate::discovery::local;
use crate::engine::TargetKey;
use crate::link::DialError;
use crate::link::memory::MemoryPort;
use crate::link::zmq::ZmqPort;
use crate::peer::Address;
use crate::tunnel::FrontDoor;

pub(crate) enum Transport {
    /// The port is `None` where nodes of this host are not looked for.
    Sockets {
        port: Option<Arc<ZmqPort>>,
        door: Arc<FrontDoor>,
    },
    Memory(MemoryPort),
}

impl Transport {
    /// Dials a target; returns when the link has been handed to the node.
    pub(crate) async fn dial(
        &self,
        target: &TargetKey,
        addresses: &[Address],
    ) -> Result<(), DialError> {
        match (self, addresses.first()) {
            (Self::Sockets { port: Some(port), .. }, Some(Address::Local(path))) => {
                match local::is_dead(path).await {
                    true => Err(DialError("nobody listens on the socket".into())),
                    false => port.dial(target, path).await,
                }
            }
            (Self::Sockets { door, .. }, _) => door.dial(target, addresses).await,
            (Self::Memory(port), Some(Address::Memory(number))) => port.dial(target, *number),
            (Self::Memory(_), _) => Err(DialError("this node is on an in-memory network".into())),
        }
    }

    pub(crate) async fn close(&self) {
        match self {
            Self::Sockets { port, door } => {
                door.close().await;
                if let Some(port) = port {
                    port.close().await;
                }
            }
            Self::Memory(port) => port.leave(),
        }
    }
}
