//! Outboxes, inboxes and the disks beneath them: crashes of processes and machines, writes that
//! fail, links that break, clocks that jump, stores that are lost or put back to an older state.
//! Links and handlers are as simple as they can be.

mod handlers;
mod links;
mod lives;
mod operator;
mod room;
mod seen;
mod senders;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::Random;
use super::disk::{Disk, SEGMENT, kind};
use crate::engine::Time;
use crate::engine::delivery::{
    DeadLetterReason, Inbox, InboxAction, NewMessage, Now, Outbox, OutboxAction, Source, Target,
};
use crate::identity::NodeId;
use crate::journal::stepped::EntryKind;
use crate::journal::{Need, Position};
use crate::message::{IdSource, MessageId};
use crate::wire::{Answer, Control, Delivery, DeliveryId, DeliveryOutcome, decode_stored};
use seen::Seen;

const NODES: usize = 3;
const KEYS: [&str; 2] = ["x", "y"];
/// Faults happen until then.
const STORMY: Duration = Duration::from_secs(2);

/// What a message's handler does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nature {
    Good,
    /// Fails so often, then succeeds.
    Flaky(u32),
    Poison,
    Rejected,
    /// Kills its process.
    Killer,
}

#[derive(Debug)]
struct Sent {
    sender: usize,
    nature: Nature,
    lane: Option<(Target, &'static str)>,
    parts: usize,
    stored: bool,
    /// Of those that are stored together, by the first.
    transaction: MessageId,
    /// To be submitted again by whoever doesn't know whether it is stored.
    once: Option<NewMessage>,
    done: Option<Result<(), DeadLetterReason>>,
    /// What said that it is settled was perhaps not written when its sender crashed.
    may_end_again: bool,
    /// Its outbox was put back to an older state, and knows nothing of it or too little.
    forgotten: bool,
    /// An operator had it sent again when it was a dead letter, or removed it.
    decided: Option<Decision>,
}

/// What an operator does about a dead letter that others wait behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Replayed,
    Removed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Outbox,
    Inbox,
}

#[derive(Debug, Clone)]
enum Packet {
    Message { id: MessageId, delivery: Delivery },
    Answer(Answer),
    Control(Control),
}

#[derive(Debug)]
enum Event {
    Wake,
    Written(Which),
    Arrive {
        from: usize,
        connection: u64,
        packet: Packet,
    },
    Ended {
        from: usize,
        id: DeliveryId,
        message: MessageId,
    },
    Send,
    Link {
        with: usize,
    },
    Fault,
    Restart,
    Calm,
    /// Segments of the outbox were removed.
    Removed,
    /// It is time to look whether the outbox's disk has room.
    Look,
}

struct Life {
    outbox: Outbox,
    inbox: Inbox,
    /// By its number in this outbox.
    numbers: HashMap<u64, MessageId>,
    waiting: HashMap<(NodeId, DeliveryId), MessageId>,
    running: HashSet<(NodeId, DeliveryId)>,
    snapshots: u64,
    wakes: Option<Time>,
    retry_at: Time,
    /// Its disk will be looked at.
    looks: bool,
}

struct Node {
    life: Option<Life>,
    lives: u64,
    outbox_disk: Disk,
    inbox_disk: Disk,
    /// A copy of the outbox's.
    backup: Option<Disk>,
    serves: bool,
}

impl Node {
    /// The id of a message that its outbox has stored.
    fn stored_id(&self, number: u64, position: Position) -> MessageId {
        let bytes = self.outbox_disk.at(position).expect("it is kept");
        let encoded = Outbox::stored_message(&bytes, number).unwrap().unwrap();
        // The same whoever reads it.
        decode_stored(&encoded, &id(0)).unwrap().header.id
    }
}

