//! One simulated node: the engine as production drives it, and users who publish, serve and ask.
//!
//! `links` takes apart what links bring, `calls` has the users and their handlers, `store` the
//! outbox, inbox and their disks, `senders` those who send guaranteed messages, and `ending` shuts
//! a node down.

mod calls;
mod disks;
mod ending;
mod links;
mod senders;
mod store;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

pub(super) use disks::Disks;
pub(super) use store::{Store, outbox_config, stored};

use super::Random;
use super::disk::Crash;
use super::ledger::Ledger;
use super::rules::Rule;
use super::settings::Settings;
use crate::address::{Pattern, ServiceName};
use crate::engine::delivery::Now;
use crate::engine::front::CallKey;
use crate::engine::{
    Budget, DownReason, EventBatch, EventSink, Flow, Front, FrontLimits, Host, LinkId, Liveness,
    Lost, Mesh, MeshConfig, Overflow, Path, Routing, ServiceNumber, Sighting, SubscriptionQueue,
    TargetKey, Time, Timing,
};
use crate::identity::{Incarnation, NodeId};
use crate::message::{IdSource, MessageId};
use crate::peer::{Address, Source};
use crate::trust::Grants;
use crate::wire::{EncodedBatch, Lane, Limits, Totals};
use disks::Which;
use ending::Ending;

/// A node and which of its incarnations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Life {
    pub(super) node: usize,
    pub(super) number: u64,
}

/// What a node asks of its world.
#[derive(Debug)]
pub(super) enum Request {
    Dial {
        target: TargetKey,
        address: usize,
    },
    Transmit {
        link: LinkId,
        batch: EncodedBatch,
    },
    Close(LinkId),
    After(Duration, Later),
    /// The outbox took no probe.
    ProbeRefused(MessageId),
    /// A message killed the process; what would follow does not.
    Die(Crash),
    /// It has shut down.
    Ended,
}

/// What happens in a node some time later, if it still lives.
#[derive(Debug, Clone, Copy)]
pub(super) enum Later {
    /// A handler ends.
    Handler(CallKey),
    /// The subscriber takes its next event.
    Take,
    /// A guaranteed message to the node itself arrives.
    LoopBack,
    /// What was being written is written, or could not be.
    Written(Which),
    /// Segments of the outbox were removed.
    Removed,
    /// It is time to look whether the outbox's disk has room.
    Look,
    /// The shutdown goes on.
    End,
}

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(1),
    suspect: Duration::from_secs(3),
    dead: Duration::from_secs(5),
};
const MAX_BODY: u64 = 1400;
/// Small enough to run dry all the time.
const LIMITS: Limits = Limits { max_body: MAX_BODY, windows: [4096; 4] };
const SEND_QUEUE: u64 = 2048;
const SUBSCRIPTION_QUEUE: u64 = 3000;
const PATTERNS: [&str; 4] = ["a.>", "*.x", "a.x", ">"];
/// What each of five nodes serves.
const SERVICES: [Option<&str>; 5] =
    [Some("mill"), Some("work"), Some("work"), Some("mill"), Some("work")];
const CONCURRENCY: u32 = 2;
/// A durable subscription of the nodes that have a store and serve `work`, to some of what is
/// published in vain to the others.
const CONSUMER: (&str, &str) = ("billing", "a.orders.*");
/// The pattern that a durable subscription has now and then: it matches nothing that is sent.
const OTHER_PATTERN: &str = "a.orders.old";
const OVERFLOWS: [Overflow; 4] =
    [Overflow::DropNewest, Overflow::DropOldest, Overflow::KeepLatest, Overflow::HoldBack];

/// The user who waits for a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waiter {
    Nobody,
    Handler(CallKey),
    Subscriber,
}

/// Credit that was given back, by link.
type Returned = Rc<RefCell<Vec<(LinkId, Lane, Totals)>>>;

/// The credit of a received message. Dropping it gives it back.
pub(super) struct SimHold {
    path: Path,
    lane: Lane,
    held: Totals,
    returned: Returned,
}

impl Drop for SimHold {
    fn drop(&mut self) {
        if let Path::Link(link) = self.path {
            self.returned.borrow_mut().push((link, self.lane, self.held));
        }
    }
}

