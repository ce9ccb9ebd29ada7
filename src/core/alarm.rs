//! Sleeps until the next deadline, and wakes earlier when an earlier one comes up.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::Core;
use crate::engine::Time;

/// The alarm of one task, which anybody may set to an earlier time.
pub(crate) struct Alarm {
    earlier: Notify,
    /// In ms since the node's start.
    armed_ms: AtomicU64,
}

impl Default for Alarm {
    fn default() -> Self {
        Self { earlier: Notify::new(), armed_ms: AtomicU64::new(0) }
    }
}

impl Alarm {
    /// Makes sure that the task wakes by then.
    pub(crate) fn wake_by(&self, at: Time) {
        let at = at.since_start().as_millis() as u64;
        if at < self.armed_ms.load(Ordering::Acquire) {
            self.earlier.notify_one();
        }
    }

    /// Sleeps until `next` says so; without an end if it says `None`.
    pub(crate) async fn sleep_until_next(&self, core: &Core, next: impl Fn() -> Option<Time>) {
        loop {
            // A deadline that comes up meanwhile leaves its notice.
            self.armed_ms.store(u64::MAX, Ordering::Release);
            let Some(at) = next().and_then(|at| Some((at, core.instant(at)?))) else {
                self.earlier.notified().await;
                continue;
            };
            let (at, instant) = at;
            self.armed_ms.store(at.since_start().as_millis() as u64, Ordering::Release);
            tokio::select! {
                () = sleep_until(instant) => return,
                () = self.earlier.notified() => {}
            }
        }
    }
}
