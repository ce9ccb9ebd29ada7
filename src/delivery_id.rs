//! The name of a guaranteed message between two nodes.

use crate::address::ServiceName;

/// Names a delivery between two nodes for good: a message may be sent again and again, and is
/// known by this.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DeliveryId {
    pub(crate) stream: Stream,
    /// Its place in the stream, from 1.
    pub(crate) seq: u64,
}

/// What numbers deliveries from one node to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Stream {
    /// Of the sender's outbox: drawn each time that it is opened.
    pub(crate) epoch: u64,
    /// The durable subscription; `None` for what is sent point to point.
    pub(crate) subscription: Option<ServiceName>,
}

/// What a guaranteed message says besides its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) id: DeliveryId,
    /// All before it in the stream is settled: the receiver may forget it.
    pub(crate) floor: u64,
    /// From 1. The answer names it.
    pub(crate) attempt: u32,
    /// It may have been handled before, here or elsewhere.
    pub(crate) redelivered: bool,
}
