//! Runs the calls of services, and reports their ends to the front.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, yield_now};

use super::handler::{Call, Handler, HandlerError, Reply};
use super::lease::Lease;
use super::log::Line;
use super::{Core, Reporter, Shell, add};
use crate::address::ServiceName;
use crate::engine::{Ended, Run, ServiceNumber};
use crate::message::MessageId;
use crate::sync::{Mutex, calling_out, lock};
use crate::wire::Failure;

/// The time after which a task yields between two calls, since handlers may never wait. All tasks of
/// a service together delay others by as many turns as it has calls at once.
const TURN: Duration = Duration::from_micros(10);

/// One service or durable subscription of this node.
pub(crate) struct ServiceRunner {
    pub(crate) name: ServiceName,
    handler: Arc<Handler>,
    /// Wakes the tasks that wait until no call is left.
    ended: Notify,
}

impl ServiceRunner {
    pub(crate) fn new(name: ServiceName, handler: Arc<Handler>) -> Self {
        Self { name, handler, ended: Notify::new() }
    }

    pub(crate) fn notify_ended(&self) {
        self.ended.notify_waiters();
    }

    /// Waits until no call is running or queued, or until the node's runtime has ended. The service
    /// must be withdrawn first.
    pub(crate) async fn wait_until_idle(&self, core: &Core, number: ServiceNumber) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            if core.look(|front| front.is_idle(number)) || core.has_lost_runtime() {
                return;
            }
            ended.await;
        }
    }
}

/// Interrupts one call.
#[derive(Debug, Default)]
pub(crate) struct CallHandle {
    cancelled: AtomicBool,
    cancellation: Notify,
    /// The call whose task runs this one, if that is another call.
    began_by: OnceLock<Arc<CallHandle>>,
    task: Mutex<Task>,
}

/// The task spawned for a call.
#[derive(Debug, Default)]
enum Task {
    #[default]
    NotSpawned,
    Spawned(AbortHandle),
    Aborted,
}

impl CallHandle {
    /// Notifies the handler that its caller gave up or is gone.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.cancellation.notify_waiters();
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Waits until the caller gives up or is gone.
    pub(super) async fn cancelled(&self) {
        let cancellation = self.cancellation.notified();
        if !self.is_cancelled() {
            cancellation.await;
        }
    }

    /// Aborts the call's task, at once or as soon as it is spawned.
    pub(super) fn abort(&self) {
        let began_by = self.began_by.get().map_or(self, AsRef::as_ref);
        let before = std::mem::replace(&mut *lock(&began_by.task), Task::Aborted);
        if let Task::Spawned(task) = before {
            task.abort();
        }
    }

    fn handle_spawned(&self, task: AbortHandle) {
        let mut slot = lock(&self.task);
        match *slot {
            Task::Aborted => task.abort(),
            Task::NotSpawned | Task::Spawned(_) => *slot = Task::Spawned(task),
        }
    }
}

/// Spawns a task that runs a call, and then the queued calls that take its place.
pub(super) fn start(core: &Arc<Core>, run: Run<Shell>) {
    let first = run.handle.clone();
    let (node, began_by) = (core.clone(), first.clone());
    let task = core.runtime.spawn(async move {
        let (mut next, mut begun) = (Some(run), Instant::now());
        while let Some(run) = next {
            if !Arc::ptr_eq(&run.handle, &began_by) {
                let _first = run.handle.began_by.set(began_by.clone());
            }
            next = run_one(&node, run).await;
            if next.is_some() && begun.elapsed() >= TURN {
                yield_now().await;
                begun = Instant::now();
            }
        }
    });
    first.handle_spawned(task.abort_handle());
}

/// Runs a call. Returns the call to run in its place.
async fn run_one(core: &Arc<Core>, run: Run<Shell>) -> Option<Run<Shell>> {
    let Run { service, number, key, message, deadline, handle } = run;
    let guaranteed = message.delivery.is_some();
    let (wants_reply, attempt) = (message.wants_reply, message.attempt());
    let lease = guaranteed.then(|| Arc::new(Lease::new(core.config.lease)));
    let deadline = deadline.and_then(|at| core.instant(at));
    let call = Call { message: *message, handle, deadline, lease: lease.clone() };
    let result = hold_panic(&core.reporter, &service, key.id, call, lease).await;
    add(&core.reporter.counters.handled, 1);
    let ended = match result {
        Ok(reply) => {
            let (body, extra) = reply.into_parts();
            Ended::Replied { body, extra }
        }
        Err(error) => {
            if guaranteed || !wants_reply {
                core.reporter.log(Line::HandlerFailed {
                    service: service.name.clone(),
                    id: key.id,
                    attempt: guaranteed.then_some(attempt),
                    error: error.to_string(),
                });
            }
            let HandlerError { code, text, rejects } = error;
            Ended::Failed { failure: Failure { code, text }, rejects }
        }
    };
    core.with_front(|front, now| front.handle_ended(now, number, key, ended))
}

/// Runs a handler within its lease. A panic becomes an error for the caller of that call only.
async fn hold_panic(
    reporter: &Reporter,
    service: &ServiceRunner,
    id: MessageId,
    call: Call,
    lease: Option<Arc<Lease>>,
) -> Result<Reply, HandlerError> {
    calling_out();
    let begun = catch_unwind(AssertUnwindSafe(|| (service.handler)(call)));
    let run = begun.map(|run| AssertUnwindSafe(run).catch_unwind());
    let ended = match (run, lease) {
        (Ok(mut run), Some(lease)) => match lease.hold(&mut run).await {
            Some(ended) => ended,
            None => catch_unwind(AssertUnwindSafe(|| drop(run))).map(|()| {
                Err(HandlerError::new("lease", "the handler took longer than its lease"))
            }),
        },
        (Ok(run), None) => run.await,
        (Err(panic), _) => Err(panic),
    };
    ended.unwrap_or_else(|panic| {
        let text = panic_text(panic.as_ref());
        reporter.log(Line::HandlerFailed {
            service: service.name.clone(),
            id,
            attempt: None,
            error: format!("it panicked: {text}"),
        });
        Err(HandlerError::new("panic", "the handler panicked"))
    })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no message",
    }
}
