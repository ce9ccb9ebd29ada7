//! One simulated node: the engine as production drives it, and users who publish, serve and ask.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use super::Random;
use super::ledger::Ledger;
use super::rules::Rule;
use crate::address::{Destination, Pattern, ServiceName, Topic};
use crate::engine::front::CallKey;
use crate::engine::{
    Action, Candidate, Connection, Delivered, DownReason, Effect, Ended, EventBatch, EventSink,
    Flow, Front, FrontLimits, Host, Incoming, LinkId, Liveness, Lost, Mesh, MeshConfig, MeshEvent,
    Overflow, Path, ReceivedControl, ReceivedMessage, Reply, RequestOutcome, Routing, Run,
    ServiceNumber, Sighting, SubscriptionQueue, TargetKey, Time, Timing, choose, deliver, incoming,
    may_publish,
};
use crate::identity::{Incarnation, NodeId};
use crate::message::{Extra, Header, IdSource, Kind, Message, MessageId};
use crate::peer::{Address, Source};
use crate::report::DropReason;
use crate::trust::Grants;
use crate::wire::{
    Bye, Control, EncodedBatch, Envelope, Failure, Lane, Limits, OutgoingEvent, Payload, Totals,
    decode,
};

/// A node and which of its incarnations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// A handler will end.
    Handle {
        key: CallKey,
        after: Duration,
    },
    /// The subscriber will take its next event.
    Take {
        after: Duration,
    },
}

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(1),
    suspect: Duration::from_secs(3),
    dead: Duration::from_secs(5),
};
const MAX_BODY: u64 = 1024;
/// Small enough to run dry all the time.
const LIMITS: Limits = Limits { max_body: MAX_BODY, windows: [4096; 4] };
const SEND_QUEUE: u64 = 2048;
const SUBSCRIPTION_QUEUE: u64 = 3000;
const PATTERNS: [&str; 4] = ["a.>", "*.x", "a.x", ">"];
const TOPICS: [&str; 4] = ["a.x", "a.y", "b.x", "b.y"];
pub(super) const SERVICES: [&str; 2] = ["work", "mill"];
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
    link: LinkId,
    lane: Lane,
    held: Totals,
    returned: Returned,
}

impl Drop for SimHold {
    fn drop(&mut self) {
        self.returned.borrow_mut().push((self.link, self.lane, self.held));
    }
}

pub(super) struct SimHost;

impl Host for SimHost {
    type Hold = SimHold;
    /// The request, its receiver, and the user.
    type Waiter = (MessageId, Life, Waiter);
    type Way = LinkId;
    type Service = ServiceName;
    type Handle = ();
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

/// An instance of a service, and its load.
struct Instance {
    node: NodeId,
    link: LinkId,
    load: (u64, u32),
}

impl Candidate for Instance {
    fn node(&self) -> NodeId {
        self.node
    }

