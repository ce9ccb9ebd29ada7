//! The id of a guaranteed message between two nodes.

use crate::address::ServiceName;

/// The permanent id of a delivery between two nodes. It identifies the delivery over all attempts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DeliveryId {
    pub(crate) stream: Stream,
    /// The delivery's number in the stream, from 1.
    pub(crate) seq: u64,
}

/// A numbered sequence of deliveries from one node to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Stream {
    /// The epoch of the sender's outbox, drawn each time that the outbox is opened.
    pub(crate) epoch: u64,
    /// The durable subscription; `None` for point-to-point messages.
    pub(crate) subscription: Option<ServiceName>,
}

/// The fields of a guaranteed message besides its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) id: DeliveryId,
    /// All earlier numbers in the stream are settled: the receiver may forget them.
    pub(crate) floor: u64,
    /// The number of the attempt, from 1, which the answer repeats.
    pub(crate) attempt: u32,
    /// A handler may have received the message before, here or elsewhere.
    pub(crate) redelivered: bool,
}

/// A moment in the history of an outbox: the outbox was opened as `epoch`, and its journal reached
/// this end. A copy of the outbox that was made earlier does not know the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    pub(crate) epoch: u64,
    /// The journal's segment, and the offset in it.
    pub(crate) segment: u64,
    pub(crate) offset: u64,
}

impl Moment {
    /// The moment that no outbox knows: the receiver may have forgotten the true one.
    pub(crate) const FORGOTTEN: Self = Self { epoch: 0, segment: 0, offset: 0 };
}
