//! The resource usage of processes: CPU, memory, network.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// The sampling interval of memory.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The resource usage of a set of processes since its begin.
pub(super) struct Usage {
    /// The CPU seconds of each process when it was first seen.
    watched: BTreeMap<u32, f64>,
    /// CPU seconds of the processes that are gone.
    gone: f64,
    memory: u64,
    wire: u64,
    looked: Instant,
}

impl Usage {
    pub(super) fn start() -> Self {
        Self {
            watched: BTreeMap::new(),
            gone: 0.0,
            memory: 0,
            wire: wire(),
            looked: Instant::now(),
        }
    }

    pub(super) fn watch(&mut self, pid: Option<u32>) {
        if let Some(pid) = pid {
            self.watched.insert(pid, cpu(pid).unwrap_or(0.0));
        }
    }

    /// Removes a process that is about to end.
    pub(super) fn forget(&mut self, pid: Option<u32>) {
        let watched = pid.and_then(|pid| Some((pid, self.watched.remove(&pid)?)));
        if let Some((pid, before)) = watched {
            self.gone += cpu(pid).map_or(0.0, |now| now - before);
        }
    }

    /// Resets the counts.
    pub(super) fn begin(&mut self) {
        for (pid, before) in &mut self.watched {
            *before = cpu(*pid).unwrap_or(0.0);
        }
        (self.gone, self.memory, self.wire) = (0.0, 0, wire());
    }

    pub(super) async fn sleep_until(&mut self, deadline: Instant) {
        while Instant::now() < deadline {
            sleep_until(deadline.min(self.looked + LOOK_EVERY)).await;
            self.look();
        }
    }

    fn look(&mut self) {
        if self.looked.elapsed() >= LOOK_EVERY {
            self.looked = Instant::now();
            let resident = self.watched.keys().filter_map(|pid| resident(*pid)).sum();
            self.memory = self.memory.max(resident);
        }
    }

    /// The CPU seconds, the peak memory, and the bytes on loopback.
    pub(super) fn end(mut self) -> (f64, u64, u64) {
        self.looked -= LOOK_EVERY;
        self.look();
        let taken = self.watched.iter().filter_map(|(pid, before)| Some(cpu(*pid)? - before));
        (self.gone + taken.sum::<f64>(), self.memory, wire() - self.wire)
    }
}

/// Returns when any of these processes has ended; never if none is known.
pub(super) async fn ended(pids: Vec<u32>) {
    if pids.is_empty() {
        std::future::pending::<()>().await;
    }
    while pids.iter().all(|pid| resident(*pid).is_some()) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The CPU time of a process, in seconds (`proc(5)`).
fn cpu(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The fields follow the name, which may hold any characters.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks as f64 / ticks_per_second())
}

#[cfg(target_os = "linux")]
fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(not(target_os = "linux"))]
fn ticks_per_second() -> f64 {
    100.0
}

/// The resident memory of a process, in bytes; `None` if it has ended.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The bytes sent over loopback, including headers.
fn wire() -> u64 {
    let devices = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let line = devices.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let sent = line.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
    sent.unwrap_or(0)
}
