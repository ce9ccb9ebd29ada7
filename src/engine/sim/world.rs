//! Virtual time, simulated links, and faults.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use bytes::Bytes;

use super::Random;
use super::ledger::Ledger;
use super::node::{Life, Request, SimNode, node_id};
use super::rules::Rule;
use crate::engine::front::CallKey;
use crate::engine::{HashMap, LinkId, TargetKey, Time};

#[derive(Debug)]
enum Event {
    Arrive { link: LinkId, frames: Vec<Bytes> },
    Released { life: Life, link: LinkId },
    Closed { link: LinkId },
    Dialled { life: Life, target: TargetKey, address: usize },
    Handler { life: Life, key: CallKey },
    Take { life: Life },
    Wake { life: Life },
    User { node: usize },
    Fault,
    Restart { node: usize },
}

/// One end of a connection; the other end's link id differs in the lowest bit.
#[derive(Debug)]
struct End {
    life: Life,
    /// Nothing arrives before this, so that order is kept.
    arrives: Time,
}

#[derive(Debug)]
struct Connection {
    ends: [End; 2],
    /// Bytes vanish, and neither side is told.
    silent: bool,
}

pub(super) struct World {
    now: Time,
    random: Random,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: HashMap<u64, Event>,
    scheduled: u64,
    lives: u64,
    nodes: Vec<Option<SimNode>>,
    woken_at: HashMap<Life, Time>,
    connections: HashMap<u64, Connection>,
    connected: u64,
    ledger: Ledger,
    faults: bool,
    active: bool,
    /// Bytes handed to links, for the scale of things.
    pub(super) bytes: u64,
}

impl World {
    pub(super) fn new(seed: u64, nodes: usize, faults: bool) -> Self {
        let mut world = Self {
            now: Time::default(),
            random: Random(seed),
            queue: BinaryHeap::new(),
            events: HashMap::default(),
            scheduled: 0,
            lives: 0,
            nodes: (0..nodes).map(|_| None).collect(),
            woken_at: HashMap::default(),
            connections: HashMap::default(),
            connected: 0,
            ledger: Ledger::default(),
            faults,
            active: true,
            bytes: 0,
        };
        for node in 0..nodes {
            world.start(node);
            let first = world.random.below(100_000);
            world.after(first, Event::User { node });
        }
        if faults {
            world.after(200_000, Event::Fault);
        }
        world
    }

    /// Runs for a time with users and faults, then lets everything come to rest.
    pub(super) fn run(mut self, busy: Duration) -> Ledger {
        let end = self.now + busy;
        self.run_until(end, |_| false);
        self.active = false;
        // A silent cut takes 5 s to be noticed, a deadline 3 s to pass, a redial some more.
        let end = end + Duration::from_secs(60);
        let quiet = |world: &Self| {
            world.nodes.iter().flatten().all(SimNode::is_quiet)
                && world.nodes.iter().all(Option::is_some)
                && world.is_full_mesh()
        };
        self.run_until(end, quiet);
        assert!(self.nodes.iter().all(Option::is_some), "every node is back");
        assert!(self.is_full_mesh(), "the mesh did not heal");
        for node in self.nodes.iter().flatten() {
            assert!(node.is_quiet(), "{:?} did not come to rest: a deadlock", node.life);
        }
        self.ledger.check_the_end();
        self.ledger
    }

    fn is_full_mesh(&self) -> bool {
        self.nodes.iter().flatten().all(|node| node.peer_count() + 1 == self.nodes.len())
    }

    fn run_until(&mut self, end: Time, done: impl Fn(&Self) -> bool) {
        let mut steps = 0u32;
        while let Some(Reverse((at, number))) = self.queue.peek().copied()
            && at <= end
        {
            self.queue.pop();
            self.now = at;
            let event = self.events.remove(&number).expect("each event is queued once");
            self.handle(event);
            steps += 1;
            if steps.is_multiple_of(64) && done(self) {
                return;
            }
        }
    }

