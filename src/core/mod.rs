//! The core of a node: the part that is the same whatever carries its messages.
//!
//! ```text
//!   node/        handles of users ───────────────┐
//!                                                ▼
//!   carrier/     mesh, broker ── records ──▶   Core   ── effects ──▶ Way (link, broker, itself)
//!                                            Front │ Subscriptions │ Reporter
//! ```
//!
//! The core decides nothing: it carries out the effects of the [`Front`]. It knows no carrier, only
//! the [`Way`] of each message.

mod alarm;
mod counters;
mod events;
mod handler;
mod lease;
mod local;
mod log;
mod progress;
mod pulse;
mod reporter;
mod routes;
mod runner;
mod subscriptions;
mod way;

pub(crate) use alarm::Alarm;
pub(crate) use counters::add;
pub use events::{DownCause, Event, Events};
pub use handler::{Call, HandlerError, Reply};
pub(crate) use handler::{Handler, boxed};
pub(crate) use log::Line;
pub use progress::NotStored;
pub(crate) use progress::{Progress, ProgressSender};
pub(crate) use pulse::Pulse;
pub(crate) use reporter::Reporter;
pub(crate) use routes::RouteWatch;
pub(crate) use runner::ServiceRunner;
pub(crate) use subscriptions::{Subscriber, Subscriptions};
pub(crate) use way::{Hold, Publication, Settle, Ticket, Way};

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use smallvec::SmallVec;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};
use tokio::time::Instant;

use crate::address::{Destination, Pattern};
use crate::config::Config;
use crate::engine::{
    self, Delivered, Effect, EventBatch, Front, FrontLimits, Host, LinkId, LinkLoss, Path,
    RequestOutcome, Time, deliver,
};
use crate::identity::{NodeId, random_u64};
use crate::message::{Header, IdSource, Kind, Message, MessageId};
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::wire::{Envelope, Totals};
use local::LocalWay;
use runner::CallHandle;

/// The types with which a node carries out the effects of its front.
pub(crate) struct Shell;

impl Host for Shell {
    type Hold = Hold;
    type Waiter = oneshot::Sender<RequestOutcome>;
    type Way = Arc<dyn Way>;
    type Service = Arc<ServiceRunner>;
    type Handle = Arc<CallHandle>;
}

pub(crate) struct Core {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) config: Config,
    pub(crate) ids: IdSource,
    pub(crate) runtime: Handle,
    pub(crate) reporter: Arc<Reporter>,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) routes: RouteWatch,
    started: Instant,
    front: Mutex<Front<Shell>>,
    /// Wakes for the next deadline of a request.
    deadlines: Alarm,
    local: Arc<dyn Way>,
    tasks: Mutex<JoinSet<()>>,
    life: AtomicU8,
}

/// The states of a node's life.
const RUNNING: u8 = 0;
const STOPPING: u8 = 1;
const RUNTIME_ENDED: u8 = 2;

/// The reason for which a node takes no further calls from its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    ShutDown,
    /// The runtime in which the node was started has ended.
    RuntimeEnded,
}

/// The text of errors about a node whose runtime has ended.
pub(crate) const RUNTIME_ENDED_TEXT: &str = "the runtime in which the node was started has ended, \
     and the node with it; start a node in a runtime that lives longer";

impl Core {
    pub(crate) fn new(id: NodeId, name: String, config: Config, started: Instant) -> Arc<Self> {
        let limits = FrontLimits {
            max_body: config.max_body,
            local: config.send_queue,
            broker: config.window,
        };
        let reporter = Arc::new(Reporter::new(config.log_lines));
        Arc::new_cyclic(|core: &Weak<Self>| Self {
            id,
            name,
            config,
            ids: IdSource::new(random_u64() >> 22),
            runtime: Handle::current(),
            reporter,
            subscriptions: Subscriptions::default(),
            routes: RouteWatch::default(),
            started,
            front: Mutex::new(Rank::Calls, Front::new(id, limits)),
            deadlines: Alarm::default(),
            local: Arc::new(LocalWay::new(id, core.clone())),
            tasks: Mutex::new(Rank::Leaf, JoinSet::new()),
            life: AtomicU8::new(RUNNING),
        })
    }

