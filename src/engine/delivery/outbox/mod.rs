//! The outbox: messages that are stored until they are processed, pure.
//!
//! ```text
//!  Storing ─▶ Scheduled ─▶ Blocked ─▶ Waiting ─▶ Binding ─▶ Ready ─▶ InFlight ─▶ settled
//!              not_before   behind    for its    the choice   │  ▲      │ failed, refused
//!                           its key   node       is stored    │  └── Paused
//!                                                             └─▶ Dead: a dead letter
//! ```

mod admin;
mod answers;
mod cleaning;
mod dispatch;
mod ends;
mod intake;
mod key_queues;
mod moving;
mod once;
mod peers;
mod recover;
mod segments;
mod stored;
#[cfg(test)]
mod tests;

pub(crate) use intake::{Full, NewMessage, NewMessages};
pub(crate) use once::Submitted;
pub(crate) use recover::Contents;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::numbered::Numbered;
use super::record::OutboxRecord;
use super::{Binding, DeadLetterReason, RetryPolicy, Target};
use crate::address::{Pattern, ServiceName, Topic};
use crate::engine::random::Random;
use crate::engine::{HashMap, Time};
use crate::identity::NodeId;
use crate::journal::{Level, Need, NotStored, Persist, Position, Room};
use crate::message::MessageId;
use crate::wire::{Control, Delivery, Envelope, Stream};

/// How an outbox behaves.
#[derive(Debug, Clone)]
pub(crate) struct OutboxConfig {
    pub(crate) me: NodeId,
    /// Drawn each time that it is opened.
    pub(crate) epoch: u64,
    pub(crate) seed: u64,
    /// What it holds at the most.
    pub(crate) max_bytes: u64,
    pub(crate) max_messages: u64,
    /// What may be sent to a peer and not be answered.
    pub(crate) window_bytes: u64,
    pub(crate) retry: RetryPolicy,
    /// A dead letter holds up those with its key.
    pub(crate) hold_keys: bool,
    /// After how long without its node a message goes to another one.
    pub(crate) reassign_after: Option<Duration>,
    /// About how large a segment of the journal is, in bytes.
    pub(crate) segment_size: u64,
    /// After how long a peer that messages wait for is reported.
    pub(crate) gone_after: Duration,
}

/// Chooses the instance of a service: of those for which the last argument has a load.
pub(crate) type Choose<'a> =
    dyn FnMut(&ServiceName, Option<&str>, &dyn Fn(&NodeId) -> Option<u64>) -> Option<NodeId> + 'a;

/// A message and one of its destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DeliveryKey {
    pub(crate) number: u64,
    pub(crate) part: u32,
}

/// Where a message's bytes are.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Memory(Arc<Envelope>),
    /// In the journal's entry at that place, by its number.
    Journal(Position, u64),
}

/// What the owner of the outbox is to do, in this order.
#[derive(Debug)]
pub(crate) enum OutboxAction {
    /// Append an entry to the journal, and tell of its end by the number.
    Append {
        token: u64,
        entry: Vec<u8>,
        /// How many messages it stores.
        messages: u32,
        persist: Persist,
        need: Need,
    },
    /// The same for one that begins a segment, so that others can go.
    AppendFirst {
        token: u64,
        entry: Vec<u8>,
    },
    /// Read a message, and tell of it: it is to be stored once more.
    Read(u64, Position),
    /// The entries of these segments are no longer wanted: remove them, and tell which are gone.
    Remove(Vec<u64>),
    Transmit {
        to: NodeId,
        key: DeliveryKey,
        source: Source,
        delivery: Arc<Delivery>,
        /// In ms since 1970.
        expires_at: Option<u64>,
    },
    Send(NodeId, Control),
    /// The message is stored, or can't be.
    Stored(u64, Result<(), NotStored>),
    /// All destinations have processed it, or it is a dead letter for one.
    Done(u64, Result<(), DeadLetterReason>),
    Report(OutboxEvent),
}

