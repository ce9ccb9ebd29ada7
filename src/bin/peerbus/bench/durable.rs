//! `peerbus bench durable`

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use peerbus::{Call, HandlerError, Node};
use serde_json::json;
use tokio::task::{spawn_blocking, unconstrained};

use super::by_hand;
use super::process::{Far, Placement, affinity, name};
use super::stats::{Samples, median};
use crate::output;
use crate::scratch::Scratch;

/// The cost of guaranteed delivery, beside the machine's own `fdatasync` and a request without
/// guarantees in the same run: the time until a message is stored here, and until it is processed
/// there, with both stores synced; and the rate with several messages in flight.
#[derive(Args)]
pub(crate) struct Durable {
    /// Folder on the disk to measure; the run creates a folder of its own in it
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Bodies to measure, in bytes
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1024])]
    sizes: Vec<usize>,
    /// Numbers of messages in flight
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 256, 4096],
        value_parser = clap::value_parser!(u32).range(1..=65_536))]
    windows: Vec<u32>,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Time for each measurement in a round, in milliseconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..))]
    millis: u64,
    /// Placement of the two nodes
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A measurement of one kind of message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// The reference: the same bytes, written and synced by hand.
    Sync,
    /// The reference in two processes, the second of which answers: a lower bound for processing.
    SyncTwice,
    /// A request without guarantees, from a node without a store.
    Bare,
    /// A request without guarantees, from a node with a store.
    Request,
    /// The time until a message is stored here. No node accepts it.
    Stored(u32),
    /// The time until a message is processed there.
    Processed(u32),
}

impl What {
    fn all(windows: &[u32]) -> Vec<Self> {
        let mut all = vec![Self::Sync, Self::SyncTwice, Self::Bare, Self::Request];
        all.extend(windows.iter().copied().map(Self::Stored));
        all.extend(windows.iter().copied().map(Self::Processed));
        all
    }

    fn title(self) -> String {
        match self {
            Self::Sync => "write and fdatasync (reference)".into(),
            Self::SyncTwice => "the same in two processes, TCP".into(),
            Self::Bare => "request, node without a store".into(),
            Self::Request => "request, node with a store".into(),
            Self::Stored(window) => format!("stored, {window} at a time"),
            Self::Processed(window) => format!("processed, {window} at a time"),
        }
    }
}

/// One line of the report, round by round.
#[derive(Default)]
struct Line {
    rates: Vec<f64>,
    p50s: Vec<f64>,
    p99s: Vec<f64>,
}

impl Line {
    fn add(&mut self, samples: &Samples, took: Duration) {
        self.rates.push(samples.len() as f64 / took.as_secs_f64());
        self.p50s.push(samples.percentile(500));
        self.p99s.push(samples.percentile(990));
    }
}

/// The nodes and processes of this benchmark.
struct Bench {
    bare: Node,
    durable: Node,
    /// The folder of the stores.
    stores: Scratch,
    runtime: Scratch,
    millis: u64,
    far: Far,
}

