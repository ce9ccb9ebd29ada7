//! The processes of a benchmark: their placement, their sockets, their start.

use std::ffi::OsStr;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// The time limit for a remote side to end.
const ENDING: Duration = Duration::from_secs(10);

/// The cores of a contender's two processes. The kernel may put both on one core, where a wake-up
/// is cheap, or on two, where it isn't, and keep it so; the same program can then differ by a
/// factor of three from run to run.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Placement {
    /// Each on a core of its own
    Apart,
    /// Both on one core
    Together,
    /// Wherever the kernel puts them
    Free,
}

impl Placement {
    /// Pins this process, before it starts other threads, to the near side's core.
    pub(crate) fn pin_near(self) {
        if let Some((near, _)) = self.cores() {
            affinity::pin(near);
        }
    }

    /// The cores of the near and the remote side, if this machine has them.
    pub(crate) fn cores(self) -> Option<(usize, usize)> {
        let allowed = cores();
        let (first, second) = (*allowed.first()?, *allowed.get(1)?);
        match self {
            Self::Apart => Some((first, second)),
            Self::Together => Some((first, first)),
            Self::Free => None,
        }
    }
}

/// The cores available to this process at its start.
fn cores() -> &'static [usize] {
    static CORES: OnceLock<Vec<usize>> = OnceLock::new();
    CORES.get_or_init(affinity::allowed)
}

#[cfg(target_os = "linux")]
pub(crate) mod affinity {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    pub(crate) fn allowed() -> Vec<usize> {
        let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
        (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
    }

    /// Pins this thread, and the threads that it starts, to one core.
    pub(crate) fn pin(cpu: usize) {
        let mut one = CpuSet::new();
        one.set(cpu);
        let _not_allowed = sched_setaffinity(None, &one);
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) mod affinity {
    pub(crate) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub(crate) fn pin(_: usize) {}
}

/// The CPU time and the resident memory, in bytes, of this process.
#[cfg(target_os = "linux")]
pub(crate) fn usage() -> anyhow::Result<(Duration, u64)> {
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu = Duration::new(cpu.tv_sec.try_into()?, cpu.tv_nsec.try_into()?);
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).context("/proc/self/statm has no resident size")?;
    Ok((cpu, pages.parse::<u64>()? * rustix::param::page_size() as u64))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn usage() -> anyhow::Result<(Duration, u64)> {
    bail!("CPU time and memory of a process are measured on Linux only")
}

/// The time that all threads of a process have run so far.
#[cfg(target_os = "linux")]
pub(crate) fn cpu_time(process: u32) -> anyhow::Result<Duration> {
    let mut nanos = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end meanwhile.
        let run = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        nanos += run.split(' ').next().and_then(|run| run.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn cpu_time(_: u32) -> anyhow::Result<Duration> {
    Ok(Duration::ZERO)
}

/// The name of a value on the command line.
pub(crate) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// A remote side: this program, run as a hidden subcommand, which is controlled by lines.
pub(crate) struct Far {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    /// The first line that it printed: its address.
    pub(crate) address: String,
}

impl Far {
    /// Starts `peerbus bench SUBCOMMAND ARGS` and waits until it is ready.
    pub(crate) async fn start<A: AsRef<OsStr>>(
        subcommand: &str,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Self> {
        let mut far = Self::spawn(subcommand, args)?;
        far.address = far.line().await.context("the remote side did not start")?;
        Ok(far)
    }

    /// Does the same for a subcommand that reads its task from its first line.
    pub(crate) async fn start_with(
        subcommand: &str,
        args: impl IntoIterator<Item = String>,
        task: &str,
        within: Duration,
    ) -> anyhow::Result<Self> {
        let mut far = Self::spawn(subcommand, args)?;
        far.tell(task).await?;
        far.address = far.line_within(within).await.context("the remote side did not start")?;
        Ok(far)
    }

    /// The number of its process.
    pub(crate) fn id(&self) -> anyhow::Result<u32> {
        self.child.id().context("the remote side has ended")
    }

    fn spawn<A: AsRef<OsStr>>(
        subcommand: &str,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", subcommand])
            .args(args)
            // Some benchmarks break links on purpose, and other failures end the process.
            .env("PEERBUS_LOG", std::env::var("PEERBUS_LOG").unwrap_or("error".into()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take().context("the remote side has no input")?;
        let stdout = child.stdout.take().context("the remote side has no output")?;
        let lines = BufReader::new(stdout).lines();
        Ok(Self { child, stdin, lines, address: String::new() })
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Requests the process to end, and waits up to [`ENDING`] until it has.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        self.tell("end").await?;
        let _killed_when_dropped = tokio::time::timeout(ENDING, self.child.wait()).await;
        Ok(())
    }

    /// Kills the process, as in a crash.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }

    /// The next line that it prints, within 30 s.
    pub(crate) async fn line(&mut self) -> anyhow::Result<String> {
        self.line_within(Duration::from_secs(30)).await
    }

    pub(crate) async fn line_within(&mut self, limit: Duration) -> anyhow::Result<String> {
        let line = tokio::time::timeout(limit, self.lines.next_line()).await;
        match line.context("timed out: the remote side printed nothing")?? {
            Some(line) => Ok(line),
            None => bail!("the remote side ended"),
        }
    }

    /// The [`usage`] of a remote side that reports it.
    pub(crate) async fn usage(&mut self) -> anyhow::Result<(Duration, u64)> {
        self.tell("usage").await?;
        let line = self.line().await?;
        let (cpu, resident) = line.split_once(' ').context("the remote side reported no usage")?;
        Ok((Duration::from_nanos(cpu.parse()?), resident.parse()?))
    }

    pub(crate) async fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        self.stdin.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(())
    }
}
