//! Guaranteed messages: stored here until they are processed there.

use std::fmt;
use std::future::{Future, IntoFuture, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use smallvec::{SmallVec, smallvec};

use super::broker::Brokered;
use super::delivery::DeliveryError;
use super::draft::{BodyError, Draft};
use super::progress::Progress;
use super::shared::Shared;
use crate::address::{AddressError, Destination};
use crate::broker::{BrokerKind, Unsupported};
use crate::clock::unix_ms;
use crate::engine::delivery::{Full, NewMessage, NewMessages, Submitted, Target};
use crate::message::{Kind, MessageId};
use crate::opaque::opaque;
use crate::sync::lock;
use crate::wire::Envelope;

/// A guaranteed message that was not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutboxError {
    /// The name or topic can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// It is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// The node has no store: [`Config::outbox`](crate::Config::outbox).
    #[error("the node has no store: name a folder for its outbox")]
    NoOutbox,
    /// The outbox holds as much as it may. Try again when some of it is processed.
    #[error("the outbox is full: it holds {messages} messages, {bytes} bytes")]
    OutboxFull {
        /// How many messages it holds.
        messages: u64,
        /// How many bytes they take.
        bytes: u64,
    },
    /// A broker can't do that.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The disk refused it, or the broker did not confirm it.
    #[error("the message can't be stored: {0}")]
    NotStored(NotStored),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// Why a message was not stored, and whether that is certain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotStored {
    /// What the system or the broker said.
    pub reason: String,
    /// The message may be delivered all the same: it was written, and then the disk failed before
    /// it was safe, so that it may still be there after a restart; or it was sent to the broker,
    /// which may have it. Sent again, it may come twice, unless both times it has the same id
    /// ([`once`](Guaranteed::once)). If this is false, nothing of the message was kept, and it
    /// will not be delivered.
    pub may_turn_up: bool,
}

impl fmt::Display for NotStored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if self.may_turn_up {
            f.write_str("; it may be delivered all the same")?;
        }
        Ok(())
    }
}

/// A message for the outbox. Awaiting it stores the message and returns a [`Receipt`].
#[must_use = "a message is stored when this is awaited"]
pub struct Guaranteed<'a> {
    shared: &'a Arc<Shared>,
    destination: Result<Destination, AddressError>,
    draft: Draft,
    not_before: Option<SystemTime>,
    once: bool,
}

opaque!(Guaranteed<'_>, |it| destination: it.destination);

impl<'a> Guaranteed<'a> {
    pub(crate) fn new(
        shared: &'a Arc<Shared>,
        destination: Result<Destination, AddressError>,
        draft: Draft,
    ) -> Self {
        Self { shared, destination, draft, not_before: None, once: false }
    }

    /// Makes it a dead letter if it is not processed by then; without it, it is tried for ever.
    /// It goes by the clock on the wall, since it outlasts this process.
    pub fn expires_in(mut self, time: Duration) -> Self {
        self.draft.rare().ttl = Some(time);
        self
    }

    /// Holds it back until then, by the clock on the wall.
    pub fn not_before(mut self, time: SystemTime) -> Self {
        self.not_before = Some(time);
        self
    }

    /// Gives it an id, and stores it only if none with that id was stored: for whoever may have to
    /// send something again without knowing whether it has been stored, as after a crash. The
    /// receipt then tells of the one that was stored first.
    ///
    /// An outbox remembers the id for as long as the next 256 MiB of its journal, on a disk that is
    /// smaller for as much as that holds, restarts included. NATS does so for two minutes (its `duplicate_window`); RabbitMQ can't.
    pub fn once(mut self, id: MessageId) -> Self {
        self.draft.rare().id = Some(id);
        self.once = true;
        self
    }

    /// A message that was stored in a database, with its id.
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
        let (shared, destination) = (node.shared(), Ok(destination));
        Self::new(shared, destination, draft).once(id)
    }

    /// Checks it, and finds out where it goes.
    pub(super) fn into_message(mut self) -> Result<NewMessage, OutboxError> {
        let shared = self.shared;
        if let Some(broker) = shared.broker() {
            self.check_broker(broker)?;
        } else if shared.store.is_none() {
            return Err(OutboxError::NoOutbox);
        }
        let destination = self.destination?;
        self.draft.check(shared)?;
        let (usual, targets) = match &destination {
            Destination::Topic(topic) => {
                let store = shared.store.as_ref();
                let known = store.map(|store| lock(&store.outbox).subscribers(topic));
                (Kind::Event, known.unwrap_or_default())
            }
            Destination::Service(name) => (Kind::Command, smallvec![Target::Service(name.clone())]),
            Destination::Node(node) => (Kind::Command, smallvec![Target::Node(*node)]),
        };
        let id = self.draft.id(&shared.ids);
        let mut header = self.draft.header(id, usual, destination);
        let expires_at = header.time_to_live.take();
        let expires_at = expires_at.map(|time| unix_ms().saturating_add(time.as_millis() as u64));
        let not_before = self
            .not_before
            .map(|time| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64);
        let envelope = Arc::new(Envelope::one_way(header, self.draft.body.bytes));
        Ok(NewMessage { envelope, targets, expires_at, not_before, once: self.once })
    }
}

