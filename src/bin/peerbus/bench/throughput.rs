//! `peerbus bench throughput`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::{Args, ValueEnum};
use peerbus::{Address, Config, MeshName, Node, Overflow, Publisher, Topic};
use serde_json::json;
use zeromq::{PullSocket, PushSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::process::{BenchDir, Far, Placement, affinity, name};
use super::stats::median;
use crate::output;

/// What carries the messages.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    Unix,
    Tcp,
}

/// Who takes part.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// A PUSH socket to a PULL socket, one message a send
    Zeromq,
    Peerbus,
}

impl Contender {
    fn title(self) -> &'static str {
        match self {
            Self::Zeromq => "zeromq crate, one message a send (reference)",
            Self::Peerbus => "peerbus",
        }
    }
}

/// Messages a second from a publisher to its subscribers, each a process of its own. The
/// contenders run in turn, round after round. A message counts when its subscriber has it from
/// its stream; none may be lost.
#[derive(Args)]
pub(crate) struct Throughput {
    /// Body size, in bytes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024 * 1024))]
    size: u32,
    /// What carries the messages
    #[arg(long, value_enum, default_value_t = if cfg!(unix) { Transport::Unix } else { Transport::Tcp })]
    transport: Transport,
    /// Subscribers, each in a process of its own; the reference has one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    subscribers: u32,
    /// Rounds
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long a contender runs in a round, in milliseconds
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..))]
    millis: u64,
    /// Where the publisher and the subscribers run
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// How long a publisher waits for its slowest subscriber.
const PATIENCE: Duration = Duration::from_secs(10);
const TOPIC: &str = "bench.throughput";

/// The near side of a contender.
enum Source {
    Zeromq(PushSocket),
    Peerbus { _node: Node, publisher: Publisher },
}

struct Side {
    title: String,
    source: Source,
    sinks: Vec<Far>,
    /// Messages a round, so that it takes as long as was asked for.
    count: u64,
    /// Deliveries a second, round by round.
    rates: Vec<f64>,
}

impl Throughput {
    /// Pins this process, before it has other threads.
    pub(crate) fn prepare(&self) {
        self.placement.pin_near();
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Where an embedding service's own tasks run: on a worker, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let dir = BenchDir::new()?;
        let mut sides = vec![self.start(Contender::Zeromq, 1, &dir).await?];
        sides.push(self.start(Contender::Peerbus, 1, &dir).await?);
        if self.subscribers > 1 {
            sides.push(self.start(Contender::Peerbus, self.subscribers, &dir).await?);
        }
        let body = vec![7; self.size as usize];
        for side in &mut sides {
            self.calibrate(side, &body).await?;
        }
        for round in 1..=self.rounds {
            if std::io::stderr().is_terminal() {
                eprint!("\rround {round} of {}", self.rounds);
            }
            for side in &mut sides {
                let rate = side.round(side.count, &body).await?;
                side.rates.push(rate);
            }
        }
        if std::io::stderr().is_terminal() {
            eprint!("\r{:20}\r", "");
        }
        self.report(&sides)
    }

    /// Warms up, and finds how many messages a round takes.
    async fn calibrate(&self, side: &mut Side, body: &[u8]) -> anyhow::Result<()> {
        let wanted = Duration::from_millis(self.millis).as_secs_f64();
        for _ in 0..3 {
            let rate = side.round(side.count, body).await? / side.sinks.len() as f64;
            side.count = ((rate * wanted) as u64).max(100);
        }
        Ok(())
    }

    async fn start(
        &self,
        contender: Contender,
        subscribers: u32,
        dir: &BenchDir,
    ) -> anyhow::Result<Side> {
        let mesh = format!("bench-{subscribers}");
        let mut sinks = Vec::new();
        for number in 0..subscribers {
            let mut args = vec![
                format!("--contender={}", name(contender)),
                format!("--transport={}", name(self.transport)),
                format!("--mesh={mesh}"),
                format!("--socket={}", dir.path().join(format!("{number}.sock")).display()),
                format!("--dir={}", dir.path().display()),
            ];
            args.extend(self.placement.cores().map(|(_, far)| format!("--cpu={far}")));
            sinks.push(Far::start("sink", args).await?);
        }
        let source = match contender {
            Contender::Zeromq => {
                let mut socket = PushSocket::new();
                socket.connect(&sinks[0].address).await?;
                Source::Zeromq(socket)
            }
            Contender::Peerbus => {
                let mut config = config(self.transport, &mesh, dir.path())?.name("publisher");
                if self.transport == Transport::Tcp {
                    for sink in &sinks {
                        config = config.peer(sink.address.parse::<Address>()?);
                    }
                }
                let node = config.start().await?;
                let topic: Topic = TOPIC.parse()?;
                let wanted = subscribers as usize;
                node.wait_for_subscribers(&topic, wanted, Duration::from_secs(10)).await?;
                Source::Peerbus { publisher: node.publisher(&topic)?, _node: node }
            }
        };
        let to = if subscribers > 1 { format!(" to {subscribers} subscribers") } else { "".into() };
        let title = format!("{}{to}", contender.title());
        Ok(Side { title, source, sinks, count: 20_000, rates: Vec::new() })
    }

