//! Guaranteed messages: stored here until their receivers have processed them.

use std::future::{Future, IntoFuture, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use smallvec::{SmallVec, smallvec};

use super::Inner;
use super::draft::Draft;
use crate::address::{AddressError, Destination};
use crate::carrier::{Capability, NewGuaranteed, OutboxError, Receipt, Submission};
use crate::clock::unix_ms;
use crate::message::{Kind, MessageId};
use crate::opaque::opaque;
use crate::wire::Envelope;

/// A guaranteed message. Awaiting it stores the message and returns a [`Receipt`].
#[must_use = "a message is stored when this is awaited"]
pub struct Guaranteed<'a> {
    node: &'a Arc<Inner>,
    destination: Result<Destination, AddressError>,
    draft: Draft,
    not_before: Option<SystemTime>,
    once: bool,
}

opaque!(Guaranteed<'_>, |it| destination: it.destination);

impl<'a> Guaranteed<'a> {
    pub(crate) fn new(
        node: &'a Arc<Inner>,
        destination: Result<Destination, AddressError>,
        draft: Draft,
    ) -> Self {
        Self { node, destination, draft, not_before: None, once: false }
    }

    /// Sets the time after which the unprocessed message becomes a dead letter; by default it never
    /// expires. Measured by the wall clock, since the message outlives this process.
    pub fn expires_in(mut self, time: Duration) -> Self {
        self.draft.rare().ttl = Some(time);
        self
    }

    /// Holds the message back until that time, by the wall clock.
    pub fn not_before(mut self, time: SystemTime) -> Self {
        self.not_before = Some(time);
        self
    }

    /// Sets the message's id, and stores the message only if none with that id was stored: for a
    /// sender that may have to send again without knowing whether the message was stored, for
    /// example after a crash. The receipt then reports on the message that was stored first.
    ///
    /// An outbox remembers the id for the next 256 MiB of its journal, or as much as a smaller disk
    /// holds, across restarts. NATS remembers it for two minutes (its `duplicate_window`), together
    /// with the sender and the body; RabbitMQ does not support it.
    pub fn once(mut self, id: MessageId) -> Self {
        self.draft.rare().id = Some(id);
        self.once = true;
        self
    }

    /// Creates a guaranteed message from one stored in a database, with its id.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn stored_elsewhere(
        node: &'a super::Node,
        id: MessageId,
        destination: Destination,
        body: Vec<u8>,
        key: Option<String>,
        content_type: &Option<String>,
    ) -> Self {
        let mut draft = Draft::new(body.into());
        if key.is_some() || content_type.is_some() {
            let extra = draft.extra();
            (extra.ordering_key, extra.content_type) = (key, content_type.clone());
        }
        Self::new(node.inner(), Ok(destination), draft).once(id)
    }

    /// Checks the message, and draws its id if it has none.
    fn into_message(mut self) -> Result<NewGuaranteed, OutboxError> {
        let core = &self.node.core;
        let destination = self.destination?;
        self.draft.check(&core.config)?;
        for capability in required(&destination, &self.draft, self.not_before, self.once) {
            self.node.carrier.require(capability)?;
        }
        let usual = match &destination {
            Destination::Topic(_) => Kind::Event,
            Destination::Service(_) | Destination::Node(_) => Kind::Command,
        };
        let id = self.draft.id(&core.ids);
        let mut header = self.draft.header(id, usual, destination);
        let expires_at = header.time_to_live.take();
        let expires_at = expires_at.map(|time| unix_ms().saturating_add(time.as_millis() as u64));
        let not_before = self
            .not_before
            .map(|time| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64);
        let envelope = Arc::new(Envelope::one_way(header, self.draft.body.bytes));
        Ok(NewGuaranteed { envelope, expires_at, not_before, once: self.once })
    }
}

/// Returns the abilities that a message requires of the carrier.
fn required(
    destination: &Destination,
    draft: &Draft,
    not_before: Option<SystemTime>,
    once: bool,
) -> impl Iterator<Item = Capability> {
    let to_service = !matches!(destination, Destination::Topic(_));
    let keyed = draft.ordering_key().is_some() && to_service;
    let wanted = [
        (Capability::Guaranteed, true),
        (Capability::NotBefore, not_before.is_some()),
        (Capability::Once, once),
        (Capability::OrderedServices, keyed),
    ];
    wanted.into_iter().filter(|(_, wanted)| *wanted).map(|(capability, _)| capability)
}

impl<'a> IntoFuture for Guaranteed<'a> {
    type Output = Result<Receipt, OutboxError>;
    type IntoFuture = Storing<'a>;

    fn into_future(self) -> Storing<'a> {
        Storing(Step::New(self))
    }
}

/// The future of a [`Guaranteed`] message that is being stored. Once polled, the message is written
/// to this node's disk even if the future is dropped. Over a broker, dropping the future may leave
/// the message unsent.
#[must_use = "a message is stored when this is awaited"]
pub struct Storing<'a>(Step<'a>);

opaque!(Storing<'_>, |_it|);

/// The state of a [`Storing`]. An async block would be ten times as large, and on the heap.
enum Step<'a> {
    New(Guaranteed<'a>),
    Submitted(Submission),
    Over,
}

impl Future for Storing<'_> {
    type Output = Result<Receipt, OutboxError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self(step) = self.get_mut();
        loop {
            match std::mem::replace(step, Step::Over) {
                Step::New(message) => {
                    let node = message.node;
                    *step = Step::Submitted(node.submit(smallvec![message.into_message()?])?);
                }
                Step::Submitted(mut submission) => {
                    return match submission.poll(context) {
                        Poll::Pending => {
                            *step = Step::Submitted(submission);
                            Poll::Pending
                        }
                        Poll::Ready(Ok(mut receipts)) => Poll::Ready(Ok(receipts.remove(0))),
                        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    };
                }
                Step::Over => panic!("it was polled after it had ended"),
            }
        }
    }
}

impl Inner {
    /// Stores messages, all of them or none.
    fn submit(&self, messages: SmallVec<[NewGuaranteed; 1]>) -> Result<Submission, OutboxError> {
        self.core.check_running()?;
        self.carrier.store(messages)
    }
}

/// Several messages that are stored together or not at all.
///
/// ```no_run
/// # async fn example(node: peerbus::Node) -> Result<(), peerbus::OutboxError> {
/// let mut transaction = node.transaction();
/// transaction.add(node.send("billing", "charge 17").guaranteed());
/// transaction.add(node.publish("orders.placed", "17 apples").guaranteed());
/// let receipts = transaction.commit().await?;
/// # Ok(()) }
/// ```
#[must_use = "a transaction does nothing until it is committed"]
pub struct Transaction<'a> {
    pub(super) node: &'a Arc<Inner>,
    pub(super) messages: Vec<Guaranteed<'a>>,
}

opaque!(Transaction<'_>, |it| messages: it.messages);

impl<'a> Transaction<'a> {
    /// Adds a message.
    pub fn add(&mut self, message: Guaranteed<'a>) {
        self.messages.push(message);
    }

    /// Stores all messages in one atomic record, and returns the receipts in the order of the
    /// messages. Each message is sent and processed separately.
    ///
    /// # Errors
    /// [`OutboxError`]: then no message is stored, and none is sent.
    pub async fn commit(self) -> Result<Vec<Receipt>, OutboxError> {
        self.node.carrier.require(Capability::Transactions)?;
        let messages = self.messages.into_iter().map(Guaranteed::into_message);
        let mut submission = self.node.submit(messages.collect::<Result<_, _>>()?)?;
        Ok(poll_fn(|context| submission.poll(context)).await?.into_vec())
    }
}