    fn load(&self) -> (u64, u32) {
        self.load
    }
}

/// A call whose handler runs.
struct Running {
    number: ServiceNumber,
    order: Option<String>,
}

pub(super) struct SimNode {
    pub(super) life: Life,
    id: NodeId,
    mesh: Mesh,
    front: Front<SimHost>,
    links: BTreeMap<LinkId, Link>,
    routing: Routing,
    running: BTreeMap<CallKey, Running>,
    subscription: Subscription,
    /// The batch that the subscriber takes events from.
    taking: Option<EventBatch<SimHold>>,
    subscriber_busy: bool,
    /// What its peers may do here.
    rules: HashMap<NodeId, Rule>,
    returned: Returned,
    ids: IdSource,
    turn: usize,
    random: Random,
    pub(super) requests: VecDeque<Request>,
}

pub(super) fn node_id(node: usize) -> NodeId {
    let mut bytes = [7; 32];
    bytes[0] = node as u8;
    NodeId::from_bytes(bytes)
}

fn life_of(id: MessageId, peer: NodeId) -> Life {
    // Ids are drawn from a stem that is the life's number, and the id's own high bits hold it.
    let stem = u128::from_be_bytes(id.to_bytes()) >> 32 & 0x3fff_ffff;
    Life { node: usize::from(peer.as_bytes()[0]), number: stem as u64 }
}

impl SimNode {
    pub(super) fn new(now: Time, life: Life, nodes: usize, mut random: Random) -> Self {
        let id = node_id(life.node);
        let config = MeshConfig {
            id,
            incarnation: Incarnation(life.number),
            mesh: "sim".parse().unwrap(),
            name: format!("node {}", life.node),
            limits: LIMITS,
            gossip: true,
            loopback_only: false,
        };
        let mut mesh = Mesh::new(config, life.number * 31 + life.node as u64);
        for node in (0..nodes).filter(|node| *node != life.node) {
            let addresses = vec![Address::Memory(node as u64)];
            let source = Source::Fixed;
            mesh.handle_sighting(now, Sighting { source, id: Some(node_id(node)), addresses });
        }
        let pattern: Pattern = PATTERNS[life.node % PATTERNS.len()].parse().unwrap();
        mesh.subscribe(&pattern);
        let overflow = OVERFLOWS[random.below(4) as usize];
        let queue = SubscriptionQueue::new(overflow, SUBSCRIPTION_QUEUE);
        let limits = FrontLimits { max_body: MAX_BODY as usize, local: 0, broker: 0 };
        let mut front = Front::new(id, limits);
        if life.node % 3 != 2 {
            let name: ServiceName = SERVICES[life.node % 2].parse().unwrap();
            mesh.serve(&name, 2);
            front.serve(&name, 2, name.clone());
        }
        Self {
            life,
            id,
            mesh,
            front,
            links: BTreeMap::new(),
            routing: Routing::default(),
            running: BTreeMap::new(),
            subscription: Subscription { pattern, overflow, queue: RefCell::new(queue) },
            taking: None,
            subscriber_busy: false,
            rules: HashMap::new(),
            returned: Returned::default(),
            ids: IdSource::new(life.number),
            turn: 0,
            random,
            requests: VecDeque::new(),
        }
    }

    fn next_id(&self, now: Time) -> MessageId {
        self.ids.next(now.since_start().as_millis() as u64)
    }

    // What users do.

    pub(super) fn publish(&mut self, now: Time, ledger: &mut Ledger) {
        let topic: Topic = TOPICS[self.random.below(4) as usize].parse().unwrap();
        let id = self.next_id(now);
        let body = Bytes::from(vec![0; self.random.below(300) as usize]);
        let header = Header::new(id, Kind::Event, Destination::Topic(topic.clone()));
        let me = self.id;
        let event = OutgoingEvent::new(&header, &topic, &body, &me);
        let links: Vec<LinkId> =
            self.routing.subscribers(&topic).iter().map(|(_, link)| **link).collect();
        for link in links {
            let Some(end) = self.links.get_mut(&link) else { continue };
            match end.flow.enqueue_event(&event) {
                Ok(_) => ledger.queued(self.life),
                // The publisher is told at once; it was never queued.
                Err(_) => ledger.seen.slow_peer += 1,
            }
            self.transmit(now, link);
        }
    }

    pub(super) fn call(&mut self, now: Time, ledger: &mut Ledger) {
        let waiting = self.random.below(3) > 0;
        let service = SERVICES[self.random.below(2) as usize];
        self.call_service(now, service, waiting.then_some(Waiter::Nobody), ledger);
    }

    /// Sends a call to an instance. Returns false if there was none with room.
    fn call_service(
        &mut self,
        now: Time,
        service: &str,
        waiter: Option<Waiter>,
        ledger: &mut Ledger,
    ) -> bool {
        let name: ServiceName = service.parse().unwrap();
        self.turn += 1;
        let links = &self.links;
        let instances: Vec<_> = self
            .routing
            .instances(&name)
            .map(|instance| {
                let flow = links.get(&instance.link).map(|link| &link.flow);
                let load = flow.map_or(u64::from(u32::MAX), Flow::unfinished_calls);
                let load = (load, instance.concurrency);
                Instance { node: instance.peer, link: instance.link, load }
            })
            .collect();
        let key = self.random.once_in(3).then(|| format!("key {}", self.random.below(3)));
        let Some(link) = choose(&instances, key.as_deref(), self.turn).map(|it| it.link) else {
            return false;
        };
        let id = self.next_id(now);
        let mut header = Header::new(id, Kind::Command, Destination::Service(name));
        header.extra =
            key.map(|key| Box::new(Extra { ordering_key: Some(key), ..Extra::default() }));
        let deadline = now + Duration::from_millis(self.random.between(20, 3000));
        let body = Bytes::from_static(b"do it");
        let Some(to) = self.links.get(&link).map(|end| end.life) else { return false };
        let payload = match waiter {
            Some(waiter) => {
                header.reply_to = Some(self.id);
                header.time_to_live = Some(deadline.since(now));
                self.front.open_request(id, deadline, Path::Link(link), link, (id, to, waiter));
                Payload::Request(body)
            }
            None => Payload::Call(body),
        };
        if !self.enqueue(now, link, Envelope { header, payload }, ledger) {
            self.front.close_request(id);
            return false;
        }
        if waiter.is_some() {
            ledger.request_opened(id);
        }
        true
    }

