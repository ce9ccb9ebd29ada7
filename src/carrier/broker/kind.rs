//! The kinds of brokers.

use std::fmt;

/// A kind of broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BrokerKind {
    /// The embedded broker, `peerbus broker`.
    Embedded,
    /// NATS, with JetStream for guaranteed messages.
    Nats,
    /// RabbitMQ, with quorum queues for guaranteed messages.
    RabbitMq,
}

impl BrokerKind {
    /// Returns its name, as it stands in texts.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Embedded => "the embedded broker",
            Self::Nats => "NATS",
            Self::RabbitMq => "RabbitMQ",
        }
    }
}

impl fmt::Display for BrokerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