/// What a user may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OutboxEvent {
    DeadLetter {
        number: u64,
        reason: DeadLetterReason,
    },
    /// A peer's inbox is not the one that it was: what it had processed it may process again.
    InboxLost(NodeId),
    /// It remembers so many peers already that it forgets this one when it goes.
    NotRemembered(NodeId),
    /// Messages have waited for a peer for long.
    PeerGone {
        peer: NodeId,
        messages: u64,
    },
}

/// After the disk refused something.
const DISK_RETRY: Duration = Duration::from_secs(1);

/// In one entry of the journal.
const MOST_FREED: usize = 4096;

#[derive(Debug)]
struct Entry {
    /// `None` while it is being stored.
    position: Option<Position>,
    cached: Option<Arc<Envelope>>,
    rare: Option<Box<Rare>>,
    parts: SmallVec<[OutboundDelivery; 1]>,
    size: u32,
}

/// What few messages have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rare {
    expires_at: Option<u64>,
    not_before: Option<u64>,
    order: Option<Arc<str>>,
}

#[derive(Debug)]
struct OutboundDelivery {
    target: u32,
    bound: Option<Bound>,
    state: State,
    failures: u32,
    attempts: u32,
    /// A handler may have had it.
    redelivered: bool,
}

impl OutboundDelivery {
    /// No handler can have had it.
    fn was_never_sent(&self) -> bool {
        self.attempts == 0 && !self.redelivered
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bound {
    stream: u32,
    seq: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Storing,
    Scheduled,
    /// Behind another with its key.
    Blocked,
    /// For somebody to be there who takes it.
    Waiting,
    /// The choice of its node is being stored.
    Binding,
    /// Taken out of what it was in; what is next is about to be decided.
    Idle,
    /// In its node's queue.
    Ready,
    InFlight,
    Paused {
        until: Time,
        /// It was not run; any change may be a reason to try again.
        refused: bool,
    },
    /// That it is a dead letter is being stored.
    DeadLettering(Box<DeadLetterReason>),
    Dead(Box<DeadLetterReason>),
    Settled,
}

/// The deliveries to a node that are numbered together.
#[derive(Debug)]
struct StreamState {
    node: NodeId,
    stream: Stream,
    next: u64,
    /// What is not settled, and what it was bound to before it went elsewhere.
    outstanding: Numbered<DeliveryKey>,
}

#[derive(Debug, Default)]
struct Peer {
    up: bool,
    /// Its inbox's epoch, while it is up and has one.
    inbox: Option<u64>,
    /// The epoch that it had when it was last up.
    known_inbox: Option<u64>,
    /// What it told first over its present link.
    told_inbox: Option<u64>,
    /// Its durable subscriptions that take messages now.
    active: Vec<ServiceName>,
    ready: VecDeque<DeliveryKey>,
    paused: BTreeSet<DeliveryKey>,
    in_flight: u64,
    in_flight_bytes: u64,
    /// What is bound to it and not settled.
    bound: u64,
    /// What waits for it to be there, and for no other.
    waiting: u64,
    down_since: Time,
    /// When its messages were last given to others since then.
    reassigned_at: Option<Time>,
    told_gone: bool,
}

/// What waits for the journal.
#[derive(Debug)]
enum Pending {
    /// Their numbers, and the ids of those that are stored once.
    Messages(SmallVec<[u64; 2]>, Vec<(MessageId, u64)>),
    Bound(Vec<DeliveryKey>),
    Dead(DeliveryKey),
    /// Something that is said of messages, and need not be synced.
    Noted(SmallVec<[u64; 1]>),
    /// A message that was in a segment that is to go.
    Moved(u64),
    /// What is settled, and the numbers that it had.
    Settled(Vec<(u64, u32)>, Vec<Bound>),
    /// What is remembered of peers.
    Peers,
    /// A segment is begun.
    Begun,
    /// What is wanted of segments that go then.
    Kept(Box<cleaning::Keeping>),
}

/// An entry of what is settled.
#[derive(Debug)]
struct Written {
    token: u64,
    settled: Vec<(u64, u32)>,
    numbers: Vec<Bound>,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    config: OutboxConfig,
    /// When it was told something last.
    now: Time,
    random: Random,
    entries: Numbered<Entry>,
    next_number: u64,
    bytes: u64,
    cached_bytes: u64,
    /// Destinations that are not settled: on their way, or dead letters.
    open: u64,
    dead: u64,
    targets: Vec<Target>,
    target_numbers: HashMap<Target, u32>,
    streams: Vec<StreamState>,
    stream_numbers: HashMap<(NodeId, Stream), u32>,
    peers: BTreeMap<NodeId, Peer>,
    /// Peers to which something may be sent now.
    dirty: BTreeSet<NodeId>,
    /// What waits for somebody to take it, by target.
    waiting: BTreeMap<u32, VecDeque<DeliveryKey>>,
    waiting_dirty: bool,
    /// What was refused and is bound to no node.
    paused: BTreeSet<DeliveryKey>,
    /// Those with one key, in order; only the first is on its way.
    key_queues: HashMap<(u32, Arc<str>), VecDeque<DeliveryKey>>,
    /// Other nodes that a message was bound to, and may have processed it.
    former: HashMap<DeliveryKey, Vec<Bound>>,
    /// What was taken from its node without ever having been sent, which is to be stored.
    freed: Vec<(u64, u32)>,
    /// What is remembered of peers is being stored.
    peers_pending: bool,
    /// It has changed since.
    peers_dirty: bool,
    /// There is somebody new in it.
    peers_met: bool,
    /// When it may be stored again, unless there is somebody new in it.
    peers_retry: Option<Time>,
    /// When the disk, which refused something that can wait, is tried again.
    disk_retry: Option<Time>,
    timers: BTreeSet<(Time, DeliveryKey)>,
    /// By the clock on the wall.
    wall: BTreeSet<(u64, DeliveryKey)>,
    subscriptions: BTreeMap<(NodeId, ServiceName), Pattern>,
    pending: Numbered<Pending>,
    next_token: u64,
    settled: Vec<(u64, u32)>,
    /// Their numbers, which their receivers have to remember until that is on the disk.
    unreleased: Vec<Bound>,
    /// The same, by the entries that say so, which have been written but perhaps not synced.
    written: VecDeque<Written>,
    /// Messages that are stored once.
    once: once::Once,
    segments: segments::Segments,
    /// Where what is remembered of peers was stored last.
    peers_in: Option<u64>,
    /// How much room the journal's disk has.
    room: Room,
    /// Since when it is full and nothing was removed.
    full_since: Time,
    cleaning: cleaning::Cleaning,
    /// The disk is full, and no segment can go before more is processed: what that takes may have
    /// the last room.
    is_at_an_end: bool,
    /// There may be a segment that can go.
    clean_due: bool,
    /// When that is looked for again.
    clean_at: Option<Time>,
    /// How many messages are being moved out of a segment.
    moving: u64,
    /// No segment is cleaned before then, since something could not be read or stored.
    clean_retry: Option<Time>,
    /// How often in a row messages could not be read, by their numbers.
    unreadable: HashMap<u64, u32>,
    actions: VecDeque<OutboxAction>,
}

impl Outbox {
    pub(crate) fn new(config: OutboxConfig) -> Self {
        let me = Peer { up: true, inbox: Some(0), known_inbox: Some(0), ..Peer::default() };
        Self {
            now: Time::default(),
            random: Random::new(config.seed),
            entries: Numbered::default(),
            next_number: 1,
            bytes: 0,
            cached_bytes: 0,
            open: 0,
            dead: 0,
            targets: Vec::new(),
            target_numbers: HashMap::default(),
            streams: Vec::new(),
            stream_numbers: HashMap::default(),
            peers: BTreeMap::from([(config.me, me)]),
            dirty: BTreeSet::new(),
            waiting: BTreeMap::new(),
            waiting_dirty: false,
            paused: BTreeSet::new(),
            key_queues: HashMap::default(),
            former: HashMap::default(),
            freed: Vec::new(),
            peers_pending: false,
            peers_dirty: false,
            peers_met: false,
            peers_retry: None,
            disk_retry: None,
            timers: BTreeSet::new(),
            wall: BTreeSet::new(),
            subscriptions: BTreeMap::new(),
            pending: Numbered::default(),
            next_token: 1,
            settled: Vec::new(),
            unreleased: Vec::new(),
            written: VecDeque::new(),
            once: once::Once::default(),
            segments: segments::Segments::default(),
            peers_in: None,
            room: Room { level: Level::Ample, bytes: u64::MAX, last: 0 },
            full_since: Time::default(),
            cleaning: cleaning::Cleaning::default(),
            is_at_an_end: false,
            clean_due: false,
            clean_at: None,
            moving: 0,
            clean_retry: None,
            unreadable: HashMap::default(),
            actions: VecDeque::new(),
            config,
        }
    }

    /// The durable subscriptions that a topic's messages go to.
    pub(crate) fn subscribers(&self, topic: &Topic) -> SmallVec<[Target; 1]> {
        let all = self.subscriptions.iter().filter(|(_, pattern)| pattern.matches(topic));
        let targets = all.map(|((node, name), _)| Target::Subscription(*node, name.clone()));
        targets.collect()
    }

    /// Messages that are on their way, once for each destination.
    pub(crate) fn pending(&self) -> u64 {
        self.open
    }

    pub(crate) fn dead_letters(&self) -> u64 {
        self.dead
    }

    // Parts and what they are bound to.

    fn part(&self, key: DeliveryKey) -> Option<&OutboundDelivery> {
        self.entries.get(key.number)?.parts.get(key.part as usize)
    }

    fn part_mut(&mut self, key: DeliveryKey) -> Option<&mut OutboundDelivery> {
        self.entries.get_mut(key.number)?.parts.get_mut(key.part as usize)
    }

    fn set_state(&mut self, key: DeliveryKey, state: State) {
        if let Some(part) = self.part_mut(key) {
            part.state = state;
        }
    }

    fn order(&self, number: u64) -> Option<&Arc<str>> {
        self.entries.get(number)?.rare.as_ref()?.order.as_ref()
    }

    fn target_number(&mut self, target: &Target) -> u32 {
        if let Some(number) = self.target_numbers.get(target) {
            return *number;
        }
        let number = self.targets.len() as u32;
        self.targets.push(target.clone());
        self.target_numbers.insert(target.clone(), number);
        number
    }

    fn stream_number(&mut self, node: NodeId, stream: Stream) -> u32 {
        if let Some(number) = self.stream_numbers.get(&(node, stream.clone())) {
            return *number;
        }
        let number = self.streams.len() as u32;
        let outstanding = Numbered::default();
        self.streams.push(StreamState { node, stream: stream.clone(), next: 1, outstanding });
        self.stream_numbers.insert((node, stream), number);
        number
    }

    fn binding(&self, bound: Bound) -> Binding {
        let StreamState { node, stream, .. } = &self.streams[bound.stream as usize];
        Binding { node: *node, stream: stream.clone(), seq: bound.seq }
    }

    /// Gives a message the next number of its node; the one that it had, if it was there before:
    /// by that the node knows whether it has processed it.
    fn bind(&mut self, key: DeliveryKey, node: NodeId, target: &Target) -> Bound {
        self.peers.entry(node).or_default().bound += 1;
        if let Some(former) = self.take_former(key, node) {
            return former;
        }
        let subscription = match target {
            Target::Subscription(_, name) => Some(name.clone()),
            Target::Service(_) | Target::Node(_) => None,
        };
        let stream = Stream { epoch: self.config.epoch, subscription };
        let number = self.stream_number(node, stream);
        let stream = &mut self.streams[number as usize];
        let bound = Bound { stream: number, seq: stream.next };
        stream.next += 1;
        stream.outstanding.insert(bound.seq, key);
        bound
    }

    /// The number that a message had at a node before, which it has no longer.
    fn take_former(&mut self, key: DeliveryKey, node: NodeId) -> Option<Bound> {
        let streams = &self.streams;
        let former = self.former.get_mut(&key)?;
        let at = former.iter().position(|it| streams[it.stream as usize].node == node)?;
        Some(former.swap_remove(at))
    }

    /// All numbers of a message, of its node and of others that it was bound to before; it has
    /// none any more.
    fn take_numbers(&mut self, key: DeliveryKey) -> impl Iterator<Item = Bound> + use<> {
        let bound = self.part_mut(key).and_then(|part| part.bound.take());
        bound.into_iter().for_each(|bound| self.leave_node(bound));
        bound.into_iter().chain(self.former.remove(&key).into_iter().flatten())
    }

    /// Takes a message from its node: its number there is settled.
    fn unbind(&mut self, key: DeliveryKey) {
        if let Some(bound) = self.part_mut(key).and_then(|part| part.bound.take()) {
            self.leave_node(bound);
            self.release_number(bound);
        }
    }

    /// Takes a message from its node, which may have processed it and still say so.
    fn leave(&mut self, key: DeliveryKey) {
        let Some(part) = self.part_mut(key) else { return };
        if let Some(bound) = part.bound.take() {
            part.redelivered = true;
            self.leave_node(bound);
            self.former.entry(key).or_default().push(bound);
        }
    }

    /// Takes one that was never sent from its node, which the next life is told.
    fn free(&mut self, key: DeliveryKey) {
        if self.node_of(key).is_some() {
            self.unbind(key);
            self.freed.push((key.number, key.part));
        }
    }

    /// Stores, without a sync, what is free. It comes before what it is bound to next.
    fn store_freed(&mut self) {
        for freed in std::mem::take(&mut self.freed).chunks(MOST_FREED) {
            let messages = freed.iter().map(|(number, _)| *number);
            self.note(&OutboxRecord::Freed(freed.to_vec()), messages);
        }
    }

    fn release_number(&mut self, bound: Bound) {
        self.streams[bound.stream as usize].outstanding.remove(bound.seq);
    }

    fn leave_node(&mut self, bound: Bound) {
        if let Some(peer) = self.peers.get_mut(&self.streams[bound.stream as usize].node) {
            peer.bound -= 1;
        }
    }

    fn node_of(&self, key: DeliveryKey) -> Option<NodeId> {
        let bound = self.part(key)?.bound?;
        Some(self.streams[bound.stream as usize].node)
    }

    /// What is to be done next. It looks for what can go when nothing else is left to be done,
    /// so once for many actions.
    pub(crate) fn poll_action(&mut self, choose: &mut Choose<'_>) -> Option<OutboxAction> {
        if self.actions.is_empty() {
            self.pump(choose);
        }
        self.actions.pop_front()
    }

    /// When it has to look at the clock, and at the one on the wall (ms since 1970).
    pub(crate) fn poll_timeout(&self) -> (Option<Time>, Option<u64>) {
        let timer = self.timers.first().map(|(at, _)| *at);
        let peers = self.peers_retry.filter(|_| self.peers_dirty && !self.peers_pending);
        let timers = timer.into_iter().chain(self.peer_timeout()).chain(peers);
        let timers = timers.chain(self.disk_retry).chain(self.clean_retry).chain(self.clean_at);
        (timers.min(), self.wall.first().map(|(at, _)| *at))
    }
}