impl Guaranteed<'_> {
    fn check_broker(&self, broker: &Brokered) -> Result<(), Unsupported> {
        let to_topic = matches!(self.destination, Ok(Destination::Topic(_)));
        broker.can_keep()?;
        match broker.client.kind() {
            BrokerKind::RabbitMq if self.not_before.is_some() => {
                Err(broker.lacks("messages that are held back until a time"))
            }
            BrokerKind::RabbitMq if self.once => {
                Err(broker.lacks("a memory of the ids of what it has stored"))
            }
            _ if self.draft.ordering_key().is_some() && !to_topic => {
                Err(broker.lacks(super::ORDERED_SERVICES))
            }
            BrokerKind::Embedded | BrokerKind::Nats | BrokerKind::RabbitMq => Ok(()),
        }
    }
}

impl<'a> IntoFuture for Guaranteed<'a> {
    type Output = Result<Receipt, OutboxError>;
    type IntoFuture = Storing<'a>;

    fn into_future(self) -> Storing<'a> {
        Storing(Step::New(self))
    }
}

/// A guaranteed message that is being stored: what awaiting a [`Guaranteed`] does. Once it was
/// polled, the message is on its way to this node's disk even if this is dropped. Over a broker,
/// dropping it may leave the message unsent.
#[must_use = "a message is stored when this is awaited"]
pub struct Storing<'a>(Step<'a>);

opaque!(Storing<'_>, |_it|);

/// It is no async block, since such a one would be ten times as large, and on the heap.
enum Step<'a> {
    New(Guaranteed<'a>),
    ToDisk(Submission),
    ToBroker(Pin<Box<dyn Future<Output = Result<Receipt, OutboxError>> + Send + 'a>>),
    Over,
}

impl<'a> Step<'a> {
    fn begin(message: Guaranteed<'a>) -> Result<Self, OutboxError> {
        let shared = message.shared;
        let message = message.into_message()?;
        let Some(broker) = shared.broker() else {
            return Ok(Self::ToDisk(submit(shared, [message])?));
        };
        if shared.is_stopping() {
            return Err(OutboxError::ShutDown);
        }
        Ok(Self::ToBroker(Box::pin(shared.store_by_broker(broker, message))))
    }
}

impl Future for Storing<'_> {
    type Output = Result<Receipt, OutboxError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self(step) = self.get_mut();
        if matches!(step, Step::New(_))
            && let Step::New(message) = std::mem::replace(step, Step::Over)
        {
            *step = Step::begin(message)?;
        }
        let polled = match step {
            Step::ToDisk(submission) => {
                let stored = submission.poll_stored(context);
                stored.map_ok(|()| submission.receipts.remove(0))
            }
            Step::ToBroker(storing) => storing.as_mut().poll(context),
            Step::New(_) | Step::Over => panic!("it was polled after it had ended"),
        };
        if polled.is_ready() {
            *step = Step::Over;
        }
        polled
    }
}

/// Proof that a message is stored: it survives a crash of this process, and of the machine
/// ([`Durability`](crate::Durability)), and is sent until it is processed.
#[derive(Debug)]
pub struct Receipt {
    id: MessageId,
    destinations: usize,
    progress: Option<Progress>,
    /// The broker that keeps it.
    broker: Option<BrokerKind>,
}

impl Receipt {
    /// Of a message that a broker has confirmed.
    pub(super) fn of_broker(id: MessageId, broker: BrokerKind) -> Self {
        Self { id, destinations: 1, progress: None, broker: Some(broker) }
    }

    /// The message's id.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// To how many it goes: 1 for what is sent; for what is published, how many durable
    /// subscriptions this outbox has met that match. 1 for what a broker keeps, which doesn't tell
    /// for whom.
    pub fn destinations(&self) -> usize {
        self.destinations
    }