pub(super) struct SimHost;

impl Host for SimHost {
    type Hold = SimHold;
    /// The request, its receiver, and the user.
    type Waiter = (MessageId, Life, Waiter);
    type Way = LinkId;
    type Service = ServiceName;
    /// Whether the call was aborted.
    type Handle = Rc<Cell<bool>>;
}

/// One end of a link.
struct Link {
    peer: NodeId,
    /// The peer's life, for the ledger.
    life: Life,
    flow: Flow,
    grants: Grants,
    /// The rule behind the grants, by which the test judges them.
    rule: Rule,
    open: bool,
    /// The peer has told its epochs.
    epochs_told: bool,
}

/// The one subscription of a node.
struct Subscription {
    pattern: Pattern,
    overflow: Overflow,
    queue: RefCell<SubscriptionQueue<SimHold>>,
}

impl EventSink<SimHold> for &Subscription {
    fn overflow(&self) -> Overflow {
        self.overflow
    }

    fn push(&self, batch: EventBatch<SimHold>) -> Vec<Lost<SimHold>> {
        self.queue.borrow_mut().push(batch)
    }
}

/// A call whose handler runs.
struct Running {
    number: ServiceNumber,
    order: Option<String>,
    handle: Rc<Cell<bool>>,
    /// Where it is processed, if it is guaranteed.
    place: Option<super::promises::Place>,
}

pub(super) struct SimNode {
    pub(super) life: Life,
    id: NodeId,
    now: Now,
    settings: Settings,
    mesh: Mesh,
    front: Front<SimHost>,
    links: BTreeMap<LinkId, Link>,
    routing: Routing,
    running: BTreeMap<CallKey, Running>,
    /// Calls that their callers gave up.
    taken_back: BTreeSet<CallKey>,
    /// What it offers now.
    offered: Vec<(ServiceName, ServiceNumber)>,
    consumer: Option<ServiceNumber>,
    subscription: Subscription,
    /// The batch that the subscriber takes events from.
    taking: Option<EventBatch<SimHold>>,
    subscriber_busy: bool,
    /// What its peers may do here.
    rules: BTreeMap<NodeId, Rule>,
    pub(super) store: Option<Store>,
    /// The outbox has to look at the routes.
    routes_changed: bool,
    returned: Returned,
    ids: IdSource,
    turn: usize,
    random: Random,
    ending: Ending,
    /// A message killed the process.
    dead: bool,
    pub(super) requests: VecDeque<Request>,
}

pub(super) fn node_id(node: usize) -> NodeId {
    let mut bytes = [7; 32];
    bytes[0] = node as u8;
    NodeId::from_bytes(bytes)
}

fn node_of(id: &NodeId) -> usize {
    usize::from(id.as_bytes()[0])
}

fn life_of(id: MessageId, peer: NodeId) -> Life {
    // Ids are drawn from a stem that is the life's number, and the id's own high bits hold it.
    let stem = u128::from_be_bytes(id.to_bytes()) >> 32 & 0x3fff_ffff;
    Life { node: node_of(&peer), number: stem as u64 }
}

