//! The wire: records in batches. `docs/protocol.md` describes it for other implementations, with
//! the byte-level examples that `examples.rs` decodes.
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
pub(crate) use delivery::{Answer, Delivery, DeliveryId, DeliveryOutcome, InboxInfo, Stream};
pub(crate) use parcel::{Parcel, Unpacked};
pub(crate) use record::{
    Envelope, Failure, LANES, Lane, OutgoingEvent, Payload, Record, decode_stored, encode_stored,
};

/// The version of the protocol that this crate speaks.
pub(crate) const PROTOCOL_VERSION: u64 = 1;

/// The most frames in a batch, the preamble and the records included.
pub(crate) const MAX_FRAMES: usize = 1024;

/// The most bytes in a batch, unless it holds a single larger message.
pub(crate) const MAX_BATCH: usize = 256 * 1024;

/// A longer body gets a frame of its own.
pub(crate) const INLINE_BODY: usize = 4 * 1024;

/// Bytes that can't be a batch of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the peer speaks protocol version {0}, this node speaks {PROTOCOL_VERSION}")]
    Version(u64),
    #[error("the batch is cut short")]
    Truncated,
    #[error("{0} is not what its place in the record calls for")]
    Unexpected(&'static str),
    #[error("values are nested too deeply")]
    TooDeep,
    #[error("a body frame is missing, left over, or of another length than its record says")]
    Bodies,
    #[error("a body of {0} bytes is over the limit")]
    BodyTooLarge(usize),
    #[error("a header of {0} bytes is over the limit")]
    HeaderTooLarge(usize),
    #[error("a record inherits from another that is not there")]
    Inheritance,
    #[error(transparent)]
    Address(#[from] crate::address::AddressError),
}