struct World {
    now: Time,
    random: Random,
    wall_offset: i64,
    nodes: Vec<Node>,
    /// The number of the connection of each pair, lower node first.
    links: BTreeMap<(usize, usize), u64>,
    connections: u64,
    /// When the last packet of each direction arrives.
    last_arrival: HashMap<(usize, usize), Time>,
    queue: BinaryHeap<Reverse<(Time, u64, usize, u64)>>,
    events: HashMap<u64, Event>,
    scheduled: u64,
    ids: IdSource,
    sent: HashMap<MessageId, Sent>,
    order: Vec<MessageId>,
    /// Handlers that were begun: by node, subscription or not, and message.
    begun: HashMap<(usize, bool, MessageId), u32>,
    /// Of these, the ones whose end is on the disk, and those whose end ever was.
    durable: HashSet<(usize, bool, MessageId)>,
    processed: HashSet<(usize, bool, MessageId)>,
    to_send: u64,
    reassign_after: Option<Duration>,
    /// A dead letter holds up those with its key.
    hold_keys: bool,
    /// What the disk of an outbox holds, in bytes, if that is little.
    capacity: Option<u64>,
    /// Messages that were settled and gone when their outbox was last read.
    gone: HashSet<MessageId>,
    /// Of each sender, when the storm was over and all was processed: the message that shows that
    /// its outbox takes one again.
    probes: [Option<MessageId>; 2],
    /// Since when it refuses them.
    refused_since: [Option<Time>; 2],
    seen: Seen,
}

fn id(node: usize) -> NodeId {
    NodeId::from_bytes([node as u8 + 1; 32])
}

