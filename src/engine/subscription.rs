//! Events on their way to local subscriptions.
//!
//! ```text
//!  events of one topic ─▶ EventBatch ─▶ deliver() ─▶ SubscriptionQueue, one a subscription
//!                                          └──────▶ Lost: by the queue's overflow policy
//! ```
//!
//! Consecutive events of one topic are matched, counted and queued together, and become messages
//! when the subscriber takes them.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::address::{Destination, Topic};
use crate::identity::NodeId;
use crate::message::BASE_COST;
use crate::message::{Header, Kind, Message, MessageId};
use crate::report::DropReason;
use crate::wire::Totals;

/// The most messages in a batch. Their hold is given back with the last.
const MAX_MESSAGES: u64 = 128;
/// The most cost of a batch, in bytes, unless it is a single message.
const MAX_COST: u64 = 64 * 1024;

#[derive(Debug, Clone)]
enum Entry {
    /// A message with only an id and a body, which is the next part of the batch's bodies.
    Plain {
        id: MessageId,
        len: u32,
    },
    Whole(Box<Message>),
}

impl Entry {
    fn cost(&self) -> u64 {
        match self {
            Self::Plain { len, .. } => BASE_COST + u64::from(*len),
            Self::Whole(message) => message.cost(),
        }
    }
}

/// Messages of one sender and topic, and their hold on their path, until the last is taken.
pub(crate) struct EventBatch<H> {
    from: NodeId,
    topic: Topic,
    /// The bodies of the plain messages, in a row.
    bodies: Bytes,
    entries: VecDeque<Entry>,
    totals: Totals,
    hold: Option<Arc<H>>,
}

impl<H> Clone for EventBatch<H> {
    fn clone(&self) -> Self {
        let Self { from, topic, bodies, entries, totals, hold } = self;
        Self {
            from: *from,
            topic: topic.clone(),
            bodies: bodies.clone(),
            entries: entries.clone(),
            totals: *totals,
            hold: hold.clone(),
        }
    }
}

impl<H> EventBatch<H> {
    /// Creates a batch of one message.
    pub(crate) fn single(topic: Topic, message: Message) -> Self {
        let (from, totals) = (message.from, Totals::one(message.cost()));
        let (entry, bodies) = match (message.header.is_plain(Kind::Event), message.body.len()) {
            (true, len @ ..=0xffff) => {
                (Entry::Plain { id: message.header.id, len: len as u32 }, message.body)
            }
            _ => (Entry::Whole(Box::new(message)), Bytes::new()),
        };
        Self { from, topic, bodies, entries: [entry].into(), totals, hold: None }
    }

    pub(crate) fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Returns the number of messages and their cost.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes the next message. The hold is given back with the last.
    pub(crate) fn take(&mut self) -> Option<Message> {
        let entry = self.entries.pop_front()?;
        self.totals.messages -= 1;
        self.totals.bytes -= entry.cost();
        if self.entries.is_empty() {
            self.hold = None;
        }
        Some(match entry {
            Entry::Plain { id, len } => {
                let body = self.bodies.split_to(len as usize);
                let destination = Destination::Topic(self.topic.clone());
                Message::new(self.from, Header::new(id, Kind::Event, destination), body)
            }
            Entry::Whole(message) => *message,
        })
    }

    /// Drops the last message.
    pub(crate) fn drop_last(&mut self) {
        let Some(entry) = self.entries.pop_back() else { return };
        if let Entry::Plain { len, .. } = entry {
            self.bodies.truncate(self.bodies.len() - len as usize);
        }
        self.totals.messages -= 1;
        self.totals.bytes -= entry.cost();
    }

    /// Splits the batch into batches of one message, without a hold.
    pub(crate) fn split(mut self) -> impl Iterator<Item = Self> {
        let topic = self.topic.clone();
        std::iter::from_fn(move || Some(Self::single(topic.clone(), self.take()?)))
    }
}

/// A batch that grows.
pub(crate) struct EventBatchBuilder {
    from: NodeId,
    topic: Topic,
    bodies: Vec<u8>,
    entries: Vec<Entry>,
    totals: Totals,
}

