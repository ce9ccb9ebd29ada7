//! The front of the engine: permission, admission, completion, refusal and the loss of a path.
//!
//! ```text
//!   a record over a link ──▶ incoming() ─ allowed? ─▶ Front ─────▶ Effect
//!   a call of this node ────────────────────────────▶  services      Run, Interrupt
//!   a handler's end ────────────────────────────────▶  requests      Reply, Settle, Drop
//!   a lost path, a deadline ────────────────────────▶                Complete, TakeBack
//! ```
//!
//! The node's shell (`core/`) and the simulator drive the same front and only carry out its
//! effects. What an event passes on its way to a subscription is in [`super::subscription`], the
//! choice among instances in [`super::choice`].

mod incoming;
mod requests;
mod service;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

pub(crate) use incoming::{
    Incoming, OutOfTurn, ReceivedControl, ReceivedMessage, incoming, may_publish,
};
use requests::Requests;
use service::{Admission, Service};

use super::flow::LinkLoss;
use super::{LinkId, Path, Time};
use crate::address::{Destination, Pattern, ServiceName};
use crate::identity::NodeId;
use crate::message::{Extra, Message, MessageId, check_size};
use crate::report::DropReason;
use crate::wire::{Delivery, DeliveryOutcome, Failure, Payload};

/// The types by which a front's owner carries out its effects.
pub(crate) trait Host {
    /// The part of its path that a received message holds until it ends, such as credit.
    type Hold;
    /// Waits for the outcome of a request.
    type Waiter;
    /// The way that a request was sent on, by which it is taken back.
    type Way;
    /// Runs the calls of one service.
    type Service: Clone;
    /// Interrupts one call. Clones reach the same call.
    type Handle: Clone + Default;
}

/// The outcome of a request.
#[derive(Debug)]
pub(crate) enum RequestOutcome {
    Reply(Message),
    Failed(Failure),
    DeadlineExceeded,
    PeerLost {
        maybe_executed: bool,
    },
    /// The broker found no taker.
    Unrouted,
    ShutDown,
}

/// How a handler ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Replied {
        body: Bytes,
        extra: Option<Box<Extra>>,
    },
    Failed {
        failure: Failure,
        /// A guaranteed message becomes a dead letter at once.
        rejects: bool,
    },
}

/// One call among all that a node has received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CallKey {
    pub(crate) path: Path,
    pub(crate) id: MessageId,
}

/// One service or durable subscription of this node, from its start to the end of its last call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ServiceNumber(u64);

/// A call to run.
pub(crate) struct Run<H: Host> {
    pub(crate) service: H::Service,
    pub(crate) number: ServiceNumber,
    pub(crate) key: CallKey,
    pub(crate) message: Message,
    pub(crate) deadline: Option<Time>,
    pub(crate) handle: H::Handle,
}

/// A reply to a call. It goes to the node that called, whatever return address the call names: a
/// reply elsewhere could pass for the answer to another node's request.
pub(crate) struct Reply {
    pub(crate) to: NodeId,
    pub(crate) call: MessageId,
    pub(crate) payload: Payload,
    pub(crate) extra: Option<Box<Extra>>,
}

/// The end of a guaranteed message at this node.
pub(crate) struct Settlement {
    pub(crate) id: MessageId,
    pub(crate) from: NodeId,
    pub(crate) delivery: Arc<Delivery>,
    /// `None` if it left its queue without having been run.
    pub(crate) outcome: Option<DeliveryOutcome>,
}

/// A decision of the front, in the order in which they are to be carried out.
pub(crate) enum Effect<H: Host> {
    /// Run a handler; [`Front::handle_ended`] tells of its end.
    Run(Run<H>),
    /// The caller gave up or is gone: let the handler know.
    Interrupt(H::Handle),
    /// End a call's task.
    Abort(H::Handle),
    /// A call of that service ended.
    CallEnded(H::Service),
    /// Hand a request's outcome to whoever waits.
    Complete(H::Waiter, RequestOutcome),
    /// Take a request back: from the queue, or by a cancel record.
    TakeBack(H::Way, MessageId),
    /// Give the hold back and send a reply, in one batch.
    Reply(H::Hold, Reply),
    /// Give the hold back; nothing else follows.
    Release(H::Hold),
    /// Drop a message that is over, outside of any lock: its body may run code of the user's.
    Discard(Message),
    /// Drop a received message, count it, and report it to its sender.
    Drop(H::Hold, DropReason),
    /// Count a received message as dropped. Its sender is gone, and counts it as in doubt.
    Forget(DropReason),
    /// Give the hold back and settle a guaranteed message, counted as dropped if there is a
    /// reason.
    Settle(H::Hold, Settlement, Option<DropReason>),
    /// Messages of this node were dropped.
    OwnDropped { to: NodeId, reason: DropReason, count: u64 },
    /// Messages of this node were sent, and their fate is unknown.
    OwnInDoubt(u64),
}