impl SimNode {
    /// Starts a node; one with disks opens its store.
    pub(super) fn new(
        now: Now,
        life: Life,
        settings: Settings,
        mut random: Random,
        disks: Option<Disks>,
        serves: bool,
        ledger: &mut Ledger,
    ) -> Self {
        let id = node_id(life.node);
        let config = MeshConfig {
            id,
            incarnation: Incarnation(life.number),
            mesh: "sim".parse().unwrap(),
            name: format!("node {}", life.node),
            limits: LIMITS,
            gossip: true,
            loopback_only: false,
            dials_per_second: 64,
            budget: Budget::new(u64::MAX),
        };
        let mut mesh = Mesh::new(config, life.number * 31 + life.node as u64);
        for node in (0..settings.nodes).filter(|node| *node != life.node) {
            let addresses = vec![Address::Memory(node as u64)];
            let sighting = Sighting { source: Source::Fixed, id: Some(node_id(node)), addresses };
            mesh.handle_sighting(now.time, sighting);
        }
        let pattern: Pattern = PATTERNS[life.node % PATTERNS.len()].parse().unwrap();
        mesh.subscribe(now.time, &pattern).unwrap();
        let overflow = OVERFLOWS[random.below(4) as usize];
        let queue = SubscriptionQueue::new(overflow, SUBSCRIPTION_QUEUE);
        let limits = FrontLimits { max_body: MAX_BODY as usize, local: 0, broker: 0 };
        let store = disks.map(|disks| Store::open(now, life, settings, &mut random, disks, ledger));
        let mut node = Self {
            life,
            id,
            now,
            settings,
            mesh,
            front: Front::new(id, limits),
            links: BTreeMap::new(),
            routing: Routing::default(),
            running: BTreeMap::new(),
            taken_back: BTreeSet::new(),
            offered: Vec::new(),
            consumer: None,
            subscription: Subscription { pattern, overflow, queue: RefCell::new(queue) },
            taking: None,
            subscriber_busy: false,
            rules: BTreeMap::new(),
            store,
            routes_changed: false,
            returned: Returned::default(),
            ids: IdSource::new(life.number),
            turn: 0,
            random,
            ending: Ending::default(),
            dead: false,
            requests: VecDeque::new(),
        };
        node.serve(serves, ledger);
        node.submit_again(ledger);
        node
    }

    fn next_id(&self) -> MessageId {
        self.ids.next(self.now.time.since_start().as_millis() as u64)
    }

    fn later(&mut self, micros: u64, what: Later) {
        self.requests.push_back(Request::After(Duration::from_micros(micros), what));
    }

    /// It is that time.
    pub(super) fn set_time(&mut self, now: Now) {
        self.now = now;
    }

    /// Begins to serve, or ends it. What runs goes on.
    pub(super) fn serve(&mut self, serves: bool, ledger: &mut Ledger) {
        if self.ending.has_begun() || serves != self.offered.is_empty() {
            return;
        }
        let names = SERVICES[self.life.node % SERVICES.len()].map(|name| name.parse().unwrap());
        let inbox = self.store.is_some().then(ServiceName::node_inbox);
        if serves {
            for name in names.into_iter().chain(inbox) {
                let number = self.front.serve(&name, CONCURRENCY, name.clone());
                self.offered.push((name.clone(), number.expect("it is not offered yet")));
                self.mesh.serve(self.now.time, &name, CONCURRENCY).unwrap();
            }
        } else {
            self.withdraw_services();
        }
        if self.store.is_some() && SERVICES[self.life.node] == Some("work") {
            let changes = self.settings.faults && self.random.once_in(4);
            let pattern = if changes { OTHER_PATTERN } else { CONSUMER.1 };
            let (name, pattern) = (CONSUMER.0.parse().unwrap(), pattern.parse().unwrap());
            if serves {
                self.consumer = self.front.consume(&name, &pattern, CONCURRENCY, name.clone());
            } else if let Some(number) = self.consumer.take() {
                self.front.withdraw(number);
                self.front.refuse_queued(number);
            }
            self.announce_consumers(ledger);
        }
        self.perform(ledger);
    }

    fn withdraw_services(&mut self) {
        for (name, number) in std::mem::take(&mut self.offered) {
            self.front.withdraw(number);
            self.mesh.withdraw(self.now.time, &name);
        }
    }

    /// The storm is over: disks are well, rules allow all, and everything is served.
    pub(super) fn calm_down(&mut self, ledger: &mut Ledger) {
        if let Some(Store { disks, .. }) = &mut self.store {
            (disks.outbox.failing, disks.inbox.failing) = (false, false);
        }
        self.serve(true, ledger);
        for node in (0..self.settings.nodes).map(node_id) {
            if self.rules.get(&node).is_some_and(|rule| *rule != Rule::All) {
                self.change_rule(node, Rule::All, ledger);
            }
        }
    }

    /// Changes what a peer may do here. As in production, it loses its link and comes back with
    /// its new rights.
    pub(super) fn change_rule(&mut self, peer: NodeId, rule: Rule, ledger: &mut Ledger) {
        self.rules.insert(peer, rule);
        self.mesh.handle_trust_changed(self.now.time, |id| *id != peer);
        self.perform(ledger);
    }

    // Time, actions and effects.

