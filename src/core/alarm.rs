//! Alarms: sleep until the next deadline, or until an earlier one is set.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::Core;
use crate::engine::Time;

/// The alarm of one task, which any task may set to an earlier time.
#[derive(Default)]
pub(crate) struct Alarm {
    earlier: Notify,
    /// The time for which the alarm is set, in ms since the node's start.
    armed_ms: AtomicU64,
}

impl Alarm {
    /// Wakes the task by `at` at the latest.
    pub(crate) fn wake_by(&self, at: Time) {
        let at = at.since_start().as_millis() as u64;
        if at < self.armed_ms.load(Ordering::Acquire) {
            self.earlier.notify_one();
        }
    }

    /// Sleeps until the time that `next` returns, or until an earlier deadline is set if it returns
    /// `None`.
    pub(crate) async fn sleep_until_next(&self, core: &Core, next: impl Fn() -> Option<Time>) {
        loop {
            // A deadline that is set meanwhile leaves its notification.
            self.armed_ms.store(u64::MAX, Ordering::Release);
            let Some((at, instant)) = next().and_then(|at| Some((at, core.instant(at)?))) else {
                self.earlier.notified().await;
                continue;
            };
            self.armed_ms.store(at.since_start().as_millis() as u64, Ordering::Release);
            tokio::select! {
                () = sleep_until(instant) => return,
                () = self.earlier.notified() => {}
            }
        }
    }
}