    fn enqueue(
        &mut self,
        now: Time,
        link: LinkId,
        envelope: Envelope,
        ledger: &mut Ledger,
    ) -> bool {
        let Some(end) = self.links.get_mut(&link) else {
            return false;
        };
        if end.flow.enqueue(envelope).is_err() {
            // The sender is told at once; it was never queued.
            ledger.seen.slow_peer += 1;
            return false;
        }
        ledger.queued(self.life);
        self.transmit(now, link);
        true
    }

    /// Changes what a peer may do here. As in production, it loses its link and comes back with
    /// its new rights.
    pub(super) fn change_rule(&mut self, now: Time, peer: NodeId, rule: Rule, ledger: &mut Ledger) {
        self.rules.insert(peer, rule);
        self.mesh.handle_trust_changed(now, |id| *id != peer);
        self.perform(now, ledger);
    }

    // What the world tells.

    pub(super) fn handle_connected(
        &mut self,
        now: Time,
        link: LinkId,
        target: Option<TargetKey>,
        life: Life,
    ) {
        let peer = node_id(life.node);
        let rule = self.rules.get(&peer).copied().unwrap_or_default();
        let grants = rule.grants();
        let flow = Flow::new(now, self.id, &LIMITS, SEND_QUEUE);
        let end = Link { peer, life, flow, grants: grants.clone(), rule, open: false };
        self.links.insert(link, end);
        let claimed = Some(peer);
        let connection = Connection { grants, claimed, target, ..Connection::default() };
        self.mesh.handle_connected(now, link, connection);
    }

    pub(super) fn handle_dial_failed(&mut self, now: Time, target: &TargetKey) {
        self.mesh.handle_dial_failed(now, target, "unreachable".into());
    }

    pub(super) fn handle_closed(&mut self, now: Time, link: LinkId, ledger: &mut Ledger) {
        self.mesh.handle_closed(now, link, DownReason::Closed);
        self.perform(now, ledger);
    }

    pub(super) fn handle_released(&mut self, now: Time, link: LinkId) {
        if let Some(end) = self.links.get_mut(&link) {
            end.flow.handle_released(1);
        }
        self.transmit(now, link);
    }

    pub(super) fn handle_batch(
        &mut self,
        now: Time,
        link: LinkId,
        frames: Vec<Bytes>,
        ledger: &mut Ledger,
    ) {
        let Some(end) = self.links.get_mut(&link) else {
            return;
        };
        let (me, peer) = (self.id, end.peer);
        let mut batch = decode(frames, &me, &peer, MAX_BODY as usize).expect("peers are honest");
        end.flow.handle_preamble(now, &batch.preamble).expect("peers are honest");
        while let Some(record) = batch.next_record().expect("peers are honest") {
            // A record may end the link; what follows it is ignored.
            let Some(end) = self.links.get(&link) else {
                return;
            };
            match incoming(record, peer, end.open, &end.grants).expect("peers are honest") {
                Incoming::Event(message) => self.handle_event(link, message, ledger),
                Incoming::Message { received, lane, cost } => {
                    self.handle_message(now, link, received, lane, Totals::one(cost));
                }
                Incoming::Control(control) => self.handle_control(now, link, control, ledger),
                Incoming::Unknown => panic!("an unknown record"),
            }
            self.perform(now, ledger);
        }
        self.perform(now, ledger);
    }

    fn handle_control(
        &mut self,
        now: Time,
        link: LinkId,
        control: ReceivedControl,
        ledger: &mut Ledger,
    ) {
        match control {
            ReceivedControl::DropReport(counts) => {
                let flow = &mut self.links.get_mut(&link).unwrap().flow;
                for (reason, count) in flow.handle_drop_report(&counts).expect("peers are honest") {
                    ledger.dropped(self.life, reason, count);
                }
            }
            ReceivedControl::Cancel(id) => self.front.handle_cancel(Path::Link(link), id),
            ReceivedControl::Mesh(control) => self.mesh.handle_control(now, link, control),
            ReceivedControl::Answers(_) | ReceivedControl::Epochs(_) => {
                panic!("this world has no outboxes")
            }
            ReceivedControl::Inbox(..) => panic!("this world has no inboxes"),
        }
    }

