//! Outboxes, inboxes and the disks beneath them: crashes of processes and machines, writes that
//! fail, links that break, clocks that jump. Links and handlers are as simple as they can be.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use smallvec::smallvec;

use super::Random;
use super::disk::{Crash, Disk, SEGMENT, kind};
use crate::address::Destination;
use crate::engine::Time;
use crate::engine::delivery::{
    Contents, Fate, Inbox, InboxAction, NewMessage, Now, Outbox, OutboxAction, OutboxConfig,
    Source, Target, Verdict,
};
use crate::identity::NodeId;
use crate::journal::Entry;
use crate::journal::stepped::EntryKind;
use crate::message::{Header, IdSource, Kind, MessageId};
use crate::wire::{Answer, Control, Delivery, DeliveryId, InboxInfo, Outcome, thaw};

const NODES: usize = 3;
const KEYS: [&str; 2] = ["x", "y"];
/// Faults happen until then.
const STORMY: Duration = Duration::from_secs(2);

/// Proof that a run was not idle, and that its faults fired.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Seen {
    pub(super) stored: u64,
    pub(super) not_stored: u64,
    pub(super) processed: u64,
    pub(super) rejected: u64,
    pub(super) failed: u64,
    pub(super) expired: u64,
    pub(super) maybe_processed: u64,
    pub(super) redelivered: u64,
    pub(super) duplicates: u64,
    pub(super) refused: u64,
    pub(super) reassigned: u64,
    pub(super) killers: u64,
    pub(super) crashes: u64,
    pub(super) power_cuts: u64,
    pub(super) cut_files: u64,
    pub(super) lost_sectors: u64,
    pub(super) torn_sectors: u64,
    pub(super) torn: u64,
    pub(super) holes: u64,
    pub(super) failed_writes: u64,
    pub(super) moved: u64,
    pub(super) lives: u64,
    /// Of inboxes; each life begins with one.
    pub(super) snapshots: u64,
    pub(super) cuts: u64,
    pub(super) clock_jumps: u64,
}

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
    done: Option<Result<(), Fate>>,
    /// What said that it is settled was perhaps not written when its sender crashed.
    may_end_again: bool,
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
    Arrive { from: usize, connection: u64, packet: Packet },
    Ended { from: usize, id: DeliveryId, message: MessageId },
    Send,
    Link { with: usize },
    Fault,
    Restart,
}

struct Life {
    outbox: Outbox,
    inbox: Inbox,
    /// By its number in this outbox.
    numbers: HashMap<u64, MessageId>,
    waiting: HashMap<(NodeId, DeliveryId), MessageId>,
    running: HashSet<(NodeId, DeliveryId)>,
    wakes: Option<Time>,
    retry_at: Time,
}

struct Node {
    life: Option<Life>,
    lives: u64,
    outbox_disk: Disk,
    inbox_disk: Disk,
    serves: bool,
}

