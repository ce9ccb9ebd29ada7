//! A service at work: its calls, how many of them run at once, and how they end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, yield_now};
use tokio::time::Instant;

use super::counters::add;
use super::handler::{Call, Cancelled, Handler, HandlerError, Reply};
use super::lease::Lease;
use super::peer_link::Credit;
use super::shared::Shared;
use crate::address::ServiceName;
use crate::broker::Ticket;
use crate::engine::{Admission, Finished, LinkId, Service as Admissions};
use crate::message::{Message, MessageId};
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, calling_out, lock};
use crate::wire::{BASE_COST, DeliveryOutcome, Failure, Payload};

/// Stands for the link of calls that this node makes to itself.
pub(crate) const LOCAL: LinkId = LinkId(0);

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
pub(crate) struct ServiceRunner {
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

impl ServiceRunner {
    pub(crate) fn new(name: ServiceName, concurrency: u32, handler: Arc<Handler>) -> Self {
        let calls = Mutex::new(Rank::Calls, Admissions::new(concurrency as usize));
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
        let mut calls = lock(&self.calls);
        match calls.handle_call(key, order.as_deref(), expires, held) {
            // Under the lock: its end waits for its beginning, and so does whoever cancels it.
            Admission::Start(held) => calls.keep(key, self.start(shared, key, held)),
            Admission::Waits => {}
            Admission::Refused(held) => {
                drop(calls);
                shared.decline(&held.message, held.credit, DropReason::NoService);
            }
        }
    }

    /// Runs a call, and after it what has waited for its place.
    fn start(self: &Arc<Self>, shared: &Arc<Shared>, key: Key, held: Box<Held>) -> Running {
        let (cancelled, guaranteed) = (held.cancelled.clone(), held.message.delivery.is_some());
        let (service, node) = (self.clone(), shared.clone());
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
        Running { cancelled, guaranteed, task: task.abort_handle() }
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
        calling_out();
        // A handler's panic is its caller's error, and nobody else's.
        let begun = catch_unwind(AssertUnwindSafe(|| (self.handler)(call)));
        let run = begun.map(|run| AssertUnwindSafe(run).catch_unwind());
        let ended = match (run, lease) {
            (Ok(mut run), Some(lease)) => match lease.hold(&mut run).await {
                Some(ended) => ended,
                None => catch_unwind(AssertUnwindSafe(|| drop(run)))
                    .map(|()| Err(HandlerError::new("lease", "its lease ran out"))),
            },
            (Ok(run), None) => run.await,
            (Err(panic), _) => Err(panic),
        };
        let result = ended.unwrap_or_else(|panic| {
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
        result: Result<Reply, HandlerError>,
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
            Ok(reply) => shared.reply_with(message, credit, reply),
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
        lock(&self.calls).all_kept().map(|(_, running)| running.task.abort()).count()
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no message",
    }
}