/// The bounds of what a node takes in without a link's credit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrontLimits {
    /// The longest body of a reply, in bytes.
    pub(crate) max_body: usize,
    /// This node's calls to itself, in bytes.
    pub(crate) local: u64,
    /// Calls from a broker, in bytes.
    pub(crate) broker: u64,
}

/// The calls that a node handles, and the requests that it waits for; pure.
pub(crate) struct Front<H: Host> {
    me: NodeId,
    limits: FrontLimits,
    requests: Requests<H>,
    services: BTreeMap<ServiceName, ServiceNumber>,
    durable: BTreeMap<ServiceName, (Pattern, ServiceNumber)>,
    /// Those two, and those that take no more and still have calls.
    served: BTreeMap<ServiceNumber, Served<H>>,
    numbers: u64,
    local_bytes: u64,
    broker_bytes: u64,
    effects: VecDeque<Effect<H>>,
}

struct Served<H: Host> {
    service: H::Service,
    concurrency: u32,
    calls: Service<CallKey, Box<Call<H>>, Running<H>>,
    offered: bool,
}

/// A call that waits for its turn. Calls are large and move from queue to queue, so they are boxed.
struct Call<H: Host> {
    message: Message,
    deadline: Option<Time>,
    hold: H::Hold,
    handle: H::Handle,
}

/// The part of a call that outlives its message, which its handler has.
struct Running<H: Host> {
    heading: Heading,
    hold: H::Hold,
    handle: H::Handle,
}

struct Heading {
    path: Path,
    id: MessageId,
    from: NodeId,
    wants_reply: bool,
    delivery: Option<Arc<Delivery>>,
    cost: u64,
}

impl Heading {
    fn of(path: Path, message: &Message) -> Self {
        Self {
            path,
            id: message.header.id,
            from: message.from,
            wants_reply: message.wants_reply,
            delivery: message.delivery.clone(),
            cost: message.cost(),
        }
    }

    fn reply(&self, payload: Payload, extra: Option<Box<Extra>>) -> Reply {
        Reply { to: self.from, call: self.id, payload, extra }
    }

    fn settlement(
        &self,
        delivery: Arc<Delivery>,
        outcome: impl Into<Option<DeliveryOutcome>>,
    ) -> Settlement {
        Settlement { id: self.id, from: self.from, delivery, outcome: outcome.into() }
    }
}

impl<H: Host> Front<H> {
    pub(crate) fn new(me: NodeId, limits: FrontLimits) -> Self {
        Self {
            me,
            limits,
            requests: Requests::default(),
            services: BTreeMap::new(),
            durable: BTreeMap::new(),
            served: BTreeMap::new(),
            numbers: 0,
            local_bytes: 0,
            broker_bytes: 0,
            effects: VecDeque::new(),
        }
    }

    pub(crate) fn poll_effect(&mut self) -> Option<Effect<H>> {
        self.effects.pop_front()
    }

    // Services and durable subscriptions.

    /// Offers a service. Returns `None` if its name is taken.
    pub(crate) fn serve(
        &mut self,
        name: &ServiceName,
        concurrency: u32,
        service: H::Service,
    ) -> Option<ServiceNumber> {
        if self.services.contains_key(name) {
            return None;
        }
        let number = self.add(concurrency, service);
        self.services.insert(name.clone(), number);
        Some(number)
    }

    /// Takes the guaranteed events of a durable subscription. Returns `None` if its name is taken.
    pub(crate) fn consume(
        &mut self,
        name: &ServiceName,
        pattern: &Pattern,
        concurrency: u32,
        service: H::Service,
    ) -> Option<ServiceNumber> {
        if self.durable.contains_key(name) {
            return None;
        }
        let number = self.add(concurrency, service);
        self.durable.insert(name.clone(), (pattern.clone(), number));
        Some(number)
    }

