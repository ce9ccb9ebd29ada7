//! The client of an actor: a node over the mesh or a broker, or a broker's own client without this
//! crate.

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

/// The topic and service of the messages.
const TOPIC: &str = "bench.topic";
const SERVICE: &str = "bench.work";
/// The time for which a sender waits for room, or for a reply.
const PATIENCE: Duration = Duration::from_secs(20);

/// The library that an actor uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Library {
    Peerbus,
    Nats,
    RabbitMq,
}

/// The callback for the body of each message.
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

    /// Receives messages from now on, and echoes requests. Returns the address on which it
    /// listens, if senders must know it.
    pub(super) async fn receive(&self, note: Note) -> anyhow::Result<Option<SocketAddr>> {
        match self {
            Self::Node(client) => client.receive(note).await,
            #[cfg(feature = "nats")]
            Self::Nats(client) => client.receive(note).await.map(|()| None),
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => client.receive(note).await.map(|()| None),
        }
    }

    /// Waits until that many receivers are present. The receivers of a broker's own client have
    /// subscribed at the broker before any sender begins.
    pub(super) async fn meet(&self, receivers: usize) -> anyhow::Result<()> {
        match self {
            Self::Node(client) => client.meet(receivers).await,
            #[cfg(feature = "nats")]
            Self::Nats(_) => Ok(()),
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(_) => Ok(()),
        }
    }

    /// The publisher of events that are not guaranteed.
    pub(super) fn flow(&self) -> anyhow::Result<Flow> {
        match self {
            Self::Node(client) => Ok(Flow::Node(client.publisher()?)),
            #[cfg(feature = "nats")]
            Self::Nats(client) => Ok(Flow::Nats(client.clone())),
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => Ok(Flow::RabbitMq(client.clone())),
        }
    }

    /// Sends any other message, and waits for the outcome that its sender can know: stored, or
    /// the reply.
    pub(super) async fn send(&self, body: Vec<u8>) -> anyhow::Result<()> {
        match self {
            Self::Node(client) => client.send(body).await,
            #[cfg(feature = "nats")]
            Self::Nats(client) => client.send(body).await,
            #[cfg(feature = "rabbitmq")]
            Self::RabbitMq(client) => client.send(body).await,
        }
    }

    /// The number of messages reported to the client as lost or in doubt.
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

/// A publisher of many events, for one task.
pub(super) enum Flow {
    Node(peerbus::Publisher),
    #[cfg(feature = "nats")]
    Nats(Arc<nats::Client>),
    #[cfg(feature = "rabbitmq")]
    RabbitMq(rabbitmq::Client),
}

impl Flow {
    /// Publishes an event; returns true if it left, as far as the client can tell. A node drops
    /// events for which its peers have no room, unless it is to `wait`; the other clients always
    /// wait for room of their own.
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
