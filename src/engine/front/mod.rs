//! The front of the engine: permission, admission, completion, refusal and the loss of a path.
//!
//! ```text
//!   a record over a link ──▶ incoming() ─ allowed? ─▶ Front ─────▶ Effect
//!   a call of this node ────────────────────────────▶  services      Run, Interrupt
//!   a handler's end ────────────────────────────────▶  requests      Reply, Settle, Drop
//!   a lost path, a deadline ────────────────────────▶                Complete, TakeBack
//! ```
//!
//! The node's shell (`core/`) and the simulator drive the same front, and only carry out its
//! effects. [`super::subscription`] delivers events to subscriptions, and [`super::choice`] chooses
//! among instances.

mod incoming;
mod losses;
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

use super::{Path, Time};
use crate::address::{Destination, Pattern, ServiceName};
use crate::identity::NodeId;
use crate::message::{Extra, Header, Message, MessageId, check_size};
use crate::report::DropReason;
use crate::wire::{Delivery, DeliveryOutcome, Failure, Payload};

/// The types with which the owner of a front carries out its effects.
pub(crate) trait Host {
    /// The part of its path that a received message holds until it ends, such as credit.
    type Hold;
    /// Receives the outcome of a request.
    type Waiter;
    /// The way on which a request was sent, and is taken back.
    type Way;
    /// Runs the calls of one service.
    type Service: Clone;
    /// Interrupts one call. Clones refer to the same call.
    type Handle: Clone + Default;
}

/// The outcome of a request.
#[derive(Debug)]
pub(crate) enum RequestOutcome {
    Reply(Box<Message>),
    Failed(Failure),
    DeadlineExceeded,
    PeerLost {
        maybe_executed: bool,
    },
    /// The broker found no receiver.
    Unrouted,
    ShutDown,
}

/// The end of a handler.
#[derive(Debug)]
pub(crate) enum Ended {
    Replied {
        body: Bytes,
        extra: Option<Box<Extra>>,
    },
    Failed {
        failure: Failure,
        /// A guaranteed message becomes a dead letter at once, without retries.
        rejects: bool,
    },
}

/// The key of a received call within a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CallKey {
    pub(crate) path: Path,
    pub(crate) id: MessageId,
}

/// The number of a service or durable subscription, from its start to the end of its last call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ServiceNumber(u64);

/// A call to run.
pub(crate) struct Run<H: Host> {
    pub(crate) service: H::Service,
    pub(crate) number: ServiceNumber,
    pub(crate) key: CallKey,
    pub(crate) message: Box<Message>,
    pub(crate) deadline: Option<Time>,
    pub(crate) handle: H::Handle,
}

/// A reply to a call. It goes to the calling node, whatever return address the call names: sent
/// elsewhere, it could pass for the reply to another node's request.
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
    /// `None` if the message left its queue without having been run.
    pub(crate) outcome: Option<DeliveryOutcome>,
}

/// A decision of the front. Effects are carried out in order.
pub(crate) enum Effect<H: Host> {
    /// Run a handler, and report its end by [`Front::handle_ended`].
    Run(Run<H>),
    /// Notify the handler that its caller gave up or is gone.
    Interrupt(H::Handle),
    /// Abort a call's task.
    Abort(H::Handle),
    /// A call of that service ended.
    CallEnded(H::Service),
    /// Pass a request's outcome to its caller.
    Complete(H::Waiter, RequestOutcome),
    /// Take a request back: out of the queue, or by a cancel record.
    TakeBack(H::Way, MessageId),
    /// Give the hold back and send a reply, in one batch.
    Reply(H::Hold, Reply),
    /// Give the hold back.
    Release(H::Hold),
    /// Drop a finished message, outside the front's lock: its body may run the user's code.
    Discard(Box<Message>),
    /// Drop a received message, count it, and report it to its sender.
    Drop(H::Hold, DropReason),
    /// Count a received message as dropped. Its sender is gone, and counts it in doubt.
    Forget(DropReason),
    /// Give the hold back and settle a guaranteed message. With a reason, count it as dropped.
    Settle(H::Hold, Settlement, Option<DropReason>),
    /// Messages of this node were dropped.
    OwnDropped { to: NodeId, reason: DropReason, count: u64 },
    /// Messages of this node were sent, and are in doubt.
    OwnInDoubt(u64),
}

/// The limits of calls that no link's credit bounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrontLimits {
    /// The maximum body of a reply, in bytes.
    pub(crate) max_body: usize,
    /// The limit of this node's unfinished calls to itself, in bytes.
    pub(crate) local: u64,
    /// The limit of unfinished calls from a broker, in bytes.
    pub(crate) broker: u64,
}

