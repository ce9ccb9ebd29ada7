//! Users who publish, call and ask, the subscriber, and the handlers.

use std::time::Duration;

use bytes::Bytes;

use super::{
    CONCURRENCY, Later, Life, Running, SimHold, SimHost, SimNode, Waiter, life_of, node_id,
};
use crate::address::{Destination, ServiceName, Topic};
use crate::engine::front::CallKey;
use crate::engine::sim::disk::Crash;
use crate::engine::sim::ledger::Ledger;
use crate::engine::sim::promises::{KEYS, Nature, place};
use crate::engine::{
    Candidate, Effect, Ended, EventBatch, Flow, Front, LinkId, Path, Reply, RequestOutcome,
    Routing, Run, choose,
};
use crate::identity::NodeId;
use crate::message::{Extra, Header, Kind, Message};
use crate::report::DropReason;
use crate::wire::{Control, Envelope, Failure, OutgoingEvent, Payload};

const TOPICS: [&str; 4] = ["a.x", "a.y", "b.x", "b.y"];
const FORGED: &[u8] = b"forged";
const NAMES: [&str; 2] = ["work", "mill"];

/// An instance of a service, and its load.
struct Instance {
    node: NodeId,
    link: Option<LinkId>,
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

/// The instance that takes a guaranteed message; `load` gives none for one that may not take it.
pub(super) fn choose_by(
    routing: &Routing,
    front: &Front<SimHost>,
    me: NodeId,
    turn: &mut usize,
    name: &ServiceName,
    key: Option<&str>,
    load: &dyn Fn(&NodeId) -> Option<u64>,
) -> Option<NodeId> {
    let there = routing.instances(name).map(|it| (it.peer, it.concurrency));
    let here = front.load(name).map(|(_, concurrency)| (me, concurrency));
    let weigh = |(node, concurrency)| {
        Some(Instance { node, link: None, load: (load(&node)?, concurrency) })
    };
    let all: Vec<Instance> = there.chain(here).filter_map(weigh).collect();
    *turn += 1;
    choose(&all, key, *turn).map(|it| it.node)
}

impl SimNode {
    // What users do.