    // Time and tasks.

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    pub(crate) fn now(&self) -> Time {
        Time::after_start(self.started.elapsed())
    }

    /// Converts a time of the engine to the runtime's clock; `None` if that can't represent it.
    pub(crate) fn instant(&self, at: Time) -> Option<Instant> {
        self.started.checked_add(at.since_start())
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.check_running().is_err()
    }

    /// Checks that the node takes calls from its user.
    pub(crate) fn check_running(&self) -> Result<(), Stopped> {
        match self.life.load(Ordering::Acquire) {
            RUNNING => Ok(()),
            STOPPING => Err(Stopped::ShutDown),
            _ => Err(Stopped::RuntimeEnded),
        }
    }

    /// Returns true if the node's runtime has ended before the node: none of its tasks runs.
    pub(crate) fn has_lost_runtime(&self) -> bool {
        self.check_running() == Err(Stopped::RuntimeEnded)
    }

    /// Returns true if the runtime drops its tasks: from before the first until after the last one.
    pub(crate) fn is_runtime_ending(&self) -> bool {
        let probe = self.runtime.spawn(std::future::pending::<()>());
        let is_refused = probe.is_finished();
        probe.abort();
        is_refused
    }

    /// Refuses further calls from the user. Returns true the first time.
    pub(crate) fn stop(&self, why: Stopped) -> bool {
        let state = match why {
            Stopped::ShutDown => STOPPING,
            Stopped::RuntimeEnded => RUNTIME_ENDED,
        };
        self.life.compare_exchange(RUNNING, state, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Spawns a task that ends with the node.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if self.has_lost_runtime() {
            return;
        }
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    /// Spawns the core's own tasks.
    pub(crate) fn spawn_own(self: &Arc<Self>) {
        let core = self.clone();
        self.spawn(async move { core.keep_deadlines().await });
        let reporter = self.reporter.clone();
        self.spawn(async move { reporter.keep_reporting().await });
        let reporter = self.reporter.clone();
        self.spawn(async move { reporter.keep_writing().await });
    }

    pub(crate) fn abort_tasks(&self) {
        lock(&self.tasks).abort_all();
    }

    /// Aborts all tasks, and waits until they have ended.
    pub(crate) async fn end_tasks(&self) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
    }

    /// Ends requests whose deadline has passed, until this future is dropped.
    async fn keep_deadlines(self: Arc<Self>) {
        loop {
            let next = || lock(&self.front).poll_timeout();
            self.deadlines.sleep_until_next(&self, next).await;
            self.with_front(|front, now| front.handle_timeout(now));
        }
    }

    // The front.

    /// Passes an input to the front, then carries out its effects.
    pub(crate) fn with_front<R>(
        self: &Arc<Self>,
        input: impl FnOnce(&mut Front<Shell>, Time) -> R,
    ) -> R {
        let mut effects = SmallVec::<[Effect<Shell>; 2]>::new();
        let mut front = lock(&self.front);
        let result = input(&mut front, self.now());
        while let Some(effect) = front.poll_effect() {
            effects.push(effect);
        }
        drop(front);
        effects.into_iter().for_each(|effect| self.perform(effect));
        result
    }

    /// Handles the loss of the link to `peer`, with the messages lost in its flow.
    pub(crate) fn lose_link(self: &Arc<Self>, link: LinkId, peer: NodeId, lost: &LinkLoss) {
        if self.with_front(|front, _| front.handle_link_lost(link, peer, lost)) {
            let core = self.clone();
            self.spawn(async move {
                while core.with_front(|front, _| front.forget_lost()) {
                    yield_now().await;
                }
            });
        }
    }

    /// Reads the front.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Front<Shell>) -> R) -> R {
        look(&lock(&self.front))
    }

