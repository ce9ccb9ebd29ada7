//! Services: handlers, and how many of them run at once.

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, yield_now};
use tokio::time::Instant;

use super::cell::Credit;
use super::counters::add;
use super::lease::Lease;
use super::shared::{Outcome, Shared};
use crate::address::{AddressError, Destination, ServiceName};
use crate::broker::{Ticket, Unsupported};
use crate::engine::{Admission, Finished, LinkId, Service as Admissions};
use crate::message::{Body, Header, Kind, Message, MessageId};
use crate::report::DropReason;
use crate::sync::lock;
use crate::wire::{BASE_COST, Envelope, Failure, Outcome as DeliveryOutcome, Payload};

/// Stands for the link of calls that this node makes to itself.
pub(crate) const LOCAL: LinkId = LinkId(0);

/// How many calls a service runs at once, unless it says so itself.
pub(crate) const DEFAULT_CONCURRENCY: u32 = 64;

/// Why a handler declined a call. Its code and text reach the caller.
///
/// Any error turns into one, with the code `error`, so that `?` works in handlers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerError {
    /// A short name that a program can match, such as `not_found`.
    pub code: String,
    /// A sentence for people.
    pub text: String,
    /// Trying again is of no use.
    rejects: bool,
}

impl HandlerError {
    /// An error with a code for programs and a text for people.
    pub fn new(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self { code: code.into(), text: text.into(), rejects: false }
    }

    /// An error that trying again won't mend: a guaranteed message becomes a dead letter at once.
    /// To any other call it is like [`HandlerError::new`].
    pub fn reject(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self { rejects: true, ..Self::new(code, text) }
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}

impl<E: std::error::Error> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::new("error", error.to_string())
    }
}

/// A call as its handler sees it: the message, and what is known of its caller's patience.
#[derive(Debug)]
pub struct Call {
    /// The message.
    pub message: Message,
    cancelled: Arc<Cancelled>,
    deadline: Option<Instant>,
    lease: Option<Arc<Lease>>,
}

#[derive(Debug, Default)]
pub(crate) struct Cancelled {
    flag: AtomicBool,
    notify: Notify,
}

impl Cancelled {
    fn set(&self) {
        self.flag.store(true, Ordering::Release);
        self.notify.notify_waiters();
    }

    async fn wait(&self) {
        let notified = self.notify.notified();
        if !self.flag.load(Ordering::Acquire) {
            notified.await;
        }
    }
}

impl Call {
    /// Whether somebody waits for a reply.
    pub fn wants_reply(&self) -> bool {
        self.message.wants_reply
    }

    /// How much longer the reply is of use; `None` if the caller set no limit.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Gives the handler of a guaranteed message its whole lease again, from now: 30 s by default
    /// ([`Config::lease`](crate::Config::lease)). When a lease ends, the handler is ended too, and
    /// the message is delivered again. Other calls have none.
    pub fn extend(&self) {
        if let Some(lease) = &self.lease {
            lease.extend();
        }
    }

    /// Whether the caller gave up, or is gone. Who sent a guaranteed message never does.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.flag.load(Ordering::Acquire)
    }

    /// Waits until the caller gives up or is gone. A handler that ignores it runs to its end;
    /// its reply is then dropped.
    pub async fn cancelled(&self) {
        self.cancelled.wait().await;
    }
}

type HandlerFuture = Pin<Box<dyn Future<Output = Result<Body, HandlerError>> + Send>>;
pub(crate) type Handler = dyn Fn(Call) -> HandlerFuture + Send + Sync;

/// Wraps a user's handler.
pub(crate) fn boxed<F, R, B>(handler: F) -> Arc<Handler>
where
    F: Fn(Call) -> R + Send + Sync + 'static,
    R: Future<Output = Result<B, HandlerError>> + Send + 'static,
    B: Into<Body>,
{
    Arc::new(move |call| {
        let running = handler(call);
        Box::pin(async move { running.await.map(Into::into) })
    })
}

type Key = (LinkId, MessageId);

/// After so many calls of one task other tasks have their turn; handlers may wait for nothing.
const MOST_IN_A_ROW: u32 = 4;

/// A call that was admitted, and holds its link's credit until it ends. It is large, and moves
/// from queue to queue: it is kept in a box.
struct Held {
    message: Message,
    credit: Option<Credit>,
    cancelled: Arc<Cancelled>,
    deadline: Option<Instant>,
    /// What it takes of the room for this node's calls to itself.
    share: Option<LocalShare>,
}

/// A place among the calls that no link's credit bounds: those of this node to itself, and those
/// that come from a broker.
struct LocalShare {
    shared: Arc<Shared>,
    bytes: u64,
    _ticket: Option<Ticket>,
}