    pub(super) fn handle_timeout(&mut self, ledger: &mut Ledger) {
        let now = self.now.time;
        self.mesh.handle_timeout(now);
        self.front.handle_timeout(now);
        let mut silent = Vec::new();
        for (link, end) in &mut self.links {
            if end.flow.handle_timeout(now, &TIMING) == Liveness::Dead {
                silent.push(*link);
            }
        }
        for link in silent {
            ledger.seen.add("deaths noticed by silence", 1);
            self.mesh.handle_closed(now, link, DownReason::Silent);
        }
        if let Some(store) = &mut self.store {
            store.handle_timeout(self.now);
        }
        self.perform(ledger);
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        links.into_iter().for_each(|link| self.transmit(link));
    }

    /// The same, one by one, for a failed test.
    pub(super) fn describe_timeouts(&self) -> String {
        let flows = self.links.values().map(|it| it.flow.poll_timeout(self.now.time, &TIMING));
        let (life, flows): (_, Vec<_>) = (self.life, flows.collect());
        let (mesh, front) = (self.mesh.poll_timeout(), self.front.poll_timeout());
        let store = self.store.as_ref().map(|store| store.outbox.poll_timeout());
        let retry = self.store.as_ref().and_then(|store| store.poll_timeout(self.now));
        format!("{life:?}: {flows:?}, {mesh:?}, {front:?}, {store:?}, {retry:?}")
    }

    pub(super) fn poll_timeout(&self) -> Option<Time> {
        let flows = self.links.values().map(|link| link.flow.poll_timeout(self.now.time, &TIMING));
        let store = self.store.as_ref().and_then(|store| store.poll_timeout(self.now));
        let others = [self.mesh.poll_timeout(), self.front.poll_timeout(), store];
        flows.chain(others.into_iter().flatten()).min()
    }

    pub(super) fn handle_later(&mut self, what: Later, ledger: &mut Ledger) {
        match what {
            Later::Handler(key) => self.handler_due(key, ledger),
            Later::Take => self.take_event(ledger),
            Later::LoopBack => self.take_looped_back(ledger),
            Later::Written(which) => self.handle_written(which, ledger),
            Later::Removed => self.handle_removed(),
            Later::Look => self.look_for_room(),
            Later::End => self.go_on_ending(ledger),
        }
    }

    /// Carries out what the engine has decided, until nothing is left.
    pub(super) fn perform(&mut self, ledger: &mut Ledger) {
        while !self.dead {
            if let Some(action) = self.mesh.poll_action() {
                self.perform_action(action, ledger);
            } else if let Some(effect) = self.front.poll_effect() {
                self.perform_effect(effect, ledger);
            } else if self.perform_store(ledger) || self.give_back() {
            } else if std::mem::take(&mut self.routes_changed) {
                if let Some(store) = &mut self.store {
                    store.outbox.handle_routes_changed();
                }
            } else {
                break;
            }
        }
    }

    /// Gives credit back. Returns false if there was none.
    fn give_back(&mut self) -> bool {
        let returned = std::mem::take(&mut *self.returned.borrow_mut());
        let some = !returned.is_empty();
        for (link, lane, held) in returned {
            if let Some(end) = self.links.get_mut(&link) {
                end.flow.handle_consumed(lane, held);
            }
            self.transmit(link);
        }
        some
    }

    fn transmit(&mut self, link: LinkId) {
        let Some(end) = self.links.get_mut(&link) else {
            return;
        };
        while let Some(batch) = end.flow.poll_transmit(self.now.time) {
            self.requests.push_back(Request::Transmit { link, batch });
        }
    }

    /// The process ends here and now.
    fn die(&mut self, crash: Crash) {
        self.dead = true;
        self.requests.push_back(Request::Die(crash));
    }

    // What the world wants to know.

    /// Returns true if nothing is on its way from or in this node.
    pub(super) fn is_quiet(&self) -> bool {
        self.links.values().all(|link| link.flow.is_settled())
            && self.front.is_quiet()
            && self.running.is_empty()
            && !self.subscriber_busy
            && !self.ending.has_begun()
            && self.store.as_ref().is_none_or(Store::is_quiet)
    }

    pub(super) fn peer_count(&self) -> usize {
        self.routing.peers()
    }
}
