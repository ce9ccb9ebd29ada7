//! One-way messages from this process to others: the common part of `throughput` and `load`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use peerbus::{Address, Config, MeshName, Node, Overflow, Publisher, Subscription, Topic, Trust};
use zeromq::{PullSocket, PushSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::process::{Far, Placement, affinity, name};
use super::stats::Samples;
use crate::output;
use crate::scratch::Scratch;

/// The transport of the messages.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    Unix,
    /// Clear text
    Tcp,
    /// Encrypted; compared with the same in clear text
    Tls,
}

impl Transport {
    pub(crate) const DEFAULT: Self = if cfg!(unix) { Self::Unix } else { Self::Tcp };

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Unix => "a Unix socket",
            Self::Tcp => "TCP in clear text",
            Self::Tls => "TCP, encrypted",
        }
    }
}

/// The contenders.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// A PUSH socket to a PULL socket, one message per send
    Zeromq,
    Peerbus,
}

impl Contender {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Zeromq => "zeromq crate, one message a send (reference)",
            Self::Peerbus => "peerbus",
        }
    }
}

/// The time for which a publisher waits for its slowest subscriber.
const PATIENCE: Duration = Duration::from_secs(10);
const TOPIC: &str = "bench.stream";

/// The publisher of a contender.
enum Source {
    Zeromq(PushSocket),
    Peerbus { node: Node, publisher: Publisher },
}

/// A publisher here, and its subscribers in other processes.
pub(crate) struct Stream {
    source: Source,
    /// The subscribers that read.
    pub(crate) sinks: Vec<Far>,
    stalled: Vec<Far>,
    _dir: Scratch,
}

impl Stream {
    /// Starts the subscribers, of which the first `stalled` never read, and links to them.
    pub(crate) async fn start(
        contender: Contender,
        transport: Transport,
        subscribers: u32,
        stalled: u32,
        placement: Placement,
    ) -> anyhow::Result<Self> {
        let dir = Scratch::new()?;
        let mesh = format!("bench-{}", std::process::id());
        let mut sinks = Vec::new();
        for number in 0..subscribers {
            let mut args = vec![
                format!("--contender={}", name(contender)),
                format!("--transport={}", name(transport)),
                format!("--mesh={mesh}"),
                format!("--socket={}", dir.path().join(format!("{number}.sock")).display()),
                format!("--dir={}", dir.path().display()),
            ];
            args.extend((number < stalled).then(|| "--stalled".to_owned()));
            args.extend(placement.cores().map(|(_, far)| format!("--cpu={far}")));
            sinks.push(Far::start("sink", args).await?);
        }
        let source = match contender {
            Contender::Zeromq => {
                let mut socket = PushSocket::new();
                socket.connect(&sinks[0].address).await?;
                Source::Zeromq(socket)
            }
            Contender::Peerbus => {
                let mut config = config(transport, &mesh, dir.path())?.name("publisher");
                if transport != Transport::Unix {
                    for sink in &sinks {
                        config = config.peer(sink.address.parse::<Address>()?);
                    }
                }
                let node = config.start().await?;
                let topic: Topic = TOPIC.parse()?;
                let wanted = subscribers as usize;
                node.wait_for_subscribers(&topic, wanted, Duration::from_secs(10)).await?;
                Source::Peerbus { publisher: node.publisher(&topic)?, node }
            }
        };
        let readers = sinks.split_off(stalled as usize);
        Ok(Self { source, sinks: readers, stalled: sinks, _dir: dir })
    }

    /// Ends the subscribers that never read, then the publisher, then the others.
    pub(crate) async fn end(self) {
        let Self { source, sinks, stalled, _dir } = self;
        drop(stalled);
        if let Source::Peerbus { node, publisher } = source {
            drop(publisher);
            node.shutdown().await;
        }
        drop(sinks);
    }

    /// Sends `count` messages at full speed; returns the deliveries per second, up to the last
    /// message at the last subscriber that reads.
    pub(crate) async fn rush(&mut self, count: u64, body: &[u8]) -> anyhow::Result<f64> {
        for sink in &mut self.sinks {
            sink.tell(&format!("count {count}")).await?;
        }
        let begun = Instant::now();
        self.source.send(count, body).await?;
        for sink in &mut self.sinks {
            let line = sink.line().await?;
            ensure!(line == "done", "unexpected answer of a subscriber: {line:?}");
        }
        let deliveries = count * self.sinks.len() as u64;
        Ok(deliveries as f64 / begun.elapsed().as_secs_f64())
    }

    /// Finds the number of messages that take about `wanted`; returns the rate and that number.
    pub(crate) async fn calibrate(
        &mut self,
        wanted: Duration,
        body: &[u8],
    ) -> anyhow::Result<(f64, u64)> {
        let (mut rate, mut count) = (0.0, 20_000);
        for _ in 0..3 {
            rate = self.rush(count, body).await? / self.sinks.len() as f64;
            count = ((rate * wanted.as_secs_f64()) as u64).max(100);
        }
        Ok((rate, count))
    }