impl Durable {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        self.placement.pin_near();
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Runs on a worker like an embedding service's own tasks, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let (stores, runtime) = (Scratch::inside(&self.dir)?, Scratch::new()?);
        let mut args = vec![
            "--runtime-dir".to_owned(),
            runtime.path().display().to_string(),
            "--store".to_owned(),
            stores.path().join("far").display().to_string(),
        ];
        if let Some((_, far)) = self.placement.cores() {
            args.extend(["--cpu".to_owned(), far.to_string()]);
        }
        let far = Far::start("keeper", args).await?;
        let bare = node(runtime.path(), None).await?;
        let durable = node(runtime.path(), Some(&stores.path().join("near"))).await?;
        let bench = Bench { bare, durable, stores, runtime, millis: self.millis, far };
        for node in [&bench.bare, &bench.durable] {
            node.wait_for_service("work", Duration::from_secs(10)).await?;
        }
        let all = What::all(&self.windows);
        let line = || self.sizes.iter().map(|_| Line::default()).collect();
        let mut lines: Vec<Vec<Line>> = all.iter().map(|_| line()).collect();
        for round in 0..=self.rounds {
            output::progress(Some(&format!("round {round} of {}", self.rounds)));
            for (what, lines) in all.iter().zip(&mut lines) {
                for (size, line) in self.sizes.iter().copied().zip(lines) {
                    let (samples, took) = bench.round(*what, size).await?;
                    // The first round is a warm-up.
                    if round > 0 {
                        line.add(&samples, took);
                    }
                }
            }
        }
        output::progress(None);
        bench.durable.shutdown().await;
        self.report(&all, &lines)
    }

    fn report(&self, all: &[What], lines: &[Vec<Line>]) -> anyhow::Result<()> {
        let mut text = format!(
            "Messages with both stores synced, in turn, {} rounds of {} ms\n\n{:<46}{:>12}{:>10}{:>10}{:>8}\n",
            self.rounds, self.millis, "", "messages/s", "p50 µs", "p99 µs", "ratio"
        );
        let mut results = Vec::new();
        for (place, size) in self.sizes.iter().enumerate() {
            let p50s = |what| {
                let line = all.iter().zip(lines).find(|(other, _)| **other == what);
                line.map(|(_, lines)| &lines[place].p50s).expect("it is always measured")
            };
            let (raw, request) = (p50s(What::Sync), p50s(What::Request));
            let sums = raw.iter().zip(request).map(|(raw, request)| 2.0 * raw + request);
            let twice: Vec<f64> = sums.collect();
            for (what, line) in all.iter().zip(lines).map(|(what, lines)| (what, &lines[place])) {
                let reference = match what {
                    What::Processed(_) | What::SyncTwice => &twice,
                    What::Request => p50s(What::Bare),
                    What::Sync | What::Bare | What::Stored(_) => raw,
                };
                let ratios = line.p50s.iter().zip(reference).map(|(own, other)| own / other);
                let (rate, p50) = (median(line.rates.clone()), median(line.p50s.clone()));
                let (p99, ratio) = (median(line.p99s.clone()), median(ratios.collect()));
                let title = format!("{size} B, {}", what.title());
                text += &format!("{title:<46}{rate:>12.0}{p50:>10.0}{p99:>10.0}{ratio:>8.2}\n");
                results.push(json!({
                    "what": what.title(), "size": size, "per_second": rate, "p50_us": p50,
                    "p99_us": p99, "p50_ratio": ratio,
                }));
            }
            text += "\n";
        }
        text += "Medians over the rounds. The ratio is that of the p50s in a round: against the reference; for\n\
                 what is synced on both sides, against two fdatasync and a request; for the node with a\n\
                 store, against the one without.";
        let value = json!({
            "rounds": self.rounds, "millis": self.millis, "placement": name(self.placement),
            "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }
}

async fn node(runtime_dir: &Path, store: Option<&Path>) -> anyhow::Result<Node> {
    let config = Node::builder().runtime_dir(runtime_dir).mdns(false).outbox_messages(10_000_000);
    Ok(store.into_iter().fold(config, |config, dir| config.outbox(dir)).start().await?)
}

impl Bench {
    async fn round(&self, what: What, size: usize) -> anyhow::Result<(Samples, Duration)> {
        let (body, millis) = (vec![7; size], self.millis);
        let path = self.stores.path().join("by-hand");
        match what {
            // On its own thread: the nodes' links must stay up meanwhile.
            What::Sync => spawn_blocking(move || by_hand::store(&path, &body, millis)).await?,
            What::SyncTwice => {
                let far = self.far.address.parse()?;
                spawn_blocking(move || by_hand::store_twice(&path, far, &body, millis)).await?
            }
            What::Bare => self.ask(&self.bare, &body).await,
            What::Request => self.ask(&self.durable, &body).await,
            What::Stored(window) => {
                let dir = self.stores.path().join("nobody");
                let node = node(self.runtime.path(), Some(&dir)).await?;
                let measured = self.keep_busy(window, || async {
                    Ok(node.send("nobody", &body[..]).guaranteed().await?)
                });
                let measured = measured.await;
                node.shutdown_within(Duration::ZERO).await;
                std::fs::remove_dir_all(&dir)?;
                measured
            }
            What::Processed(window) => {
                let send = || async {
                    Ok(self.durable.send("work", &body[..]).guaranteed().await?.processed().await?)
                };
                self.keep_busy(window, send).await
            }
        }
    }

    async fn ask(&self, node: &Node, body: &[u8]) -> anyhow::Result<(Samples, Duration)> {
        self.keep_busy(1, || async { Ok(node.request("work", body).await?) }).await
    }

    /// Runs `act` repeatedly, `window` at a time.
    async fn keep_busy<T, F: Future<Output = anyhow::Result<T>>>(
        &self,
        window: u32,
        act: impl Fn() -> F,
    ) -> anyhow::Result<(Samples, Duration)> {
        let timed = || {
            let (begun, acting) = (Instant::now(), act());
            async move { acting.await.map(|_| begun.elapsed()) }
        };
        let (mut samples, begun) = (Samples::default(), Instant::now());
        let mut waiting: FuturesUnordered<_> = (0..window).map(|_| timed()).collect();
        // Tokio makes a task yield after 128 steps; thousands of futures in one task would then
        // all be polled in vain.
        while let Some(took) = unconstrained(waiting.next()).await {
            samples.add(took?);
            if begun.elapsed() < Duration::from_millis(self.millis) {
                waiting.push(timed());
            }
        }
        Ok((samples, begun.elapsed()))
    }
}

/// The remote side.
#[derive(Args)]
pub(crate) struct Keeper {
    #[arg(long)]
    runtime_dir: PathBuf,
    #[arg(long)]
    store: PathBuf,
    #[arg(long)]
    cpu: Option<usize>,
}

impl Keeper {
    pub(crate) fn prepare(&self) {
        if let Some(cpu) = self.cpu {
            affinity::pin(cpu);
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let node = node(&self.runtime_dir, Some(&self.store)).await?;
        let handler = |_: Call| std::future::ready(Ok::<_, HandlerError>(""));
        let _service = node.serve("work", handler).start()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        output::say(listener.local_addr()?)?;
        let path = self.store.with_extension("by-hand");
        thread::spawn(move || by_hand::answer(&listener, &path));
        // Runs until the near side closes its end.
        let mut line = String::new();
        tokio::task::spawn_blocking(move || std::io::stdin().read_line(&mut line)).await??;
        Ok(())
    }
}
