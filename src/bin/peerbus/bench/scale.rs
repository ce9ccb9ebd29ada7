//! `peerbus bench scale`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use futures_util::future::try_join_all;
use peerbus::{Address, Config, MeshName, Node};
use serde_json::json;
use tokio::task::JoinSet;
use zeromq::{DealerSocket, RouterSocket, Socket};

use super::process::{Far, name, usage};
use super::stats::median;
use crate::output;
use crate::scratch::Scratch;

/// The means by which the nodes find each other.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    /// The socket folder of this host
    Local,
    /// Multicast DNS, over loopback TCP
    Mdns,
    /// The address of the first node, which announces the others; over loopback TCP
    Gossip,
}

impl By {
    fn title(self) -> &'static str {
        match self {
            Self::Local => "peerbus, by this host's folder",
            Self::Mdns => "peerbus, by mDNS",
            Self::Gossip => "peerbus, by one address and gossip",
        }
    }
}

/// Many node processes on this machine: the time until each has a link to each, and their memory
/// and CPU time at rest. The reference is as many processes of the bare `zeromq` crate that know
/// all addresses beforehand, each with a ROUTER and DEALERs to half of the others, without
/// heartbeats.
#[derive(Args)]
pub(crate) struct Scale {
    /// Number of nodes, each a process
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..=500))]
    nodes: u32,
    /// Means by which the nodes find each other
    #[arg(long, value_enum, default_value_t = if cfg!(unix) { By::Local } else { By::Mdns })]
    by: By,
    /// Rounds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Time of observation at rest in a round, in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    rest: u64,
    /// Time limit for the full mesh, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The outcome of one round.
struct Outcome {
    /// The time from the start of the first process until the last one has all its links, in
    /// seconds.
    met: f64,
    /// The resident memory of each process at rest, in MiB.
    resident: Vec<f64>,
    /// The resident memory of a process without peers, in MiB.
    alone: f64,
    /// The CPU time of each process at rest, in percent of a core.
    busy: Vec<f64>,
}

