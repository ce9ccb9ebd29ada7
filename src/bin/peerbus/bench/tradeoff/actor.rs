//! One process of a comparison: it sends or receives, as it is told by its standard input.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use peerbus::{Address, Call, Config, HandlerError, Node, Overflow, Trust};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines, Stdin};
use tokio::task::unconstrained;

use super::tally::{Counter, Log, Sent, Stamp, count, now};
use super::workload::Pattern;
use crate::bench::process::affinity;

const TOPIC: &str = "bench.topic";
const SERVICE: &str = "bench.work";
const SUBSCRIPTION: &str = "bench";
/// How long the others may take to be there.
const MEETING: Duration = Duration::from_secs(60);
/// How long a sender waits for room, or for a reply.
const PATIENCE: Duration = Duration::from_secs(20);

/// What it is told at its start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) role: Role,
    pub(super) pattern: Pattern,
    pub(super) guaranteed: bool,
    pub(super) mesh: String,
    /// A folder for its store or identity.
    pub(super) dir: PathBuf,
    /// One for this user alone, which all processes of a round share, for the key of this host.
    pub(super) runtime: PathBuf,
    pub(super) broker: Option<String>,
    pub(super) tls: bool,
    /// Where it listens, as a receiver of a mesh.
    pub(super) listen: Option<SocketAddr>,
    /// Whom it dials, as a sender of a mesh.
    pub(super) peers: Vec<SocketAddr>,
    pub(super) size: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Role {
    Receiver {
        /// Where to write down what comes, if it may be killed.
        log: Option<PathBuf>,
    },
    Sender {
        number: u32,
        /// How many receivers there are.
        receivers: usize,
        /// Messages a second, or as fast as it goes.
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
        // Where an embedding service's own tasks run: on a worker, not on the main thread.
        tokio::spawn(async {
            let mut lines = BufReader::new(tokio::io::stdin()).lines();
            let part = lines.next_line().await?.context("there is no part to play")?;
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
    async fn start(&self) -> anyhow::Result<Node> {
        let config = Node::builder()
            .mesh(self.mesh.parse()?)
            .runtime_dir(&self.runtime)
            .request_deadline(PATIENCE)
            // A node that is told to take what it can is not to lose it to a queue of its own.
            .subscription_queue(256 * 1024 * 1024);
        let config = match (&self.broker, self.guaranteed) {
            (Some(url), _) => self.over_broker(config, url),
            (None, guaranteed) => self.over_mesh(config, guaranteed),
        };
        Ok(config.start().await?)
    }

    fn over_broker(&self, config: Config, url: &str) -> Config {
        let config = config.broker(url).identity(self.dir.join("identity"));
        match std::env::var_os("PEERBUS_BROKER_CA") {
            Some(ca) if self.tls => config.broker_ca(ca),
            _ => config,
        }
    }

    fn over_mesh(&self, config: Config, guaranteed: bool) -> Config {
        let trust = match self.tls {
            true => Trust::ThisHost,
            false => Trust::Open { anywhere: false },
        };
        let config = config.trust(trust).local(false).mdns(false).gossip(false);
        let config = self.listen.into_iter().fold(config, Config::listen);
        let config = self.peers.iter().map(|addr| Address::Tcp(*addr)).fold(config, Config::peer);
        match guaranteed {
            true => config.outbox(self.dir.join("store")).outbox_messages(10_000_000),
            false => config,
        }
    }
}

/// What a receiver has got so far.
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
                eprintln!("what came can't be written down: {error}");
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
    let node = part.start().await?;
    let book: Shared = Arc::default();
    if let Some(path) = &log {
        *book.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Book::Logging(Log::open(path)?));
    }
    let noting = book.clone();
    let handler = move |call: Call| {
        note(&noting, &call.message.body);
        let reply = if call.wants_reply() { call.message.body } else { bytes::Bytes::new() };
        std::future::ready(Ok::<_, HandlerError>(reply))
    };
    let (mut service, mut consumer) = (None, None);
    match (part.pattern, part.guaranteed) {
        (Pattern::Publish, false) => {
            let overflow = match part.broker {
                Some(_) => Overflow::DropNewest,
                None => Overflow::HoldBack,
            };
            let mut events = node.subscribe_with(TOPIC, overflow)?;
            let book = book.clone();
            tokio::spawn(unconstrained(async move {
                while let Some(message) = events.recv().await {
                    note(&book, &message.body);
                }
            }));
        }
        (Pattern::Publish, true) => {
            consumer = Some(node.consume(SUBSCRIPTION, TOPIC, handler).start()?);
        }
        (Pattern::Work | Pattern::Request, _) => {
            service = Some(node.serve(SERVICE, handler).start()?);
        }
    }
    match node.listening().first() {
        Some(addr) => println!("{addr}"),
        None => println!("ready"),
    }
    while let Some(line) = lines.next_line().await? {
        let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
        match (line.split_once(' ').unwrap_or((&line, "")), &mut *book) {
            (("begin", start), Some(Book::Logging(_))) => _ = start,
            (("begin", start), book) => {
                *book = Some(Book::Counting(Box::new(Counter::new(start.parse()?))));
            }
            (("count", _), Some(Book::Counting(counter))) => println!("{}", counter.received()),
            (("report", _), book @ Some(Book::Counting(_))) => {
                if let Some(Book::Counting(counter)) = book.take() {
                    println!("{}", serde_json::to_string(&counter.finish())?);
                }
            }
            (("end", _), _) => break,
            (other, _) => bail!("{other:?} makes no sense now"),
        }
    }
    drop((service, consumer));
    node.shutdown_within(Duration::from_secs(1)).await;
    Ok(())
}

/// What a sender does with one message.
#[derive(Clone)]
struct Sender {
    node: Node,
    part: Arc<Part>,
    number: u32,
    ended: Arc<Mutex<Ended>>,
}

#[derive(Default)]
struct Ended {
    told: u64,
    /// The replies to an asker.
    replies: Option<Counter>,
}

impl Sender {
    fn with(&self, act: impl FnOnce(&mut Ended)) {
        act(&mut self.ended.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Sends one, and waits for what its sender can know.
    async fn send(&self, stamp: Stamp) {
        let body = stamp.body(self.part.size);
        let (node, guaranteed) = (&self.node, self.part.guaranteed);
        let failed = match (self.part.pattern, guaranteed) {
            (Pattern::Publish, true) => {
                node.publish(TOPIC, body).guaranteed().await.err().map(|error| error.to_string())
            }
            (Pattern::Work, true) => {
                node.send(SERVICE, body).guaranteed().await.err().map(|error| error.to_string())
            }
            (Pattern::Work, false) => {
                node.send(SERVICE, body).await.err().map(|error| error.to_string())
            }
            (Pattern::Request, _) => match node.request(SERVICE, body).deadline(PATIENCE).await {
                Ok(_) => {
                    let at = now();
                    if !stamp.warm {
                        self.with(|ended| {
                            ended.replies.iter_mut().for_each(|replies| replies.add(stamp, at));
                        });
                    }
                    None
                }
                Err(error) => Some(error.to_string()),
            },
            (Pattern::Publish, false) => {
                self.publish_now(stamp);
                None
            }
        };
        if let (Some(error), false) = (failed, stamp.warm) {
            tracing::debug!(error, "not sent");
            self.with(|ended| ended.told += 1);
        }
    }

    fn publish_now(&self, stamp: Stamp) {
        let heard = match self.node.publish(TOPIC, stamp.body(self.part.size)).now() {
            Ok(report) => !report.is_unheard(),
            Err(_) => false,
        };
        // What is dropped is in the counters.
        if !heard && !stamp.warm {
            self.with(|ended| ended.told += 1);
        }
    }
}

/// When its messages are due.
struct Schedule {
    /// In nanoseconds.
    start: u64,
    end: u64,
    rate: Option<f64>,
    warm: bool,
}

async fn send(part: Part, mut lines: Lines<BufReader<Stdin>>) -> anyhow::Result<()> {
    let Role::Sender { number, receivers, rate, window, warm_up, lasts } = part.role.clone() else {
        bail!("it is no sender");
    };
    let node = part.start().await?;
    match (part.pattern, part.guaranteed) {
        (Pattern::Publish, true) => node.wait_for_consumers(TOPIC, receivers, MEETING).await,
        (Pattern::Publish, false) => node.wait_for_subscribers(TOPIC, receivers, MEETING).await,
        (Pattern::Work | Pattern::Request, _) => {
            node.wait_for_instances(SERVICE, receivers, MEETING).await
        }
    }
    .context("the receivers were not met")?;
    println!("ready");
    let line = lines.next_line().await?.context("it was never told to begin")?;
    let start: u64 = line.strip_prefix("begin ").context("it was not told when")?.parse()?;
    let part = Arc::new(part);
    let sender = Sender { node: node.clone(), part, number, ended: Arc::default() };
    let before = start.saturating_sub(warm_up.as_nanos() as u64);
    run(&sender, Schedule { start: before, end: start, rate, warm: true }, window).await?;
    if sender.part.pattern == Pattern::Request {
        sender.with(|ended| ended.replies = Some(Counter::new(start)));
    }
    let lost_before = lost(&node);
    let end = start + lasts.as_nanos() as u64;
    let due = run(&sender, Schedule { start, end, rate, warm: false }, window).await?;
    // What was dropped later is told later.
    let line = lines.next_line().await?.context("nobody wants to know")?;
    anyhow::ensure!(line == "report", "{line:?} makes no sense now");
    let mut sent = Sent { sent: due.iter().sum(), due, ..Sent::default() };
    sender.with(|ended| {
        sent.told = ended.told + lost(&node) - lost_before;
        sent.replies = ended.replies.take().map(Counter::finish);
    });
    println!("{}", serde_json::to_string(&sent)?);
    while lines.next_line().await?.is_some_and(|line| line != "end") {}
    node.shutdown_within(Duration::from_secs(1)).await;
    Ok(())
}

/// What this node has been told is lost, or may be.
fn lost(node: &Node) -> u64 {
    let counters = node.counters();
    counters.dropped_total() + counters.in_doubt
}

/// Sends by a schedule, to its end; when messages were due.
async fn run(sender: &Sender, schedule: Schedule, window: usize) -> anyhow::Result<Vec<u64>> {
    let now = now();
    if schedule.start > now {
        tokio::time::sleep(Duration::from_nanos(schedule.start - now)).await;
    }
    match schedule.rate {
        Some(rate) => {
            let sender = sender.clone();
            let runtime = tokio::runtime::Handle::current();
            tokio::task::spawn_blocking(move || pace(&sender, &schedule, rate, &runtime))
                .await
                .context("the pace was lost")
        }
        None => Ok(rush(sender, &schedule, window).await),
    }
}

/// Sends each message when it is due, on a thread of its own, since a runtime's timers count in
/// milliseconds. What is late counts from when it was due.
fn pace(
    sender: &Sender,
    schedule: &Schedule,
    rate: f64,
    runtime: &tokio::runtime::Handle,
) -> Vec<u64> {
    let _entered = runtime.enter();
    let (mut moments, mut waiting) = (Vec::new(), Vec::new());
    for seq in 0.. {
        let due = schedule.start + (seq as f64 * 1e9 / rate) as u64;
        if due >= schedule.end {
            break;
        }
        if let Some(early) = due.checked_sub(now()) {
            std::thread::sleep(Duration::from_nanos(early));
        }
        count(&mut moments, due - schedule.start);
        let stamp = Stamp { seq, due, sender: sender.number, warm: schedule.warm };
        match (sender.part.pattern, sender.part.guaranteed) {
            (Pattern::Publish, false) => sender.publish_now(stamp),
            _ => {
                let sender = sender.clone();
                waiting.push(runtime.spawn(async move { sender.send(stamp).await }));
            }
        }
    }
    runtime.block_on(async {
        for sent in waiting {
            let _panicked = sent.await;
        }
    });
    moments
}

/// Sends as fast as it goes, so many at a time; events one after the other, waiting for room.
async fn rush(sender: &Sender, schedule: &Schedule, window: usize) -> Vec<u64> {
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
    if (sender.part.pattern, sender.part.guaranteed) == (Pattern::Publish, false) {
        let Ok(mut publisher) = sender.node.publisher(TOPIC) else { return moments };
        while let Some(stamp) = next(&mut moments) {
            let published = publisher.publish(stamp.body(sender.part.size)).within(PATIENCE).await;
            if !stamp.warm && published.map_or(true, |report| report.is_unheard()) {
                sender.with(|ended| ended.told += 1);
            }
        }
        return moments;
    }
    let mut waiting = FuturesUnordered::new();
    loop {
        while waiting.len() < window {
            let Some(stamp) = next(&mut moments) else { break };
            waiting.push(sender.send(stamp));
        }
        // Thousands of futures in one task would all be polled for nothing when it has to yield.
        if unconstrained(waiting.next()).await.is_none() {
            return moments;
        }
    }
}
