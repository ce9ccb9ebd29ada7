//! The outbox: messages stored until they are processed. Pure.
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
#[cfg(test)]
mod describe;
mod dispatch;
mod ends;
mod history;
mod intake;
mod key_queues;
mod moving;
mod once;
mod peers;
mod recover;
mod segments;
mod stored;
mod subscriptions;
#[cfg(test)]
mod tests;

pub(crate) use intake::{Full, NewMessage, NewMessages};
pub(crate) use once::Submitted;
pub(crate) use recover::Contents;

pub(crate) use subscriptions::MAX_SUBSCRIPTIONS;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::numbered::Numbered;
use super::record::OutboxRecord;
use super::{Binding, DeadLetterReason, Lapse, RetryPolicy, Target};
use crate::address::ServiceName;
use crate::engine::random::Random;
use crate::engine::{HashMap, Time};
use crate::identity::NodeId;
use crate::journal::{Level, Need, NotStored, Persist, Position, Room};
use crate::message::MessageId;
use crate::wire::{Control, Delivery, Envelope, Stream};

/// The configuration of an outbox.
#[derive(Debug, Clone)]
pub(crate) struct OutboxConfig {
    pub(crate) me: NodeId,
    /// A number drawn each time that the outbox is opened.
    pub(crate) epoch: u64,
    pub(crate) seed: u64,
    /// The limits of the outbox.
    pub(crate) max_bytes: u64,
    pub(crate) max_messages: u64,
    /// The most bytes in flight to a peer.
    pub(crate) window_bytes: u64,
    pub(crate) retry: RetryPolicy,
    /// A dead letter blocks the messages with its ordering key.
    pub(crate) hold_keys: bool,
    /// The absence of a node after which its messages are reassigned.
    pub(crate) reassign_after: Option<Duration>,
    /// The approximate size of a journal segment, in bytes.
    pub(crate) segment_size: u64,
    /// The absence of a peer with pending messages after which it is reported.
    pub(crate) gone_after: Duration,
    /// The absence of a peer after which its durable subscriptions lapse.
    pub(crate) lapse_after: Option<Duration>,
}

/// Chooses an instance of a service, among those for which the last argument returns a load.
pub(crate) type Choose<'a> =
    dyn FnMut(&ServiceName, Option<&str>, &dyn Fn(&NodeId) -> Option<u64>) -> Option<NodeId> + 'a;

/// A message and one of its destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DeliveryKey {
    pub(crate) number: u64,
    pub(crate) part: u32,
}

/// The location of a message's bytes.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Memory(Arc<Envelope>),
    /// The journal entry at that position, and the message's number in it.
    Journal(Position, u64),
}

/// An action for the owner of the outbox. Actions are carried out in order.
#[derive(Debug)]
pub(crate) enum OutboxAction {
    /// Append an entry to the journal, and report its outcome with the token.
    Append {
        token: u64,
        entry: Vec<u8>,
        /// The number of messages in the entry.
        messages: u32,
        persist: Persist,
        need: Need,
    },
    /// Append an entry at the start of a new segment, so that others can be removed.
    AppendFirst {
        token: u64,
        entry: Vec<u8>,
    },
    /// Read a message and report its bytes: it is to be rewritten.
    Read(u64, Position),
    /// Remove these segments, whose entries are no longer needed, and report the removed ones.
    Remove(Vec<u64>),
    Transmit {
        to: NodeId,
        key: DeliveryKey,
        source: Source,
        delivery: Arc<Delivery>,
        /// In ms since the Unix epoch.
        expires_at: Option<u64>,
    },
    Send(NodeId, Control),
    /// The message is stored, or can't be stored.
    Stored(u64, Result<(), NotStored>),
    /// All destinations processed the message, or it is a dead letter for one of them.
    Done(u64, Result<(), DeadLetterReason>),
    Report(OutboxEvent),
}

/// An event for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OutboxEvent {
    DeadLetter {
        number: u64,
        reason: DeadLetterReason,
    },
    /// A peer's inbox was replaced: it may process messages again.
    InboxLost(NodeId),
    /// A peer knows a later state of this outbox, which is an older copy.
    IsOlder(NodeId),
    /// A durable subscription was ended here, with that number of messages.
    Lapsed {
        node: NodeId,
        name: ServiceName,
        reason: Lapse,
        messages: u64,
    },
    /// The peer is forgotten when it disconnects, as too many peers are remembered already.
    NotRemembered(NodeId),
    /// The peer has more durable subscriptions than are remembered for one.
    SubscriptionsNotRemembered(NodeId),
    /// Messages have been queued for an absent peer for long.
    PeerGone {
        peer: NodeId,
        messages: u64,
    },
}