pub(super) struct World {
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
    /// Of these, the ones whose end is on the disk.
    durable: HashSet<(usize, bool, MessageId)>,
    to_send: u64,
    reassign_after: Option<Duration>,
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
    pub(super) fn new(seed: u64) -> Self {
        let node = |_| Node {
            life: None,
            lives: 0,
            outbox_disk: Disk::default(),
            inbox_disk: Disk::default(),
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
            to_send: 120,
            reassign_after: None,
            seen: Seen::default(),
        };
        if world.random.once_in(3) {
            world.reassign_after = Some(Duration::from_millis(world.random.between(50, 500)));
        }
        for node in 0..NODES {
            world.after(0, node, Event::Restart);
        }
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
    pub(super) fn run(mut self) -> Seen {
        while let Some(Reverse((at, number, node, life))) = self.queue.pop() {
            assert!(at.since_start() < Duration::from_secs(5000), "{:?}", self.unsettled());
            self.now = at;
            let event = self.events.remove(&number).expect("each event is queued once");
            let of_this_life = self.nodes[node].lives == life;
            match event {
                Event::Send | Event::Fault | Event::Restart | Event::Link { .. } => {}
                _ if !of_this_life => continue,
                _ => {}
            }
            self.handle(node, event);
            if self.to_send == 0 && self.is_calm() && self.unsettled().is_empty() {
                break;
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
                if let Some(life) = &mut self.nodes[node].life {
                    life.wakes = None;
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
        }
        self.perform(node);
    }

    // Lives.

    fn restart(&mut self, node: usize) {
        if self.nodes[node].life.is_some() {
            return;
        }
        let (now, epoch, inbox_epoch) = (self.clock(), self.random.next(), self.random.next());
        let config = OutboxConfig {
            me: id(node),
            epoch,
            seed: self.random.next(),
            max_bytes: 1 << 30,
            max_messages: 1000,
            window_bytes: 600,
            max_failures: 10,
            hold_keys: false,
            segment_size: SEGMENT,
            reassign_after: self.reassign_after,
            gone_after: Duration::from_secs(3600),
        };
        let entry = &mut self.nodes[node];
        let (mut outbox, mut inbox) =
            (Outbox::new(config), Inbox::new(inbox_epoch).with_snapshots_after(SEGMENT));
        let mut numbers = HashMap::new();
        let take = |it: Entry<'_>| outbox.recover(it.position, it.payload).unwrap();
        let outbox_read = entry.outbox_disk.open(take);
        for Contents { number, position, .. } in outbox.contents() {
            let bytes = entry.outbox_disk.at(position.expect("it is stored")).expect("it is kept");
            let frozen = Outbox::frozen(&bytes, number).unwrap().unwrap();
            numbers.insert(number, thaw(&frozen, &id(node)).unwrap().0.id);
        }
        let inbox_read = entry.inbox_disk.open(|it| inbox.recover(it.payload).unwrap());
        for read in [outbox_read, inbox_read] {
            self.seen.torn += u64::from(read.torn > 0);
            self.seen.holes += u64::from(!read.damaged.is_empty());
        }
        outbox.handle_recovered(now);
        let contents: Vec<_> = outbox.contents().collect();
        for letter in &contents {
            let of_this = |other: &&Contents| other.number == letter.number;
            let ended = contents.iter().filter(of_this).all(|other| other.dead.is_some());
            let sent = self.sent.get_mut(&numbers[&letter.number]).expect("it was sent");
            if ended && sent.done.is_none() {
                // It crashed before it could tell.
                sent.done = letter.dead.clone().map(Err);
                sent.may_end_again = true;
            }
        }
        inbox.handle_recovered();
        self.seen.lives += 1;
        let (waiting, running) = (HashMap::new(), HashSet::new());
        entry.life = Some(Life {
            outbox,
            inbox,
            numbers,
            waiting,
            running,
            wakes: None,
            retry_at: Time::default(),
        });
        // What was not on the disk when it crashed has to be there now, or was never stored.
        self.tell_consumers(node);
        for other in 0..NODES {
            self.after(100, node, Event::Link { with: other });
        }
    }

    fn crash(&mut self, node: usize, crash: Crash) {
        if self.nodes[node].life.take().is_none() {
            return;
        }
        let entry = &mut self.nodes[node];
        entry.lives += 1;
        self.seen.crashes += 1;
        for disk in [&mut entry.outbox_disk, &mut entry.inbox_disk] {
            let lost = disk.crash(crash, &mut self.random);
            self.seen.cut_files += lost.cut;
            self.seen.lost_sectors += lost.sectors;
            self.seen.torn_sectors += lost.torn;
        }
        if crash == Crash::Machine {
            self.seen.power_cuts += 1;
        }
        let ended = self.sent.values_mut().filter(|it| it.sender == node && it.done.is_some());
        ended.for_each(|sent| sent.may_end_again = true);
        for other in 0..NODES {
            self.cut(node, other);
        }
        let pause = self.random.between(1_000, 300_000);
        self.after(pause, node, Event::Restart);
    }

    fn consumed(&self, node: usize) -> Vec<(crate::address::ServiceName, crate::address::Pattern)> {
        match node > 0 && self.nodes[node].serves {
            true => vec![("billing".parse().unwrap(), "orders.>".parse().unwrap())],
            false => Vec::new(),
        }
    }

    fn tell_consumers(&mut self, node: usize) {
        let subscriptions = self.consumed(node);
        let Some(life) = &mut self.nodes[node].life else { return };
        let own = InboxInfo { epoch: 0, subscriptions, ended: Vec::new() };
        life.outbox.handle_inbox(id(node), own);
        for other in (0..NODES).filter(|other| *other != node) {
            self.tell_inbox(node, other);
        }
    }

    fn tell_inbox(&mut self, node: usize, to: usize) {
        let subscriptions = self.consumed(node);
        let Some(life) = &self.nodes[node].life else { return };
        let info = InboxInfo { epoch: life.inbox.epoch(), subscriptions, ended: Vec::new() };
        self.transmit(node, to, Packet::Control(Control::Inbox(Box::new(info))));
    }

    // Links.

    fn link(&mut self, node: usize, with: usize) {
        let both = self.nodes[node].life.is_some() && self.nodes[with].life.is_some();
        if node == with || !both || self.links.contains_key(&pair(node, with)) {
            return;
        }
        self.connections += 1;
        self.links.insert(pair(node, with), self.connections);
        for (a, b) in [(node, with), (with, node)] {
            if let Some(life) = &mut self.nodes[a].life {
                life.outbox.handle_link_up(id(b));
            }
            self.tell_inbox(a, b);
            self.perform(a);
        }
    }

    fn cut(&mut self, node: usize, with: usize) {
        if self.links.remove(&pair(node, with)).is_none() {
            return;
        }
        self.seen.cuts += 1;
        let now = self.clock();
        for (a, b) in [(node, with), (with, node)] {
            if let Some(life) = &mut self.nodes[a].life {
                life.outbox.handle_link_down(now, id(b));
            }
            self.perform(a);
        }
        let pause = self.random.between(100, 200_000);
        self.after(pause, node, Event::Link { with });
    }

    fn transmit(&mut self, from: usize, to: usize, packet: Packet) {
        let Some(connection) = self.links.get(&pair(from, to)).copied() else { return };
        let delay = Duration::from_micros(self.random.between(50, 500));
        let last = self.last_arrival.entry((from, to)).or_default();
        *last = (*last).max(self.now + delay);
        let at = *last;
        self.at(at, to, Event::Arrive { from, connection, packet });
    }

    fn handle_packet(&mut self, from: usize, node: usize, packet: Packet) {
        let now = self.clock();
        let Some(life) = &mut self.nodes[node].life else { return };
        match packet {
            Packet::Message { id: message, delivery } => {
                self.handle_message(from, node, message, delivery);
            }
            Packet::Answer(answer) => {
                life.outbox.handle_answer(now, id(from), answer);
            }
            Packet::Control(Control::Inbox(info)) => life.outbox.handle_inbox(id(from), *info),
            Packet::Control(Control::Epochs(epochs)) => {
                life.inbox.handle_epochs(id(from), &epochs);
            }
            Packet::Control(_) => unreachable!("nobody sends it"),
        }
    }

    // Handlers.

    fn handle_message(&mut self, from: usize, node: usize, message: MessageId, mut it: Delivery) {
        let serves = self.nodes[node].serves;
        let Some(life) = &mut self.nodes[node].life else { return };
        let verdict = life.inbox.handle_delivery(id(from), &mut it);
        let attempt = it.attempt;
        match verdict {
            Verdict::Run | Verdict::RunLater if it.redelivered => self.seen.redelivered += 1,
            _ => {}
        }
        match verdict {
            Verdict::Run if !serves => {
                self.seen.refused += 1;
                life.inbox.handle_ended(id(from), &it.id, Outcome::Refused);
            }
            Verdict::Run => self.begin(from, node, it.id, message, it.redelivered),
            Verdict::RunLater => _ = life.waiting.insert((id(from), it.id), message),
            Verdict::Wait => {}
            Verdict::Answer(outcome) => {
                if outcome == Outcome::Processed {
                    let place = (node, it.id.stream.subscription.is_some(), message);
                    assert!(self.begun.contains_key(&place), "{message} was never begun");
                    // Its answer may have been lost in a crash.
                    self.durable.insert(place);
                    self.seen.duplicates += 1;
                }
                let answer = Answer { id: it.id, attempt, outcome };
                self.answer(node, from, answer);
            }
        }
    }

    fn answer(&mut self, node: usize, to: usize, answer: Answer) {
        if node != to {
            return self.transmit(node, to, Packet::Answer(answer));
        }
        let now = self.clock();
        if let Some(life) = &mut self.nodes[node].life {
            life.outbox.handle_answer(now, id(node), answer);
        }
    }

    fn begin(&mut self, from: usize, node: usize, it: DeliveryId, message: MessageId, again: bool) {
        let subscribed = it.stream.subscription.is_some();
        let place = (node, subscribed, message);
        assert!(!self.durable.contains(&place), "{message} is processed again at {node}");
        // One that is sent goes to one node, and to another when that refuses it, or is away for
        // longer than is waited for it.
        let others = (0..NODES).filter(|other| *other != node && !subscribed);
        let others = others.map(|other| (other, false, message));
        let elsewhere = others.clone().any(|place| self.begun.contains_key(&place));
        let processed = others.clone().any(|place| self.durable.contains(&place));
        self.seen.reassigned += u64::from(processed);
        assert!(!processed || self.reassign_after.is_some(), "{message} was processed elsewhere");
        let begun = self.begun.entry(place).or_default();
        assert!(again || *begun == 0 && !elsewhere, "{message} comes again, and doesn't say so");
        *begun += 1;
        self.check_order(message);
        let running = self.nodes[node].life.as_mut().map(|life| &mut life.running);
        assert!(running.is_some_and(|running| running.insert((id(from), it.clone()))));
        if self.sent[&message].nature == Nature::Killer {
            self.seen.killers += 1;
            return self.crash(node, Crash::Process);
        }
        let takes = self.random.between(10, 20_000);
        self.after(takes, node, Event::Ended { from, id: it, message });
    }

    /// All before it with its key are through.
    fn check_order(&self, message: MessageId) {
        let sent = &self.sent[&message];
        let Some(lane) = &sent.lane else { return };
        let before = self.order.iter().take_while(|other| **other != message);
        for other in before.map(|other| &self.sent[other]) {
            let same = other.sender == sent.sender && other.lane.as_ref() == Some(lane);
            assert!(
                !same || !other.stored || other.done.is_some(),
                "{message} of {lane:?} is ahead of one before it: {other:?}"
            );
        }
    }

    fn handle_ended(&mut self, node: usize, from: usize, it: DeliveryId, message: MessageId) {
        let place = (node, it.stream.subscription.is_some(), message);
        let times = self.begun[&place];
        let outcome = match self.sent[&message].nature {
            Nature::Flaky(fails) if times <= fails => Outcome::Failed("flaky".into()),
            Nature::Good | Nature::Flaky(_) => Outcome::Processed,
            Nature::Poison => Outcome::Failed("poison".into()),
            Nature::Rejected => Outcome::Rejected("no".into()),
            Nature::Killer => unreachable!("it killed its process"),
        };
        let Some(life) = &mut self.nodes[node].life else { return };
        life.running.remove(&(id(from), it.clone()));
        life.waiting.insert((id(from), it.clone()), message);
        life.inbox.handle_ended(id(from), &it, outcome);
    }

    // Senders.

    fn send(&mut self, node: usize) {
        self.to_send -= 1;
        let now = self.clock();
        let serving: Vec<usize> = (1..NODES).filter(|node| self.nodes[*node].serves).collect();
        let Some(life) = &mut self.nodes[node].life else { return };
        let message = self.ids.next(1);
        let (destination, targets) = match self.random.below(4) {
            0 => {
                let topic = "orders.new".parse().unwrap();
                let targets = life.outbox.subscribers(&topic);
                (Destination::Topic(topic), targets)
            }
            1 => {
                let to = id(self.random.below(3) as usize);
                (Destination::Node(to), smallvec![Target::Node(to)])
            }
            _ => {
                let work: crate::address::ServiceName = "work".parse().unwrap();
                (Destination::Service(work.clone()), smallvec![Target::Service(work)])
            }
        };
        if targets.is_empty() {
            return;
        }
        let nature = match self.random.below(40) {
            0 => Nature::Poison,
            1 => Nature::Rejected,
            2 if self.random.once_in(4) => Nature::Killer,
            3..=8 => Nature::Flaky(self.random.between(1, 3) as u32),
            _ => Nature::Good,
        };
        let mut header = Header::new(message, Kind::Command, destination);
        let key = self.random.once_in(3).then(|| KEYS[self.random.below(2) as usize]);
        let lane = key.filter(|_| targets.len() == 1).map(|key| (targets[0].clone(), key));
        header.extra_mut().ordering_key = lane.as_ref().map(|(_, key)| (*key).to_owned());
        let soon = now.unix_ms + self.random.below(400);
        let expires_at = self.random.once_in(8).then_some(soon);
        let not_before = self.random.once_in(8).then_some(soon / 2 + now.unix_ms / 2);
        let parts = targets.len();
        let body = Bytes::from_static(b"a body");
        let once = false;
        let new = NewMessage { header, body, targets, expires_at, not_before, once };
        let submitted = life
            .outbox
            .submit(now, smallvec![new], &mut |_, _, load| least_loaded(&serving, load))
            .unwrap();
        life.numbers.insert(submitted[0].number(), message);
        let (stored, done, may_end_again) = (false, None, false);
        let sent = Sent { sender: node, nature, lane, parts, stored, done, may_end_again };
        self.sent.insert(message, sent);
        self.order.push(message);
    }

    fn handle_done(&mut self, node: usize, number: u64, result: Result<(), Fate>) {
        let message = self.nodes[node].life.as_ref().expect("it lives").numbers[&number];
        let sent = self.sent.get_mut(&message).expect("it was sent");
        if let Some(before) = &sent.done {
            assert!(sent.may_end_again, "{message} ended twice: {before:?}, then {result:?}");
            return;
        }
        let ran = self.begun.keys().filter(|(.., other)| *other == message).count();
        match &result {
            Ok(()) => {
                let there = self.durable.iter().filter(|(.., other)| *other == message).count();
                assert!(there >= sent.parts, "{message} is settled and was not processed");
                self.seen.processed += 1;
            }
            Err(Fate::Expired { maybe_processed }) => {
                self.seen.expired += 1;
                self.seen.maybe_processed += u64::from(*maybe_processed);
                assert!(*maybe_processed || ran == 0 || sent.parts > 1, "{message} did run");
            }
            Err(Fate::Rejected { .. }) => {
                self.seen.rejected += 1;
                // One that only dies with others is taken for a killer when that happens ten times.
                let deaths = self.nodes.iter().map(|node| node.lives).max().unwrap_or_default();
                let suspected = sent.nature == Nature::Killer || deaths >= 10;
                assert!(sent.nature == Nature::Rejected || suspected);
            }
            Err(Fate::Failed { .. }) => {
                self.seen.failed += 1;
                assert_eq!(sent.nature, Nature::Poison);
            }
            Err(Fate::TooLarge | Fate::Unreadable) => panic!("nothing is"),
        }
        sent.done = Some(result);
    }

    // Disks.

    fn handle_written(&mut self, node: usize, which: Which) {
        let now = self.clock();
        let Node { life: Some(life), outbox_disk, inbox_disk, .. } = &mut self.nodes[node] else {
            return;
        };
        let disk = match which {
            Which::Outbox => outbox_disk,
            Which::Inbox => inbox_disk,
        };
        let fails = disk.failing && !self.random.once_in(3);
        let written = disk.finish(fails, &mut self.random);
        self.seen.failed_writes += u64::from(written.iter().any(|(_, result)| result.is_err()));
        for (token, result) in written {
            match which {
                Which::Outbox => life.outbox.handle_appended(now, token, result),
                Which::Inbox => life.inbox.handle_appended(token, result),
            }
        }
    }

    fn fault(&mut self, node: usize) {
        match self.random.below(8) {
            0 => self.crash(node, Crash::Process),
            1 => self.crash(node, Crash::Machine),
            2 | 3 => {
                let with = self.random.below(3) as usize;
                self.cut(node, with);
            }
            4 => {
                let disk = match self.random.once_in(2) {
                    true => &mut self.nodes[node].outbox_disk,
                    false => &mut self.nodes[node].inbox_disk,
                };
                disk.failing = !disk.failing;
            }
            5 => {
                self.seen.clock_jumps += 1;
                self.wall_offset += self.random.below(2_000) as i64 - 1_000;
            }
            _ => self.serve(node, !self.nodes[node].serves),
        }
    }

    fn serve(&mut self, node: usize, serves: bool) {
        self.nodes[node].serves = serves;
        self.tell_consumers(node);
        for other in 0..NODES {
            if let Some(life) = &mut self.nodes[other].life {
                life.outbox.handle_routes_changed();
            }
            self.perform(other);
        }
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
            life.outbox.pump(&mut |_, _, load| least_loaded(&serving, load));
            if let Some(action) = life.outbox.poll_action() {
                self.perform_outbox(node, action);
            } else if let Some(action) = life.inbox.poll_action() {
                self.perform_inbox(node, action);
            } else {
                break;
            }
        }
        self.write(node, Which::Outbox);
        self.write(node, Which::Inbox);
        let now = self.clock();
        let Some(life) = &mut self.nodes[node].life else { return };
        let (timer, wall) = life.outbox.poll_timeout();
        let wall = wall.map(|at| now.time + Duration::from_millis(at.saturating_sub(now.unix_ms)));
        // The clock on the wall may be set: nobody sleeps longer than that.
        let longest = now.time + Duration::from_secs(1);
        let retry = life.inbox.has_unstored().then_some(life.retry_at);
        if let Some(at) = timer.into_iter().chain(wall.map(|at| at.min(longest))).chain(retry).min()
            && at < Time::after_start(Duration::MAX)
            && life.wakes.is_none_or(|known| known > at)
        {
            life.wakes = Some(at);
            self.at(at.max(now.time) + Duration::from_micros(1), node, Event::Wake);
        }
    }

    fn write(&mut self, node: usize, which: Which) {
        let disk = match which {
            Which::Outbox => &mut self.nodes[node].outbox_disk,
            Which::Inbox => &mut self.nodes[node].inbox_disk,
        };
        if disk.begin() {
            let takes = self.random.between(20, 400);
            self.after(takes, node, Event::Written(which));
        }
    }

    fn perform_outbox(&mut self, node: usize, action: OutboxAction) {
        let now = self.clock();
        let entry = &mut self.nodes[node];
        match action {
            OutboxAction::Append { token, entry: bytes, haste, .. } => {
                entry.outbox_disk.append(Some(token), bytes, kind(haste));
            }
            OutboxAction::Note(bytes) => entry.outbox_disk.append(None, bytes, EntryKind::Note),
            OutboxAction::RemoveBefore(segment) => entry.outbox_disk.remove_before(segment),
            OutboxAction::Read(number, position) => {
                self.seen.moved += 1;
                let bytes = entry.outbox_disk.at(position).expect("it is kept");
                let frozen = Outbox::frozen(&bytes, number).unwrap();
                entry.life.as_mut().expect("it acts").outbox.handle_read(now, number, frozen);
            }
            OutboxAction::Transmit { to, source, delivery, .. } => {
                let message = match source {
                    Source::Memory(message) => message.0.id,
                    Source::Journal(position, number) => {
                        let bytes = entry.outbox_disk.at(position).expect("it is kept");
                        let frozen = Outbox::frozen(&bytes, number).unwrap().unwrap();
                        thaw(&frozen, &id(node)).unwrap().0.id
                    }
                };
                let to = node_of(&to);
                match to == node {
                    true => self.handle_message(node, node, message, *delivery),
                    false => self.transmit(
                        node,
                        to,
                        Packet::Message { id: message, delivery: *delivery },
                    ),
                }
            }
            OutboxAction::Send(to, control) => {
                self.transmit(node, node_of(&to), Packet::Control(control));
            }
            OutboxAction::Stored(number, result) => {
                let life = entry.life.as_ref().expect("it acts");
                let sent = self.sent.get_mut(&life.numbers[&number]).expect("it was sent");
                sent.stored = result.is_ok();
                match result {
                    Ok(()) => self.seen.stored += 1,
                    Err(_) => self.seen.not_stored += 1,
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
            InboxAction::Append { token, entry: bytes, haste } => {
                entry.inbox_disk.append(Some(token), bytes, kind(haste));
            }
            InboxAction::AppendSnapshot { token, entry: bytes } => {
                self.seen.snapshots += 1;
                entry.inbox_disk.append(Some(token), bytes, EntryKind::First);
            }
            InboxAction::Note(bytes) => entry.inbox_disk.append(None, bytes, EntryKind::Note),
            InboxAction::RemoveBefore(segment) => entry.inbox_disk.remove_before(segment),
            InboxAction::Answer(to, answer) => {
                let message = life.waiting.remove(&(to, answer.id.clone()));
                if answer.outcome == Outcome::Processed {
                    let message = message.expect("its handler ended");
                    let subscribed = answer.id.stream.subscription.is_some();
                    self.durable.insert((node, subscribed, message));
                }
                self.answer(node, node_of(&to), answer);
            }
            InboxAction::Begin(from, it) => {
                let message = life.waiting.remove(&(from, it.clone())).expect("it waits");
                life.inbox.handle_begun(from);
                match entry.serves {
                    true => self.begin(node_of(&from), node, it, message, true),
                    false => life.inbox.handle_ended(from, &it, Outcome::Refused),
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
    let mut seen = Seen::default();
    super::tests::each_seed(10_000, |seed| seen.add(&World::new(seed).run()));
    println!("{seen:#?}");
    if super::tests::is_alone() {
        return;
    }
    for (what, count) in seen.all() {
        assert!(count > 0, "no {what} in the whole run");
    }
}

impl Seen {
    fn all(&self) -> [(&'static str, u64); 24] {
        [
            ("messages stored", self.stored),
            ("messages that could not be stored", self.not_stored),
            ("messages processed", self.processed),
            ("rejections", self.rejected),
            ("dead letters by failure", self.failed),
            ("dead letters by expiry", self.expired),
            ("dead letters that may have been processed", self.maybe_processed),
            ("redeliveries", self.redelivered),
            ("suppressed duplicates", self.duplicates),
            ("refusals", self.refused),
            ("messages taken from a node that had processed them", self.reassigned),
            ("messages that kill their process", self.killers),
            ("crashes", self.crashes),
            ("power cuts", self.power_cuts),
            ("files cut short with the power", self.cut_files),
            ("sectors lost with the power", self.lost_sectors),
            ("sectors torn with the power", self.torn_sectors),
            ("journals with a torn tail", self.torn),
            ("journals with holes", self.holes),
            ("failed writes", self.failed_writes),
            ("messages moved to a newer segment", self.moved),
            ("snapshots of inboxes that live", self.snapshots.saturating_sub(self.lives)),
            ("cuts", self.cuts),
            ("clock jumps", self.clock_jumps),
        ]
    }

    fn add(&mut self, other: &Self) {
        self.stored += other.stored;
        self.not_stored += other.not_stored;
        self.processed += other.processed;
        self.rejected += other.rejected;
        self.failed += other.failed;
        self.expired += other.expired;
        self.maybe_processed += other.maybe_processed;
        self.redelivered += other.redelivered;
        self.duplicates += other.duplicates;
        self.refused += other.refused;
        self.reassigned += other.reassigned;
        self.killers += other.killers;
        self.crashes += other.crashes;
        self.power_cuts += other.power_cuts;
        self.cut_files += other.cut_files;
        self.lost_sectors += other.lost_sectors;
        self.torn_sectors += other.torn_sectors;
        self.torn += other.torn;
        self.holes += other.holes;
        self.failed_writes += other.failed_writes;
        self.moved += other.moved;
        self.lives += other.lives;
        self.snapshots += other.snapshots;
        self.cuts += other.cuts;
        self.clock_jumps += other.clock_jumps;
    }
}
