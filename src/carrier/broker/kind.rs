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

impl fmt::Display for BrokerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedded => "the embedded broker",
            Self::Nats => "NATS",
            Self::RabbitMq => "RabbitMQ",
        })
    }
}