/// The retry delay after a refusal by the disk.
const DISK_RETRY: Duration = Duration::from_secs(1);

/// The most unbound messages in one journal entry.
const MOST_FREED: usize = 4096;

#[derive(Debug)]
struct Entry {
    /// `None` until the message is stored.
    position: Option<Position>,
    cached: Option<Arc<Envelope>>,
    rare: Option<Box<Rare>>,
    parts: SmallVec<[OutboundDelivery; 1]>,
    size: u32,
}

/// The fields that few messages have.
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
    /// A handler may have received the message.
    redelivered: bool,
}

impl OutboundDelivery {
    /// Returns true if no handler can have received the message.
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
    /// Behind another message with its ordering key.
    Blocked,
    /// Waiting for a node that takes it.
    Waiting,
    /// The binding is not yet durable.
    Binding,
    /// Between two states: the next one is about to be set.
    Idle,
    /// In the queue of its node.
    Ready,
    InFlight,
    Paused {
        until: Time,
        /// The peer refused it without running it: any change of routes may trigger a retry.
        refused: bool,
    },
    /// The dead letter record is not yet durable.
    DeadLettering(Box<DeadLetterReason>),
    Dead(Box<DeadLetterReason>),
    Settled,
}

/// A stream of deliveries to a node, numbered in sequence.
#[derive(Debug)]
struct StreamState {
    node: NodeId,
    stream: Stream,
    next: u64,
    /// The deliveries not settled, including those whose message was since bound to another node.
    outstanding: Numbered<DeliveryKey>,
}

#[derive(Debug, Default)]
struct Peer {
    up: bool,
    /// The epoch of its inbox, while the peer is up and has an inbox.
    inbox: Option<u64>,
    /// The last known epoch of its inbox.
    known_inbox: Option<u64>,
    /// The first epoch that it announced over the current link.
    told_inbox: Option<u64>,
    /// The end of the journal that it was told over the current link.
    told: Option<(u64, u64)>,
    /// The node's durable subscriptions that currently accept messages.
    active: Vec<ServiceName>,
    ready: VecDeque<DeliveryKey>,
    paused: BTreeSet<DeliveryKey>,
    in_flight: u64,
    in_flight_bytes: u64,
    /// The number of unsettled deliveries bound to it.
    bound: u64,
    /// The number of messages that wait for this peer alone.
    waiting: u64,
    down_since: Time,
    /// The time of the last reassignment of its messages since `down_since`.
    reassigned_at: Option<Time>,
    told_gone: bool,
    /// The event that further durable subscriptions of the peer are not remembered was reported.
    told_full: bool,
    /// The time at which its absence is looked at next.
    absence: Option<Time>,
    /// The last time that it was linked, in ms since the Unix epoch.
    seen_at: u64,
}

/// A journal append in progress.
#[derive(Debug)]
enum Pending {
    /// New messages: their numbers, and the ids of those stored once.
    Messages(SmallVec<[u64; 2]>, Vec<(MessageId, u64)>),
    Bound(Vec<DeliveryKey>),
    Dead(DeliveryKey),
    /// A record about messages that needs no sync.
    Noted(SmallVec<[u64; 1]>),
    /// A message moved out of a segment to be removed.
    Moved(u64),
    /// Settled destinations, and their delivery numbers.
    Settled(Vec<(u64, u32)>, Vec<Bound>),
    /// The remembered state of peers.
    Peers(Vec<NodeId>),
    /// The lives and doubts, and the peers that wait for it.
    History(Vec<NodeId>),
    /// The first entry of a new segment.
    Begun,
    /// The records to keep of segments to be removed.
    Kept(Box<cleaning::Keeping>),
}