/// The calls that a node handles, and its own open requests. Pure.
pub(crate) struct Front<H: Host> {
    me: NodeId,
    limits: FrontLimits,
    requests: Requests<H>,
    services: BTreeMap<ServiceName, ServiceNumber>,
    durable: BTreeMap<ServiceName, (Pattern, ServiceNumber)>,
    /// The services and durable subscriptions above, and withdrawn ones with unfinished calls.
    served: BTreeMap<ServiceNumber, Served<H>>,
    /// The services with queued calls of lost paths.
    losing: VecDeque<ServiceNumber>,
    numbers: u64,
    local_bytes: u64,
    broker_bytes: u64,
    effects: VecDeque<Effect<H>>,
}

struct Served<H: Host> {
    service: H::Service,
    concurrency: u32,
    calls: Service<CallKey, Call<H>, Running<H>>,
    offered: bool,
}

/// A queued call.
struct Call<H: Host> {
    message: Box<Message>,
    deadline: Option<Time>,
    hold: H::Hold,
    handle: H::Handle,
}

/// The part of a call that is kept while its handler has the message.
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
            losing: VecDeque::new(),
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

    /// Stops taking calls; queued and running ones go on. Returns false if already withdrawn.
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
        for (key, call) in served.calls.take_queued() {
            self.refuse(key.path, call, DropReason::NoService);
        }
        self.forget_if_over(number);
    }

    /// Refuses all queued calls and aborts the running ones. Returns the number of the latter.
    pub(crate) fn abort_all(&mut self) -> usize {
        let numbers: Vec<_> = self.served.keys().copied().collect();
        numbers.iter().for_each(|number| self.refuse_queued(*number));
        let running = self.served.values().flat_map(|served| served.calls.all_kept());
        let handles: Vec<_> = running.map(|(_, running)| running.handle.clone()).collect();
        let count = handles.len();
        self.effects.extend(handles.into_iter().map(Effect::Abort));
        count
    }

    /// Returns true if none of its calls is running or queued.
    pub(crate) fn is_idle(&self, number: ServiceNumber) -> bool {
        self.served.get(&number).is_none_or(|served| served.calls.is_idle())
    }

    pub(crate) fn running(&self, number: ServiceNumber) -> usize {
        self.served.get(&number).map_or(0, |served| served.calls.running())
    }

    /// Returns the number of a service's unfinished calls, and its concurrency, if it takes calls.
    pub(crate) fn load(&self, name: &ServiceName) -> Option<(u64, u32)> {
        let served = self.served.get(self.services.get(name)?)?;
        Some((served.calls.unfinished() as u64, served.concurrency))
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = (&ServiceName, ServiceNumber)> {
        self.services.iter().map(|(name, number)| (name, *number))
    }

    /// Returns all services and durable subscriptions that take calls or have unfinished ones.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = (ServiceNumber, &H::Service)> {
        self.served.iter().map(|(number, served)| (*number, &served.service))
    }

    /// Returns the durable subscriptions, by name.
    pub(crate) fn consumers(
        &self,
    ) -> impl Iterator<Item = (&ServiceName, &Pattern, ServiceNumber)> {
        self.durable.iter().map(|(name, (pattern, number))| (name, pattern, *number))
    }

    // Calls.

    /// Handles a call of this node to itself.
    ///
    /// # Errors
    /// [`DropReason::SlowPeer`] if this node's calls to itself are at their limit.
    pub(crate) fn handle_own_call(
        &mut self,
        now: Time,
        message: Box<Message>,
        hold: H::Hold,
    ) -> Result<(), DropReason> {
        if !has_room(self.local_bytes, message.cost(), self.limits.local) {
            return Err(DropReason::SlowPeer);
        }
        self.handle_call(now, Path::Local, message, hold);
        Ok(())
    }

    /// Handles a permitted call, request or guaranteed message.
    pub(crate) fn handle_call(
        &mut self,
        now: Time,
        path: Path,
        message: Box<Message>,
        hold: H::Hold,
    ) {
        let bounded = path == Path::Broker && message.delivery.is_none();
        if bounded && !has_room(self.broker_bytes, message.cost(), self.limits.broker) {
            return self.handle_refused(path, message, hold, DropReason::SlowPeer);
        }
        let subscription =
            message.delivery.as_ref().and_then(|it| it.id.stream.subscription.as_ref());
        let target = self.target(&message.header, subscription);
        let Some((number, served)) =
            target.and_then(|number| Some((number, self.served.get_mut(&number)?)))
        else {
            return self.handle_refused(path, message, hold, DropReason::NoService);
        };
        let key = CallKey { path, id: message.header.id };
        let deadline = message.header.time_to_live.map(|ttl| now + ttl);
        let order = message.header.ordering_key().map(str::to_owned);
        let cost = message.cost();
        let call = Call { message, deadline, hold, handle: H::Handle::default() };
        match served.calls.handle_call(key, path, order.as_deref(), deadline, call) {
            Admission::Start(call) => {
                self.hold_room(path, cost);
                let run = self.begin(number, key, call);
                self.effects.extend(run.map(Effect::Run));
            }
            Admission::Waits => self.hold_room(path, cost),
            Admission::Refused(call) => {
                let Call { message, hold, .. } = call;
                self.handle_refused(path, message, hold, DropReason::NoService);
            }
        }
    }

    /// Returns true if this node takes messages with that header, for that durable subscription.
    pub(crate) fn serves(&self, header: &Header, subscription: Option<&ServiceName>) -> bool {
        self.target(header, subscription).is_some()
    }

    /// Returns the service or durable subscription to which a message is addressed.
    fn target(&self, header: &Header, subscription: Option<&ServiceName>) -> Option<ServiceNumber> {
        match (&header.destination, subscription) {
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

    /// Refuses a message: its sender is notified by a reply, an answer or a drop report.
    pub(crate) fn handle_refused(
        &mut self,
        path: Path,
        message: Box<Message>,
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

    /// Refuses an admitted call.
    fn refuse(&mut self, path: Path, call: Call<H>, reason: DropReason) {
        self.free_room(path, call.message.cost());
        self.handle_refused(path, call.message, call.hold, reason);
    }

    /// Handles the end of a handler. Returns the call to run in its place.
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
            self.refuse(key.path, call, DropReason::Expired);
        }
        self.effects.push_back(Effect::CallEnded(service));
        let run = finished.next.and_then(|(key, call)| self.begin(number, key, call));
        self.forget_if_over(number);
        run
    }

    /// Concludes a call whose handler ended.
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

    /// Handles the cancellation of a call by its caller.
    pub(crate) fn handle_cancel(&mut self, path: Path, id: MessageId) {
        let key = CallKey { path, id };
        let mut cancelled = None;
        for (number, served) in &mut self.served {
            if let Some(call) = served.calls.handle_cancel(path, key) {
                cancelled = Some((*number, call));
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

    /// Opens a request of this node, which is about to be sent.
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

    /// Closes a request that could not be sent. Returns false if it has ended already.
    pub(crate) fn close_request(&mut self, id: MessageId) -> bool {
        self.requests.remove(id).is_some()
    }

    /// Handles a request whose caller no longer waits.
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

    /// Handles an outcome that arrived over a path. It counts only if the request took that path.
    pub(crate) fn handle_outcome(
        &mut self,
        path: Path,
        id: Option<MessageId>,
        outcome: RequestOutcome,
        hold: H::Hold,
    ) {
        match id.and_then(|id| self.requests.remove_over(id, path)) {
            Some(waiter) => {
                // Consumed before its caller wakes, so that the caller's next message confirms it.
                self.effects.push_back(Effect::Release(hold));
                self.effects.push_back(Effect::Complete(waiter, outcome));
            }
            None => self.effects.push_back(Effect::Drop(hold, DropReason::Late)),
        }
    }

    /// Handles a request for which the broker found no receiver. Returns false if it is not open.
    pub(crate) fn handle_unrouted(&mut self, id: MessageId) -> bool {
        let waiter = self.requests.remove_over(id, Path::Broker);
        let found = waiter.is_some();
        self.effects.extend(waiter.map(|it| Effect::Complete(it, RequestOutcome::Unrouted)));
        found
    }

    /// Handles the loss of the broker. Requests sent through it may have been executed.
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

    /// Ends all open requests, since the node shuts down.
    pub(crate) fn handle_shut_down(&mut self) {
        for waiter in self.requests.drain() {
            self.effects.push_back(Effect::Complete(waiter, RequestOutcome::ShutDown));
        }
    }

    /// Returns true if no request is open and no call is running or queued.
    #[cfg(test)]
    pub(crate) fn is_quiet(&self) -> bool {
        self.requests.len() == 0 && self.served.values().all(|served| served.calls.is_idle())
    }
}

/// Returns true if a call fits the limit. With nothing held, any one call fits.
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
