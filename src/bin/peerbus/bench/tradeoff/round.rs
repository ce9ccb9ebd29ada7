//! One round: a workload over one system, with all its processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::{Instant, sleep_until};

use super::actor::{Part, Role};
use super::relay::Relay;
use super::systems::{Broker, SystemName};
use super::tally::{Log, MOMENT, Sent, Tally, now};
use super::usage::{Usage, ended};
use super::workload::{Guaranteed, Pattern, Rate, Target, Workload};
use crate::bench::process::{Far, Placement};
use crate::scratch::{Scratch, create_private};

/// The warm-up of each sender, which does not count.
const WARM_UP: Duration = Duration::from_millis(500);
/// The silence after the last message from which a round counts as complete.
const QUIET: Duration = Duration::from_millis(1500);
/// The silence for guaranteed messages after a fault: they are redelivered when their lease ends,
/// after 30 s.
const QUIET_AFTER_FAULT: Duration = Duration::from_secs(35);
/// The time limit for a process to start, or to answer.
const PATIENCE: Duration = Duration::from_secs(90);

/// The result of one round.
pub(super) struct Round {
    pub(super) received: Vec<Tally>,
    pub(super) sent: Vec<Sent>,
    /// CPU seconds of all processes.
    pub(super) cpu: f64,
    /// Peak resident memory, in bytes.
    pub(super) memory: u64,
    pub(super) wire: u64,
    /// The start of the round, by the monotonic clock.
    pub(super) start: u64,
    /// The time of the fault's repair.
    pub(super) mended: Option<u64>,
}

/// The processes of a round.
struct Cast<'a> {
    workload: &'a Workload,
    system: SystemName,
    placement: Placement,
    dir: &'a Path,
    mesh: String,
    broker: Option<Broker>,
    relays: Vec<Relay>,
    receivers: Vec<Receiver>,
    senders: Vec<Far>,
}

struct Receiver {
    part: Part,
    far: Far,
    log: Option<PathBuf>,
}

/// Runs a workload over a system.
pub(super) async fn run(
    workload: &Workload,
    system: SystemName,
    placement: Placement,
    dir: &Path,
    number: u32,
) -> anyhow::Result<Round> {
    let scratch = Scratch::inside(dir)?;
    let mut cast = Cast {
        workload,
        system,
        placement,
        dir: scratch.path(),
        mesh: format!("b{}-{}-{number}", std::process::id(), system.as_str()),
        broker: Broker::start(system, workload.tls).await?,
        relays: Vec::new(),
        receivers: Vec::new(),
        senders: Vec::new(),
    };
    // The round ends with its broker, except if the broker is killed on purpose.
    let broker = match (&cast.broker, workload.fault) {
        (Some(_), Some(fault)) if fault.kill == Target::Broker => Vec::new(),
        (Some(broker), _) => broker.pids().await?,
        (None, _) => Vec::new(),
    };
    let running = async {
        for place in 0..workload.receivers() {
            cast.add_receiver(place).await.context("a receiver")?;
        }
        for place in 0..workload.publishers {
            cast.add_sender(place).await.context("a sender")?;
        }
        // All processes are linked before they report that they are ready.
        cast.measure().await
    };
    tokio::select! {
        round = running => round,
        () = ended(broker) => bail!("the broker ended during the round"),
    }
}

