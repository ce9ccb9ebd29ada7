//! The pulse of a node: notices that its tasks do not run, and has them run elsewhere.
//!
//! A handler that blocks its thread can hold up the timers and sockets of a whole runtime, although
//! the runtime's other threads are free: tokio wakes no second thread for a single task, and nobody
//! else waits for sockets and timers meanwhile. One thread in a process watches all its nodes, and
//! hands the overdue work of a node to its runtime from outside, which wakes a free thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::clock::running_for;

/// The interval at which the nodes are checked, and the lateness from which they are helped.
const CHECK: Duration = Duration::from_millis(250);
/// The shortest lateness that counts as a pause.
const PAUSE: Duration = Duration::from_secs(1);

/// The pulse of one node.
pub(crate) struct Pulse {
    /// The time at which the node's work is due at the latest, in ms.
    due: AtomicU64,
    /// The work was handed to the runtime, and has not begun.
    handed_over: AtomicBool,
    runtime: Handle,
    work: Box<dyn Fn() + Send + Sync>,
}

/// The watched nodes of this process, and the thread that watches them.
#[derive(Default)]
struct Watched {
    nodes: Vec<Weak<Pulse>>,
    is_running: bool,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched { nodes: Vec::new(), is_running: false });

impl Pulse {
    pub(crate) fn new(runtime: Handle, work: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let work = Box::new(work);
        let (due, handed_over) = (AtomicU64::new(u64::MAX), AtomicBool::new(false));
        Arc::new(Self { due, handed_over, runtime, work })
    }

    /// Watches the node from now on, until the pulse is dropped.
    pub(crate) fn begin(self: &Arc<Self>) {
        let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
        watched.nodes.push(Arc::downgrade(self));
        if !watched.is_running {
            let thread = thread::Builder::new().name("peerbus-pulse".into()).spawn(watch);
            // Without a thread the nodes run as well as their runtime does.
            watched.is_running = thread.is_ok();
        }
    }

    /// Records that the work is due within `wait`.
    pub(crate) fn plan(&self, wait: Duration) {
        self.due.store(ms(running_for() + wait), Ordering::Release);
    }

    /// Records that the work is being done. Returns the lateness, if the node did not run.
    pub(crate) fn beat(&self) -> Option<Duration> {
        self.handed_over.store(false, Ordering::Release);
        let due = self.due.swap(u64::MAX, Ordering::AcqRel);
        let late = Duration::from_millis(ms(running_for()).saturating_sub(due));
        (late >= PAUSE).then_some(late)
    }

    fn help_if_late(self: Arc<Self>, now: Duration) {
        let limit = ms(now.saturating_sub(CHECK));
        let is_late = self.due.load(Ordering::Acquire) <= limit;
        if is_late && !self.handed_over.swap(true, Ordering::AcqRel) {
            let runtime = self.runtime.clone();
            runtime.spawn(async move { (self.work)() });
        }
    }
}

fn ms(time: Duration) -> u64 {
    time.as_millis() as u64
}

/// Watches all nodes of this process, until there is none.
fn watch() {
    loop {
        thread::sleep(CHECK);
        let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
        watched.nodes.retain(|node| node.strong_count() > 0);
        if watched.nodes.is_empty() {
            watched.is_running = false;
            return;
        }
        let nodes: Vec<_> = watched.nodes.iter().filter_map(Weak::upgrade).collect();
        drop(watched);
        let now = running_for();
        nodes.into_iter().for_each(|node| node.help_if_late(now));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[test]
    fn overdue_work_is_done_although_a_task_blocks_its_thread() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (done, mut wait) = mpsc::unbounded_channel();
        let pulse = Pulse::new(runtime.handle().clone(), move || done.send(()).unwrap());
        pulse.begin();
        let (release, held) = std::sync::mpsc::channel::<()>();
        runtime.spawn(async move { held.recv().unwrap() });
        pulse.plan(Duration::ZERO);
        wait.blocking_recv().unwrap();
        assert!(pulse.beat().is_none(), "it ran in time, with help");
        release.send(()).unwrap();
    }
}