    fn handle_message(
        &mut self,
        now: Time,
        link: LinkId,
        received: ReceivedMessage,
        lane: Lane,
        held: Totals,
    ) {
        let flow = &mut self.links.get_mut(&link).unwrap().flow;
        flow.handle_received(lane, held).expect("peers are honest");
        let hold = SimHold { link, lane, held, returned: self.returned.clone() };
        let path = Path::Link(link);
        match received {
            ReceivedMessage::Call(message) => self.front.handle_call(now, path, message, hold),
            ReceivedMessage::RefusedCall(message) => {
                self.front.handle_refused(path, message, hold, DropReason::NotAllowed);
            }
            ReceivedMessage::Outcome(id, outcome) => {
                self.front.handle_outcome(path, id, outcome, hold);
            }
            ReceivedMessage::Delivery(_) | ReceivedMessage::RefusedDelivery(_) => {
                panic!("this world has no outboxes")
            }
        }
    }

    fn handle_event(&mut self, link: LinkId, message: Message, ledger: &mut Ledger) {
        let end = self.links.get_mut(&link).unwrap();
        let new = Totals::one(message.cost());
        end.flow.handle_received(Lane::Events, new).expect("peers are honest");
        let Destination::Topic(topic) = message.header.destination.clone() else { panic!() };
        let hold = |held| {
            Some(SimHold { link, lane: Lane::Events, held, returned: self.returned.clone() })
        };
        if !may_publish(&end.grants, topic.as_str()) {
            ledger.seen.denied += 1;
            end.flow.handle_dropped(DropReason::NotAllowed, 1);
            drop(hold(new));
            return;
        }
        let sink = self.subscription.pattern.matches(&topic).then_some(&self.subscription);
        let mut dropped = Vec::new();
        let batch = EventBatch::single(topic, message);
        deliver(batch, sink.as_slice(), &hold, &mut |outcome| match outcome {
            Delivered::NoSubscriber(hold, count) => {
                dropped.extend(hold.map(|it| (it.link, DropReason::NoSubscriber, count)));
            }
            Delivered::Pushed(_, lost) => dropped.extend(
                lost.into_iter()
                    .filter_map(|it| Some((it.hold.as_ref()?.link, it.reason, it.count))),
            ),
        });
        for (link, reason, count) in dropped {
            if let Some(end) = self.links.get_mut(&link) {
                end.flow.handle_dropped(reason, count);
            } else {
                // Its sender counts it as in doubt.
                ledger.seen.lost_with_link += count;
            }
        }
        if !self.subscriber_busy {
            self.take_later();
        }
    }

    // The subscriber and the handlers.

    fn take_later(&mut self) {
        self.subscriber_busy = true;
        let after = Duration::from_micros(self.random.below(4000));
        self.requests.push_back(Request::Take { after });
    }

    fn take(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.taking.as_mut().and_then(EventBatch::take) {
                return Some(message);
            }
            self.taking = Some(self.subscription.queue.borrow_mut().pop()?);
        }
    }

    /// The subscriber takes an event, and now and then asks a question before the next.
    pub(super) fn take_event(&mut self, now: Time, ledger: &mut Ledger) {
        self.subscriber_busy = false;
        let Some(event) = self.take() else {
            self.taking = None;
            return self.perform(now, ledger);
        };
        let sender = life_of(event.header.id, event.from);
        ledger.reached(sender, self.life, event.header.id);
        if let Destination::Topic(topic) = &event.header.destination {
            ledger.reached_in_order(sender, self.life, topic.as_str(), event.header.id);
        }
        self.perform(now, ledger);
        if self.random.once_in(8)
            && self.call_service(now, "work", Some(Waiter::Subscriber), ledger)
        {
            self.subscriber_busy = true;
        } else {
            self.take_later();
        }
    }

