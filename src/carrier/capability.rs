//! The abilities that a carrier may lack.

use super::broker::BrokerKind;

/// An ability of which a carrier may have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Capability {
    /// Messages that are stored until they are processed.
    Guaranteed,
    /// Guaranteed events for named subscriptions.
    DurableSubscriptions,
    /// Guaranteed messages that are stored together or not at all.
    Transactions,
    /// Guaranteed messages that are held back until a time.
    NotBefore,
    /// Guaranteed messages that are stored once by their id.
    Once,
    /// Word for the sender of a message that its receivers have processed it.
    ProcessedReceipts,
    /// Order by key among the instances of a service.
    OrderedServices,
    /// Subscriptions that hold their senders back.
    HoldBack,
    /// The number of nodes that it serves.
    PeerCount,
}

impl Capability {
    /// The ability in words, as it stands behind "has no".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "guaranteed messages",
            Self::DurableSubscriptions => "durable subscriptions",
            Self::Transactions => "transactions over several queues",
            Self::NotBefore => "messages that are held back until a time",
            Self::Once => "a memory of the ids of what it has stored",
            Self::ProcessedReceipts => "word for the sender of what its receivers have processed",
            Self::OrderedServices => "order by key among the instances of a service",
            Self::HoldBack => "way to be held back by one subscription",
            Self::PeerCount => "word of how many nodes it serves",
        }
    }
}

impl std::fmt::Display for Capability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A call that the node's carrier can't carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{broker} has no {capability}")]
#[non_exhaustive]
pub struct Unsupported {
    /// The broker.
    pub broker: BrokerKind,
    /// The missing ability.
    pub capability: Capability,
}