    /// Sends `count` messages evenly, `rate` per second; returns their delays at the first
    /// subscriber.
    pub(crate) async fn pace(
        &mut self,
        count: u64,
        rate: f64,
        size: usize,
    ) -> anyhow::Result<Delays> {
        self.sinks[0].tell(&format!("delays {count}")).await?;
        let mut body = vec![7; size];
        let begun = unix_nanos();
        for number in 0..count {
            // Counted from the time at which it was due, so that delays of the publisher count.
            let due = begun + (number as f64 * 1e9 / rate) as u64;
            while unix_nanos() < due {
                tokio::task::yield_now().await;
            }
            body[..8].copy_from_slice(&due.to_be_bytes());
            self.source.send(1, &body).await?;
        }
        let line = self.sinks[0].line().await?;
        let mut numbers = line.split(' ').map(str::parse::<f64>);
        let mut next =
            || numbers.next().context("the remote side reported no delays")?.context("delays");
        Ok(Delays { p50: next()?, p99: next()?, p999: next()? })
    }
}

/// Latencies of messages from the time at which they were due, in microseconds.
pub(crate) struct Delays {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

/// The current time of the wall clock, which all processes of this machine share.
fn unix_nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

impl Source {
    /// Sends `count` messages, each a new copy of `body`.
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
    let trust = match transport {
        Transport::Unix | Transport::Tls => Trust::ThisHost,
        Transport::Tcp => Trust::Open { anywhere: false },
    };
    Ok(Node::builder().mesh(mesh).local(local).trust(trust).mdns(false).runtime_dir(dir))
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
    /// Subscribe, and never read
    #[arg(long)]
    stalled: bool,
}

/// The source of a subscriber's messages.
enum Incoming {
    Zeromq(PullSocket),
    Peerbus { _node: Node, subscription: Subscription },
}

impl Incoming {
    async fn next(&mut self) -> anyhow::Result<Bytes> {
        match self {
            Self::Zeromq(socket) => {
                let message = socket.recv().await?;
                message.get(0).cloned().context("a message without a frame")
            }
            Self::Peerbus { subscription, .. } => {
                Ok(subscription.recv().await.context("the subscription ended")?.body)
            }
        }
    }
}

impl Sink {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        if let Some(cpu) = self.cpu {
            affinity::pin(cpu);
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        tokio::spawn(self.receive()).await?
    }

    async fn receive(self) -> anyhow::Result<()> {
        let mut incoming = self.open().await?;
        while let Some((what, count)) = next_round().await? {
            if what == "delays" {
                let mut delays = Samples::default();
                for _ in 0..count {
                    let body = incoming.next().await?;
                    let due = body.first_chunk().context("a body that is too short")?;
                    let late = unix_nanos().saturating_sub(u64::from_be_bytes(*due));
                    delays.add(Duration::from_nanos(late));
                }
                let [p50, p99, p999] = [500, 990, 999].map(|part| delays.percentile(part));
                output::say(format_args!("{p50} {p99} {p999}"))?;
            } else {
                for _ in 0..count {
                    incoming.next().await?;
                }
                output::say("done")?;
            }
        }
        Ok(())
    }

    async fn open(&self) -> anyhow::Result<Incoming> {
        match self.contender {
            Contender::Zeromq => {
                let mut socket = PullSocket::new();
                let endpoint = match self.transport {
                    Transport::Unix => format!("ipc://{}", self.socket.display()),
                    Transport::Tcp | Transport::Tls => "tcp://127.0.0.1:0".to_owned(),
                };
                output::say(socket.bind(&endpoint).await?)?;
                Ok(Incoming::Zeromq(socket))
            }
            Contender::Peerbus => {
                let config = config(self.transport, &self.mesh, &self.dir)?.name("subscriber");
                let node = config.start().await?;
                let overflow = if self.stalled { Overflow::DropNewest } else { Overflow::HoldBack };
                let subscription = node.subscribe_with(TOPIC, overflow)?;
                let address = node.listening().first().map(ToString::to_string);
                output::say(address.unwrap_or_else(|| "here".into()))?;
                Ok(Incoming::Peerbus { _node: node, subscription })
            }
        }
    }
}

/// The kind of the next round, and its number of messages; `None` when the publisher is done.
async fn next_round() -> anyhow::Result<Option<(String, u64)>> {
    let line = tokio::task::spawn_blocking(|| std::io::stdin().lines().next()).await?;
    let Some(line) = line.transpose()? else { return Ok(None) };
    let (what, count) = line.split_once(' ').context("no count")?;
    Ok(Some((what.to_owned(), count.parse()?)))
}