    fn report(&self, sides: &[Side]) -> anyhow::Result<()> {
        let reference = &sides[0];
        let transport = match self.transport {
            Transport::Unix => "a Unix socket",
            Transport::Tcp => "TCP",
        };
        let mut text = format!(
            "Messages of {} bytes over {transport}, in turn, {} rounds of {} ms\n\n{:<48}{:>14}{:>12}{:>10}\n",
            self.size, self.rounds, self.millis, "", "deliveries/s", "MiB/s", "ratio"
        );
        let mut results = Vec::new();
        for side in sides {
            let ratios = side.rates.iter().zip(&reference.rates).map(|(a, b)| a / b).collect();
            let (rate, ratio) = (median(side.rates.clone()), median(ratios));
            let mib = rate * f64::from(self.size) / 1024.0 / 1024.0;
            text += &format!("{:<48}{rate:>14.0}{mib:>12.1}{ratio:>10.2}\n", side.title);
            results.push(json!({
                "contender": side.title, "subscribers": side.sinks.len(),
                "deliveries_per_second": rate, "ratio": ratio, "rounds": side.rates,
            }));
        }
        text += "\nThe ratio is the median, over the rounds, of the rate against the reference's in that round.";
        let value = json!({
            "size": self.size, "transport": name(self.transport), "placement": name(self.placement),
            "rounds": self.rounds, "millis": self.millis, "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }
}

impl Side {
    /// Sends `count` messages; deliveries a second, until the last subscriber has the last one.
    async fn round(&mut self, count: u64, body: &[u8]) -> anyhow::Result<f64> {
        for sink in &mut self.sinks {
            sink.tell(&count.to_string()).await?;
        }
        let begun = Instant::now();
        self.source.send(count, body).await?;
        for sink in &mut self.sinks {
            let line = sink.line().await?;
            ensure!(line == "done", "a subscriber says {line:?}");
        }
        let deliveries = count * self.sinks.len() as u64;
        Ok(deliveries as f64 / begun.elapsed().as_secs_f64())
    }
}

impl Source {
    /// Sends `count` messages, each a fresh copy of `body`.
    async fn send(&mut self, count: u64, body: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Zeromq(socket) => {
                for _ in 0..count {
                    socket.send(ZmqMessage::from(body.to_vec())).await?;
                }
            }
            Self::Peerbus { publisher, .. } => {
                for _ in 0..count {
                    let report = publisher.publish(body).within(PATIENCE).await?;
                    ensure!(report.dropped.is_empty(), "messages were dropped: {report:?}");
                }
            }
        }
        Ok(())
    }
}

fn config(transport: Transport, mesh: &str, dir: &Path) -> anyhow::Result<Config> {
    let mesh: MeshName = mesh.parse()?;
    let local = transport == Transport::Unix;
    Ok(Node::builder().mesh(mesh).local(local).mdns(false).runtime_dir(dir))
}

/// A subscriber.
#[derive(Args)]
pub(crate) struct Sink {
    #[arg(long)]
    contender: Contender,
    #[arg(long)]
    transport: Transport,
    #[arg(long)]
    mesh: String,
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    cpu: Option<usize>,
}

impl Sink {
    /// Pins this process, before it has other threads.
    pub(crate) fn prepare(&self) {
        if let Some(cpu) = self.cpu {
            affinity::pin(cpu);
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        tokio::spawn(self.receive()).await?
    }

    async fn receive(self) -> anyhow::Result<()> {
        match self.contender {
            Contender::Zeromq => {
                let mut socket = PullSocket::new();
                let endpoint = match self.transport {
                    Transport::Unix => format!("ipc://{}", self.socket.display()),
                    Transport::Tcp => "tcp://127.0.0.1:0".to_owned(),
                };
                println!("{}", socket.bind(&endpoint).await?);
                while let Some(count) = next_count().await? {
                    for _ in 0..count {
                        socket.recv().await?;
                    }
                    println!("done");
                }
            }
            Contender::Peerbus => {
                let config = config(self.transport, &self.mesh, &self.dir)?.name("subscriber");
                let node = config.start().await?;
                let mut subscription = node.subscribe_with(TOPIC, Overflow::HoldBack)?;
                let address = node.listening().first().map(ToString::to_string);
                println!("{}", address.unwrap_or_else(|| "here".into()));
                while let Some(count) = next_count().await? {
                    for _ in 0..count {
                        ensure!(subscription.recv().await.is_some(), "the subscription ended");
                    }
                    println!("done");
                }
            }
        }
        Ok(())
    }
}

/// How many messages the next round has; `None` when the publisher is done.
async fn next_count() -> anyhow::Result<Option<u64>> {
    let line = tokio::task::spawn_blocking(|| std::io::stdin().lines().next()).await?;
    Ok(line.transpose()?.map(|line| line.parse()).transpose()?)
}