impl Cast<'_> {
    fn is_guaranteed(&self) -> bool {
        self.workload.guaranteed != Guaranteed::No && self.system.is_guaranteed()
    }

    fn part(&self, name: &str, role: Role) -> anyhow::Result<Part> {
        let dir = self.dir.join(name);
        if !dir.is_dir() {
            create_private(&dir)?;
        }
        Ok(Part {
            runtime: self.dir.to_owned(),
            role,
            library: self.system.library(),
            pattern: self.workload.pattern,
            guaranteed: self.is_guaranteed(),
            mesh: self.mesh.clone(),
            dir,
            broker: self.broker.as_ref().map(|broker| broker.url().reveal().to_owned()),
            tls: self.workload.tls,
            listen: None,
            peers: Vec::new(),
            size: self.workload.size,
        })
    }

    async fn add_receiver(&mut self, place: usize) -> anyhow::Result<()> {
        let fault = self.workload.fault.filter(|_| place == 0);
        let log = fault.map(|_| self.dir.join(format!("log-{place}")));
        let mut part =
            self.part(&format!("receiver-{place}"), Role::Receiver { log: log.clone() })?;
        let is_cut = fault.is_some_and(|fault| fault.kill == Target::Link);
        if let (Some(url), true) = (&part.broker, is_cut) {
            part.broker = Some(self.relayed(url.clone()).await?);
        }
        if self.system.is_mesh() {
            part.listen = Some(([127, 0, 0, 1], 0).into());
        }
        let far = start(&part, self.placement, false).await?;
        if self.system.is_mesh() {
            // A restarted receiver listens on the same address.
            part.listen = Some(far.address.parse().context("a receiver's address")?);
            if is_cut {
                self.relays.push(Relay::start(far.address.clone()).await?);
            }
        }
        self.receivers.push(Receiver { part, far, log });
        Ok(())
    }

    /// A broker's address through a relay.
    async fn relayed(&mut self, url: String) -> anyhow::Result<String> {
        let (before, rest) = url.rsplit_once(':').context("the broker's address has no port")?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (port, after) = rest.split_at(digits);
        let host = before.rsplit(['@', '/']).next().unwrap_or("127.0.0.1");
        let relay = Relay::start(format!("{host}:{port}")).await?;
        let relayed = format!("{before}:{}{after}", relay.addr().port());
        self.relays.push(relay);
        Ok(relayed)
    }

    async fn add_sender(&mut self, place: usize) -> anyhow::Result<()> {
        let rate = match self.workload.rate {
            Rate::Max => None,
            Rate::PerSecond(rate) => Some(rate / self.workload.publishers as f64),
        };
        let role = Role::Sender {
            number: place as u32,
            receivers: self.workload.receivers(),
            rate,
            window: self.workload.window,
            warm_up: WARM_UP,
            lasts: self.workload.seconds,
        };
        let mut part = self.part(&format!("sender-{place}"), role)?;
        if self.system.is_mesh() {
            let relayed = self.relays.iter().map(Relay::addr);
            let straight = self.receivers.iter().filter_map(|it| it.part.listen);
            let straight = straight.skip(self.relays.len());
            part.peers = relayed.chain(straight).collect();
        }
        let far = start(&part, self.placement, true).await?;
        self.senders.push(far);
        Ok(())
    }

    async fn measure(mut self) -> anyhow::Result<Round> {
        let mut usage = Usage::start();
        for far in self.senders.iter().chain(self.receivers.iter().map(|it| &it.far)) {
            usage.watch(far.pid());
        }
        if let Some(broker) = &self.broker {
            broker.pids().await?.into_iter().for_each(|pid| usage.watch(Some(pid)));
        }
        // Leaves time for all processes to read the command.
        let start = now() + (WARM_UP + Duration::from_millis(200)).as_nanos() as u64;
        let begin = format!("begin {start}");
        for receiver in &mut self.receivers {
            receiver.far.tell(&begin).await?;
        }
        for sender in &mut self.senders {
            sender.tell(&begin).await?;
        }
        let began = Instant::now() + Duration::from_nanos(start.saturating_sub(now()));
        sleep_until(began).await;
        usage.begin();
        let mended = self.act(began, &mut usage).await?;
        usage.sleep_until(began + self.workload.seconds).await;
        self.settle(&mut usage).await?;
        let (cpu, memory, wire) = usage.end();
        let mut sent = Vec::new();
        for sender in &mut self.senders {
            sender.tell("report").await?;
            let line = sender.line_within(PATIENCE).await?;
            sent.push(serde_json::from_str::<Sent>(&line)?);
        }
        let received = self.tallies(start, &mut sent).await?;
        for far in self.senders.iter_mut().chain(self.receivers.iter_mut().map(|it| &mut it.far)) {
            far.end().await?;
        }
        Ok(Round { received, sent, cpu, memory, wire, start, mended })
    }

    /// Injects the workload's fault, and repairs it; returns the time of the repair.
    async fn act(&mut self, began: Instant, usage: &mut Usage) -> anyhow::Result<Option<u64>> {
        let Some(fault) = self.workload.fault else { return Ok(None) };
        usage.sleep_until(began + fault.after).await;
        let mend = began + fault.after + fault.lasts;
        match (fault.kill, &mut self.broker) {
            (Target::Receiver, _) => {
                let first = &mut self.receivers[0];
                usage.forget(first.far.pid());
                first.far.kill().await?;
                usage.sleep_until(mend).await;
                let mended = now();
                first.far = start(&first.part, self.placement, false).await?;
                usage.watch(first.far.pid());
                first.far.tell(&format!("begin {mended}")).await?;
                Ok(Some(mended))
            }
            (Target::Broker, Some(broker)) => {
                for pid in broker.pids().await? {
                    usage.forget(Some(pid));
                }
                broker.kill().await?;
                usage.sleep_until(mend).await;
                let mended = now();
                broker.restart().await?;
                broker.pids().await?.into_iter().for_each(|pid| usage.watch(Some(pid)));
                Ok(Some(mended))
            }
            // A mesh has no broker to kill.
            (Target::Broker, None) => Ok(None),
            (Target::Link, _) => {
                self.relays.iter().for_each(Relay::cut);
                usage.sleep_until(mend).await;
                self.relays.iter().for_each(Relay::restore);
                Ok(Some(now()))
            }
        }
    }

    /// Waits until no more messages arrive.
    async fn settle(&mut self, usage: &mut Usage) -> anyhow::Result<()> {
        if self.workload.pattern == Pattern::Request {
            return Ok(());
        }
        // Messages sent at full speed leave no gaps; failed ones are retried after a while.
        let quiet = match self.is_guaranteed() && self.workload.fault.is_some() {
            true => QUIET_AFTER_FAULT,
            false => QUIET,
        };
        let (mut before, mut since) = (u64::MAX, Instant::now());
        // The maximum number of messages, reached unless some are lost.
        let wanted = match self.workload.rate {
            Rate::PerSecond(rate) => Some(
                (rate * self.workload.seconds.as_secs_f64()) as u64
                    * self.workload.fan_out() as u64,
            ),
            Rate::Max => None,
        };
        loop {
            let mut count = 0;
            for receiver in &mut self.receivers {
                count += match &receiver.log {
                    Some(log) => Log::entries(log),
                    None => {
                        receiver.far.tell("count").await?;
                        receiver.far.line_within(PATIENCE).await?.parse()?
                    }
                };
            }
            if wanted.is_some_and(|wanted| count >= wanted) && self.has_all(wanted)? {
                return Ok(());
            }
            if count != before {
                (before, since) = (count, Instant::now());
            } else if since.elapsed() > quiet {
                return Ok(());
            }
            usage.sleep_until(Instant::now() + Duration::from_nanos(MOMENT)).await;
        }
    }

    /// Returns true if every message has arrived: a log may hold duplicates.
    fn has_all(&self, wanted: Option<u64>) -> anyhow::Result<bool> {
        let mut count = 0;
        for log in self.receivers.iter().filter_map(|receiver| receiver.log.as_ref()) {
            count += Log::tally(log, 0)?.received;
        }
        let counted = self.receivers.iter().any(|receiver| receiver.log.is_none());
        Ok(counted || wanted.is_some_and(|wanted| count >= wanted))
    }

    async fn tallies(&mut self, start: u64, sent: &mut [Sent]) -> anyhow::Result<Vec<Tally>> {
        if self.workload.pattern == Pattern::Request {
            return Ok(sent.iter_mut().filter_map(|sent| sent.replies.take()).collect());
        }
        let mut tallies = Vec::new();
        for receiver in &mut self.receivers {
            tallies.push(match &receiver.log {
                Some(log) => Log::tally(log, start)?,
                None => {
                    receiver.far.tell("report").await?;
                    serde_json::from_str(&receiver.far.line_within(PATIENCE).await?)?
                }
            });
        }
        Ok(tallies)
    }
}

async fn start(part: &Part, placement: Placement, near: bool) -> anyhow::Result<Far> {
    let cpu = placement.cores().map(|(first, second)| if near { first } else { second });
    let args = cpu.into_iter().flat_map(|cpu| ["--cpu".to_owned(), cpu.to_string()]);
    Far::start_with("actor", args, &serde_json::to_string(part)?, PATIENCE).await
}