impl Drop for LocalShare {
    fn drop(&mut self) {
        self.shared.local_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// One service of this node.
pub(crate) struct ServiceCell {
    pub(crate) name: ServiceName,
    pub(crate) concurrency: u32,
    handler: Arc<Handler>,
    calls: Mutex<Admissions<Key, Box<Held>, Running>>,
    /// Woken whenever a call ends.
    ended: Notify,
}

struct Running {
    cancelled: Arc<Cancelled>,
    guaranteed: bool,
    /// The one that runs it.
    task: AbortHandle,
}

impl Held {
    fn key(&self) -> Key {
        let link = self.credit.as_ref().map_or(LOCAL, |credit| credit.cell().id);
        (link, self.message.header.id)
    }

    /// As what it runs from now on.
    fn begin(&self, task: AbortHandle) -> Running {
        let guaranteed = self.message.delivery.is_some();
        Running { cancelled: self.cancelled.clone(), guaranteed, task }
    }
}

impl ServiceCell {
    pub(crate) fn new(name: ServiceName, concurrency: u32, handler: Arc<Handler>) -> Self {
        let calls = Mutex::new(Admissions::new(concurrency as usize));
        Self { name, concurrency, handler, calls, ended: Notify::new() }
    }

    pub(crate) fn handle_call(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        message: Message,
        credit: Option<Credit>,
        ticket: Option<Ticket>,
    ) {
        let time_to_live = message.header.time_to_live;
        let deadline = time_to_live.and_then(|ttl| Instant::now().checked_add(ttl));
        let expires = time_to_live.map(|ttl| shared.now() + ttl);
        let share = credit.is_none().then(|| {
            let bytes = BASE_COST + message.body.len() as u64;
            shared.local_bytes.fetch_add(bytes, Ordering::Relaxed);
            LocalShare { shared: shared.clone(), bytes, _ticket: ticket }
        });
        let cancelled = Arc::default();
        let held = Box::new(Held { message, credit, cancelled, deadline, share });
        let (key, order) = (held.key(), held.message.header.ordering_key().map(str::to_owned));
        let admission = lock(&self.calls).handle_call(key, order.as_deref(), expires, held);
        match admission {
            Admission::Start(held) => self.start(shared, key, held),
            Admission::Waits => {}
            Admission::Refused(held) => {
                shared.decline(&held.message, held.credit, DropReason::NoService);
            }
        }
    }

    /// Runs a call, and after it what has waited for its place.
    fn start(self: &Arc<Self>, shared: &Arc<Shared>, key: Key, held: Box<Held>) {
        let (cancelled, guaranteed) = (held.cancelled.clone(), held.message.delivery.is_some());
        let (service, node) = (self.clone(), shared.clone());
        // What it does when it ends waits until this is done.
        let mut calls = lock(&self.calls);
        let task = shared.runtime.spawn(async move {
            let (mut next, mut in_a_row) = (Some((key, held)), 0);
            while let Some((key, held)) = next {
                next = service.run(&node, key, held).await;
                in_a_row += 1;
                if in_a_row == MOST_IN_A_ROW {
                    in_a_row = 0;
                    yield_now().await;
                }
            }
        });
        calls.keep(key, Running { cancelled, guaranteed, task: task.abort_handle() });
    }

    /// Runs a call; returns what is next in its place.
    async fn run(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        key: Key,
        held: Box<Held>,
    ) -> Option<(Key, Box<Held>)> {
        let Held { message, credit, cancelled, deadline, share } = *held;
        let lease = message.delivery.is_some().then(|| Arc::new(Lease::new(shared.config.lease)));
        let heading = message.heading();
        let call = Call { message, cancelled, deadline, lease: lease.clone() };
        // A handler's panic is its caller's error, and nobody else's.
        let begun = catch_unwind(AssertUnwindSafe(|| (self.handler)(call)));
        let run = begun.map(|run| AssertUnwindSafe(run).catch_unwind());
        let ended = match (run, lease) {
            (Ok(run), Some(lease)) => lease.hold(run).await,
            (Ok(run), None) => Some(run.await),
            (Err(panic), _) => Some(Err(panic)),
        };
        let timed_out = || Ok(Err(HandlerError::new("lease", "its lease ran out")));
        let result = ended.unwrap_or_else(timed_out).unwrap_or_else(|panic| {
            let text = panic_text(panic.as_ref());
            tracing::warn!(service = %self.name, message_id = %heading.header.id, text, "a handler panicked");
            Err(HandlerError::new("panic", "the handler panicked"))
        });
        let next = self.finish(shared, key, &heading, credit, result);
        drop(share);
        next
    }

    fn finish(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        key: Key,
        message: &Message,
        credit: Option<Credit>,
        result: Result<Body, HandlerError>,
    ) -> Option<(Key, Box<Held>)> {
        add(&shared.counters.handled, 1);
        match result {
            result if message.delivery.is_some() => {
                let outcome = match result {
                    Ok(_unwanted) => DeliveryOutcome::Processed,
                    Err(error) => {
                        tracing::warn!(service = %self.name, message_id = %message.header.id, attempt = message.attempt(), %error, "a handler failed");
                        match error.rejects {
                            true => DeliveryOutcome::Rejected(error.to_string()),
                            false => DeliveryOutcome::Failed(error.to_string()),
                        }
                    }
                };
                drop(credit);
                shared.end_delivery(message, outcome);
            }
            Ok(body) => shared.reply_with_body(message, credit, body),
            Err(HandlerError { code, text, .. }) if message.wants_reply => {
                shared.reply(message, credit, Payload::Failed(Failure { code, text }));
            }
            Err(error) => {
                tracing::warn!(service = %self.name, message_id = %message.header.id, %error, "a handler failed");
                shared.drop_received(credit.as_ref(), DropReason::HandlerFailed, 1);
            }
        }
        self.end(shared, key)
    }

    fn end(&self, shared: &Arc<Shared>, key: Key) -> Option<(Key, Box<Held>)> {
        let mut calls = lock(&self.calls);
        let Finished { kept, next, expired } = calls.handle_finished(shared.now(), key);
        let next = next.map(|held| (held.key(), held));
        if let (Some((key, held)), Some(Running { task, .. })) = (&next, kept) {
            calls.keep(*key, held.begin(task));
        }
        drop(calls);
        for held in expired {
            shared.decline(&held.message, held.credit, DropReason::Expired);
        }
        self.ended.notify_waiters();
        next
    }

    /// The caller no longer wants it; returns it if it is guaranteed, for its inbox to forget.
    pub(crate) fn handle_cancel(
        &self,
        shared: &Shared,
        link: LinkId,
        id: MessageId,
    ) -> Option<Message> {
        let mut calls = lock(&self.calls);
        let waiting = calls.handle_cancel((link, id));
        if let Some(running) = calls.kept((link, id)) {
            running.cancelled.set();
        }
        drop(calls);
        let held = waiting?;
        shared.drop_received(held.credit.as_ref(), DropReason::Cancelled, 1);
        Some(held.message).filter(|message| message.delivery.is_some())
    }

    /// What came over the link has nobody left to wait for it.
    pub(crate) fn handle_link_lost(&self, shared: &Arc<Shared>, link: LinkId) {
        let mut calls = lock(&self.calls);
        let waiting = calls.take_waiting(|key| key.0 == link);
        for (_, running) in calls.all_kept().filter(|(key, _)| key.0 == link) {
            if !running.guaranteed {
                running.cancelled.set();
            }
        }
        drop(calls);
        for lost in waiting {
            if lost.message.delivery.is_some() {
                shared.unqueue_delivery(&lost.message);
                continue;
            }
            // Their sender counts them as in doubt.
            shared.counters.dropped_for_others(DropReason::LinkLost, 1);
        }
        self.ended.notify_waiters();
    }

    /// How many calls run now.
    pub(crate) fn running(&self) -> usize {
        lock(&self.calls).running()
    }

    /// How many calls run and wait, unless the service takes no more.
    pub(crate) fn load(&self) -> Option<usize> {
        let calls = lock(&self.calls);
        (!calls.is_draining()).then(|| calls.unfinished())
    }

    /// Takes no more calls, and waits until those that it has are done.
    pub(crate) async fn drain(&self) {
        lock(&self.calls).drain();
        loop {
            let ended = self.ended.notified();
            if lock(&self.calls).is_idle() {
                return;
            }
            ended.await;
        }
    }

    /// Turns down what waits.
    pub(super) fn turn_down(&self, shared: &Arc<Shared>) {
        let waiting = lock(&self.calls).take_waiting(|_| true);
        for held in waiting {
            shared.decline(&held.message, held.credit, DropReason::NoService);
        }
    }

    /// Turns down what waits and ends what runs; how many of the latter there were.
    pub(crate) fn abort(&self, shared: &Arc<Shared>) -> usize {
        self.turn_down(shared);
        let calls = lock(&self.calls);
        calls.all_kept().for_each(|(_, running)| running.task.abort());
        calls.running()
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no message",
    }
}

impl Shared {
    fn reply_with_body(self: &Arc<Self>, call: &Message, credit: Option<Credit>, body: Body) {
        if !call.wants_reply {
            return;
        }
        if body.len() > self.config.max_body {
            let text = format!("the reply is {} bytes long, over the limit", body.len());
            let failure = Failure { code: "too_large".into(), text };
            return self.reply(call, credit, Payload::Failed(failure));
        }
        self.send_reply(call, credit, Payload::Reply(body.bytes), body.content_type);
    }

    pub(crate) fn reply(
        self: &Arc<Self>,
        call: &Message,
        credit: Option<Credit>,
        payload: Payload,
    ) {
        self.send_reply(call, credit, payload, None);
    }

    /// Sends a reply to the node that called.
    fn send_reply(
        self: &Arc<Self>,
        call: &Message,
        credit: Option<Credit>,
        payload: Payload,
        content_type: Option<&str>,
    ) {
        // Where it came from, whatever it says: a reply elsewhere could pass for an answer to
        // somebody else's request.
        let id = self.ids.next_now();
        let mut header = Header::new(id, Kind::Document, Destination::Node(call.from));
        header.correlation_id = Some(call.header.id);
        if let Some(content_type) = content_type {
            header.extra_mut().content_type = Some(content_type.to_owned());
        }
        let envelope = Envelope { header, payload };
        let Some(credit) = credit else {
            return match self.broker() {
                Some(broker) => self.reply_by_broker(broker, call.from, envelope),
                None => self.reply_to_self(envelope),
            };
        };
        match credit.answer(envelope) {
            Ok(()) => add(&self.counters.queued, 1),
            Err(reason) => self.count_drop(call.from, reason, 1),
        }
    }

    fn reply_to_self(&self, Envelope { header, payload }: Envelope) {
        let Some(id) = header.correlation_id else {
            return;
        };
        let outcome = match payload {
            Payload::Failed(failure) => Outcome::Failed(failure),
            Payload::Event(body)
            | Payload::Call(body)
            | Payload::Request(body)
            | Payload::Reply(body)
            | Payload::Guaranteed(body, _) => Outcome::Reply(Message::new(self.id, header, body)),
        };
        match self.end_request(id) {
            Some((waiter, _)) => {
                let _caller_left = waiter.send(outcome);
            }
            None => self.count_drop(self.id, DropReason::Late, 1),
        }
    }
}

/// A service name that can't be offered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The name can't be parsed.
    #[error(transparent)]
    Name(#[from] AddressError),
    /// This node offers it already.
    #[error("this node serves {0} already")]
    AlreadyServed(ServiceName),
    /// A durable subscription needs a store: [`Config::outbox`](crate::Config::outbox).
    #[error("the node has no store: name a folder for its outbox")]
    NoStore,
    /// A durable subscription over a broker needs a node that keeps its identity:
    /// [`Config::identity`](crate::Config::identity).
    #[error("the node draws a new identity at each start: name a file for it")]
    NoIdentity,
    /// A broker can't do that.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// A service that is about to be offered. [`Serve::start`] does it.
#[must_use = "a service is offered when it is started"]
pub struct Serve {
    pub(crate) shared: Arc<Shared>,
    pub(crate) name: Result<ServiceName, AddressError>,
    pub(crate) handler: Arc<Handler>,
    pub(crate) concurrency: u32,
}

impl Serve {
    /// How many calls run at once: 64 by default, 1 at the least. Others wait, as far as the
    /// credit of their senders goes.
    pub fn concurrency(mut self, calls: u32) -> Self {
        self.concurrency = calls.max(1);
        self
    }

    /// Offers the service and announces it to the mesh.
    ///
    /// # Errors
    /// [`ServeError`] if the name can't be parsed or is served here already.
    pub fn start(self) -> Result<Service, ServeError> {
        let name = self.name?;
        if self.shared.is_stopping() {
            return Err(ServeError::ShutDown);
        }
        let cell = Arc::new(ServiceCell::new(name.clone(), self.concurrency, self.handler));
        if !self.shared.add_service(&cell) {
            return Err(ServeError::AlreadyServed(name));
        }
        Ok(Service { cell, shared: self.shared })
    }
}

/// A service that this node offers. Dropping it withdraws the service; what runs is finished.
#[must_use = "dropping a service withdraws it"]
pub struct Service {
    cell: Arc<ServiceCell>,
    shared: Arc<Shared>,
}

impl Service {
    /// The name under which it is offered.
    pub fn name(&self) -> &ServiceName {
        &self.cell.name
    }

    /// How many calls run now.
    pub fn running(&self) -> usize {
        self.cell.running()
    }

    /// Withdraws the service and waits until the calls that it has taken are done: for a
    /// rolling deploy. Calls that arrive meanwhile are turned down with `no_service`.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the service withdrawn.
    pub async fn drain(self) {
        self.shared.withdraw(&self.cell.name);
        self.cell.drain().await;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.withdraw(&self.cell.name);
        self.shared.remove_service(&self.cell.name);
    }
}
