//! The wire format: records in batches. `protocol.md` specifies it for other implementations, with
//! byte-level examples, which `examples.rs` decodes.
//!
//! ```text
//! ┌ frame 1 ──┐ ┌ frame 2 ──────────────────────────┐ ┌ frame 3… ─────────────┐
//! │ preamble  │ │ len record │ len record │ …       │ │ a body over 4 KiB each │
//! └───────────┘ └───────────────────────────────────┘ └───────────────────────┘
//! ```

mod batch;
mod control;
mod delivery;
#[cfg(test)]
mod examples;
mod pack;
mod parcel;
mod record;

pub(crate) use batch::{BatchEncoder, Decoded, EncodedBatch, EventPack, Preamble, Totals, decode};
pub(crate) use control::{Announcement, Bye, Control, Hello, Hint, Limits, MAX_ANSWERS, MAX_HINTS};
pub(crate) use delivery::{
    Answer, Delivery, DeliveryId, DeliveryOutcome, InboxInfo, Moment, Stream,
};
pub(crate) use parcel::{Parcel, Unpacked};
pub(crate) use record::{
    Envelope, Failure, LANES, Lane, OutgoingEvent, Payload, Record, decode_stored, encode_stored,
};

/// The protocol version that this crate speaks.
pub(crate) const PROTOCOL_VERSION: u64 = 1;

/// The most frames in a batch, including the preamble and the records.
pub(crate) const MAX_FRAMES: usize = 1024;

/// The most bytes in a batch, unless it holds a single larger message.
pub(crate) const MAX_BATCH: usize = 256 * 1024;

/// The longest body inside a record; a longer one gets a frame of its own.
pub(crate) const INLINE_BODY: usize = 4 * 1024;

/// The error of decoding a batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the peer speaks protocol version {0}, but this node speaks {PROTOCOL_VERSION}")]
    Version(u64),
    #[error("the batch is cut short")]
    Truncated,
    #[error("invalid record: {0}")]
    Unexpected(&'static str),
    #[error("values are nested too deeply")]
    TooDeep,
    #[error("a body frame is missing, surplus, or not of the length that its record gives")]
    Bodies,
    #[error("a body of {0} bytes is over the limit")]
    BodyTooLarge(usize),
    #[error("a header of {0} bytes is over the limit")]
    HeaderTooLarge(usize),
    #[error("a record inherits from a missing one")]
    Inheritance,
    #[error(transparent)]
    Address(#[from] crate::address::AddressError),
    #[error(transparent)]
    NodeId(#[from] crate::identity::NodeIdError),
}
