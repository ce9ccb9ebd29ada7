//! The compared systems: their names, their promises, their servers.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use peerbus::Secret;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::client::Library;
use super::workload::{Guaranteed, Pattern, Workload};
use crate::secrets::broker_from_env;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SystemName {
    /// Nodes without a broker
    Mesh,
    /// Nodes with an outbox
    Outbox,
    /// `peerbus broker`
    Embedded,
    /// NATS
    Nats,
    /// NATS, with JetStream
    Jetstream,
    /// RabbitMQ
    Rabbitmq,
    /// RabbitMQ, with quorum queues
    Quorum,
    /// NATS by async-nats alone
    NatsClient,
    /// NATS with JetStream, by async-nats alone
    JetstreamClient,
    /// RabbitMQ by lapin alone
    RabbitmqClient,
    /// RabbitMQ with quorum queues, by lapin alone
    QuorumClient,
}

impl SystemName {
    pub(super) const ALL: [Self; 11] = [
        Self::Mesh,
        Self::Outbox,
        Self::Embedded,
        Self::Nats,
        Self::Jetstream,
        Self::Rabbitmq,
        Self::Quorum,
        Self::NatsClient,
        Self::JetstreamClient,
        Self::RabbitmqClient,
        Self::QuorumClient,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Outbox => "outbox",
            Self::Embedded => "embedded",
            Self::Nats => "nats",
            Self::Jetstream => "jetstream",
            Self::Rabbitmq => "rabbitmq",
            Self::Quorum => "quorum",
            Self::NatsClient => "nats-client",
            Self::JetstreamClient => "jetstream-client",
            Self::RabbitmqClient => "rabbitmq-client",
            Self::QuorumClient => "quorum-client",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Mesh => "the mesh",
            Self::Outbox => "the mesh, with outbox and inbox",
            Self::Embedded => "the embedded broker",
            Self::Nats => "NATS",
            Self::Jetstream => "NATS, JetStream, sync_interval: always",
            Self::Rabbitmq => "RabbitMQ, classic queues",
            Self::Quorum => "RabbitMQ, quorum queues with confirms",
            Self::NatsClient => "NATS, async-nats alone",
            Self::JetstreamClient => "NATS, JetStream, async-nats alone",
            Self::RabbitmqClient => "RabbitMQ, lapin alone",
            Self::QuorumClient => "RabbitMQ, quorum queues, lapin alone",
        }
    }

    /// Returns true if the system stores messages.
    pub(super) fn is_guaranteed(self) -> bool {
        use SystemName::{Jetstream, JetstreamClient, Outbox, Quorum, QuorumClient};
        matches!(self, Outbox | Jetstream | Quorum | JetstreamClient | QuorumClient)
    }

    /// The library that its senders and receivers use.
    pub(super) fn library(self) -> Library {
        match self {
            Self::NatsClient | Self::JetstreamClient => Library::Nats,
            Self::RabbitmqClient | Self::QuorumClient => Library::RabbitMq,
            _ => Library::Peerbus,
        }
    }

    pub(super) fn is_mesh(self) -> bool {
        matches!(self, Self::Mesh | Self::Outbox)
    }

    /// The promise of the system for a pattern, and who confirms it.
    pub(super) fn promise(self, pattern: Pattern) -> &'static str {
        match (self, pattern) {
            (Self::Mesh, Pattern::Request) => "in memory; the reply confirms",
            (Self::Mesh, _) => "in memory; drops are counted at the sender",
            (Self::Outbox, _) => {
                "synced at the sender before it counts as sent, and at the receiver before it \
                 counts as processed, which the sender is told"
            }
            (Self::Jetstream | Self::Quorum | Self::JetstreamClient | Self::QuorumClient, _) => {
                "synced at the broker before it confirms; at least once, the sender is not told of \
                 processing"
            }
            (_, Pattern::Request) => "in memory of the broker; the reply confirms",
            (Self::Embedded, _) => "in memory of the broker; its drops are told to the sender",
            (_, _) => "in memory of the broker; nobody confirms",
        }
    }

    /// Returns true if the system takes part in a workload.
    pub(super) fn takes_part(self, workload: &Workload) -> bool {
        let chosen = workload.systems.as_ref().is_none_or(|systems| systems.contains(&self));
        let keeps = match workload.guaranteed {
            Guaranteed::No => !self.is_guaranteed(),
            Guaranteed::Yes => self.is_guaranteed(),
            Guaranteed::Both => true,
        };
        // After a fault, nothing restores a bare client's subscriptions.
        let copes = self.library() == Library::Peerbus || workload.fault.is_none();
        // Bare clients that store messages do so in a queue only.
        let fits = self.library() == Library::Peerbus
            || !self.is_guaranteed()
            || (workload.guaranteed != Guaranteed::No && workload.pattern == Pattern::Work);
        chosen && keeps && copes && fits && !(workload.tls && self == Self::Embedded)
    }

    /// The name and version that the server reports.
    pub(super) async fn version(self) -> anyhow::Result<String> {
        let ours = concat!("peerbus ", env!("CARGO_PKG_VERSION")).to_owned();
        let Some(variable) = self.variable(false) else { return Ok(ours) };
        let url = broker_from_env(variable)?;
        let mesh = format!("v{}", std::process::id()).parse()?;
        let node = peerbus::Node::builder().mesh(mesh).broker(url).start().await?;
        let met = node.wait_for_peers(1, std::time::Duration::from_secs(20)).await;
        let name = node.peers().first().map(|peer| peer.name.clone());
        let trouble = node.unreachable().first().map(|it| it.last_error.clone());
        node.shutdown().await;
        met.with_context(|| trouble.unwrap_or_default())?;
        let name = name.unwrap_or_default();
        match (self.server(), std::env::var("PEERBUS_RABBITMQ_VERSION")) {
            (Some("rabbitmq"), Ok(version)) => Ok(format!("{name} {version}")),
            _ => Ok(name),
        }
    }

    /// The name of its server in the script `brokers`.
    fn server(self) -> Option<&'static str> {
        match self {
            Self::Nats | Self::Jetstream | Self::NatsClient | Self::JetstreamClient => Some("nats"),
            Self::Rabbitmq | Self::Quorum | Self::RabbitmqClient | Self::QuorumClient => {
                Some("rabbitmq")
            }
            Self::Mesh | Self::Outbox | Self::Embedded => None,
        }
    }

    /// The environment variable with its address.
    fn variable(self, tls: bool) -> Option<&'static str> {
        match (self.server()?, tls) {
            ("nats", false) => Some("PEERBUS_NATS"),
            ("nats", true) => Some("PEERBUS_NATS_TLS"),
            (_, false) => Some("PEERBUS_RABBITMQ"),
            (_, true) => Some("PEERBUS_RABBITMQ_TLS"),
        }
    }

    /// The reason it can't take part, if it can't.
    pub(super) fn missing(self) -> Option<String> {
        let built_in = match self.server() {
            Some("nats") => peerbus::BrokerKind::Nats.is_built_in(),
            Some(_) => peerbus::BrokerKind::RabbitMq.is_built_in(),
            None => true,
        };
        if !built_in {
            let feature = self.server().unwrap_or_default();
            return Some(format!("this build has no feature `{feature}`"));
        }
        let variable = self.variable(false)?;
        std::env::var_os(variable).is_none().then(|| {
            format!("{variable} is not set; `./brokers run` starts the server and sets it")
        })
    }
}

