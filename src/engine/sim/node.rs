//! One simulated node: the engine's pieces, and users who publish, serve and ask.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use super::Random;
use super::ledger::Ledger;
use crate::address::{Destination, Pattern, ServiceName, Topic};
use crate::engine::{
    Action, Admission, Connection, DownReason, Finished, Flow, LinkId, Liveness, Mesh, MeshConfig,
    MeshEvent, Queue, Requests, Routing, Service, Sighting, TargetKey, Time, Timing, least_loaded,
    preferred,
};
use crate::identity::{Incarnation, NodeId};
use crate::message::{Extra, Header, IdSource, Kind, MessageId};
use crate::peer::{Address, Source};
use crate::report::DropReason;
use crate::wire::{
    Bye, Control, EncodedBatch, Envelope, Failure, Lane, Limits, OutgoingEvent, Payload, Record,
    Totals, decode,
};

/// A node and which of its incarnations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Life {
    pub(super) node: usize,
    pub(super) number: u64,
}

/// What a node asks of its world.
#[derive(Debug)]
pub(super) enum Effect {
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

pub(super) type CallKey = (LinkId, MessageId);

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
const SERVICES: [&str; 2] = ["work", "mill"];

/// What a handler or a subscriber does when its request ends.
#[derive(Debug, Clone, Copy)]
enum Waiter {
    Nobody,
    Handler(CallKey),
    Subscriber,
}

struct Call {
    link: LinkId,
    envelope: Envelope,
    cost: u64,
}

pub(super) struct SimNode {
    pub(super) life: Life,
    id: NodeId,
    mesh: Mesh,
    pub(super) flows: BTreeMap<LinkId, Flow>,
    peers: HashMap<LinkId, NodeId>,
    routing: Routing,
    requests: Requests<Waiter>,
    services: HashMap<ServiceName, Service<CallKey, Call, ()>>,
    running: HashMap<CallKey, (ServiceName, Envelope)>,
    patterns: Vec<Pattern>,
    events: Queue<(LinkId, Envelope)>,
    subscriber_busy: bool,
    ids: IdSource,
    turn: usize,
    random: Random,
    pub(super) effects: VecDeque<Effect>,
}

pub(super) fn node_id(node: usize) -> NodeId {
    let mut bytes = [7; 32];
    bytes[0] = node as u8;
    NodeId::from_bytes(bytes)
}

fn life_of(envelope: &Envelope, peer: NodeId) -> Life {
    // Ids are drawn from a stem that is the life's number, and the id's own high bits hold it.
    let stem = u128::from_be_bytes(envelope.header.id.to_bytes()) >> 32 & 0x3fff_ffff;
    Life { node: usize::from(peer.as_bytes()[0]), number: stem as u64 }
}

impl SimNode {
    pub(super) fn new(now: Time, life: Life, nodes: usize, random: Random) -> Self {
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
        let mut services = HashMap::new();
        if life.node % 3 != 2 {
            let name: ServiceName = SERVICES[life.node % 2].parse().unwrap();
            mesh.serve(&name, 2);
            services.insert(name, Service::new(2));
        }
        Self {
            life,
            id,
            mesh,
            flows: BTreeMap::new(),
            peers: HashMap::new(),
            routing: Routing::default(),
            requests: Requests::default(),
            services,
            running: HashMap::new(),
            patterns: vec![pattern],
            events: Queue::new(SUBSCRIPTION_QUEUE),
            subscriber_busy: false,
            ids: IdSource::new(life.number),
            turn: 0,
            random,
            effects: VecDeque::new(),
        }
    }

    // What users do.

    pub(super) fn publish(&mut self, now: Time, ledger: &mut Ledger) {
        let topic: Topic = TOPICS[self.random.below(4) as usize].parse().unwrap();
        let id = self.ids.next(now.since_start().as_millis() as u64);
        let body = Bytes::from(vec![0; self.random.below(300) as usize]);
        let header = Header::new(id, Kind::Event, Destination::Topic(topic.clone()));
        let envelope = Envelope { header, payload: Payload::Event(body) };
        let links: Vec<LinkId> =
            self.routing.subscribers(&topic).iter().map(|(_, link)| **link).collect();
        for link in links {
            self.enqueue(now, link, envelope.clone(), ledger);
        }
    }