    fn add(&mut self, concurrency: u32, service: H::Service) -> ServiceNumber {
        self.numbers += 1;
        let number = ServiceNumber(self.numbers);
        let calls = Service::new(concurrency as usize);
        self.served.insert(number, Served { service, concurrency, calls, offered: true });
        number
    }

    /// Takes no more calls; queued and running ones go on. Returns false if it did so already.
    pub(crate) fn withdraw(&mut self, number: ServiceNumber) -> bool {
        let Some(served) = self.served.get_mut(&number) else { return false };
        let was_offered = std::mem::replace(&mut served.offered, false);
        self.services.retain(|_, other| *other != number);
        self.durable.retain(|_, (_, other)| *other != number);
        self.forget_if_over(number);
        was_offered
    }

    /// Refuses the queued calls.
    pub(crate) fn refuse_queued(&mut self, number: ServiceNumber) {
        let Some(served) = self.served.get_mut(&number) else { return };
        for call in served.calls.take_waiting(|_| true) {
            let (key, call) = call;
            self.refuse(key.path, *call, DropReason::NoService);
        }
        self.forget_if_over(number);
    }

    /// Refuses the queued calls and aborts the running ones; returns the number of the latter.
    pub(crate) fn abort_all(&mut self) -> usize {
        let numbers: Vec<_> = self.served.keys().copied().collect();
        numbers.iter().for_each(|number| self.refuse_queued(*number));
        let running = self.served.values().flat_map(|served| served.calls.all_kept());
        let handles: Vec<_> = running.map(|(_, running)| running.handle.clone()).collect();
        let count = handles.len();
        self.effects.extend(handles.into_iter().map(Effect::Abort));
        count
    }

    /// Returns true if none of its calls is queued or running.
    pub(crate) fn is_idle(&self, number: ServiceNumber) -> bool {
        self.served.get(&number).is_none_or(|served| served.calls.is_idle())
    }

    pub(crate) fn running(&self, number: ServiceNumber) -> usize {
        self.served.get(&number).map_or(0, |served| served.calls.running())
    }

    /// The unfinished calls of a service that takes more, and its concurrency.
    pub(crate) fn load(&self, name: &ServiceName) -> Option<(u64, u32)> {
        let served = self.served.get(self.services.get(name)?)?;
        Some((served.calls.unfinished() as u64, served.concurrency))
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = (&ServiceName, ServiceNumber)> {
        self.services.iter().map(|(name, number)| (name, *number))
    }

    /// All that has calls or takes some.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = (ServiceNumber, &H::Service)> {
        self.served.iter().map(|(number, served)| (*number, &served.service))
    }

    /// The durable subscriptions, by name.
    pub(crate) fn consumed(&self) -> impl Iterator<Item = (&ServiceName, &Pattern)> {
        self.durable.iter().map(|(name, (pattern, _))| (name, pattern))
    }

    // Calls.

    /// A call of this node to itself.
    ///
    /// # Errors
    /// [`DropReason::SlowPeer`] if its own calls hold as much as they may.
    pub(crate) fn handle_own_call(
        &mut self,
        now: Time,
        message: Message,
        hold: H::Hold,
    ) -> Result<(), DropReason> {
        if !has_room(self.local_bytes, message.cost(), self.limits.local) {
            return Err(DropReason::SlowPeer);
        }
        self.handle_call(now, Path::Local, message, hold);
        Ok(())
    }

    /// A call, a request or a guaranteed message that may be run.
    pub(crate) fn handle_call(&mut self, now: Time, path: Path, message: Message, hold: H::Hold) {
        let bounded = path == Path::Broker && message.delivery.is_none();
        if bounded && !has_room(self.broker_bytes, message.cost(), self.limits.broker) {
            return self.handle_refused(path, message, hold, DropReason::SlowPeer);
        }
        let target = self.target(&message);
        let Some((number, served)) =
            target.and_then(|number| Some((number, self.served.get_mut(&number)?)))
        else {
            return self.handle_refused(path, message, hold, DropReason::NoService);
        };
        let key = CallKey { path, id: message.header.id };
        let deadline = message.header.time_to_live.map(|ttl| now + ttl);
        let order = message.header.ordering_key().map(str::to_owned);
        let cost = message.cost();
        let call = Box::new(Call { message, deadline, hold, handle: H::Handle::default() });
        match served.calls.handle_call(key, order.as_deref(), deadline, call) {
            Admission::Start(call) => {
                self.hold_room(path, cost);
                let run = self.begin(number, key, *call);
                self.effects.extend(run.map(Effect::Run));
            }
            Admission::Waits => self.hold_room(path, cost),
            Admission::Refused(call) => {
                let Call { message, hold, .. } = *call;
                self.handle_refused(path, message, hold, DropReason::NoService);
            }
        }
    }