    pub(in super::super) fn publish(&mut self, ledger: &mut Ledger) {
        let topic: Topic = TOPICS[self.random.below(4) as usize].parse().unwrap();
        let id = self.next_id();
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
                Err(_) => ledger.seen.add("drops for a slow peer", 1),
            }
            self.transmit(link);
        }
    }

    pub(in super::super) fn call(&mut self, ledger: &mut Ledger) {
        let waiting = self.random.below(3) > 0;
        let service = NAMES[self.random.below(2) as usize];
        self.call_service(service, waiting.then_some(Waiter::Nobody), ledger);
    }

    /// Sends a call to an instance. Returns false if there was none with room.
    fn call_service(&mut self, service: &str, waiter: Option<Waiter>, ledger: &mut Ledger) -> bool {
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
                Instance { node: instance.peer, link: Some(instance.link), load }
            })
            .collect();
        let key = self.random.once_in(3).then(|| KEYS[self.random.below(2) as usize]);
        let Some(link) = choose(&instances, key, self.turn).and_then(|it| it.link) else {
            return false;
        };
        let id = self.next_id();
        let mut header = Header::new(id, Kind::Command, Destination::Service(name));
        header.extra =
            key.map(|key| Box::new(Extra { ordering_key: Some(key.into()), ..Extra::default() }));
        let lasts = Duration::from_millis(self.random.between(20, 3000));
        let body = Bytes::from_static(b"do it");
        let Some(to) = self.links.get(&link).map(|end| end.life) else { return false };
        let payload = match waiter {
            Some(waiter) => {
                header.reply_to = Some(self.id);
                header.time_to_live = Some(lasts);
                let (deadline, path) = (self.now.time + lasts, Path::Link(link));
                self.front.open_request(id, deadline, path, link, (id, to, waiter));
                Payload::Request(body)
            }
            None => Payload::Call(body),
        };
        if !self.enqueue(link, Envelope { header, payload }, ledger) {
            self.front.close_request(id);
            return false;
        }
        if waiter.is_some() {
            ledger.request_opened(self.life, id, to);
        }
        true
    }

    fn enqueue(&mut self, link: LinkId, envelope: Envelope, ledger: &mut Ledger) -> bool {
        let Some(end) = self.links.get_mut(&link) else {
            return false;
        };
        if end.flow.enqueue(envelope).is_err() {
            // The sender is told at once; it was never queued.
            ledger.seen.add("drops for a slow peer", 1);
            return false;
        }
        ledger.queued(self.life);
        self.transmit(link);
        true
    }

    /// Replies to another node's request in the place of whoever was asked. The caller has to take
    /// it for a reply that is too late.
    pub(in super::super) fn forge(&mut self, ledger: &mut Ledger) {
        let Some((caller, id)) = ledger.any_request(self.life, self.random.next()) else { return };
        let Some(link) = self.routing.link(&node_id(caller.node)).copied() else { return };
        let to = Destination::Node(node_id(caller.node));
        let mut header = Header::new(self.next_id(), Kind::Document, to);
        header.correlation_id = Some(id);
        let payload = Payload::Reply(Bytes::from_static(FORGED));
        if self.enqueue(link, Envelope { header, payload }, ledger) {
            ledger.seen.add("forged replies", 1);
        }
    }

    // The subscriber.

    pub(super) fn take_later(&mut self) {
        self.subscriber_busy = true;
        let after = self.random.below(4000);
        self.later(after, Later::Take);
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
    pub(super) fn take_event(&mut self, ledger: &mut Ledger) {
        self.subscriber_busy = false;
        let Some(event) = self.take() else {
            self.taking = None;
            return;
        };
        let sender = life_of(event.header.id, event.from);
        ledger.reached(sender, self.life, event.header.id);
        if let Destination::Topic(topic) = &event.header.destination {
            ledger.reached_in_order(sender, self.life, topic.as_str(), event.header.id);
        }
        self.perform(ledger);
        if self.random.once_in(8)
            && !self.ending.has_begun()
            && self.call_service("work", Some(Waiter::Subscriber), ledger)
        {
            self.subscriber_busy = true;
        } else {
            self.take_later();
        }
    }

    // The handlers.

    pub(super) fn start(&mut self, run: Run<SimHost>, ledger: &mut Ledger) {
        let Run { number, key, message, deadline, handle, .. } = run;
        assert!(deadline.is_none_or(|at| at >= self.now.time), "it had expired");
        assert!(!self.taken_back.contains(&key), "it had been taken back");
        let beside = self.running.values().filter(|other| other.number == number).count();
        assert!(beside < CONCURRENCY as usize, "too many run at once");
        if let Some(end) = self.end(key.path) {
            assert!(end.rule.lets_send(&message.header.destination), "it was not allowed");
        }
        let order = message.header.ordering_key().map(str::to_owned);
        if let Some(order) = &order {
            let mut running = self.running.values();
            let beside =
                running.any(|other| other.number == number && other.order.as_ref() == Some(order));
            assert!(!beside, "two calls of one key run at once");
        }
        let place = message.delivery.is_some().then(|| place(self.life.node, &message));
        match place {
            Some(place) => {
                self.begin_delivery(&message);
                let again = message.delivery.as_ref().is_some_and(|it| it.redelivered);
                if ledger.promises.begin(place, again) == Nature::Killer {
                    ledger.seen.add("messages that kill their process", 1);
                    return self.die(Crash::Process);
                }
            }
            None => {
                let sender = life_of(message.header.id, message.from);
                ledger.reached(sender, self.life, message.header.id);
                if let Some(order) = &order {
                    // A service that is offered again doesn't wait for what the one before took.
                    let of_service = format!("{order} of {number:?}");
                    ledger.reached_in_order(sender, self.life, &of_service, message.header.id);
                    ledger.seen.add("calls with an ordering key", 1);
                }
            }
        }
        let before = self.running.insert(key, Running { number, order, handle, place });
        assert!(before.is_none(), "one call runs twice at once");
        let after = self.random.below(20_000);
        self.later(after, Later::Handler(key));
    }

    /// A handler reached its end, or the point where it asks another service first.
    pub(super) fn handler_due(&mut self, key: CallKey, ledger: &mut Ledger) {
        let asks = self.random.once_in(4) && !self.ending.has_begun();
        let service = NAMES[self.random.below(2) as usize];
        if !(asks && self.call_service(service, Some(Waiter::Handler(key)), ledger)) {
            self.finish(key, ledger);
        }
    }

    fn finish(&mut self, key: CallKey, ledger: &mut Ledger) {
        let Some(Running { number, handle, place, .. }) = self.running.remove(&key) else {
            return;
        };
        if handle.get() {
            return;
        }
        let replied = || Ended::Replied { body: Bytes::from_static(b"done"), extra: None };
        let failed = |text: &str, rejects| {
            let failure = Failure { code: "no".into(), text: text.into() };
            Ended::Failed { failure, rejects }
        };
        let ended = match place {
            Some(place) => match ledger.promises.sent[&place.2].nature {
                Nature::Flaky(fails) if ledger.promises.times_begun(place) <= fails => {
                    failed("flaky", false)
                }
                Nature::Good | Nature::Flaky(_) => replied(),
                Nature::Poison => failed("poison", false),
                Nature::Rejected => failed("never", true),
                Nature::Killer => unreachable!("it killed its process"),
            },
            None if self.random.once_in(5) => failed("not today", false),
            None => replied(),
        };
        if let Some(next) = self.front.handle_ended(self.now.time, number, key, ended) {
            self.start(next, ledger);
        }
    }

    fn handle_completed(
        &mut self,
        to: Life,
        waiter: Waiter,
        outcome: &RequestOutcome,
        ledger: &mut Ledger,
    ) {
        match outcome {
            RequestOutcome::Reply(reply) => {
                assert_ne!(&reply.body[..], FORGED, "a forged reply ended a request");
                ledger.replied(to);
            }
            RequestOutcome::Failed(_) => ledger.replied(to),
            RequestOutcome::DeadlineExceeded => ledger.seen.add("requests past their deadline", 1),
            RequestOutcome::PeerLost { .. } => {
                ledger.seen.add("requests that failed with their link", 1);
            }
            // Links end before their node does, and there is no broker.
            RequestOutcome::ShutDown | RequestOutcome::Unrouted => panic!("{outcome:?}"),
        }
        match waiter {
            Waiter::Nobody => {}
            Waiter::Handler(key) => self.finish(key, ledger),
            Waiter::Subscriber => {
                self.subscriber_busy = false;
                self.take_later();
            }
        }
    }

    // What the front decides.

    pub(super) fn perform_effect(&mut self, effect: Effect<SimHost>, ledger: &mut Ledger) {
        match effect {
            Effect::Run(run) => self.start(run, ledger),
            Effect::Interrupt(_) => ledger.seen.add("running calls that were interrupted", 1),
            Effect::Abort(handle) => {
                ledger.seen.add("handlers that a shutdown ended", 1);
                handle.set(true);
            }
            Effect::CallEnded(_) | Effect::Discard(_) => {}
            Effect::Complete((id, to, waiter), outcome) => {
                ledger.request_ended(self.life, id, &outcome);
                self.handle_completed(to, waiter, &outcome, ledger);
            }
            Effect::TakeBack(link, id) => {
                if let Some(end) = self.links.get_mut(&link) {
                    if end.flow.take_back(id) {
                        ledger.dropped(self.life, DropReason::Cancelled, 1);
                    } else {
                        end.flow.enqueue_control(&Control::Cancel(id));
                    }
                }
                self.transmit(link);
            }
            Effect::Reply(hold, reply) => self.reply(hold, reply, ledger),
            Effect::Release(hold) => drop(hold),
            Effect::Drop(hold, reason) => {
                match reason {
                    DropReason::Cancelled => ledger.seen.add("calls taken back", 1),
                    DropReason::NotAllowed => ledger.seen.add("messages that a rule refused", 1),
                    _ => {}
                }
                if let Some(end) = self.end(hold.path) {
                    end.flow.handle_dropped(reason, 1);
                }
            }
            Effect::Forget(_) => ledger.seen.add("queued calls that were lost with their link", 1),
            Effect::Settle(hold, settlement, dropped) => {
                assert!(dropped.is_none(), "nobody takes back a guaranteed message");
                drop(hold);
                self.settle(settlement, ledger);
            }
            Effect::OwnDropped { reason, count, .. } => ledger.dropped(self.life, reason, count),
            Effect::OwnInDoubt(count) => ledger.in_doubt(self.life, count),
        }
    }

    fn reply(&mut self, hold: SimHold, reply: Reply, ledger: &mut Ledger) {
        let Reply { to, call, payload, extra } = reply;
        if let Payload::Failed(failure) = &payload {
            match DropReason::from_wire(&failure.code) {
                DropReason::NotAllowed => ledger.seen.add("messages that a rule refused", 1),
                DropReason::Expired => ledger.seen.add("calls that expired in the queue", 1),
                DropReason::NoService => ledger.seen.add("calls that nothing served any more", 1),
                _ => {}
            }
        }
        let mut header = Header::new(self.next_id(), Kind::Document, Destination::Node(to));
        header.correlation_id = Some(call);
        header.extra = extra;
        let Path::Link(link) = hold.path else { panic!("nobody asks itself") };
        drop(hold);
        self.enqueue(link, Envelope { header, payload }, ledger);
    }
}
