//! `peerbus bench latency`

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::{Args, ValueEnum};
use peerbus::{Address, Call, Config, MeshName, Node, ServiceName, Trust};
use serde_json::json;

use super::process::{Far, Placement, affinity, cpu_time, name};
use super::reference::{EchoClient, ZeromqClient, serve_echo, serve_zeromq};
use super::stats::{Samples, median};
use crate::options::LatencyOption;
use crate::output;
use crate::scratch::Scratch;

/// The contenders. The first is the reference.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    TcpEcho,
    UnixEcho,
    ZeromqUnix,
    ZeromqTcp,
    PeerbusUnix,
    PeerbusTcp,
    PeerbusTls,
}

impl Contender {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::TcpEcho => "tokio TCP echo (reference)",
            Self::UnixEcho => "tokio Unix echo",
            Self::ZeromqUnix => "zeromq crate, Unix socket",
            Self::ZeromqTcp => "zeromq crate, TCP",
            Self::PeerbusUnix => "peerbus, Unix socket",
            Self::PeerbusTcp => "peerbus, TCP in clear text",
            Self::PeerbusTls => "peerbus, TCP encrypted",
        }
    }

    fn all() -> Vec<Self> {
        let unix = cfg!(unix);
        let all = Self::value_variants().iter().copied();
        let on_unix = [Self::UnixEcho, Self::ZeromqUnix, Self::PeerbusUnix];
        let wanted = |contender: &Self| unix || !on_unix.contains(contender);
        all.filter(wanted).collect()
    }
}

/// The remote side of each contender is a process of its own. The contenders run in turn, round
/// after round, so that other load on the machine affects all of them.
#[derive(Args)]
pub(crate) struct Latency {
    /// Body size, in bytes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024 * 1024))]
    size: u32,
    /// Rounds
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Round trips of each contender in a round
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Placement of the two sides
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// Pause after each round trip, in microseconds
    #[arg(long, value_name = "MICROS", default_value_t = 0)]
    gap: u64,
    /// Processor time that peerbus's nodes give for lower latency
    #[arg(long, value_name = "HOW", value_enum, default_value = "balanced")]
    latency: LatencyOption,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The client of a contender.
pub(super) enum Client {
    Echo(EchoClient),
    Zeromq(ZeromqClient),
    Peerbus { node: Node, service: ServiceName, body: Vec<u8> },
}

pub(super) struct Side {
    pub(super) contender: Contender,
    pub(super) client: Client,
    far: Far,
    all: Samples,
    medians: Vec<f64>,
    /// The processor time of both sides for a round trip, in microseconds, by round.
    cpu: Vec<f64>,
}

impl Latency {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        self.placement.pin_near();
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Runs on a worker like an embedding service's own tasks, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let dir = Scratch::new()?;
        let mut sides = Vec::new();
        for contender in Contender::all() {
            let side =
                Side::start(contender, self.size as usize, self.placement, self.latency, &dir);
            sides.push(side.await?);
        }
        let gap = Duration::from_micros(self.gap);
        // Warm-up, not counted.
        for side in &mut sides {
            side.client.round(self.count as usize / 4 + 1, gap).await?;
        }
        for round in 1..=self.rounds {
            output::progress(Some(&format!("round {round} of {}", self.rounds)));
            for side in &mut sides {
                side.round(self.count, gap).await?;
            }
        }
        output::progress(None);
        self.report(&sides)
    }