    fn start(&mut self, run: Run<SimHost>, ledger: &mut Ledger) {
        let Run { number, key, message, .. } = run;
        let sender = life_of(message.header.id, message.from);
        ledger.reached(sender, self.life, message.header.id);
        if let Path::Link(link) = key.path
            && let Some(end) = self.links.get(&link)
        {
            assert!(end.rule.lets_send(&message.header.destination), "it was not allowed");
        }
        let order = message.header.ordering_key().map(str::to_owned);
        if let Some(order) = &order {
            let mut running = self.running.values();
            let beside = running.any(|other| other.order.as_ref() == Some(order));
            assert!(!beside, "two calls of one key run at once");
            ledger.reached_in_order(sender, self.life, order, message.header.id);
            ledger.seen.ordered_calls += 1;
        }
        self.running.insert(key, Running { number, order });
        let after = Duration::from_micros(self.random.below(20_000));
        self.requests.push_back(Request::Handle { key, after });
    }

    /// A handler reached its end, or the point where it asks another service first.
    pub(super) fn handler_due(&mut self, now: Time, key: CallKey, ledger: &mut Ledger) {
        let asks = self.random.once_in(4);
        let service = SERVICES[self.random.below(2) as usize];
        if !(asks && self.call_service(now, service, Some(Waiter::Handler(key)), ledger)) {
            self.finish(now, key, ledger);
        }
        self.perform(now, ledger);
    }

    fn finish(&mut self, now: Time, key: CallKey, ledger: &mut Ledger) {
        let Some(Running { number, .. }) = self.running.remove(&key) else {
            return;
        };
        let ended = match self.random.once_in(5) {
            true => {
                let failure = Failure { code: "no".into(), text: "not today".into() };
                Ended::Failed { failure, rejects: false }
            }
            false => Ended::Replied { body: Bytes::from_static(b"done"), extra: None },
        };
        if let Some(next) = self.front.handle_ended(now, number, key, ended) {
            self.start(next, ledger);
        }
    }

    fn handle_completed(
        &mut self,
        now: Time,
        to: Life,
        waiter: Waiter,
        outcome: &RequestOutcome,
        ledger: &mut Ledger,
    ) {
        match outcome {
            RequestOutcome::Reply(_) | RequestOutcome::Failed(_) => ledger.replied(to),
            RequestOutcome::DeadlineExceeded => ledger.seen.late_requests += 1,
            RequestOutcome::PeerLost { .. } => ledger.seen.failed_requests += 1,
            RequestOutcome::Unrouted | RequestOutcome::ShutDown => panic!("{outcome:?}"),
        }
        match waiter {
            Waiter::Nobody => {}
            Waiter::Handler(key) => self.finish(now, key, ledger),
            Waiter::Subscriber => {
                self.subscriber_busy = false;
                self.take_later();
            }
        }
    }

    // Time, actions and effects.

    pub(super) fn handle_timeout(&mut self, now: Time, ledger: &mut Ledger) {
        self.mesh.handle_timeout(now);
        self.front.handle_timeout(now);
        let mut silent = Vec::new();
        for (link, end) in &mut self.links {
            if end.flow.handle_timeout(now, &TIMING) == Liveness::Dead {
                silent.push(*link);
            }
        }
        for link in silent {
            ledger.seen.silent_deaths += 1;
            self.mesh.handle_closed(now, link, DownReason::Silent);
        }
        self.perform(now, ledger);
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        links.into_iter().for_each(|link| self.transmit(now, link));
    }

    pub(super) fn poll_timeout(&self, now: Time) -> Option<Time> {
        let flows = self.links.values().map(|link| link.flow.poll_timeout(now, &TIMING));
        flows.chain(self.mesh.poll_timeout()).chain(self.front.poll_timeout()).min()
    }

    /// Carries out what the engine has decided, until nothing is left.
    pub(super) fn perform(&mut self, now: Time, ledger: &mut Ledger) {
        loop {
            if let Some(action) = self.mesh.poll_action() {
                self.perform_action(now, action, ledger);
            } else if let Some(effect) = self.front.poll_effect() {
                self.perform_effect(now, effect, ledger);
            } else {
                let returned = std::mem::take(&mut *self.returned.borrow_mut());
                if returned.is_empty() {
                    return;
                }
                for (link, lane, held) in returned {
                    if let Some(end) = self.links.get_mut(&link) {
                        end.flow.handle_consumed(lane, held);
                    }
                    self.transmit(now, link);
                }
            }
        }
    }

