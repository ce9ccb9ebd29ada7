//! The pacing of messages to the microsecond; a runtime's own timers count in milliseconds.

#[cfg(target_os = "linux")]
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::tally::now;

/// Wakes its task at times of the machine's monotonic clock. It uses the runtime's own poll, since
/// the wake-ups of another thread would distort the measurement.
#[cfg(target_os = "linux")]
pub(super) struct Pace(tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>);

#[cfg(target_os = "linux")]
impl Pace {
    pub(super) fn new() -> std::io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[allow(deprecated, reason = "its successor is unsafe, for descriptors that nobody owns")]
        let timer = tokio::io::unix::AsyncFd::new(timer)?;
        Ok(Self(timer))
    }

    /// Waits until `due`; if that has passed, only yields to other tasks.
    pub(super) async fn wait_until(&mut self, due: u64) -> std::io::Result<()> {
        // Queued messages leave first; otherwise setting the timer would delay them.
        tokio::task::yield_now().await;
        if due <= now() {
            return Ok(());
        }
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: (due / 1_000_000_000) as _,
                tv_nsec: (due % 1_000_000_000) as _,
            },
        };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::ABSTIME, &once)?;
        loop {
            let mut ready = self.0.readable_mut().await?;
            let read = |timer: &mut tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>| {
                Ok(rustix::io::read(timer.get_ref(), &mut [0; 8])?)
            };
            if let Ok(read) = ready.try_io(read) {
                return read.map(drop);
            }
        }
    }
}

/// The fallback without a pollable timer: to the millisecond.
#[cfg(not(target_os = "linux"))]
pub(super) struct Pace;

#[cfg(not(target_os = "linux"))]
impl Pace {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    pub(super) async fn wait_until(&mut self, due: u64) -> std::io::Result<()> {
        match due.checked_sub(now()) {
            Some(early) => tokio::time::sleep(std::time::Duration::from_nanos(early)).await,
            None => tokio::task::yield_now().await,
        }
        Ok(())
    }
}