impl Scale {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let contenders: [(&str, Option<By>); 2] =
            [("zeromq crate, addresses known (reference)", None), (self.by.title(), Some(self.by))];
        let mut outcomes = [Vec::new(), Vec::new()];
        for round in 1..=self.rounds {
            for ((title, by), outcomes) in contenders.iter().zip(&mut outcomes) {
                let title = format!("round {round} of {}: {title}", self.rounds);
                outcomes.push(self.round(*by, &title).await?);
            }
        }
        output::progress(None);
        let mut text = format!(
            "{} processes on this machine, {} rounds, {} s at rest\n\n{:<44}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}\n{:<44}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}\n",
            self.nodes,
            self.rounds,
            self.rest,
            "",
            "full mesh",
            "resident",
            "most",
            "a peer",
            "core",
            "most",
            "",
            "s",
            "MiB",
            "MiB",
            "KiB",
            "%",
            "%",
        );
        let mut results = Vec::new();
        for ((title, _), outcomes) in contenders.iter().zip(&outcomes) {
            let over =
                |value: &dyn Fn(&Outcome) -> f64| median(outcomes.iter().map(value).collect());
            let most = |values: &[f64]| values.iter().copied().fold(f64::NAN, f64::max);
            let met = over(&|outcome| outcome.met);
            let resident = over(&|outcome| median(outcome.resident.clone()));
            let most_resident = over(&|outcome| most(&outcome.resident));
            let peers = f64::from(self.nodes - 1);
            let a_peer = over(&|outcome| {
                (median(outcome.resident.clone()) - outcome.alone) * 1024.0 / peers
            });
            let busy = over(&|outcome| median(outcome.busy.clone()));
            let most_busy = over(&|outcome| most(&outcome.busy));
            text += &format!(
                "{title:<44}{met:>12.2}{resident:>12.1}{most_resident:>12.1}{a_peer:>12.1}{busy:>12.3}{most_busy:>12.3}\n"
            );
            results.push(json!({
                "contender": title, "full_mesh_s": met, "resident_mib": resident,
                "most_resident_mib": most_resident, "kib_a_peer": a_peer,
                "core_percent": busy, "most_core_percent": most_busy,
            }));
        }
        text += "\nThe median process of the median round, and the most of any. A peer is what a process has beyond\none that is alone.";
        let value = json!({
            "nodes": self.nodes, "by": name(self.by), "rounds": self.rounds, "rest_s": self.rest,
            "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }

    async fn round(&self, by: Option<By>, title: &str) -> anyhow::Result<Outcome> {
        output::progress(Some(&format!("{title}: one alone")));
        let (alone_dir, dir) = (Scratch::new()?, Scratch::new()?);
        let mut alone = self.start(by, 0, 1, &alone_dir, None).await?;
        alone.line().await?;
        let (_, alone_resident) = alone.usage().await?;
        drop(alone);

        let begun = Instant::now();
        let mut members = vec![self.start(by, 0, self.nodes, &dir, None).await?];
        let seed = (by == Some(By::Gossip)).then(|| members[0].address.clone());
        let others =
            (1..self.nodes).map(|number| self.start(by, number, self.nodes, &dir, seed.as_deref()));
        members.extend(try_join_all(others).await?);
        for (met, member) in members.iter_mut().enumerate() {
            output::progress(Some(&format!("{title}: {met} of {} have all peers", self.nodes)));
            member.line_within(Duration::from_secs(self.patience)).await?;
        }
        let met = begun.elapsed().as_secs_f64();

        output::progress(Some(&format!("{title}: at rest")));
        // Skips the work left over from the start.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut before = Vec::new();
        for member in &mut members {
            before.push((member.usage().await?.0, Instant::now()));
        }
        tokio::time::sleep(Duration::from_secs(self.rest)).await;
        let (mut resident, mut busy) = (Vec::new(), Vec::new());
        for (member, (cpu_before, since)) in members.iter_mut().zip(before) {
            let (cpu, bytes) = member.usage().await?;
            resident.push(bytes as f64 / 1024.0 / 1024.0);
            let spent = cpu.saturating_sub(cpu_before).as_secs_f64();
            busy.push(100.0 * spent / since.elapsed().as_secs_f64());
        }
        let alone = alone_resident as f64 / 1024.0 / 1024.0;
        Ok(Outcome { met, resident, alone, busy })
    }

    async fn start(
        &self,
        by: Option<By>,
        number: u32,
        nodes: u32,
        dir: &Scratch,
        seed: Option<&str>,
    ) -> anyhow::Result<Far> {
        let mut args = vec![
            // Other machines on this network may run the benchmark too.
            format!("--mesh=bench-{}", std::process::id()),
            format!("--number={number}"),
            format!("--nodes={nodes}"),
            format!("--dir={}", dir.path().display()),
            format!("--patience={}", self.patience),
        ];
        args.extend(by.map(|by| format!("--by={}", name(by))));
        args.extend(seed.map(|seed| format!("--seed={seed}")));
        Far::start("member", args).await
    }
}

/// One node of a round.
#[derive(Args)]
pub(crate) struct Member {
    #[arg(long)]
    mesh: MeshName,
    #[arg(long)]
    number: u32,
    #[arg(long)]
    nodes: u32,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    patience: u64,
    #[arg(long)]
    by: Option<By>,
    #[arg(long)]
    seed: Option<Address>,
}

impl Member {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.by {
            Some(by) => {
                let node = self.config(by)?.start().await?;
                let address = node.listening().first().map(ToString::to_string);
                output::say(address.unwrap_or_else(|| "here".into()))?;
                let others = self.nodes as usize - 1;
                node.wait_for_peers(others, Duration::from_secs(self.patience)).await?;
                self.rest().await
            }
            None => {
                let path = |number| format!("ipc://{}/{number}.sock", self.dir.display());
                let mut router = RouterSocket::new();
                router.bind(&path(self.number)).await?;
                output::say("here")?;
                let mut dials = JoinSet::new();
                for number in 0..self.number {
                    let endpoint = path(number);
                    dials.spawn(async move {
                        let mut dealer = DealerSocket::new();
                        // Retries until the other process has bound its socket.
                        while dealer.connect(&endpoint).await.is_err() {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                        dealer
                    });
                }
                let _dealers = dials.join_all().await;
                self.rest().await
            }
        }
    }

    fn config(&self, by: By) -> anyhow::Result<Config> {
        let config =
            Node::builder().mesh(self.mesh.clone()).name(format!("member {}", self.number));
        let config = config.runtime_dir(&self.dir).local(by == By::Local).mdns(by == By::Mdns);
        Ok(self.seed.iter().cloned().fold(config, Config::peer))
    }

    /// Reports this process's usage on request.
    async fn rest(&self) -> anyhow::Result<()> {
        output::say("met")?;
        while tokio::task::spawn_blocking(|| std::io::stdin().lines().next()).await?.is_some() {
            let (cpu, resident) = usage()?;
            output::say(format_args!("{} {resident}", cpu.as_nanos()))?;
        }
        Ok(())
    }
}
