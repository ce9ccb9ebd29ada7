//! One process of a comparison: it sends or receives, controlled by its standard input.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};
use tokio::task::{JoinSet, unconstrained};

use super::client::{Client, Flow, Library, Note};
use super::pace::Pace;
use super::tally::{Counter, Log, Sent, Stamp, count, now};
use super::workload::Pattern;
use crate::bench::process::affinity;
use crate::output;

/// The task of an actor, which it reads at its start. It has the broker's credentials.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) role: Role,
    pub(super) library: Library,
    pub(super) pattern: Pattern,
    pub(super) guaranteed: bool,
    pub(super) mesh: String,
    /// The folder for its store or identity.
    pub(super) dir: PathBuf,
    /// A private folder that all processes of a round share, for the key of this host.
    pub(super) runtime: PathBuf,
    pub(super) broker: Option<String>,
    pub(super) tls: bool,
    /// The address on which a receiver of a mesh listens.
    pub(super) listen: Option<SocketAddr>,
    /// The addresses that a sender of a mesh dials.
    pub(super) peers: Vec<SocketAddr>,
    pub(super) size: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Role {
    Receiver {
        /// The file in which to record arrivals, if the receiver may be killed.
        log: Option<PathBuf>,
    },
    Sender {
        number: u32,
        /// The number of receivers.
        receivers: usize,
        /// Messages per second; `None` sends at full speed.
        rate: Option<f64>,
        window: usize,
        warm_up: Duration,
        lasts: Duration,
    },
}

/// One of the processes of `tradeoff`
#[derive(Args)]
pub(crate) struct Actor {
    #[arg(long)]
    cpu: Option<usize>,
}

impl Actor {
    pub(crate) fn prepare(&self) {
        if let Some(cpu) = self.cpu {
            affinity::pin(cpu);
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Runs on a worker like an embedding service's own tasks, not on the main thread.
        tokio::spawn(async {
            let mut lines = BufReader::new(tokio::io::stdin()).lines();
            let part = lines.next_line().await?.context("no task was given")?;
            let part: Part = serde_json::from_str(&part)?;
            match part.role.clone() {
                Role::Receiver { log } => receive(part, log, lines).await,
                Role::Sender { .. } => send(part, lines).await,
            }
        })
        .await?
    }
}

impl Part {
    /// The CA certificates for the broker's certificate.
    pub(super) fn ca(&self) -> Option<PathBuf> {
        self.broker.as_ref().filter(|_| self.tls)?;
        Some(std::env::var_os("PEERBUS_BROKER_CA")?.into())
    }
}

/// The record of the messages that a receiver has received.
enum Book {
    Counting(Box<Counter>),
    Logging(Log),
}

type Shared = Arc<Mutex<Option<Book>>>;

fn note(book: &Shared, body: &[u8]) {
    let at = now();
    let Some(stamp) = Stamp::read(body).filter(|stamp| !stamp.warm) else { return };
    match &mut *book.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(Book::Counting(counter)) => counter.add(stamp, at),
        Some(Book::Logging(log)) => {
            if let Err(error) = log.add(stamp, at) {
                output::note(format_args!("an arrival can't be recorded: {error}"));
            }
        }
        None => {}
    }
}

async fn receive(
    part: Part,
    log: Option<PathBuf>,
    mut lines: Lines<BufReader<Stdin>>,
) -> anyhow::Result<()> {
    let client = Client::connect(&part).await?;
    let book: Shared = Arc::default();
    if let Some(path) = &log {
        *book.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Book::Logging(Log::open(path)?));
    }
    let noting = book.clone();
    let noting: Note = Arc::new(move |body| note(&noting, body));
    match client.receive(noting).await? {
        Some(addr) => output::say(addr)?,
        None => output::say("ready")?,
    }
    while let Some(line) = lines.next_line().await? {
        let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
        match (line.split_once(' ').unwrap_or((&line, "")), &mut *book) {
            (("begin", start), Some(Book::Logging(_))) => _ = start,
            (("begin", start), book) => {
                *book = Some(Book::Counting(Box::new(Counter::new(start.parse()?))));
            }
            (("count", _), Some(Book::Counting(counter))) => output::say(counter.received())?,
            (("report", _), book @ Some(Book::Counting(_))) => {
                if let Some(Book::Counting(counter)) = book.take() {
                    output::say(serde_json::to_string(&counter.finish())?)?;
                }
            }
            (("end", _), _) => break,
            (other, _) => bail!("unexpected command {other:?}"),
        }
    }
    client.close().await;
    Ok(())
}

/// The sender of single messages.
#[derive(Clone)]
struct Sender {
    client: Client,
    part: Arc<Part>,
    number: u32,
    ended: Arc<Mutex<Ended>>,
}

#[derive(Default)]
struct Ended {
    told: u64,
    /// The replies to requests.
    replies: Option<Counter>,
}

