//! Virtual time, simulated links, and what happens on them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use bytes::Bytes;

use super::Random;
use super::ledger::Ledger;
use super::machine::Machine;
use super::node::{Later, Life, Request, SimNode};
use super::seen::Seen;
use super::settings::{SENDERS, Settings};
use crate::engine::delivery::Now;
use crate::engine::{HashMap, LinkId, TargetKey, Time};
use crate::message::MessageId;

/// Faults happen, and users send, until then.
const STORMY: Duration = Duration::from_secs(3);
/// After that, all nodes are linked again within this time.
const HEALED: Duration = Duration::from_secs(60);
/// Everything is over by then.
const LONGEST: Duration = Duration::from_secs(300);
/// Far more events than any run takes.
const MOST_STEPS: u32 = 3_000_000;
/// How many guaranteed messages, or transactions of them, are sent in a run.
const SENT: u64 = 120;

#[derive(Debug)]
pub(super) enum Event {
    Arrive { link: LinkId, frames: Vec<Bytes> },
    Released { life: Life, link: LinkId },
    Closed { link: LinkId },
    Dialled { life: Life, target: TargetKey, address: usize },
    Later { life: Life, what: Later },
    Wake { life: Life },
    User { node: usize },
    Send { node: usize },
    Fault,
    Restart { node: usize },
    Calm,
}

/// One end of a connection; the other end's link id differs in the lowest bit.
#[derive(Debug)]
pub(super) struct End {
    pub(super) life: Life,
    /// Nothing arrives before this, so that order is kept.
    arrives: Time,
    pub(super) closed: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ends: [End; 2],
    /// Bytes vanish, and neither side is told.
    pub(super) silent: bool,
}

/// The end of a run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) seen: Seen,
    /// Of all events and their times: the same for the same seed.
    pub(super) digest: u64,
}

pub(super) struct World {
    pub(super) now: Time,
    wall_offset: i64,
    pub(super) random: Random,
    pub(super) settings: Settings,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: HashMap<u64, Event>,
    scheduled: u64,
    digest: u64,
    lives: u64,
    /// Boxed, since they are taken out for each event.
    pub(super) nodes: Vec<Option<Box<SimNode>>>,
    pub(super) machines: Vec<Machine>,
    woken_at: HashMap<Life, Time>,
    pub(super) connections: BTreeMap<u64, Connection>,
    connected: u64,
    pub(super) ledger: Ledger,
    /// The storm is over.
    pub(super) calm: bool,
    /// All nodes were linked since.
    healed: bool,
    /// Since when each sender's outbox refuses the probe, and when the next is sent.
    pub(super) refused_since: [Option<Time>; SENDERS],
    pub(super) next_probe: [Time; SENDERS],
}

impl World {
    pub(super) fn new(seed: u64, nodes: usize, faults: bool) -> Self {
        let mut random = Random(seed);
        let settings = Settings::draw(&mut random, nodes, faults);
        let mut world = Self {
            now: Time::default(),
            wall_offset: 1_000_000_000,
            random,
            settings,
            queue: BinaryHeap::new(),
            events: HashMap::default(),
            scheduled: 0,
            digest: 0,
            lives: 0,
            nodes: (0..nodes).map(|_| None).collect(),
            machines: (0..nodes).map(|node| Machine::new(node, settings)).collect(),
            woken_at: HashMap::default(),
            connections: BTreeMap::new(),
            connected: 0,
            ledger: Ledger::new(settings),
            calm: false,
            healed: false,
            refused_since: [None; SENDERS],
            next_probe: [Time::default(); SENDERS],
        };
        for node in 0..nodes {
            world.start(node);
            let first = world.random.below(100_000);
            world.after(first, Event::User { node });
        }
        let stormy = STORMY.as_micros() as u64;
        for _ in 0..SENT {
            let node = world.random.below(SENDERS as u64) as usize;
            let when = world.random.below(stormy - 200_000);
            world.after(when, Event::Send { node });
        }
        if faults {
            world.after(50_000, Event::Fault);
        }
        world.after(stormy, Event::Calm);
        world
    }

    /// Runs until the storm is over, all that was stored is processed, and all is at rest.
    pub(super) fn run(mut self) -> Outcome {
        let mut steps = 0u32;
        while let Some(Reverse((at, number))) = self.queue.pop() {
            self.now = at;
            self.digest = Random(self.digest ^ at.since_start().as_nanos() as u64).next();
            let event = self.events.remove(&number).expect("each event is queued once");
            self.handle(event);
            steps += 1;
            assert!(steps < MOST_STEPS, "it spins at {at:?}\n{}", self.describe_timeouts());
            if self.calm && steps.is_multiple_of(16) && self.is_over() {
                break;
            }
        }
        self.ledger.check_the_end();
        Outcome { seen: self.ledger.into_seen(), digest: self.digest }
    }