    /// The service or durable subscription that a message is for.
    fn target(&self, message: &Message) -> Option<ServiceNumber> {
        let subscription =
            message.delivery.as_ref().and_then(|it| it.id.stream.subscription.as_ref());
        match (&message.header.destination, subscription) {
            (Destination::Topic(topic), Some(subscription)) => {
                let (pattern, number) = self.durable.get(subscription)?;
                pattern.matches(topic).then_some(*number)
            }
            (Destination::Service(name), None) => self.services.get(name).copied(),
            (Destination::Node(node), None) if *node == self.me => {
                self.services.get(&ServiceName::node_inbox()).copied()
            }
            (Destination::Node(_) | Destination::Topic(_), None) | (_, Some(_)) => None,
        }
    }

    fn begin(&mut self, number: ServiceNumber, key: CallKey, call: Call<H>) -> Option<Run<H>> {
        let Call { message, deadline, hold, handle } = call;
        let served = self.served.get_mut(&number)?;
        let heading = Heading::of(key.path, &message);
        served.calls.keep(key, Running { heading, hold, handle: handle.clone() });
        Some(Run { service: served.service.clone(), number, key, message, deadline, handle })
    }

    /// A message that is not run: its sender is answered, one way or the other.
    pub(crate) fn handle_refused(
        &mut self,
        path: Path,
        message: Message,
        hold: H::Hold,
        reason: DropReason,
    ) {
        let heading = Heading::of(path, &message);
        self.effects.push_back(Effect::Discard(message));
        let effect = match &heading.delivery {
            Some(delivery) => {
                let outcome = match reason {
                    DropReason::Expired => DeliveryOutcome::Expired,
                    _ => DeliveryOutcome::Refused,
                };
                Effect::Settle(hold, heading.settlement(delivery.clone(), outcome), None)
            }
            None if heading.wants_reply => {
                let text = refusal_text(reason).into();
                let failure = Failure { code: reason.as_str().into(), text };
                Effect::Reply(hold, heading.reply(Payload::Failed(failure), None))
            }
            None => Effect::Drop(hold, reason),
        };
        self.effects.push_back(effect);
    }

    /// Refuses a call that was admitted.
    fn refuse(&mut self, path: Path, call: Call<H>, reason: DropReason) {
        self.free_room(path, call.message.cost());
        self.handle_refused(path, call.message, call.hold, reason);
    }

    /// A handler ended. Returns the call to run in its place.
    pub(crate) fn handle_ended(
        &mut self,
        now: Time,
        number: ServiceNumber,
        key: CallKey,
        ended: Ended,
    ) -> Option<Run<H>> {
        let served = self.served.get_mut(&number)?;
        let service = served.service.clone();
        let finished = served.calls.handle_finished(now, key);
        if let Some(Running { heading, hold, .. }) = finished.kept {
            self.free_room(heading.path, heading.cost);
            self.conclude(&heading, hold, ended);
        }
        for (key, call) in finished.expired {
            self.refuse(key.path, *call, DropReason::Expired);
        }
        self.effects.push_back(Effect::CallEnded(service));
        let run = finished.next.and_then(|(key, call)| self.begin(number, key, *call));
        self.forget_if_over(number);
        run
    }

