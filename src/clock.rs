//! The wall clock, as milliseconds since 1970; and the time since the machine's start.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The current time.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// The current time from the kernel's cached clock: it advances once per tick, every 1 to 10 ms,
/// and takes a fifth of the time to read.
#[cfg(target_os = "linux")]
pub(crate) fn coarse_unix_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    u64::try_from(now.tv_sec * 1000 + now.tv_nsec / 1_000_000).unwrap_or_default()
}

#[cfg(not(target_os = "linux"))]
pub(crate) use unix_ms as coarse_unix_ms;

/// The time since some fixed moment, in which the machine may have slept.
#[cfg(target_os = "linux")]
pub(crate) fn running_for() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// The time since the first call. Sleep of the machine counts on some systems only.
#[cfg(not(target_os = "linux"))]
pub(crate) fn running_for() -> Duration {
    static FIRST: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    FIRST.get_or_init(std::time::Instant::now).elapsed()
}