/// A written entry of settled destinations.
#[derive(Debug)]
struct Written {
    token: u64,
    settled: Vec<(u64, u32)>,
    numbers: Vec<Bound>,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    config: OutboxConfig,
    /// The time of the last input.
    now: Time,
    random: Random,
    entries: Numbered<Entry>,
    next_number: u64,
    bytes: u64,
    cached_bytes: u64,
    /// The number of destinations not settled: pending or dead letters.
    open: u64,
    dead: u64,
    targets: Vec<Target>,
    target_numbers: HashMap<Target, u32>,
    streams: Vec<StreamState>,
    stream_numbers: HashMap<(NodeId, Stream), u32>,
    /// The streams of each node.
    streams_of: HashMap<NodeId, Vec<u32>>,
    peers: BTreeMap<NodeId, Peer>,
    /// Peers that may have something to send.
    dirty: BTreeSet<NodeId>,
    /// Messages that wait for a node to take them, by target.
    waiting: BTreeMap<u32, VecDeque<DeliveryKey>>,
    waiting_dirty: bool,
    /// Paused messages that are bound to no node.
    paused: BTreeSet<DeliveryKey>,
    /// The messages of each ordering key, in order; only the first is sent.
    key_queues: HashMap<(u32, Arc<str>), VecDeque<DeliveryKey>>,
    /// Earlier bindings of a message to other nodes, which may have processed it.
    former: HashMap<DeliveryKey, Vec<Bound>>,
    /// Messages unbound without having been sent; the record of that is still to be written.
    freed: Vec<(u64, u32)>,
    /// Messages that were rewritten while their bindings were being stored.
    bindings_copied: BTreeSet<DeliveryKey>,
    /// The state of peers is being stored.
    peers_pending: bool,
    /// The peers whose state changed since it was last stored.
    peers_dirty: BTreeSet<NodeId>,
    /// The changes include a new peer or subscription.
    peers_met: bool,
    /// The number of peers whose inbox is known.
    peers_known: usize,
    /// The time until which there is no room for more.
    peers_full_until: Time,
    /// The absent peers with messages, by the time at which they are looked at next.
    absences: BTreeSet<(Time, NodeId)>,
    /// The time of the next search for subscriptions that lapse.
    lapse_at: Option<Time>,
    /// The earliest time to store it again, unless it includes a new peer or subscription.
    peers_retry: Option<Time>,
    /// The time at which to retry an append that the disk refused and that can wait.
    disk_retry: Option<Time>,
    timers: BTreeSet<(Time, DeliveryKey)>,
    /// Timers by the wall clock.
    wall: BTreeSet<(u64, DeliveryKey)>,
    subscriptions: subscriptions::Subscriptions,
    /// The unsettled messages for each durable subscription, by target: their part, by number.
    kept_for: HashMap<u32, Numbered<u32>>,
    /// Ended subscriptions, by target, and the number below which their messages are dropped.
    dropping: VecDeque<(u32, u64)>,
    drop_at: Option<Time>,
    pending: Numbered<Pending>,
    next_token: u64,
    settled: Vec<(u64, u32)>,
    /// The delivery numbers of `settled`, which receivers must remember until it is durable.
    unreleased: Vec<Bound>,
    /// Settled entries that are written but perhaps not synced, with their delivery numbers.
    written: VecDeque<Written>,
    /// The ids of messages stored once.
    once: once::Once,
    segments: segments::Segments,
    history: history::History,
    /// The segments with records of the state of peers.
    peers_in: BTreeSet<u64>,
    /// The free space of the journal's disk.
    room: Room,
    /// The time since which the disk is full and nothing was removed.
    full_since: Time,
    /// The same, but for moments in which it was not.
    short_since: Time,
    /// The time at which it was last no longer full.
    full_until: Option<Time>,
    cleaning: cleaning::Cleaning,
    /// The disk is full, and no segment can be removed until more messages are settled: records of
    /// that may use the last space.
    is_at_an_end: bool,
    /// A segment may be removable.
    clean_due: bool,
    /// The time of the next search for a removable segment.
    clean_at: Option<Time>,
    /// The number of messages being moved out of a segment.
    moving: u64,
    /// The earliest time of the next cleaning, after a failed read or append.
    clean_retry: Option<Time>,
    /// The number of consecutive failed reads of a message, by its number.
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
            streams_of: HashMap::default(),
            peers: BTreeMap::from([(config.me, me)]),
            dirty: BTreeSet::new(),
            waiting: BTreeMap::new(),
            waiting_dirty: false,
            paused: BTreeSet::new(),
            key_queues: HashMap::default(),
            former: HashMap::default(),
            freed: Vec::new(),
            bindings_copied: BTreeSet::new(),
            peers_pending: false,
            peers_dirty: BTreeSet::new(),
            peers_met: false,
            peers_known: 1,
            peers_full_until: Time::default(),
            absences: BTreeSet::new(),
            lapse_at: None,
            peers_retry: None,
            disk_retry: None,
            timers: BTreeSet::new(),
            wall: BTreeSet::new(),
            subscriptions: subscriptions::Subscriptions::default(),
            kept_for: HashMap::default(),
            dropping: VecDeque::new(),
            drop_at: None,
            pending: Numbered::default(),
            next_token: 1,
            settled: Vec::new(),
            unreleased: Vec::new(),
            written: VecDeque::new(),
            once: once::Once::default(),
            segments: segments::Segments::default(),
            history: history::History::default(),
            peers_in: BTreeSet::new(),
            room: Room { level: Level::Ample, bytes: u64::MAX, last: 0 },
            full_since: Time::default(),
            short_since: Time::default(),
            full_until: None,
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