    /// What follows from a handler's end.
    fn conclude(&mut self, heading: &Heading, hold: H::Hold, ended: Ended) {
        let effect = match (&heading.delivery, ended) {
            (Some(delivery), ended) => {
                let outcome = match ended {
                    Ended::Replied { .. } => DeliveryOutcome::Processed,
                    Ended::Failed { failure, rejects: true } => {
                        DeliveryOutcome::Rejected(failure.to_string())
                    }
                    Ended::Failed { failure, rejects: false } => {
                        DeliveryOutcome::Failed(failure.to_string())
                    }
                };
                Effect::Settle(hold, heading.settlement(delivery.clone(), outcome), None)
            }
            (None, Ended::Replied { .. }) if !heading.wants_reply => Effect::Release(hold),
            (None, Ended::Replied { body, extra }) => match self.check_reply(&body, &extra) {
                Ok(()) => Effect::Reply(hold, heading.reply(Payload::Reply(body), extra)),
                Err(failure) => Effect::Reply(hold, heading.reply(Payload::Failed(failure), None)),
            },
            (None, Ended::Failed { failure, .. }) if heading.wants_reply => {
                Effect::Reply(hold, heading.reply(Payload::Failed(failure), None))
            }
            (None, Ended::Failed { .. }) => Effect::Drop(hold, DropReason::HandlerFailed),
        };
        self.effects.push_back(effect);
    }

    fn check_reply(&self, body: &Bytes, extra: &Option<Box<Extra>>) -> Result<(), Failure> {
        check_size(body.len(), extra.as_deref(), self.limits.max_body)
            .map_err(|error| Failure { code: "too_large".into(), text: error.to_string() })
    }

    /// The caller gave up.
    pub(crate) fn handle_cancel(&mut self, path: Path, id: MessageId) {
        let key = CallKey { path, id };
        let mut cancelled = None;
        for (number, served) in &mut self.served {
            if let Some(call) = served.calls.handle_cancel(key) {
                cancelled = Some((*number, *call));
            } else if let Some(running) = served.calls.kept(key) {
                self.effects.push_back(Effect::Interrupt(running.handle.clone()));
            }
        }
        let Some((number, Call { message, hold, .. })) = cancelled else { return };
        self.free_room(path, message.cost());
        let heading = Heading::of(path, &message);
        self.effects.push_back(Effect::Discard(message));
        self.effects.push_back(match &heading.delivery {
            None => Effect::Drop(hold, DropReason::Cancelled),
            Some(delivery) => {
                let settlement = heading.settlement(delivery.clone(), None);
                Effect::Settle(hold, settlement, Some(DropReason::Cancelled))
            }
        });
        self.forget_if_over(number);
    }

    /// A link is lost, with what its flow says was on its way to `peer`.
    pub(crate) fn handle_link_lost(&mut self, link: LinkId, peer: NodeId, lost: &LinkLoss) {
        let path = Path::Link(link);
        if lost.unsent > 0 {
            let reason = DropReason::LinkLost;
            self.effects.push_back(Effect::OwnDropped { to: peer, reason, count: lost.unsent });
        }
        if lost.in_doubt > 0 {
            self.effects.push_back(Effect::OwnInDoubt(lost.in_doubt));
        }
        for (id, waiter) in self.requests.remove_all(path) {
            let maybe_executed = !lost.unsent_calls.contains(&id);
            self.effects
                .push_back(Effect::Complete(waiter, RequestOutcome::PeerLost { maybe_executed }));
        }
        let numbers: Vec<_> = self.served.keys().copied().collect();
        for number in numbers {
            self.lose_calls(number, path);
            self.forget_if_over(number);
        }
    }

    /// Nobody is left to wait for the calls of a service that came over a path.
    fn lose_calls(&mut self, number: ServiceNumber, path: Path) {
        let Some(served) = self.served.get_mut(&number) else { return };
        let queued = served.calls.take_waiting(|key| key.path == path);
        for (key, running) in served.calls.all_kept() {
            // Its outbox still waits for a guaranteed message.
            if key.path == path && running.heading.delivery.is_none() {
                self.effects.push_back(Effect::Interrupt(running.handle.clone()));
            }
        }
        self.effects.push_back(Effect::CallEnded(served.service.clone()));
        for (_, call) in queued {
            let Call { message, hold, .. } = *call;
            let heading = Heading::of(path, &message);
            self.effects.push_back(Effect::Discard(message));
            match &heading.delivery {
                Some(delivery) => {
                    let settlement = heading.settlement(delivery.clone(), None);
                    self.effects.push_back(Effect::Settle(hold, settlement, None));
                }
                None => {
                    self.effects.push_back(Effect::Release(hold));
                    self.effects.push_back(Effect::Forget(DropReason::LinkLost));
                }
            }
        }
    }