    fn after(&mut self, micros: u64, event: Event) {
        self.at(self.now + Duration::from_micros(micros), event);
    }

    fn at(&mut self, at: Time, event: Event) {
        self.scheduled += 1;
        self.events.insert(self.scheduled, event);
        self.queue.push(Reverse((at, self.scheduled)));
    }

    fn start(&mut self, node: usize) {
        self.lives += 1;
        let life = Life { node, number: self.lives };
        let random = Random(self.random.next());
        self.nodes[node] = Some(SimNode::new(self.now, life, self.nodes.len(), random));
        self.act(life, |_, _, _| {});
    }

    fn is_alive(&self, life: Life) -> bool {
        self.nodes[life.node].as_ref().is_some_and(|node| node.life == life)
    }

    /// Lets a node do something, if that life of it still lasts, and carries out what follows.
    fn act(&mut self, life: Life, act: impl FnOnce(&mut SimNode, Time, &mut Ledger)) {
        if !self.is_alive(life) {
            return;
        }
        let Some(mut node) = self.nodes[life.node].take() else {
            return;
        };
        act(&mut node, self.now, &mut self.ledger);
        node.perform(self.now, &mut self.ledger);
        let requests = std::mem::take(&mut node.requests);
        let wake = node.poll_timeout(self.now);
        self.nodes[life.node] = Some(node);
        for request in requests {
            self.perform(life, request);
        }
        if let Some(at) = wake
            && self.woken_at.get(&life).is_none_or(|known| *known > at || *known < self.now)
        {
            self.woken_at.insert(life, at);
            self.at(at.max(self.now + Duration::from_micros(1)), Event::Wake { life });
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
                self.bytes += frames.iter().map(|frame| frame.len() as u64).sum::<u64>();
                let delay = Duration::from_micros(self.random.between(50, 5_000));
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
            Request::Handle { key, after } => {
                self.after(after.as_micros() as u64, Event::Handler { life, key });
            }
            Request::Take { after } => self.after(after.as_micros() as u64, Event::Take { life }),
        }
    }

    /// One end closes; the other hears of it after what is on its way.
    fn close(&mut self, link: LinkId) {
        let Some(connection) = self.connections.get(&(link.0 >> 1)) else {
            return;
        };
        let at = connection.ends[(link.0 & 1 ^ 1) as usize].arrives.max(self.now);
        if !connection.silent {
            self.at(at + Duration::from_micros(10), Event::Closed { link: LinkId(link.0 ^ 1) });
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive { link, frames } => {
                if let Some(life) = self.receiver(link) {
                    self.act(life, |node, now, ledger| {
                        node.handle_batch(now, link, frames, ledger)
                    });
                }
            }
            Event::Released { life, link } => {
                self.act(life, |node, now, _| node.handle_released(now, link));
            }
            Event::Closed { link } => {
                if let Some(life) = self.receiver(link) {
                    self.act(life, |node, now, ledger| node.handle_closed(now, link, ledger));
                }
            }
            Event::Dialled { life, target, address } => self.dialled(life, &target, address),
            Event::Handler { life, key } => {
                self.act(life, |node, now, ledger| node.handler_due(now, key, ledger));
            }
            Event::Take { life } => self.act(life, SimNode::take_event),
            Event::Wake { life } => {
                self.woken_at.remove(&life);
                self.act(life, SimNode::handle_timeout);
            }
            Event::User { node } => self.user(node),
            Event::Fault => self.fault(),
            Event::Restart { node } => {
                self.ledger.seen.restarts += 1;
                self.start(node);
            }
        }
    }

    fn receiver(&self, link: LinkId) -> Option<Life> {
        let connection = self.connections.get(&(link.0 >> 1))?;
        (!connection.silent).then_some(connection.ends[(link.0 & 1) as usize].life)
    }