    pub(super) fn call(&mut self, now: Time, ledger: &mut Ledger) {
        let waiting = self.random.below(3) > 0;
        let service = SERVICES[self.random.below(2) as usize];
        self.call_service(now, service, waiting.then_some(Waiter::Nobody), ledger);
    }

    /// Sends a call to the least loaded instance; whether there was one with room.
    fn call_service(
        &mut self,
        now: Time,
        service: &str,
        waiter: Option<Waiter>,
        ledger: &mut Ledger,
    ) -> bool {
        let name: ServiceName = service.parse().unwrap();
        self.turn += 1;
        let flows = &self.flows;
        let instances: Vec<_> = self.routing.instances(&name).collect();
        let key = self.random.once_in(3).then(|| format!("key {}", self.random.below(3)));
        let by_load = || {
            least_loaded(&instances, self.turn, |instance| {
                let load = flows.get(&instance.link).map_or(u64::MAX / 64, Flow::unfinished_calls);
                (load, instance.concurrency)
            })
        };
        let chosen = match &key {
            Some(key) => preferred(&instances, key, |instance| instance.peer),
            None => by_load(),
        };
        let Some(link) = chosen.map(|instance| instance.link) else {
            return false;
        };
        let id = self.ids.next(now.since_start().as_millis() as u64);
        let mut header = Header::new(id, Kind::Command, Destination::Service(name));
        header.extra =
            key.map(|key| Box::new(Extra { ordering_key: Some(key), ..Extra::default() }));
        let deadline = now + Duration::from_millis(self.random.between(20, 3000));
        if waiter.is_some() {
            header.reply_to = Some(self.id);
            header.time_to_live = Some(deadline.since(now));
        }
        let body = Bytes::from_static(b"do it");
        let payload = match waiter {
            Some(_) => Payload::Request(body),
            None => Payload::Call(body),
        };
        if !self.enqueue(now, link, Envelope { header, payload }, ledger) {
            return false;
        }
        if let Some(waiter) = waiter {
            ledger.request_opened(id);
            self.requests.insert(id, deadline, Some(link), waiter);
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
        let Some(flow) = self.flows.get_mut(&link) else {
            return false;
        };
        let queued = match &envelope.payload {
            Payload::Event(body) => {
                let Destination::Topic(topic) = &envelope.header.destination else { panic!() };
                let event = OutgoingEvent::new(&envelope.header, topic, body, &self.id);
                flow.enqueue_event(&event).map(drop)
            }
            _ => flow.enqueue(envelope),
        };
        if queued.is_err() {
            // Told to the sender at once; never queued.
            ledger.seen.slow_peer += 1;
            return false;
        }
        ledger.queued(self.life);
        self.transmit(now, link);
        true
    }

    // What the world tells.

    pub(super) fn handle_connected(
        &mut self,
        now: Time,
        link: LinkId,
        target: Option<TargetKey>,
        peer: NodeId,
    ) {
        self.flows.insert(link, Flow::new(now, self.id, &LIMITS, SEND_QUEUE));
        self.peers.insert(link, peer);
        self.mesh.handle_connected(
            now,
            link,
            Connection { claimed: Some(peer), target, ..Connection::default() },
        );
    }

    pub(super) fn handle_dial_failed(&mut self, now: Time, target: &TargetKey) {
        self.mesh.handle_dial_failed(now, target, "unreachable".into());
    }

    pub(super) fn handle_closed(&mut self, now: Time, link: LinkId, ledger: &mut Ledger) {
        self.mesh.handle_closed(now, link, DownReason::Closed);
        self.perform(now, ledger);
    }

    pub(super) fn handle_released(&mut self, now: Time, link: LinkId) {
        if let Some(flow) = self.flows.get_mut(&link) {
            flow.handle_released(1);
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
        let Some(peer) = self.peers.get(&link).copied() else {
            return;
        };
        let me = self.id;
        let mut batch = decode(frames, &me, &peer, MAX_BODY as usize).expect("peers are honest");
        let Some(flow) = self.flows.get_mut(&link) else {
            return;
        };
        flow.handle_preamble(now, &batch.preamble).expect("peers are honest");
        while let Some(record) = batch.next_record().expect("peers are honest") {
            // A record may end the link; what follows it is ignored.
            if !self.flows.contains_key(&link) {
                return;
            }
            match record {
                Record::Control(control) => self.handle_control(now, link, control, ledger),
                Record::Message(envelope) => self.handle_message(now, link, envelope, ledger),
                Record::Unknown(kind) => panic!("unknown record {kind}"),
            }
        }
        self.perform(now, ledger);
    }

    fn handle_control(&mut self, now: Time, link: LinkId, control: Control, ledger: &mut Ledger) {
        match control {
            Control::Dropped(counts) => {
                let flow = self.flows.get_mut(&link).unwrap();
                for (reason, count) in flow.handle_drop_report(&counts).expect("peers are honest") {
                    ledger.dropped(self.life, reason, count);
                }
            }
            Control::Cancel(id) => {
                let key = (link, id);
                let cancelled =
                    self.services.values_mut().find_map(|service| service.handle_cancel(key));
                if let Some(call) = cancelled {
                    ledger.seen.cancelled += 1;
                    self.drop_received(link, Lane::Calls, call.cost, DropReason::Cancelled);
                }
            }
            control => {
                self.mesh.handle_control(now, link, control);
                self.perform(now, ledger);
            }
        }
    }

    fn handle_message(&mut self, now: Time, link: LinkId, envelope: Envelope, ledger: &mut Ledger) {
        let (lane, cost) = (envelope.lane(), envelope.cost());
        let flow = self.flows.get_mut(&link).unwrap();
        flow.handle_received(lane, Totals::one(cost)).expect("peers are honest");
        let sender = life_of(&envelope, self.peers[&link]);
        match &envelope.payload {
            Payload::Event(_) => {
                let Destination::Topic(topic) = &envelope.header.destination else { panic!() };
                if !self.patterns.iter().any(|pattern| pattern.matches(topic)) {
                    return self.drop_received(link, lane, cost, DropReason::NoSubscriber);
                }
                let was_empty = self.events.len() == 0;
                if self.events.push((link, envelope), cost).is_err() {
                    return self.drop_received(link, lane, cost, DropReason::SlowSubscriber);
                }
                if was_empty && !self.subscriber_busy {
                    self.take_later();
                }
            }
            Payload::Call(_) | Payload::Request(_) => {
                let Destination::Service(name) = envelope.header.destination.clone() else {
                    panic!()
                };
                let key = (link, envelope.header.id);
                let expires = envelope.header.time_to_live.map(|ttl| now + ttl);
                let call = Call { link, envelope, cost };
                let admission = match self.services.get_mut(&name) {
                    Some(service) => {
                        let order = call.envelope.header.ordering_key().map(str::to_owned);
                        service.handle_call(key, order.as_deref(), expires, call)
                    }
                    None => Admission::Refused(call),
                };
                match admission {
                    Admission::Start(call) => self.start(name, key, call.envelope, ledger),
                    Admission::Waits => {}
                    Admission::Refused(call) => {
                        self.drop_received(link, lane, call.cost, DropReason::NoService);
                    }
                }
            }
            Payload::Guaranteed(..) => unreachable!("the outbox has a simulation of its own"),
            Payload::Reply(_) | Payload::Failed(_) => {
                let id = envelope.header.correlation_id.expect("a reply names its request");
                match self.requests.remove(id) {
                    Some((waiter, _)) => {
                        ledger.reached(sender, self.life, envelope.header.id);
                        ledger.seen.replies += 1;
                        self.flows.get_mut(&link).unwrap().handle_consumed(lane, Totals::one(cost));
                        self.request_ended(now, id, waiter, ledger);
                    }
                    None => self.drop_received(link, lane, cost, DropReason::Late),
                }
            }
        }
        self.transmit(now, link);
    }

    fn drop_received(&mut self, link: LinkId, lane: Lane, cost: u64, reason: DropReason) {
        if let Some(flow) = self.flows.get_mut(&link) {
            flow.handle_dropped(reason, 1);
            flow.handle_consumed(lane, Totals::one(cost));
        }
    }

    // The subscriber and the handlers.

    fn take_later(&mut self) {
        self.subscriber_busy = true;
        let after = Duration::from_micros(self.random.below(4000));
        self.effects.push_back(Effect::Take { after });
    }

    /// The subscriber takes an event, and now and then asks a question before the next.
    pub(super) fn take_event(&mut self, now: Time, ledger: &mut Ledger) {
        self.subscriber_busy = false;
        let Some((link, event)) = self.events.pop() else {
            return;
        };
        let sender = life_of(&event, event_sender(&event, &self.peers, link));
        ledger.reached(sender, self.life, event.header.id);
        if let Destination::Topic(topic) = &event.header.destination {
            ledger.reached_in_order(sender, self.life, topic.as_str(), event.header.id);
        }
        if let Some(flow) = self.flows.get_mut(&link) {
            flow.handle_consumed(Lane::Events, Totals::one(event.cost()));
        }
        self.transmit(now, link);
        if self.random.once_in(8)
            && self.call_service(now, "work", Some(Waiter::Subscriber), ledger)
        {
            self.subscriber_busy = true;
        } else if self.events.len() > 0 {
            self.take_later();
        }
    }

    fn start(&mut self, name: ServiceName, key: CallKey, call: Envelope, ledger: &mut Ledger) {
        let peer = self.peers.get(&key.0).copied().unwrap_or(self.id);
        let sender = life_of(&call, peer);
        ledger.reached(sender, self.life, call.header.id);
        if let Some(order) = call.header.ordering_key() {
            let mut running = self.running.values();
            let beside = running.any(|(_, other)| other.header.ordering_key() == Some(order));
            assert!(!beside, "two calls of one key run at once");
            ledger.reached_in_order(sender, self.life, order, call.header.id);
            ledger.seen.ordered_calls += 1;
        }
        self.running.insert(key, (name, call));
        let after = Duration::from_micros(self.random.below(20_000));
        self.effects.push_back(Effect::Handle { key, after });
    }

    /// A handler reached its end, or the point where it asks another service first.
    pub(super) fn handler_due(&mut self, now: Time, key: CallKey, ledger: &mut Ledger) {
        let asks = self.random.once_in(4);
        let service = SERVICES[self.random.below(2) as usize];
        if !(asks && self.call_service(now, service, Some(Waiter::Handler(key)), ledger)) {
            self.finish(now, key, ledger);
        }
    }

    fn finish(&mut self, now: Time, key: CallKey, ledger: &mut Ledger) {
        let Some((name, call)) = self.running.remove(&key) else {
            return;
        };
        let link = key.0;
        if let Some(flow) = self.flows.get_mut(&link) {
            flow.handle_consumed(Lane::Calls, Totals::one(call.cost()));
        }
        if call.header.reply_to.is_some() && self.flows.contains_key(&link) {
            let id = self.ids.next(now.since_start().as_millis() as u64);
            let mut header = Header::new(id, Kind::Document, Destination::Node(self.peers[&link]));
            header.correlation_id = Some(call.header.id);
            let failure = Failure { code: "no".into(), text: "not today".into() };
            let payload = match self.random.once_in(5) {
                true => Payload::Failed(failure),
                false => Payload::Reply(Bytes::from_static(b"done")),
            };
            self.enqueue(now, link, Envelope { header, payload }, ledger);
        }
        self.transmit(now, link);
        let service = self.services.get_mut(&name).expect("services stay");
        let Finished { next, expired, .. } = service.handle_finished(now, key);
        for call in expired {
            self.drop_received(call.link, Lane::Calls, call.cost, DropReason::Expired);
            self.transmit(now, call.link);
        }
        if let Some(next) = next {
            self.start(name, (next.link, next.envelope.header.id), next.envelope, ledger);
        }
    }

    fn request_ended(&mut self, now: Time, id: MessageId, waiter: Waiter, ledger: &mut Ledger) {
        ledger.request_ended(id);
        match waiter {
            Waiter::Nobody => {}
            Waiter::Handler(key) => self.finish(now, key, ledger),
            Waiter::Subscriber => {
                self.subscriber_busy = false;
                if self.events.len() > 0 {
                    self.take_later();
                }
            }
        }
    }

    // Time and actions.

    pub(super) fn handle_timeout(&mut self, now: Time, ledger: &mut Ledger) {
        self.mesh.handle_timeout(now);
        for (id, waiter, link) in self.requests.handle_timeout(now) {
            ledger.seen.late_requests += 1;
            if let Some(flow) = link.and_then(|link| self.flows.get_mut(&link)) {
                if flow.take_back(id) {
                    ledger.dropped(self.life, DropReason::Cancelled, 1);
                } else {
                    flow.enqueue_control(Control::Cancel(id));
                }
            }
            self.request_ended(now, id, waiter, ledger);
        }
        let mut silent = Vec::new();
        for (link, flow) in &mut self.flows {
            if flow.handle_timeout(now, &TIMING) == Liveness::Dead {
                silent.push(*link);
            }
        }
        for link in silent {
            ledger.seen.silent_deaths += 1;
            self.mesh.handle_closed(now, link, DownReason::Silent);
            self.effects.push_back(Effect::Close(link));
            self.lose(now, link, ledger);
        }
        self.perform(now, ledger);
        let links: Vec<LinkId> = self.flows.keys().copied().collect();
        links.into_iter().for_each(|link| self.transmit(now, link));
    }

    pub(super) fn poll_timeout(&self, now: Time) -> Option<Time> {
        let flows = self.flows.values().map(|flow| flow.poll_timeout(now, &TIMING));
        flows.chain(self.mesh.poll_timeout()).chain(self.requests.poll_timeout()).min()
    }

    pub(super) fn perform(&mut self, now: Time, ledger: &mut Ledger) {
        while let Some(action) = self.mesh.poll_action() {
            match action {
                Action::Dial { target, addresses } => {
                    let Address::Memory(address) = addresses[0] else { panic!() };
                    self.effects.push_back(Effect::Dial { target, address: address as usize });
                }
                Action::Send(link, control) => {
                    if let Some(flow) = self.flows.get_mut(&link) {
                        flow.enqueue_control(control);
                    }
                    self.transmit(now, link);
                }
                Action::Open { link, limits } => {
                    if let Some(flow) = self.flows.get_mut(&link) {
                        flow.handle_limits(&limits);
                    }
                }
                Action::Close { link, reason } => {
                    match reason {
                        DownReason::Bye(Bye::Duplicate) => ledger.seen.duplicate_links += 1,
                        DownReason::Replaced => ledger.seen.replaced_links += 1,
                        _ => {}
                    }
                    self.transmit(now, link);
                    self.effects.push_back(Effect::Close(link));
                    self.lose(now, link, ledger);
                }
                Action::Report(MeshEvent::IdentityConflict { .. }) => panic!("ids are unique here"),
                Action::Admit(_) | Action::Report(_) => {}
                Action::Route { link, peer, change } => {
                    self.routing.apply(peer, link, &link, change);
                }
            }
        }
    }

    fn lose(&mut self, now: Time, link: LinkId, ledger: &mut Ledger) {
        let Some(mut flow) = self.flows.remove(&link) else {
            return;
        };
        let lost = flow.close();
        ledger.dropped(self.life, DropReason::LinkLost, lost.unsent);
        ledger.in_doubt(self.life, lost.in_doubt);
        for service in self.services.values_mut() {
            service.take_waiting(|key| key.0 == link);
        }
        for (id, waiter) in self.requests.handle_link_lost(link) {
            ledger.seen.failed_requests += 1;
            self.request_ended(now, id, waiter, ledger);
        }
    }

    fn transmit(&mut self, now: Time, link: LinkId) {
        let Some(flow) = self.flows.get_mut(&link) else {
            return;
        };
        while let Some(batch) = flow.poll_transmit(now) {
            self.effects.push_back(Effect::Transmit { link, batch });
        }
    }

    pub(super) fn open_requests(&mut self) -> Vec<MessageId> {
        let forever = Time::after_start(Duration::MAX);
        self.requests.handle_timeout(forever).into_iter().map(|(id, _, _)| id).collect()
    }

    /// Whether nothing is on its way from or in this node.
    pub(super) fn is_quiet(&self) -> bool {
        self.flows.values().all(Flow::is_settled)
            && self.requests.len() == 0
            && self.running.is_empty()
            && self.events.len() == 0
            && self.services.values().all(Service::is_idle)
    }

    pub(super) fn peer_count(&self) -> usize {
        self.routing.peers()
    }
}

fn event_sender(event: &Envelope, peers: &HashMap<LinkId, NodeId>, link: LinkId) -> NodeId {
    // A link's peer is remembered after the link's end, for the events that it left behind.
    debug_assert!(matches!(event.payload, Payload::Event(_)));
    peers[&link]
}