    fn hold_room(&mut self, path: Path, cost: u64) {
        match path {
            Path::Local => self.local_bytes += cost,
            Path::Broker => self.broker_bytes += cost,
            Path::Link(_) => {}
        }
    }

    fn free_room(&mut self, path: Path, cost: u64) {
        match path {
            Path::Local => self.local_bytes -= cost,
            Path::Broker => self.broker_bytes -= cost,
            Path::Link(_) => {}
        }
    }

    fn forget_if_over(&mut self, number: ServiceNumber) {
        if let Some(served) = self.served.get(&number)
            && !served.offered
            && served.calls.is_idle()
        {
            self.served.remove(&number);
        }
    }

    // Requests.

    /// A request of this node is about to be sent.
    pub(crate) fn open_request(
        &mut self,
        id: MessageId,
        deadline: Time,
        path: Path,
        way: H::Way,
        waiter: H::Waiter,
    ) {
        self.requests.insert(id, deadline, path, way, waiter);
    }

    /// Forgets a request that could not be sent. Returns false if it has ended.
    pub(crate) fn close_request(&mut self, id: MessageId) -> bool {
        self.requests.remove(id).is_some()
    }

    /// The caller no longer waits.
    pub(crate) fn handle_abandoned(&mut self, id: MessageId) {
        if let Some(open) = self.requests.remove(id) {
            self.take_back(id, open.path, open.way);
        }
    }

    fn take_back(&mut self, id: MessageId, path: Path, way: H::Way) {
        match path {
            Path::Local => self.handle_cancel(path, id),
            Path::Link(_) | Path::Broker => self.effects.push_back(Effect::TakeBack(way, id)),
        }
    }

    /// The outcome of a request came over a path. It counts only if the request took that path.
    pub(crate) fn handle_outcome(
        &mut self,
        path: Path,
        id: Option<MessageId>,
        outcome: RequestOutcome,
        hold: H::Hold,
    ) {
        match id.and_then(|id| self.requests.remove_over(id, path)) {
            Some(waiter) => {
                // Consumed before its caller wakes, so that the caller's next message says so.
                self.effects.push_back(Effect::Release(hold));
                self.effects.push_back(Effect::Complete(waiter, outcome));
            }
            None => self.effects.push_back(Effect::Drop(hold, DropReason::Late)),
        }
    }

    /// The broker found no taker for a request. Returns false if it is none of this node's.
    pub(crate) fn handle_unrouted(&mut self, id: MessageId) -> bool {
        let waiter = self.requests.remove_over(id, Path::Broker);
        let found = waiter.is_some();
        self.effects.extend(waiter.map(|it| Effect::Complete(it, RequestOutcome::Unrouted)));
        found
    }

    /// The broker is lost: the requests that it had may have been executed.
    pub(crate) fn handle_broker_lost(&mut self) {
        for (_, waiter) in self.requests.remove_all(Path::Broker) {
            let outcome = RequestOutcome::PeerLost { maybe_executed: true };
            self.effects.push_back(Effect::Complete(waiter, outcome));
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Time) {
        while let Some((id, open)) = self.requests.pop_late(now) {
            self.effects.push_back(Effect::Complete(open.waiter, RequestOutcome::DeadlineExceeded));
            self.take_back(id, open.path, open.way);
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Time> {
        self.requests.poll_timeout()
    }

    /// The node ends: no request is answered any more.
    pub(crate) fn handle_shut_down(&mut self) {
        for waiter in self.requests.drain() {
            self.effects.push_back(Effect::Complete(waiter, RequestOutcome::ShutDown));
        }
    }

    /// Returns true if no request is open and no call queued or running.
    #[cfg(test)]
    pub(crate) fn is_quiet(&self) -> bool {
        self.requests.len() == 0 && self.served.values().all(|served| served.calls.is_idle())
    }
}

/// An empty room takes any one call.
fn has_room(held: u64, cost: u64, limit: u64) -> bool {
    held == 0 || held + cost <= limit
}

fn refusal_text(reason: DropReason) -> &'static str {
    match reason {
        DropReason::NoService => "the node no longer serves it",
        DropReason::NotAllowed => incoming::NOT_ALLOWED,
        DropReason::Expired => "its time to live ran out in the queue",
        DropReason::SlowPeer => "the node has no room for it",
        _ => "it was not run",
    }
}