    fn dialled(&mut self, life: Life, target: &TargetKey, address: usize) {
        let Some(other) = self.nodes[address].as_ref().map(|node| node.life) else {
            return self.act(life, |node, now, _| node.handle_dial_failed(now, target));
        };
        if !self.is_alive(life) {
            return;
        }
        let number = self.connected;
        self.connected += 1;
        let end = |life| End { life, arrives: self.now };
        let connection = Connection { ends: [end(life), end(other)], silent: false };
        self.connections.insert(number, connection);
        let (near, far) = (LinkId(number << 1), LinkId(number << 1 | 1));
        let target = Some(target.clone());
        self.act(other, |node, now, _| node.handle_connected(now, far, None, life));
        self.act(life, |node, now, _| node.handle_connected(now, near, target, other));
    }

    fn user(&mut self, node: usize) {
        if !self.active {
            return;
        }
        let pause = self.random.between(200, 30_000);
        self.after(pause, Event::User { node });
        let Some(life) = self.nodes[node].as_ref().map(|node| node.life) else {
            return;
        };
        // Now and then a burst that no window holds.
        let burst = if self.random.once_in(10) { 60 } else { 1 };
        let calls = self.random.once_in(3);
        self.act(life, |node, now, ledger| {
            for _ in 0..burst {
                if calls { node.call(now, ledger) } else { node.publish(now, ledger) }
            }
        });
    }

    fn fault(&mut self) {
        if !self.active || !self.faults {
            return;
        }
        let pause = self.random.between(100_000, 1_500_000);
        self.after(pause, Event::Fault);
        let mut open: Vec<u64> = self.connections.keys().copied().collect();
        open.sort_unstable();
        match self.random.below(5) {
            0 => {
                let node = self.random.below(self.nodes.len() as u64) as usize;
                self.crash(node);
            }
            2 => self.change_rule(),
            1 if !open.is_empty() => {
                let number = open[self.random.below(open.len() as u64) as usize];
                self.connections.get_mut(&number).expect("it is open").silent = true;
                self.ledger.seen.silent_cuts += 1;
            }
            _ if !open.is_empty() => {
                let number = open[self.random.below(open.len() as u64) as usize];
                self.ledger.seen.cuts += 1;
                self.cut(number);
            }
            _ => {}
        }
    }

    /// A node changes what another may do there.
    fn change_rule(&mut self) {
        let nodes = self.nodes.len() as u64;
        let (node, peer) = (self.random.below(nodes) as usize, self.random.below(nodes) as usize);
        let rule = Rule::any(&mut self.random);
        if let Some(life) = self.nodes[node].as_ref().map(|node| node.life) {
            self.act(life, |node, now, ledger| {
                node.change_rule(now, node_id(peer), rule, ledger);
            });
        }
    }

    /// Both ends are told; what is on its way is lost.
    fn cut(&mut self, number: u64) {
        let Some(connection) = self.connections.remove(&number) else {
            return;
        };
        for (side, end) in connection.ends.iter().enumerate() {
            let link = LinkId(number << 1 | side as u64);
            self.act(end.life, |node, now, ledger| node.handle_closed(now, link, ledger));
        }
    }

    fn crash(&mut self, node: usize) {
        let Some(gone) = self.nodes[node].take() else {
            return;
        };
        self.ledger.seen.crashes += 1;
        self.ledger.crashed(gone.life);
        self.ledger.forget_requests(gone.open_requests().into_iter());
        let mut held: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.ends.iter().any(|end| end.life == gone.life))
            .map(|(number, _)| *number)
            .collect();
        held.sort_unstable();
        for number in held {
            if self.random.once_in(3) {
                // The host died with it: nobody says that the connection is gone.
                self.connections.get_mut(&number).expect("it is held").silent = true;
            } else {
                self.cut(number);
            }
        }
        let pause = self.random.between(50_000, 3_000_000);
        self.after(pause, Event::Restart { node });
    }
}
