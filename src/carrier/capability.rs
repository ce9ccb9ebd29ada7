//! The abilities that a carrier may lack.

/// An ability that a carrier may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Capability {
    /// Messages stored until they are processed.
    Guaranteed,
    /// Guaranteed events for named subscriptions.
    DurableSubscriptions,
    /// Guaranteed messages stored together or not at all.
    Transactions,
    /// Guaranteed messages held back until a time.
    NotBefore,
    /// Guaranteed messages stored only once by their id.
    Once,
    /// Reports to the sender that a message was processed.
    ProcessedReceipts,
    /// Order by key among the instances of a service.
    OrderedServices,
    /// Subscriptions that hold back their senders.
    HoldBack,
    /// The number of connected nodes.
    PeerCount,
}

impl Capability {
    /// The ability in words, to follow "has no".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "guaranteed messages",
            Self::DurableSubscriptions => "durable subscriptions",
            Self::Transactions => "transactions over several queues",
            Self::NotBefore => "messages held back until a time",
            Self::Once => "record of the ids of stored messages",
            Self::ProcessedReceipts => "report of processed messages to their sender",
            Self::OrderedServices => "order by key among the instances of a service",
            Self::HoldBack => "subscriptions that hold back their senders",
            Self::PeerCount => "count of the connected nodes",
        }
    }
}

impl std::fmt::Display for Capability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An operation that the node's carrier does not support.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{carrier} has no {capability}")]
#[non_exhaustive]
pub struct Unsupported {
    /// The carrier: "NATS", for example.
    pub carrier: &'static str,
    /// The missing ability.
    pub capability: Capability,
}