impl Sender {
    fn with(&self, act: impl FnOnce(&mut Ended)) {
        act(&mut self.ended.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns true if its messages are unstored events, which are published one by one.
    fn is_flow(&self) -> bool {
        self.part.pattern == Pattern::Publish && !self.part.guaranteed
    }

    /// Sends a message, and waits for the outcome that the sender can know.
    async fn send(&self, stamp: Stamp) {
        let sent = self.client.send(stamp.body(self.part.size)).await;
        let at = now();
        if stamp.warm {
            return;
        }
        self.with(|ended| match sent {
            Ok(()) => ended.replies.iter_mut().for_each(|replies| replies.add(stamp, at)),
            Err(error) => {
                tracing::debug!(%error, "not sent");
                ended.told += 1;
            }
        });
    }

    /// Publishes a message. A later drop is reported later.
    async fn publish(&self, flow: &mut Flow, stamp: Stamp, wait: bool) {
        let left = flow.publish(stamp.body(self.part.size), wait).await;
        if !left && !stamp.warm {
            self.with(|ended| ended.told += 1);
        }
    }
}

/// The times at which a sender's messages are due.
struct Schedule {
    /// Nanoseconds of the monotonic clock.
    start: u64,
    end: u64,
    rate: Option<f64>,
    warm: bool,
}

async fn send(part: Part, mut lines: Lines<BufReader<Stdin>>) -> anyhow::Result<()> {
    let Role::Sender { number, receivers, rate, window, warm_up, lasts } = part.role.clone() else {
        bail!("the task is not a sender's");
    };
    let client = Client::connect(&part).await?;
    client.meet(receivers).await?;
    output::say("ready")?;
    let line = lines.next_line().await?.context("no begin command was given")?;
    let start: u64 =
        line.strip_prefix("begin ").context("the begin command has no time")?.parse()?;
    let part = Arc::new(part);
    let sender = Sender { client, part, number, ended: Arc::default() };
    let before = start.saturating_sub(warm_up.as_nanos() as u64);
    run(&sender, Schedule { start: before, end: start, rate, warm: true }, window).await?;
    if sender.part.pattern == Pattern::Request {
        sender.with(|ended| ended.replies = Some(Counter::new(start)));
    }
    let told_before = sender.client.told();
    let end = start + lasts.as_nanos() as u64;
    let due = run(&sender, Schedule { start, end, rate, warm: false }, window).await?;
    // Later drops are reported later.
    let line = lines.next_line().await?.context("no report command was given")?;
    anyhow::ensure!(line == "report", "unexpected command {line:?}");
    let mut sent = Sent { sent: due.iter().sum(), due, ..Sent::default() };
    sender.with(|ended| {
        sent.told = ended.told + sender.client.told() - told_before;
        sent.replies = ended.replies.take().map(Counter::finish);
    });
    output::say(serde_json::to_string(&sent)?)?;
    while lines.next_line().await?.is_some_and(|line| line != "end") {}
    sender.client.close().await;
    Ok(())
}

/// Sends by a schedule, to its end; returns the number of messages due in each moment.
async fn run(sender: &Sender, schedule: Schedule, window: usize) -> anyhow::Result<Vec<u64>> {
    let now = now();
    if schedule.start > now {
        tokio::time::sleep(Duration::from_nanos(schedule.start - now)).await;
    }
    match schedule.rate {
        Some(rate) => pace(sender, &schedule, rate).await,
        None => rush(sender, &schedule, window).await,
    }
}

/// Sends each message when it is due. The latency of a late one counts from that time.
async fn pace(sender: &Sender, schedule: &Schedule, rate: f64) -> anyhow::Result<Vec<u64>> {
    let (mut pace, mut flow) = (Pace::new()?, sender.client.flow()?);
    let (mut moments, mut waiting) = (Vec::new(), JoinSet::new());
    for seq in 0.. {
        let due = schedule.start + (seq as f64 * 1e9 / rate) as u64;
        if due >= schedule.end {
            break;
        }
        pace.wait_until(due).await?;
        count(&mut moments, due - schedule.start);
        let stamp = Stamp { seq, due, sender: sender.number, warm: schedule.warm };
        if sender.is_flow() {
            sender.publish(&mut flow, stamp, false).await;
            continue;
        }
        let sender = sender.clone();
        waiting.spawn(async move { sender.send(stamp).await });
        while waiting.try_join_next().is_some() {}
    }
    waiting.join_all().await;
    Ok(moments)
}

/// Sends at full speed, `window` messages at a time; events one by one, waiting for room.
async fn rush(sender: &Sender, schedule: &Schedule, window: usize) -> anyhow::Result<Vec<u64>> {
    let mut moments = Vec::new();
    let mut seq = 0;
    let mut next = |moments: &mut Vec<u64>| {
        let due = now();
        if due >= schedule.end {
            return None;
        }
        count(moments, due.saturating_sub(schedule.start));
        seq += 1;
        Some(Stamp { seq: seq - 1, due, sender: sender.number, warm: schedule.warm })
    };
    if sender.is_flow() {
        let mut flow = sender.client.flow()?;
        while let Some(stamp) = next(&mut moments) {
            sender.publish(&mut flow, stamp, true).await;
        }
        return Ok(moments);
    }
    let mut waiting = FuturesUnordered::new();
    loop {
        while waiting.len() < window {
            let Some(stamp) = next(&mut moments) else { break };
            waiting.push(sender.send(stamp));
        }
        // Without this, thousands of futures in one task would be polled in vain at each yield.
        if unconstrained(waiting.next()).await.is_none() {
            return Ok(moments);
        }
    }
}