/// The broker of a round.
pub(super) enum Broker {
    /// Started for the round.
    Embedded { child: Child, url: String },
    /// Started from outside, usually by the script.
    There { name: &'static str, url: Secret },
}

impl Broker {
    pub(super) async fn start(system: SystemName, tls: bool) -> anyhow::Result<Option<Self>> {
        if system == SystemName::Embedded {
            let (child, url) = start_embedded("127.0.0.1:0").await?;
            return Ok(Some(Self::Embedded { child, url }));
        }
        let (Some(name), Some(variable)) = (system.server(), system.variable(tls)) else {
            return Ok(None);
        };
        let url = broker_from_env(variable)?;
        let name = match (name, tls) {
            ("nats", true) => "nats-tls",
            (name, _) => name,
        };
        Ok(Some(Self::There { name, url }))
    }

    pub(super) fn url(&self) -> Secret {
        match self {
            Self::Embedded { url, .. } => url.as_str().into(),
            Self::There { url, .. } => url.clone(),
        }
    }

    /// Returns the process ids of the system's broker; empty if unknown.
    pub(super) async fn pids(&self) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::Embedded { child, .. } => Ok(child.id().into_iter().collect()),
            Self::There { name, .. } => match script() {
                Some(script) => {
                    let output = Command::new(script).args(["pids", name]).output().await?;
                    let text = String::from_utf8_lossy(&output.stdout).into_owned();
                    Ok(text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
                }
                None => Ok(Vec::new()),
            },
        }
    }

    /// Kills the broker, as in a crash.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Embedded { child, .. } => Ok(child.kill().await?),
            Self::There { name, .. } => run_script("kill", name).await,
        }
    }

    /// Restarts the broker at the same address.
    pub(super) async fn restart(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Embedded { child, url } => {
                let addr = url.trim_start_matches("peerbus://").to_owned();
                (*child, _) = start_embedded(&addr).await?;
                Ok(())
            }
            Self::There { name, .. } => run_script("start", name.trim_end_matches("-tls")).await,
        }
    }
}

async fn start_embedded(addr: &str) -> anyhow::Result<(Child, String)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["broker", "--json", "--listen", addr])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().context("the broker has no output")?;
    let line = BufReader::new(stdout).lines().next_line().await?;
    let line = line.context("the embedded broker did not start")?;
    let value: serde_json::Value = serde_json::from_str(&line)?;
    let url = value["url"].as_str().context("the embedded broker reported no address")?.to_owned();
    Ok((child, url))
}

fn script() -> Option<PathBuf> {
    std::env::var_os("PEERBUS_BROKERS").map(PathBuf::from)
}

async fn run_script(act: &str, name: &str) -> anyhow::Result<()> {
    let Some(script) = script() else {
        bail!("a broker can be killed only if `./brokers run` started it (PEERBUS_BROKERS)");
    };
    let output = Command::new(script).args([act, name]).output().await?;
    ensure!(
        output.status.success(),
        "`brokers {act} {name}` failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