    /// Returns the number of pending messages, counted once for each destination.
    pub(crate) fn pending(&self) -> u64 {
        self.open
    }

    pub(crate) fn dead_letters(&self) -> u64 {
        self.dead
    }

    // Destinations and their bindings.

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
        self.streams_of.entry(node).or_default().push(number);
        number
    }

    fn binding(&self, bound: Bound) -> Binding {
        let StreamState { node, stream, .. } = &self.streams[bound.stream as usize];
        Binding { node: *node, stream: stream.clone(), seq: bound.seq }
    }

    /// Binds a message to a node, under the node's next number; under its former number, if it was
    /// bound to the node before, so that the node recognises a duplicate.
    fn bind(&mut self, key: DeliveryKey, node: NodeId, target: &Target) -> Bound {
        self.peers.entry(node).or_default().bound += 1;
        self.note_absence(node);
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

    /// Removes and returns the former binding of a message to a node.
    fn take_former(&mut self, key: DeliveryKey, node: NodeId) -> Option<Bound> {
        let streams = &self.streams;
        let former = self.former.get_mut(&key)?;
        let at = former.iter().position(|it| streams[it.stream as usize].node == node)?;
        Some(former.swap_remove(at))
    }

    /// Removes and returns all bindings of a message, the current and former ones.
    fn take_numbers(&mut self, key: DeliveryKey) -> impl Iterator<Item = Bound> + use<> {
        let bound = self.part_mut(key).and_then(|part| part.bound.take());
        bound.into_iter().for_each(|bound| self.leave_node(bound));
        bound.into_iter().chain(self.former.remove(&key).into_iter().flatten())
    }

    /// Unbinds a message from its node, and settles its number there.
    fn unbind(&mut self, key: DeliveryKey) {
        if let Some(bound) = self.part_mut(key).and_then(|part| part.bound.take()) {
            self.leave_node(bound);
            self.release_number(bound);
        }
    }

    /// Unbinds a message from its node, which may have processed it and may still answer.
    fn leave(&mut self, key: DeliveryKey) {
        let Some(part) = self.part_mut(key) else { return };
        if let Some(bound) = part.bound.take() {
            part.redelivered = true;
            self.leave_node(bound);
            self.former.entry(key).or_default().push(bound);
        }
    }

    /// Unbinds a message that was never sent, and schedules the record of that.
    fn free(&mut self, key: DeliveryKey) {
        if self.node_of(key).is_some() {
            self.unbind(key);
            self.freed.push((key.number, key.part));
        }
    }

    /// Writes the records of unbound messages, without a sync, before those of their next bindings.
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

    /// Returns the next action. Work is looked for only when no action is queued, once for many
    /// actions.
    pub(crate) fn poll_action(&mut self, choose: &mut Choose<'_>) -> Option<OutboxAction> {
        if self.actions.is_empty() {
            self.pump(choose);
        }
        self.actions.pop_front()
    }

    /// Returns the next timeouts: by the monotonic clock, and by the wall clock in Unix ms.
    pub(crate) fn poll_timeout(&self) -> (Option<Time>, Option<u64>) {
        let timer = self.timers.first().map(|(at, _)| *at);
        let peers =
            self.peers_retry.filter(|_| !self.peers_dirty.is_empty() && !self.peers_pending);
        let timers = timer.into_iter().chain(self.peer_timeout()).chain(peers);
        let timers = timers.chain(self.drop_at).chain(self.lapse_at).chain(self.history.retry);
        let timers = timers.chain(self.disk_retry).chain(self.clean_retry).chain(self.clean_at);
        (timers.min(), self.wall.first().map(|(at, _)| *at))
    }
}