impl EventBatchBuilder {
    pub(crate) fn new(from: NodeId, topic: Topic) -> Self {
        let (bodies, entries) = (Vec::new(), Vec::new());
        Self { from, topic, bodies, entries, totals: Totals::default() }
    }

    pub(crate) fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Returns true if a message with a body of `len` bytes belongs in the next batch.
    pub(crate) fn is_full(&self, len: usize) -> bool {
        self.totals.messages >= MAX_MESSAGES
            || self.totals.bytes + BASE_COST + len as u64 > MAX_COST && !self.entries.is_empty()
    }

    /// Adds a plain message. Its body is copied, so that it does not pin its read buffer.
    pub(crate) fn add_plain(&mut self, id: MessageId, body: &[u8]) {
        self.bodies.extend_from_slice(body);
        self.totals += Totals::one(BASE_COST + body.len() as u64);
        self.entries.push(Entry::Plain { id, len: body.len() as u32 });
    }

    pub(crate) fn add(&mut self, mut message: Message) {
        message.unpin();
        self.totals += Totals::one(message.cost());
        self.entries.push(Entry::Whole(Box::new(message)));
    }

    /// Returns the gathered messages, if there are any; an empty batch of the same topic stays.
    pub(crate) fn finish<H>(&mut self) -> Option<EventBatch<H>> {
        if self.entries.is_empty() {
            return None;
        }
        let bodies = std::mem::take(&mut self.bodies);
        let entries = std::mem::take(&mut self.entries);
        Some(EventBatch {
            from: self.from,
            topic: self.topic.clone(),
            bodies: bodies.into(),
            entries: entries.into(),
            totals: std::mem::take(&mut self.totals),
            hold: None,
        })
    }
}

/// The loss of a subscription whose messages are not taken in time. The sender counts each loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overflow {
    /// Drops the newest: messages that arrive while the queue is full. Counted as
    /// [`SlowSubscriber`](DropReason::SlowSubscriber).
    #[default]
    DropNewest,
    /// Drops the oldest: the messages queued longest make room. Counted as
    /// [`SlowSubscriber`](DropReason::SlowSubscriber).
    DropOldest,
    /// Keeps the latest of each topic: a message replaces the unread one before it, whether the
    /// queue is full or not. Counted as [`Superseded`](DropReason::Superseded). Topics beyond the
    /// queue's capacity lose their newest.
    KeepLatest,
    /// Drops nothing: unread messages hold the credit of their link, until the senders wait or
    /// drop.
    ///
    /// A subscription that never reads then stops **all** events from its peers to this node,
    /// not only its own. The queue is bounded by [`Config::window`] for each peer. Events that
    /// this node publishes to itself are bounded by [`Config::subscription_queue`], and the
    /// newest are dropped.
    ///
    /// [`Config::window`]: crate::Config::window
    /// [`Config::subscription_queue`]: crate::Config::subscription_queue
    HoldBack,
}

/// Messages that a queue did not keep, and the hold of their batch.
pub(crate) struct Lost<H> {
    pub(crate) hold: Option<Arc<H>>,
    pub(crate) reason: DropReason,
    pub(crate) count: u64,
    /// The messages had been queued before.
    pub(crate) earlier: bool,
}

/// The queue of one subscription, bounded in bytes.
pub(crate) struct SubscriptionQueue<H> {
    overflow: Overflow,
    limit: u64,
    batches: VecDeque<EventBatch<H>>,
    bytes: u64,
    closed: bool,
}