    /// Waits until the handlers of all destinations have returned Ok, and their nodes have
    /// stored that.
    ///
    /// # Errors
    /// [`DeliveryError`] if it became a dead letter, or the node shuts down before.
    pub async fn processed(self) -> Result<(), DeliveryError> {
        if let Some(broker) = self.broker {
            let what = "word for the sender of what its receivers have processed";
            return Err(DeliveryError::Unsupported(Unsupported { broker, what }));
        }
        let Some(progress) = self.progress else { return Ok(()) };
        match poll_fn(|context| progress.poll_done(context)).await {
            Some(result) => result.map_err(DeliveryError::DeadLetter),
            None => Err(DeliveryError::ShutDown),
        }
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
    pub(super) shared: &'a Arc<Shared>,
    pub(super) messages: Vec<Guaranteed<'a>>,
}

opaque!(Transaction<'_>, |it| messages: it.messages);

impl<'a> Transaction<'a> {
    /// Adds a message.
    pub fn add(&mut self, message: Guaranteed<'a>) {
        self.messages.push(message);
    }

    /// Stores all messages, in one atomic record; the receipts are in their order. They are sent
    /// and processed each on its own.
    ///
    /// # Errors
    /// [`OutboxError`]; none of them is stored then, and none is sent.
    pub async fn commit(self) -> Result<Vec<Receipt>, OutboxError> {
        if let Some(broker) = self.shared.broker() {
            return Err(broker.lacks("transactions over several queues").into());
        }
        let messages = self.messages.into_iter().map(Guaranteed::into_message);
        let messages: NewMessages = messages.collect::<Result<_, _>>()?;
        let mut submission = submit(self.shared, messages)?;
        poll_fn(|context| submission.poll_stored(context)).await?;
        Ok(submission.receipts.into_vec())
    }
}

/// Messages that are stored together.
struct Submission {
    receipts: SmallVec<[Receipt; 1]>,
    /// How many of them are stored, the first ones.
    stored: usize,
}

impl Submission {
    fn poll_stored(&mut self, context: &mut Context<'_>) -> Poll<Result<(), OutboxError>> {
        while let Some(receipt) = self.receipts.get(self.stored) {
            match receipt.progress.as_ref().map(|it| it.poll_stored(context)) {
                Some(Poll::Pending) => return Poll::Pending,
                Some(Poll::Ready(None)) => return Poll::Ready(Err(OutboxError::ShutDown)),
                Some(Poll::Ready(Some(Err(error)))) => {
                    return Poll::Ready(Err(OutboxError::NotStored(error)));
                }
                Some(Poll::Ready(Some(Ok(())))) | None => self.stored += 1,
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Sets messages on their way to the disk, all of them or none.
fn submit(
    shared: &Arc<Shared>,
    messages: impl IntoIterator<Item = NewMessage>,
) -> Result<Submission, OutboxError> {
    if shared.is_stopping() {
        return Err(OutboxError::ShutDown);
    }
    let Some(store) = &shared.store else { return Err(OutboxError::NoOutbox) };
    let (mut receipts, mut wanted) = (SmallVec::<[Receipt; 1]>::new(), NewMessages::new());
    for message in messages {
        let (id, destinations) = (message.id(), message.targets.len());
        receipts.push(Receipt { id, destinations, progress: None, broker: None });
        // What nobody subscribes to is processed by all.
        if destinations > 0 {
            wanted.push(message);
        }
    }
    if wanted.is_empty() {
        return Ok(Submission { receipts, stored: 0 });
    }
    let submitted = shared.with_outbox(|outbox, now| {
        let choose = &mut |name: &_, order: Option<&str>, load: &dyn Fn(&_) -> _| {
            shared.choose_instance(name, order, load)
        };
        let submitted = outbox.submit(now, wanted, choose)?;
        let mut waiters = lock(&store.waiters);
        let sent = receipts.iter_mut().filter(|receipt| receipt.destinations > 0);
        for (submitted, receipt) in submitted.into_iter().zip(sent) {
            let (sender, progress) = Progress::new();
            match submitted {
                Submitted::New(number) => waiters.get_or_insert_default(number).push(sender),
                Submitted::Pending { number, stored } => {
                    if stored {
                        sender.notify_stored(Ok(()));
                    }
                    waiters.get_or_insert_default(number).push(sender);
                }
                Submitted::Processed => continue,
                Submitted::Dead(reason) => {
                    sender.notify_stored(Ok(()));
                    sender.notify_done(Err(reason));
                }
            }
            receipt.progress = Some(progress);
        }
        Ok(())
    });
    match submitted {
        Some(Ok(())) => Ok(Submission { receipts, stored: 0 }),
        Some(Err(Full { messages, bytes })) => Err(OutboxError::OutboxFull { messages, bytes }),
        None => Err(OutboxError::NoOutbox),
    }
}
