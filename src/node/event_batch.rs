//! Events of one topic that came one after the other: matched, counted and queued together, and
//! made into messages when somebody takes them.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::peer_link::Credit;
use crate::address::{Destination, Topic};
use crate::identity::NodeId;
use crate::message::{Header, Kind, Message, MessageId};
use crate::wire::{BASE_COST, Totals};

/// The most messages in a run. They give their credit back together.
const MAX_MESSAGES: u64 = 128;
/// The most that they cost, unless it is one alone.
const MAX_COST: u64 = 64 * 1024;

#[derive(Debug, Clone)]
enum Entry {
    /// With no more than an id and a body, which is the next part of the run's bodies.
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

/// Messages of one sender and topic, and the credit that they hold until the last is taken.
#[derive(Clone)]
pub(crate) struct EventBatch {
    from: NodeId,
    topic: Topic,
    /// The bodies of the plain ones, one behind the other.
    bodies: Bytes,
    entries: VecDeque<Entry>,
    totals: Totals,
    pub(super) credit: Option<Arc<Credit>>,
}

impl EventBatch {
    /// A run of one.
    pub(crate) fn single(topic: Topic, message: Message) -> Self {
        let (from, totals) = (message.from, Totals::one(message.cost()));
        let (entry, bodies) = match (message.header.is_plain(Kind::Event), message.body.len()) {
            (true, len @ ..=0xffff) => {
                (Entry::Plain { id: message.header.id, len: len as u32 }, message.body)
            }
            _ => (Entry::Whole(Box::new(message)), Bytes::new()),
        };
        Self { from, topic, bodies, entries: [entry].into(), totals, credit: None }
    }

    pub(crate) fn topic(&self) -> &Topic {
        &self.topic
    }

    /// How many there are, and what they cost.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The next message. The credit goes back with the last.
    pub(crate) fn take(&mut self) -> Option<Message> {
        let entry = self.entries.pop_front()?;
        self.totals.messages -= 1;
        self.totals.bytes -= entry.cost();
        if self.entries.is_empty() {
            self.credit = None;
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

    /// The same messages one by one, without credit.
    pub(crate) fn split(mut self) -> impl Iterator<Item = Self> {
        let topic = self.topic.clone();
        std::iter::from_fn(move || Some(Self::single(topic.clone(), self.take()?)))
    }
}

/// A run that grows.
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

    /// Whether a message with a body of `len` bytes belongs to the next run.
    pub(crate) fn is_full(&self, len: usize) -> bool {
        self.totals.messages >= MAX_MESSAGES
            || self.totals.bytes + BASE_COST + len as u64 > MAX_COST && !self.entries.is_empty()
    }

    /// Adds a plain message. Its body is copied, so that it doesn't pin the buffer that it was
    /// read into.
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

    /// What has gathered, if anything; an empty run of the same topic stays.
    pub(crate) fn finish(&mut self) -> Option<EventBatch> {
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
            credit: None,
        })
    }
}