    /// # Panics
    /// If something takes too long.
    fn is_over(&mut self) -> bool {
        let is_full = self.is_full_mesh();
        self.healed |= is_full;
        let calm_for = self.now.since(Time::after_start(STORMY));
        assert!(self.healed || calm_for < HEALED, "the mesh did not heal");
        let settled = self.settle();
        let quiet = self.nodes.iter().flatten().all(|node| node.is_quiet());
        if calm_for >= LONGEST {
            let promises = &self.ledger.promises;
            let open: Vec<_> = promises.unsettled().take(5).collect();
            let busy: Vec<_> = self.nodes.iter().flatten().filter(|it| !it.is_quiet()).collect();
            let busy: Vec<_> = busy.into_iter().map(|it| it.life).collect();
            let states: Vec<_> = open.iter().map(|(message, _)| self.describe(message)).collect();
            let rooms = self.describe_rooms();
            panic!(
                "not over: linked {is_full}, busy {busy:?}, unsettled {open:?}\n{states:#?}\n{rooms}"
            );
        }
        settled && quiet && is_full
    }

    fn is_full_mesh(&self) -> bool {
        let others = self.nodes.len() - 1;
        self.nodes.iter().all(|it| it.as_ref().is_some_and(|it| it.peer_count() == others))
    }

    /// Describes a message as the outboxes know it, for a failed test.
    fn describe(&self, message: &MessageId) -> Vec<String> {
        let stores = self.nodes.iter().flatten().filter_map(|node| node.store.as_ref());
        let known = stores.flat_map(|store| {
            let numbers = store.numbers.iter().filter(|(_, other)| *other == message);
            numbers.map(|(number, _)| store.outbox.describe_message(*number))
        });
        known.collect()
    }

    // Time.

    /// What each node waits for.
    fn describe_timeouts(&self) -> String {
        self.nodes.iter().flatten().map(|node| node.describe_timeouts() + "\n").collect()
    }

    pub(super) fn clock(&self) -> Now {
        let unix_ms = self.now.since_start().as_millis() as i64 + self.wall_offset;
        Now { time: self.now, unix_ms: unix_ms as u64 }
    }

    /// The clock on the wall is set, by up to a second.
    pub(super) fn jump(&mut self) {
        self.ledger.seen.add("clock jumps", 1);
        self.wall_offset += self.random.below(2_000) as i64 - 1_000;
    }

    pub(super) fn after(&mut self, micros: u64, event: Event) {
        self.at(self.now + Duration::from_micros(micros), event);
    }

