//! Guaranteed messages on their way to the store: this node's outbox, or a broker.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use smallvec::SmallVec;

use super::capability::Unsupported;
use crate::address::AddressError;
use crate::core::{NotStored, Progress, RUNTIME_ENDED_TEXT, Stopped};
use crate::engine::delivery::DeadLetterReason;
use crate::message::{BodyError, MessageId};
use crate::wire::Envelope;

/// A guaranteed message that was not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutboxError {
    /// The name or topic can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The message is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// The node has no store: [`Config::outbox`](crate::Config::outbox).
    #[error("the node has no store; set a folder for its outbox")]
    NoOutbox,
    /// The outbox is at its limit. Retry when some of its messages are processed.
    #[error("the outbox is full: it holds {messages} messages, {bytes} bytes; retry later")]
    OutboxFull {
        /// The number of messages in the outbox.
        messages: u64,
        /// Their size in bytes.
        bytes: u64,
    },
    /// The carrier lacks the ability.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The disk refused the message, or the broker did not confirm it.
    #[error("the message can't be stored: {0}")]
    NotStored(NotStored),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}

impl From<Stopped> for OutboxError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::ShutDown => Self::ShutDown,
            Stopped::RuntimeEnded => Self::RuntimeEnded,
        }
    }
}

/// A stored message that was not processed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeliveryError {
    /// The message is a dead letter: it stays in the outbox, and is not sent again by itself.
    #[error("the message is a dead letter: {0}")]
    DeadLetter(DeadLetterReason),
    /// A broker keeps the message, and does not report its end.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The node shut down. The message is kept, and sent when the store is opened again.
    #[error("the node is shutting down; the message is kept")]
    ShutDown,
}

/// A guaranteed message to be stored.
pub(crate) struct NewGuaranteed {
    pub(crate) envelope: Arc<Envelope>,
    /// The expiry, in ms since the Unix epoch.
    pub(crate) expires_at: Option<u64>,
    /// The earliest delivery, in ms since the Unix epoch.
    pub(crate) not_before: Option<u64>,
    /// Store the message only if none with its id was stored before.
    pub(crate) once: bool,
}

impl NewGuaranteed {
    pub(crate) fn id(&self) -> MessageId {
        self.envelope.header.id
    }
}

/// Proof that a message is stored. The message survives a crash of this process, and of the machine
/// (see [`Durability`](crate::Durability)), and is sent until it is processed.
#[derive(Debug)]
pub struct Receipt {
    id: MessageId,
    destinations: usize,
    end: End,
}

/// The source of reports on a stored message's end.
#[derive(Debug)]
enum End {
    /// The message had no destination, or was processed before.
    Processed,
    InOutbox(Progress),
    Unreported(Unsupported),
}

impl Receipt {
    /// Creates a receipt that reports the message as processed, until [`Receipt::follow`].
    pub(crate) fn new(id: MessageId, destinations: usize) -> Self {
        Self { id, destinations, end: End::Processed }
    }

    /// Creates the receipt of a message confirmed by a broker, which does not report its end.
    pub(crate) fn of_broker(id: MessageId, lack: Unsupported) -> Self {
        Self { id, destinations: 1, end: End::Unreported(lack) }
    }

    /// Follows the message's progress.
    pub(crate) fn follow(&mut self, progress: Progress) {
        self.end = End::InOutbox(progress);
    }

    /// The message's id.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// The number of destinations: 1 for a sent message; for a published one, the number of
    /// matching durable subscriptions that this outbox knows. 1 for a message that a broker keeps,
    /// since the broker does not report for whom.
    pub fn destinations(&self) -> usize {
        self.destinations
    }

    /// Waits until the handlers of all destinations have returned Ok and the records of that are
    /// durable at their nodes.
    ///
    /// # Errors
    /// [`DeliveryError`] if the message became a dead letter, if the node shuts down first, or if a
    /// broker keeps the message and does not report its end.
    pub async fn processed(self) -> Result<(), DeliveryError> {
        match self.end {
            End::Processed => Ok(()),
            End::Unreported(lack) => Err(lack.into()),
            End::InOutbox(progress) => match poll_fn(|context| progress.poll_done(context)).await {
                Some(result) => result.map_err(DeliveryError::DeadLetter),
                None => Err(DeliveryError::ShutDown),
            },
        }
    }

    fn poll_stored(&self, context: &Context<'_>) -> Poll<Result<(), OutboxError>> {
        let End::InOutbox(progress) = &self.end else { return Poll::Ready(Ok(())) };
        progress.poll_stored(context).map(|stored| match stored {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(OutboxError::NotStored(error)),
            None => Err(OutboxError::ShutDown),
        })
    }
}

type Receipts = SmallVec<[Receipt; 1]>;

/// Messages that are being stored together.
pub(crate) enum Submission {
    /// The messages are written to the disk, even if this is dropped.
    ToDisk {
        receipts: Receipts,
        /// The number of stored messages, which are the first ones.
        stored: usize,
    },
    /// One message that is sent to a broker. Dropping this may leave it unsent.
    ToBroker(Pin<Box<dyn Future<Output = Result<Receipt, OutboxError>> + Send>>),
}

impl Submission {
    pub(crate) fn to_disk(receipts: Receipts) -> Self {
        Self::ToDisk { receipts, stored: 0 }
    }

    /// Polls for the receipts, in the order of the messages, once all are stored.
    pub(crate) fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<SmallVec<[Receipt; 1]>, OutboxError>> {
        match self {
            Self::ToDisk { receipts, stored } => {
                while let Some(receipt) = receipts.get(*stored) {
                    match receipt.poll_stored(context) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Ready(Ok(())) => *stored += 1,
                    }
                }
                Poll::Ready(Ok(std::mem::take(receipts)))
            }
            Self::ToBroker(storing) => {
                storing.as_mut().poll(context).map_ok(|receipt| smallvec::smallvec![receipt])
            }
        }
    }
}