fn node_of(id: &NodeId) -> usize {
    id.as_bytes()[0] as usize - 1
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

impl World {
    fn new(seed: u64) -> Self {
        let node = |_| Node {
            life: None,
            lives: 0,
            outbox_disk: Disk::cleaned(),
            inbox_disk: Disk::default(),
            backup: None,
            serves: true,
        };
        let mut world = Self {
            now: Time::default(),
            random: Random(seed),
            wall_offset: 1_000_000_000,
            nodes: (0..NODES).map(node).collect(),
            links: BTreeMap::new(),
            connections: 0,
            last_arrival: HashMap::new(),
            queue: BinaryHeap::new(),
            events: HashMap::new(),
            scheduled: 0,
            ids: IdSource::new(seed),
            sent: HashMap::new(),
            order: Vec::new(),
            begun: HashMap::new(),
            durable: HashSet::new(),
            processed: HashSet::new(),
            to_send: 120,
            reassign_after: None,
            hold_keys: false,
            capacity: None,
            gone: HashSet::new(),
            probes: [None; 2],
            refused_since: [None; 2],
            seen: Seen::default(),
        };
        if world.random.once_in(3) {
            world.reassign_after = Some(Duration::from_millis(world.random.between(50, 500)));
        }
        world.hold_keys = world.random.once_in(3);
        if world.random.once_in(2) {
            // Its manifest takes 24 KiB of it.
            let capacity = 24 * 1024 + world.random.between(10, 18) * SEGMENT;
            world.capacity = Some(capacity);
            world.nodes.iter().for_each(|node| node.outbox_disk.limit(capacity));
        }
        for node in 0..NODES {
            world.after(0, node, Event::Restart);
        }
        // So that something happens when the storm is over.
        world.at(Time::after_start(STORMY) + Duration::from_millis(1), 0, Event::Calm);
        for _ in 0..world.to_send {
            let (when, node) = (world.random.below(1_800_000), world.random.below(2) as usize);
            world.after(when, node, Event::Send);
        }
        for _ in 0..40 {
            let (when, node) = (world.random.below(2_000_000), world.random.below(3) as usize);
            world.after(when, node, Event::Fault);
        }
        world
    }

    /// Runs until all is settled.
    fn run(mut self) -> Seen {
        while let Some(Reverse((at, number, node, life))) = self.queue.pop() {
            let is_over = at.since_start() >= Duration::from_secs(5000);
            assert!(!is_over, "{:?}\n{}", self.unsettled(), self.describe_room());
            self.now = at;
            let event = self.events.remove(&number).expect("each event is queued once");
            let of_this_life = self.nodes[node].lives == life;
            match event {
                Event::Send | Event::Fault | Event::Restart | Event::Link { .. } | Event::Calm => {}
                _ if !of_this_life => continue,
                _ => {}
            }
            self.handle(node, event);
            if self.to_send == 0 && self.is_calm() {
                if !self.unsettled().is_empty() {
                    self.free_held();
                } else if self.probe() {
                    break;
                }
            }
        }
        assert!(self.unsettled().is_empty(), "{:?}", self.unsettled());
        self.seen
    }

    fn is_calm(&self) -> bool {
        self.now.since_start() > STORMY
    }

    fn unsettled(&self) -> Vec<(&MessageId, &Sent)> {
        self.sent.iter().filter(|(_, sent)| sent.stored && sent.done.is_none()).collect()
    }

    fn after(&mut self, micros: u64, node: usize, event: Event) {
        self.at(self.now + Duration::from_micros(micros), node, event);
    }

    fn at(&mut self, at: Time, node: usize, event: Event) {
        self.scheduled += 1;
        self.events.insert(self.scheduled, event);
        let life = self.nodes[node].lives;
        self.queue.push(Reverse((at, self.scheduled, node, life)));
    }

    fn clock(&self) -> Now {
        let unix_ms = self.now.since_start().as_millis() as i64 + self.wall_offset;
        Now { time: self.now, unix_ms: unix_ms as u64 }
    }

    fn handle(&mut self, node: usize, event: Event) {
        let now = self.clock();
        match event {
            Event::Wake => {
                // It may have been told to wake earlier since.
                if let Some(life) = &mut self.nodes[node].life
                    && life.wakes.take_if(|at| *at <= now.time).is_some()
                {
                    life.outbox.handle_timeout(now);
                    if life.retry_at <= now.time {
                        life.inbox.handle_timeout();
                        life.retry_at = now.time + Duration::from_secs(1);
                    }
                }
            }
            Event::Written(which) => self.handle_written(node, which),
            Event::Arrive { from, connection, packet } => {
                if self.links.get(&pair(from, node)) == Some(&connection) {
                    self.handle_packet(from, node, packet);
                }
            }
            Event::Ended { from, id, message } => self.handle_ended(node, from, id, message),
            Event::Send => self.send(node),
            Event::Link { with } => self.link(node, with),
            Event::Fault => self.fault(node),
            Event::Restart => self.restart(node),
            Event::Calm => {}
            Event::Removed => self.handle_removed(node),
            Event::Look => self.look_for_room(node),
        }
        self.perform(node);
    }

    // What the engines decide.

    fn perform(&mut self, node: usize) {
        if self.is_calm() {
            for other in 0..NODES {
                self.nodes[other].outbox_disk.failing = false;
                self.nodes[other].inbox_disk.failing = false;
                if !self.nodes[other].serves {
                    self.serve(other, true);
                }
            }
        }
        loop {
            let serving: Vec<usize> = (1..NODES).filter(|node| self.nodes[*node].serves).collect();
            let Some(life) = &mut self.nodes[node].life else { return };
            let choose = &mut |_: &_, _: Option<&str>, load: &dyn Fn(&NodeId) -> Option<u64>| {
                least_loaded(&serving, load)
            };
            if let Some(action) = life.outbox.poll_action(choose) {
                self.perform_outbox(node, action);
            } else if let Some(action) = life.inbox.poll_action() {
                self.perform_inbox(node, action);
            } else {
                break;
            }
        }
        self.write(node, Which::Outbox);
        self.write(node, Which::Inbox);
        self.look_later(node);
        let now = self.clock();
        let Some(life) = &mut self.nodes[node].life else { return };
        let (timer, wall) = life.outbox.poll_timeout();
        let wall = wall.map(|at| now.time + Duration::from_millis(at.saturating_sub(now.unix_ms)));
        // The clock on the wall may be set: nobody sleeps longer than that.
        let longest = now.time + Duration::from_secs(1);
        let retry = life.inbox.has_unstored().then_some(life.retry_at);
        if let Some(at) = timer.into_iter().chain(wall.map(|at| at.min(longest))).chain(retry).min()
            && at < Time::after_start(Duration::MAX)
        {
            let at = at.max(now.time) + Duration::from_micros(1);
            if life.wakes.is_none_or(|known| known > at) {
                life.wakes = Some(at);
                self.at(at, node, Event::Wake);
            }
        }
    }

    fn write(&mut self, node: usize, which: Which) {
        let disk = match which {
            Which::Outbox => &mut self.nodes[node].outbox_disk,
            Which::Inbox => &mut self.nodes[node].inbox_disk,
        };
        let begun = disk.begin();
        let removed = which == Which::Outbox && disk.has_removed();
        if begun {
            let takes = self.random.between(20, 400);
            self.after(takes, node, Event::Written(which));
        }
        if removed {
            let takes = self.random.between(20, 400);
            self.after(takes, node, Event::Removed);
        }
    }

    fn perform_outbox(&mut self, node: usize, action: OutboxAction) {
        let now = self.clock();
        let entry = &mut self.nodes[node];
        match action {
            OutboxAction::Append { token, entry: bytes, persist, need, .. } => {
                entry.outbox_disk.append(Some(token), bytes, kind(persist, need));
            }
            OutboxAction::AppendFirst { token, entry: bytes } => {
                self.seen.add("segments begun to clean the newest", 1);
                entry.outbox_disk.append(Some(token), bytes, EntryKind::First);
            }
            OutboxAction::Remove(segments) => {
                self.seen.add("segments removed", segments.len() as u64);
                entry.outbox_disk.remove(segments);
            }
            OutboxAction::Read(number, position) => {
                self.seen.add("messages moved to another segment", 1);
                let bytes = entry.outbox_disk.at(position).expect("it is kept");
                let encoded = Outbox::stored_message(&bytes, number).unwrap();
                entry.life.as_mut().expect("it acts").outbox.handle_read(now, number, encoded);
            }
            OutboxAction::Transmit { to, source, delivery, .. } => {
                let message = match source {
                    Source::Memory(message) => message.header.id,
                    Source::Journal(position, number) => entry.stored_id(number, position),
                };
                let to = node_of(&to);
                match to == node {
                    true => {
                        self.handle_message(node, node, message, Arc::unwrap_or_clone(delivery))
                    }
                    false => self.transmit(
                        node,
                        to,
                        Packet::Message { id: message, delivery: Arc::unwrap_or_clone(delivery) },
                    ),
                }
            }
            OutboxAction::Send(to, control) => {
                self.transmit(node, node_of(&to), Packet::Control(control));
            }
            OutboxAction::Stored(number, result) => {
                let life = entry.life.as_ref().expect("it acts");
                let message = life.numbers[&number];
                let sent = self.sent.get_mut(&message).expect("it was sent");
                sent.stored = result.is_ok();
                match result {
                    Ok(()) => self.seen.add("messages stored", 1),
                    Err(_) => {
                        self.seen.add("messages that could not be stored", 1);
                        self.handle_refused(node, message);
                    }
                }
            }
            OutboxAction::Done(number, result) => self.handle_done(node, number, result),
            OutboxAction::Report(_) => {}
        }
    }

    fn perform_inbox(&mut self, node: usize, action: InboxAction) {
        let entry = &mut self.nodes[node];
        let life = entry.life.as_mut().expect("it acts");
        match action {
            InboxAction::Append { token, entry: bytes, persist, .. } => {
                entry.inbox_disk.append(Some(token), bytes, kind(persist, Need::Urgent));
            }
            InboxAction::AppendSnapshot { token, entry: bytes, .. } => {
                // Each life begins with one.
                self.seen.when("snapshots of inboxes that live", life.snapshots > 0);
                life.snapshots += 1;
                entry.inbox_disk.append(Some(token), bytes, EntryKind::First);
            }
            InboxAction::Note(bytes) => entry.inbox_disk.append(None, bytes, EntryKind::Note),
            InboxAction::RemoveBefore(segment) => entry.inbox_disk.remove_before(segment),
            InboxAction::Answer(to, answer) => {
                let message = life.waiting.remove(&(to, answer.id.clone()));
                if answer.outcome == DeliveryOutcome::Processed {
                    let message = message.expect("its handler ended");
                    let subscribed = answer.id.stream.subscription.is_some();
                    self.durable.insert((node, subscribed, message));
                    self.processed.insert((node, subscribed, message));
                }
                self.answer(node, node_of(&to), answer);
            }
            InboxAction::Begin(from, it) => {
                let message = life.waiting.remove(&(from, it.clone())).expect("it waits");
                life.inbox.handle_begun(from);
                match entry.serves {
                    true => self.begin(node_of(&from), node, it, message, true),
                    false => life.inbox.handle_ended(from, &it, DeliveryOutcome::Refused),
                }
            }
        }
    }
}

/// The least loaded of the nodes that serve.
fn least_loaded(serving: &[usize], load: &dyn Fn(&NodeId) -> Option<u64>) -> Option<NodeId> {
    let loads = serving.iter().filter_map(|node| Some((load(&id(*node))?, id(*node))));
    loads.min().map(|(_, node)| node)
}

#[test]
fn ten_thousand_faulty_runs_process_what_was_stored_once_and_in_order() {
    let run = |seed| World::new(seed).run();
    let seen = super::tests::each_seed(10_000, run, Seen::extend);
    println!("{seen:#?}");
    if !super::tests::is_alone() {
        seen.check();
    }
}