    fn at(&mut self, at: Time, event: Event) {
        self.scheduled += 1;
        self.events.insert(self.scheduled, event);
        self.queue.push(Reverse((at, self.scheduled)));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive { link, frames } => {
                if let Some(life) = self.receiver(link) {
                    self.act(life, |node, ledger| node.handle_batch(link, frames, ledger));
                }
            }
            Event::Released { life, link } => self.act(life, |node, _| node.handle_released(link)),
            Event::Closed { link } => {
                if let Some(life) = self.receiver(link) {
                    self.act(life, |node, _| node.handle_closed(link));
                }
            }
            Event::Dialled { life, target, address } => self.dialled(life, &target, address),
            Event::Later { life, what } => {
                self.act(life, |node, ledger| node.handle_later(what, ledger));
            }
            Event::Wake { life } => {
                // It may have been told to wake earlier since.
                if self.woken_at.get(&life) == Some(&self.now) {
                    self.woken_at.remove(&life);
                    self.act(life, SimNode::handle_timeout);
                }
            }
            Event::User { node } => self.user(node),
            Event::Send { node } => self.act_as(node, SimNode::send),
            Event::Fault => self.fault(),
            Event::Restart { node } => {
                self.ledger.seen.add("restarts", 1);
                self.start(node);
            }
            Event::Calm => self.calm_down(),
        }
    }

    // Nodes.

    fn start(&mut self, node: usize) {
        self.decide(node);
        self.lives += 1;
        let life = Life { node, number: self.lives };
        let random = Random(self.random.next());
        let Machine { disks, serves, .. } = &mut self.machines[node];
        let (disks, serves) = (disks.take(), *serves);
        let (now, settings) = (self.clock(), self.settings);
        let ledger = &mut self.ledger;
        let started = SimNode::new(now, life, settings, random, disks, serves, ledger);
        self.nodes[node] = Some(Box::new(started));
        self.act(life, |_, _| {});
    }

    /// Lets a user of a node do something, if it lives and is not about to end.
    fn act_as(&mut self, node: usize, act: impl FnOnce(&mut SimNode, &mut Ledger)) {
        if let Some(life) = self.user_of(node) {
            self.act(life, act);
        }
    }

    pub(super) fn user_of(&self, node: usize) -> Option<Life> {
        self.nodes[node].as_ref().filter(|it| !it.is_ending()).map(|it| it.life)
    }

    /// Lets a node do something, if that life of it still lasts, and carries out what follows.
    pub(super) fn act(&mut self, life: Life, act: impl FnOnce(&mut SimNode, &mut Ledger)) {
        let is_alive = |node: &mut Box<SimNode>| node.life == life;
        let Some(mut node) = self.nodes[life.node].take_if(is_alive) else {
            return;
        };
        node.set_time(self.clock());
        act(&mut node, &mut self.ledger);
        node.perform(&mut self.ledger);
        node.use_disks();
        let requests = std::mem::take(&mut node.requests);
        let wake = node.poll_timeout();
        self.nodes[life.node] = Some(node);
        for request in requests {
            match request {
                Request::Die(crash) => return self.crash(life.node, crash),
                Request::Ended => return self.ended(life.node),
                request => self.perform(life, request),
            }
        }
        let soonest = self.now + Duration::from_micros(1);
        if let Some(at) = wake.map(|at| at.max(soonest))
            && self.woken_at.get(&life).is_none_or(|known| *known > at)
        {
            self.woken_at.insert(life, at);
            self.at(at, Event::Wake { life });
        }
    }

    fn perform(&mut self, life: Life, request: Request) {
        match request {
            Request::Dial { target, address } => {
                let after = self.random.between(100, 3_000);
                self.after(after, Event::Dialled { life, target, address });
            }
            Request::Transmit { link, batch } => {
                let encoded = self.random.below(300);
                self.after(encoded, Event::Released { life, link });
                let frames = batch.into_frames(Bytes::from);
                let delay = Duration::from_micros(self.random.between(50, self.settings.latency));
                let Some(connection) = self.connections.get_mut(&(link.0 >> 1)) else {
                    return;
                };
                let end = &mut connection.ends[(link.0 & 1 ^ 1) as usize];
                end.arrives = end.arrives.max(self.now + delay);
                let at = end.arrives;
                if !connection.silent {
                    self.at(at, Event::Arrive { link: LinkId(link.0 ^ 1), frames });
                }
            }
            Request::Close(link) => self.close(link),
            Request::After(after, what) => {
                self.at(self.now + after, Event::Later { life, what });
            }
            Request::ProbeRefused(message) => self.handle_refused(life.node, message),
            Request::Die(_) | Request::Ended => unreachable!("nothing follows them"),
        }
    }

    fn user(&mut self, node: usize) {
        if self.calm {
            return;
        }
        let pause = self.random.between(400, 60_000);
        self.after(pause, Event::User { node });
        let calls = self.random.once_in(3);
        // Now and then a burst that no window holds.
        let burst = match self.random.once_in(10) {
            true if calls => 25,
            true => 60,
            false => 1,
        };
        let forges = self.random.once_in(20) && self.settings.faults;
        self.act_as(node, |node, ledger| {
            if forges {
                node.forge(ledger);
            }
            for _ in 0..burst {
                if calls { node.call(ledger) } else { node.publish(ledger) }
            }
        });
    }

    // Connections.

    fn receiver(&self, link: LinkId) -> Option<Life> {
        let connection = self.connections.get(&(link.0 >> 1))?;
        (!connection.silent).then_some(connection.ends[(link.0 & 1) as usize].life)
    }

    fn dialled(&mut self, life: Life, target: &TargetKey, address: usize) {
        let Some(other) = self.nodes[address].as_ref().map(|node| node.life) else {
            return self.act(life, |node, _| node.handle_dial_failed(target));
        };
        if self.nodes[life.node].as_ref().is_none_or(|node| node.life != life) {
            return;
        }
        let number = self.connected;
        self.connected += 1;
        let end = |life| End { life, arrives: self.now, closed: false };
        let connection = Connection { ends: [end(life), end(other)], silent: false };
        self.connections.insert(number, connection);
        let (near, far) = (LinkId(number << 1), LinkId(number << 1 | 1));
        let target = Some(target.clone());
        self.act(other, |node, _| node.handle_connected(far, None, life));
        self.act(life, |node, _| node.handle_connected(near, target, other));
    }

    /// One end closes; the other hears of it after what is on its way.
    fn close(&mut self, link: LinkId) {
        let number = link.0 >> 1;
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        connection.ends[(link.0 & 1) as usize].closed = true;
        if connection.ends.iter().all(|end| end.closed) {
            self.connections.remove(&number);
            return;
        }
        let at = connection.ends[(link.0 & 1 ^ 1) as usize].arrives.max(self.now);
        if !connection.silent {
            self.at(at + Duration::from_micros(10), Event::Closed { link: LinkId(link.0 ^ 1) });
        }
    }

    /// Both ends are told; what is on its way is lost.
    pub(super) fn cut(&mut self, number: u64) {
        let Some(connection) = self.connections.remove(&number) else {
            return;
        };
        for (side, end) in connection.ends.iter().enumerate() {
            let link = LinkId(number << 1 | side as u64);
            self.act(end.life, |node, _| node.handle_closed(link));
        }
    }
}
