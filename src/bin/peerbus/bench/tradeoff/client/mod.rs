//! What sends and receives for an actor: a node over the mesh or a broker, or a broker's own client
//! with nothing of ours around it.

#[cfg(feature = "nats")]
mod nats;
mod node;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::actor::Part;

/// What the messages are named by.
const TOPIC: &str = "bench.topic";
const SERVICE: &str = "bench.work";
/// How long a sender waits for room, or for a reply.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whose calls an actor makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Library {
    Peerbus,
    Nats,
    RabbitMq,
}

/// What is done with the body of each message that comes.
pub(super) type Note = Arc<dyn Fn(&[u8]) + Send + Sync>;

#[derive(Clone)]
pub(super) enum Client {
    Node(node::Client),
    #[cfg(feature = "nats")]
    Nats(Arc<nats::Client>),
    #[cfg(feature = "rabbitmq")]
    RabbitMq(rabbitmq::Client),
}

impl Client {
    pub(super) async fn connect(part: &Part) -> anyhow::Result<Self> {
        match part.library {
            Library::Peerbus => Ok(Self::Node(node::Client::connect(part).await?)),
            #[cfg(feature = "nats")]
            Library::Nats => Ok(Self::Nats(Arc::new(nats::Client::connect(part).await?))),
            #[cfg(feature = "rabbitmq")]
            Library::RabbitMq => Ok(Self::RabbitMq(rabbitmq::Client::connect(part).await?)),
            #[cfg(not(all(feature = "nats", feature = "rabbitmq")))]
            other => anyhow::bail!("the client of {other:?} is not built in"),
        }
    }

    /// Takes messages from now on, and answers requests with what they said. Where it listens, if
    /// others have to know.
    pub(super) async fn receive(&self, note: Note) -> anyhow::Result<Option<SocketAddr>> {
        match self {
            Self::Node(client) => client.receive(note).await,
            #[cfg(feature = "nats")]
            Self::Nats(client) => client.receive(note).await.map(|()| None),
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => client.receive(note).await.map(|()| None),
        }
    }

    /// Waits until so many receivers are there. Those of a broker's own client have told the broker
    /// before any sender begins.
    pub(super) async fn meet(&self, receivers: usize) -> anyhow::Result<()> {
        match self {
            Self::Node(client) => client.meet(receivers).await,
            #[cfg(feature = "nats")]
            Self::Nats(_) => Ok(()),
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(_) => Ok(()),
        }
    }

    /// For events that are not guaranteed.
    pub(super) fn flow(&self) -> anyhow::Result<Flow> {
        match self {
            Self::Node(client) => Ok(Flow::Node(client.publisher()?)),
            #[cfg(feature = "nats")]
            Self::Nats(client) => Ok(Flow::Nats(client.clone())),
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => Ok(Flow::RabbitMq(client.clone())),
        }
    }

    /// Sends anything else, and waits for what its sender can know: that it is stored, or the reply.
    pub(super) async fn send(&self, body: Vec<u8>) -> anyhow::Result<()> {
        match self {
            Self::Node(client) => client.send(body).await,
            #[cfg(feature = "nats")]
            Self::Nats(client) => client.send(body).await,
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => client.send(body).await,
        }
    }

    /// How many messages it has been told are lost, or may be.
    pub(super) fn told(&self) -> u64 {
        match self {
            Self::Node(client) => client.told(),
            #[cfg(feature = "nats")]
            Self::Nats(_) => 0,
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(_) => 0,
        }
    }

    pub(super) async fn close(self) {
        match self {
            Self::Node(client) => client.close().await,
            #[cfg(feature = "nats")]
            Self::Nats(client) => client.close().await,
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => client.close().await,
        }
    }
}

/// One task's way to publish event after event.
pub(super) enum Flow {
    Node(peerbus::Publisher),
    #[cfg(feature = "nats")]
    Nats(Arc<nats::Client>),
    #[cfg(feature = "rabbitmq")]
    RabbitMq(rabbitmq::Client),
}

impl Flow {
    /// Whether it left, as far as the client can tell. A node drops what its peers have no room
    /// for, unless it is to `wait`; the other clients always wait for the room of their own.
    pub(super) async fn publish(&mut self, body: Vec<u8>, wait: bool) -> bool {
        match self {
            Self::Node(publisher) => {
                let event = publisher.publish(body);
                let report = match wait {
                    true => event.within(PATIENCE).await,
                    false => event.now(),
                };
                report.is_ok_and(|report| !report.is_unheard())
            }
            #[cfg(feature = "nats")]
            Self::Nats(client) => client.publish(body).await,
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => client.publish(body).await,
        }
    }
}