    fn perform(self: &Arc<Self>, effect: Effect<Shell>) {
        match effect {
            Effect::Run(run) => runner::start(self, run),
            Effect::Interrupt(call) => call.cancel(),
            Effect::Abort(call) => call.abort(),
            Effect::CallEnded(service) => service.notify_ended(),
            Effect::Complete(waiter, outcome) => {
                let _caller_left = waiter.send(outcome);
            }
            Effect::TakeBack(way, id) => way.take_back(id),
            Effect::Reply(hold, reply) => self.reply(hold, reply),
            Effect::Release(hold) => drop(hold),
            Effect::Discard(message) => drop(message),
            Effect::Drop(hold, reason) => self.drop_received(hold.path(), Some(&hold), reason, 1),
            Effect::Forget(reason) => self.reporter.counters.dropped_for_others(reason, 1),
            Effect::Settle(hold, settlement, dropped) => {
                if let Some(reason) = dropped {
                    self.drop_received(hold.path(), Some(&hold), reason, 1);
                }
                hold.settle(settlement);
            }
            Effect::OwnDropped { to, reason, count } => {
                self.reporter.count_drop(to, reason, count);
            }
            Effect::OwnInDoubt(count) => add(&self.reporter.counters.in_doubt, count),
        }
    }

    fn reply(&self, hold: Hold, reply: engine::Reply) {
        let engine::Reply { to, call, payload, extra } = reply;
        let mut header = Header::new(self.ids.next_now(), Kind::Document, Destination::Node(to));
        header.correlation_id = Some(call);
        header.extra = extra;
        let (path, node) = (hold.path(), hold.way().node());
        match hold.answer(Envelope { header, payload }) {
            Ok(()) if path == Path::Local => {}
            Ok(()) => add(&self.reporter.counters.queued, 1),
            Err(reason) => self.reporter.count_drop(node, reason, 1),
        }
    }

    /// Counts dropped received messages, and reports them to their sender.
    pub(crate) fn drop_received(
        &self,
        path: Path,
        hold: Option<&Hold>,
        reason: DropReason,
        count: u64,
    ) {
        match path {
            Path::Local => self.reporter.count_drop(self.id, reason, count),
            Path::Link(_) | Path::Broker => {
                self.reporter.counters.dropped_for_others(reason, count);
                if let Some(hold) = hold {
                    hold.way().report_drop(reason, count);
                }
            }
        }
    }

    // Calls and requests of this node.

    /// Returns the way from this node to itself.
    pub(crate) fn local(&self) -> &Arc<dyn Way> {
        &self.local
    }

    /// Opens a request, and sets the alarm for its deadline.
    pub(crate) fn open_request(
        self: &Arc<Self>,
        id: MessageId,
        deadline: Time,
        way: &Arc<dyn Way>,
        waiter: oneshot::Sender<RequestOutcome>,
    ) {
        let path = way.path();
        self.with_front(|front, _| front.open_request(id, deadline, path, way.clone(), waiter));
        self.deadlines.wake_by(deadline);
    }

    // Events.

    /// Delivers an event of this node to its own subscriptions. Returns false if one lost it.
    pub(crate) fn publish_here(&self, event: &Publication<'_>) -> bool {
        let Envelope { header, mut payload } = event.envelope();
        let message = Message::new(self.id, header, payload.take_body());
        let batch = EventBatch::single(event.topic.clone(), message);
        self.deliver(batch, Path::Local, None, &|_| None) == 0
    }

    /// Delivers events that arrived over `path` to the matching subscriptions, or only to those
    /// with the pattern `only`. `hold` makes the hold of messages with that cost. Returns the
    /// number of messages that a subscription lost.
    pub(crate) fn deliver(
        &self,
        batch: EventBatch<Hold>,
        path: Path,
        only: Option<&Pattern>,
        hold: &dyn Fn(Totals) -> Option<Hold>,
    ) -> u64 {
        let snapshot = self.subscriptions.load();
        let mut matching = snapshot.matching(batch.topic());
        if let Some(only) = only {
            matching.retain(|subscriber| subscriber.pattern() == only);
        }
        deliver(batch, &matching, hold, &mut |outcome| match outcome {
            Delivered::NoSubscriber(hold, count) => {
                self.drop_received(path, hold, DropReason::NoSubscriber, count);
            }
            Delivered::Pushed(came, lost) => {
                let mut gone = 0;
                for it in lost {
                    self.drop_received(path, it.hold.as_deref(), it.reason, it.count);
                    gone += it.count;
                }
                self.reporter.counters.delivered(came, gone);
            }
        })
    }
}