impl<H> SubscriptionQueue<H> {
    pub(crate) fn new(overflow: Overflow, limit: u64) -> Self {
        Self { overflow, limit, batches: VecDeque::new(), bytes: 0, closed: false }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Closes the queue to new messages; the queued ones stay.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Queues messages. Returns the messages that are lost by that.
    pub(crate) fn push(&mut self, batch: EventBatch<H>) -> Vec<Lost<H>> {
        let mut lost = Vec::new();
        if self.closed {
            let (count, reason) = (batch.totals.messages, DropReason::NoSubscriber);
            lost.push(Lost { hold: batch.hold, reason, count, earlier: false });
            return lost;
        }
        match self.overflow {
            Overflow::HoldBack if batch.hold.is_some() => self.append(batch),
            Overflow::HoldBack | Overflow::DropNewest => lost.extend(self.append_within(batch)),
            Overflow::DropOldest => {
                while self.bytes + batch.totals.bytes > self.limit
                    && let Some(oldest) = self.drop_oldest()
                {
                    lost.push(oldest);
                }
                lost.extend(self.append_within(batch));
            }
            Overflow::KeepLatest => {
                lost.extend(self.supersede(&batch));
                lost.extend(self.append_within(batch));
            }
        }
        lost
    }

    pub(crate) fn pop(&mut self) -> Option<EventBatch<H>> {
        let batch = self.batches.pop_front()?;
        self.bytes -= batch.totals.bytes;
        Some(batch)
    }

    fn append(&mut self, batch: EventBatch<H>) {
        self.bytes += batch.totals.bytes;
        self.batches.push_back(batch);
    }

    /// Appends the messages for which there is room. An empty queue takes any one message.
    fn append_within(&mut self, mut batch: EventBatch<H>) -> Option<Lost<H>> {
        let fits = |batch: &EventBatch<H>| {
            let totals = batch.totals;
            self.bytes + totals.bytes <= self.limit
                || self.batches.is_empty() && totals.messages == 1
        };
        let mut count = 0;
        while !batch.is_empty() && !fits(&batch) {
            batch.drop_last();
            count += 1;
        }
        let hold = batch.hold.clone();
        if !batch.is_empty() {
            self.append(batch);
        }
        let reason = DropReason::SlowSubscriber;
        (count > 0).then_some(Lost { hold, reason, count, earlier: false })
    }

    fn drop_oldest(&mut self) -> Option<Lost<H>> {
        let batch = self.batches.front_mut()?;
        let hold = batch.hold.clone();
        self.bytes -= batch.take()?.cost();
        if batch.is_empty() {
            self.batches.pop_front();
        }
        Some(Lost { hold, reason: DropReason::SlowSubscriber, count: 1, earlier: true })
    }

    /// Removes the unread message on the same topic.
    fn supersede(&mut self, by: &EventBatch<H>) -> Option<Lost<H>> {
        let place = self.batches.iter().position(|batch| batch.topic == by.topic)?;
        let old = self.batches.remove(place)?;
        self.bytes -= old.totals.bytes;
        let (count, hold) = (old.totals.messages, old.hold);
        Some(Lost { hold, reason: DropReason::Superseded, count, earlier: true })
    }
}

/// A subscription that receives events.
pub(crate) trait EventSink<H> {
    fn overflow(&self) -> Overflow;
    fn push(&self, batch: EventBatch<H>) -> Vec<Lost<H>>;
}

/// The outcome of a delivery at one subscription, or at none.
pub(crate) enum Delivered<'a, H> {
    /// The number of messages that arrived, and those that were lost.
    Pushed(u64, Vec<Lost<H>>),
    /// No subscription matches: all messages of a batch are dropped.
    NoSubscriber(Option<&'a H>, u64),
}

/// Delivers a batch to the matching subscriptions. `hold` makes the hold of messages with that
/// cost, and `report` receives each outcome. Returns the number of messages of this batch that a
/// subscription lost.
pub(crate) fn deliver<H, S: EventSink<H>>(
    mut batch: EventBatch<H>,
    matching: &[S],
    hold: &dyn Fn(Totals) -> Option<H>,
    report: &mut dyn FnMut(Delivered<'_, H>),
) -> u64 {
    let held = batch.totals;
    let singly = |sink: &S| sink.overflow() == Overflow::KeepLatest;
    if held.messages > 1 && matching.iter().any(singly) {
        return batch.split().map(|single| deliver(single, matching, hold, report)).sum();
    }
    let hold = hold(held);
    let Some((last, others)) = matching.split_last() else {
        report(Delivered::NoSubscriber(hold.as_ref(), held.messages));
        return held.messages;
    };
    batch.hold = hold.map(Arc::new);
    let mut lost = 0;
    let mut push = |sink: &S, batch| {
        let gone = sink.push(batch);
        lost += gone.iter().filter(|it| !it.earlier).map(|it| it.count).sum::<u64>();
        report(Delivered::Pushed(held.messages, gone));
    };
    for sink in others {
        push(sink, batch.clone());
    }
    push(last, batch);
    lost
}