    fn perform_effect(&mut self, now: Time, effect: Effect<SimHost>, ledger: &mut Ledger) {
        match effect {
            Effect::Run(run) => self.start(run, ledger),
            Effect::Interrupt(()) => ledger.seen.interrupted += 1,
            Effect::Abort(()) => panic!("nobody shuts down"),
            Effect::CallEnded(_) | Effect::Discard(_) => {}
            Effect::Complete((id, to, waiter), outcome) => {
                ledger.request_ended(self.life, id, &outcome);
                self.handle_completed(now, to, waiter, &outcome, ledger);
            }
            Effect::TakeBack(link, id) => {
                if let Some(end) = self.links.get_mut(&link) {
                    if end.flow.take_back(id) {
                        ledger.dropped(self.life, DropReason::Cancelled, 1);
                    } else {
                        end.flow.enqueue_control(Control::Cancel(id));
                    }
                }
                self.transmit(now, link);
            }
            Effect::Reply(hold, reply) => self.reply(now, hold, reply, ledger),
            Effect::Release(hold) => drop(hold),
            Effect::Drop(hold, reason) => {
                match reason {
                    DropReason::Cancelled => ledger.seen.cancelled += 1,
                    DropReason::NotAllowed => ledger.seen.denied += 1,
                    _ => {}
                }
                if let Some(end) = self.links.get_mut(&hold.link) {
                    end.flow.handle_dropped(reason, 1);
                }
            }
            Effect::Forget(_) => ledger.seen.lost_with_link += 1,
            Effect::Settle(..) => panic!("this world has no outboxes"),
            Effect::OwnDropped { reason, count, .. } => ledger.dropped(self.life, reason, count),
            Effect::OwnInDoubt(count) => ledger.in_doubt(self.life, count),
        }
    }

    fn reply(&mut self, now: Time, hold: SimHold, reply: Reply, ledger: &mut Ledger) {
        let Reply { to, call, payload, extra } = reply;
        if let Payload::Failed(failure) = &payload
            && failure.code == DropReason::NotAllowed.as_str()
        {
            ledger.seen.denied += 1;
        }
        let mut header = Header::new(self.next_id(now), Kind::Document, Destination::Node(to));
        header.correlation_id = Some(call);
        header.extra = extra;
        let link = hold.link;
        drop(hold);
        self.enqueue(now, link, Envelope { header, payload }, ledger);
    }

    fn perform_action(&mut self, now: Time, action: Action, ledger: &mut Ledger) {
        match action {
            Action::Dial { target, addresses } => {
                let Address::Memory(address) = addresses[0] else { panic!() };
                self.requests.push_back(Request::Dial { target, address: address as usize });
            }
            Action::Send(link, control) => {
                if let Some(end) = self.links.get_mut(&link) {
                    end.flow.enqueue_control(control);
                }
                self.transmit(now, link);
            }
            Action::Open { link, limits } => {
                if let Some(end) = self.links.get_mut(&link) {
                    end.flow.handle_limits(&limits);
                    end.open = true;
                }
            }
            Action::Close { link, reason } => {
                match reason {
                    DownReason::Bye(Bye::Duplicate) => ledger.seen.duplicate_links += 1,
                    DownReason::Replaced => ledger.seen.replaced_links += 1,
                    DownReason::Distrusted => ledger.seen.distrusted_links += 1,
                    _ => {}
                }
                self.transmit(now, link);
                self.requests.push_back(Request::Close(link));
                if let Some(mut end) = self.links.remove(&link) {
                    let loss = end.flow.close();
                    self.front.handle_link_lost(link, end.peer, &loss);
                }
            }
            Action::Report(MeshEvent::IdentityConflict { .. }) => panic!("ids are unique here"),
            Action::Admit(_) | Action::Report(_) => {}
            Action::Route { link, peer, change } => {
                self.routing.apply(peer, link, &link, change);
            }
        }
    }

    fn transmit(&mut self, now: Time, link: LinkId) {
        let Some(end) = self.links.get_mut(&link) else {
            return;
        };
        while let Some(batch) = end.flow.poll_transmit(now) {
            self.requests.push_back(Request::Transmit { link, batch });
        }
    }

    pub(super) fn open_requests(&self) -> Vec<MessageId> {
        self.front.open_requests()
    }

    /// Returns true if nothing is on its way from or in this node.
    pub(super) fn is_quiet(&self) -> bool {
        self.links.values().all(|link| link.flow.is_settled())
            && self.front.is_quiet()
            && self.running.is_empty()
            && !self.subscriber_busy
    }

    pub(super) fn peer_count(&self) -> usize {
        self.routing.peers()
    }
}