    fn report(&self, sides: &[Side]) -> anyhow::Result<()> {
        let reference = &sides[0];
        let placement = match self.placement {
            Placement::Apart => "on a core each",
            Placement::Together => "on one core",
            Placement::Free => "wherever the kernel puts them",
        };
        let mut results = Vec::new();
        let mut text = format!(
            "Round trips of {} bytes, {} contenders in turn, {} rounds of {}, {} µs between them, the two sides {}; peerbus {}; microseconds\n\n{:<36}{:>9}{:>9}{:>9}{:>12}{:>12}\n",
            self.size,
            sides.len(),
            self.rounds,
            self.count,
            self.gap,
            placement,
            name(self.latency),
            "",
            "p50",
            "p99",
            "p99.9",
            "p50 ratio",
            "processor"
        );
        for side in sides {
            let ratios = side.medians.iter().zip(&reference.medians).map(|(a, b)| a / b).collect();
            let ratio = median(ratios);
            let [p50, p99, p999] = [500, 990, 999].map(|per_mille| side.all.percentile(per_mille));
            let cpu = median(side.cpu.clone());
            text += &format!(
                "{:<36}{p50:>9.1}{p99:>9.1}{p999:>9.1}{ratio:>12.2}{cpu:>12.1}\n",
                side.contender.title()
            );
            results.push(json!({
                "contender": side.contender.title(), "samples": side.all.len(),
                "p50_us": p50, "p99_us": p99, "p999_us": p999, "p50_ratio": ratio,
                "processor_us": cpu,
            }));
        }
        text += "\nThe ratio is the median, over the rounds, of the p50 against the reference's in that round. \
                 The processor's time is that of both sides together for a round trip, gaps included.";
        let value = json!({
            "size": self.size, "rounds": self.rounds, "count": self.count, "gap_us": self.gap,
            "placement": placement, "latency": name(self.latency), "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }
}

impl Side {
    pub(super) async fn start(
        contender: Contender,
        size: usize,
        placement: Placement,
        latency: LatencyOption,
        dir: &Scratch,
    ) -> anyhow::Result<Self> {
        let mut args = vec![
            format!("--contender={}", name(contender)),
            format!("--latency={}", name(latency)),
            format!("--size={size}"),
            format!("--dir={}", dir.path().display()),
        ];
        args.extend(placement.cores().map(|(_, far)| format!("--cpu={far}")));
        let far = Far::start("echo", args).await?;
        let address = &far.address;
        let client = match contender {
            Contender::TcpEcho | Contender::UnixEcho => {
                Client::Echo(EchoClient::connect(address, size).await?)
            }
            Contender::ZeromqUnix | Contender::ZeromqTcp => {
                Client::Zeromq(ZeromqClient::connect(address, size).await?)
            }
            Contender::PeerbusUnix | Contender::PeerbusTcp | Contender::PeerbusTls => {
                let mut config = config(contender, latency, dir.path())?.name("near");
                if contender != Contender::PeerbusUnix {
                    config = config.peer(address.parse::<Address>()?);
                }
                let node = config.start().await?;
                node.wait_for_service("echo", Duration::from_secs(10)).await?;
                Client::Peerbus { node, service: "echo".parse()?, body: vec![7; size] }
            }
        };
        let (all, medians, cpu) = (Samples::default(), Vec::new(), Vec::new());
        Ok(Self { contender, client, far, all, medians, cpu })
    }

    async fn round(&mut self, count: u32, gap: Duration) -> anyhow::Result<()> {
        let before = self.cpu_time()?;
        let samples = self.client.round(count as usize, gap).await?;
        let cpu = self.cpu_time()?.saturating_sub(before);
        self.cpu.push(cpu.as_secs_f64() * 1e6 / f64::from(count));
        self.medians.push(samples.percentile(500));
        self.all.extend(&samples);
        Ok(())
    }

    /// The processor time of both processes so far.
    fn cpu_time(&self) -> anyhow::Result<Duration> {
        Ok(cpu_time(std::process::id())? + cpu_time(self.far.id()?)?)
    }
}

impl Client {
    pub(super) async fn trip(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Echo(client) => client.trip().await,
            Self::Zeromq(client) => client.trip().await,
            Self::Peerbus { node, service, body } => {
                let reply = node.request(&*service, body.as_slice()).await?;
                ensure!(reply.body.len() == body.len(), "the reply is not what was sent");
                Ok(())
            }
        }
    }

    async fn round(&mut self, count: usize, gap: Duration) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        for _ in 0..count {
            let begun = Instant::now();
            self.trip().await?;
            samples.add(begun.elapsed());
            if !gap.is_zero() {
                // The runtime's own timers count in milliseconds.
                tokio::task::spawn_blocking(move || std::thread::sleep(gap)).await?;
            }
        }
        Ok(samples)
    }
}

fn config(contender: Contender, latency: LatencyOption, dir: &Path) -> anyhow::Result<Config> {
    let (mesh, local, trust) = match contender {
        Contender::PeerbusUnix => ("unix", true, Trust::ThisHost),
        Contender::PeerbusTls => ("tls", false, Trust::ThisHost),
        _ => ("tcp", false, Trust::Open { anywhere: false }),
    };
    let mesh: MeshName = mesh.parse()?;
    let config = Node::builder().mesh(mesh).local(local).trust(trust).mdns(false).runtime_dir(dir);
    Ok(config.latency(latency.into()))
}

/// The remote side of one contender.
#[derive(Args)]
pub(crate) struct Echo {
    #[arg(long)]
    contender: Contender,
    #[arg(long)]
    latency: LatencyOption,
    #[arg(long)]
    size: usize,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    cpu: Option<usize>,
}

impl Echo {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        if let Some(cpu) = self.cpu {
            affinity::pin(cpu);
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let ready = |address: String| _ = output::say(address);
        let serving = async move {
            match self.contender {
                Contender::TcpEcho => serve_echo(self.size, None, ready).await,
                Contender::UnixEcho => {
                    serve_echo(self.size, Some(self.dir.join("echo.sock")), ready).await
                }
                Contender::ZeromqUnix => {
                    serve_zeromq(Some(self.dir.join("zeromq.sock")), ready).await
                }
                Contender::ZeromqTcp => serve_zeromq(None, ready).await,
                Contender::PeerbusUnix | Contender::PeerbusTcp | Contender::PeerbusTls => {
                    let node = config(self.contender, self.latency, &self.dir)?
                        .name("far")
                        .start()
                        .await?;
                    let echo = |call: Call| std::future::ready(Ok(call.message.body));
                    let _service = node.serve("echo", echo).start()?;
                    let address = node.listening().first().map(ToString::to_string);
                    ready(address.unwrap_or_else(|| "here".into()));
                    std::future::pending().await
                }
            }
        };
        tokio::spawn(serving).await?
    }
}
