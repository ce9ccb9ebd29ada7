//! The flags that all commands with a node share.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use peerbus::{
    Address, Config, DeliveryError, Latency, MeshName, Node, NodeId, Receipt, Recipient, Secret,
    Trust,
};
use serde_json::json;

use crate::secrets;
use crate::trust::TrustOptions;

#[derive(Args, Clone)]
#[command(next_help_heading = "Node")]
pub(crate) struct NodeOptions {
    /// Human name of this node [default: the host's name]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Mesh to join; meshes on one network or host are separate
    #[arg(long, env = "PEERBUS_MESH", default_value = "default")]
    pub(crate) mesh: MeshName,
    /// File that keeps this node's identity; created if missing [default: a new identity]
    #[arg(long, value_name = "FILE")]
    pub(crate) identity: Option<PathBuf>,
    /// Folder that keeps guaranteed messages and this node's identity; created if missing
    #[arg(long, value_name = "DIR")]
    pub(crate) outbox: Option<PathBuf>,
    /// Number of failures after which a guaranteed message becomes a dead letter; over a broker, of
    /// the messages that this node handles [default: 10]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    max_attempts: Option<u32>,
    /// Backoff of guaranteed messages: after the first attempt, and the longest; it doubles with
    /// each attempt [default: 200ms..60s]
    #[arg(long, value_name = "FIRST..LONGEST", value_parser = parse_backoff)]
    backoff: Option<(Duration, Duration)>,
    /// Absence of a peer after which its durable subscriptions end here, with the messages kept for
    /// them, such as 30d [default: 30d]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    forget_subscribers_after: Option<Duration>,
    /// Send all messages through a broker instead of links: peerbus://HOST:PORT (`peerbus broker`),
    /// nats:// or tls:// (NATS), amqp:// or amqps:// (RabbitMQ). Other users of this host can read
    /// command lines: give credentials by --broker-credentials-file, by PEERBUS_BROKER_CREDENTIALS
    /// (USER:PASSWORD or TOKEN), or in PEERBUS_BROKER before the host (USER:PASSWORD@)
    #[arg(long, value_name = "URL", env = "PEERBUS_BROKER", hide_env_values = true)]
    pub(crate) broker: Option<Secret>,
    /// File with the broker's credentials, one line: USER:PASSWORD, or TOKEN (NATS). Only this user
    /// may be able to read it
    #[arg(long, value_name = "FILE", env = "PEERBUS_BROKER_CREDENTIALS_FILE")]
    broker_credentials_file: Option<PathBuf>,
    /// PEM file of CA certificates for the broker's certificate, besides the system's
    #[arg(long, value_name = "FILE", env = "PEERBUS_BROKER_CA")]
    broker_ca: Option<PathBuf>,
    #[command(flatten)]
    trust: TrustOptions,
    /// TCP address to listen on, port 0 for a free one; repeatable [default: with keys, a free
    /// port of all IPv4 interfaces]
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Address of a node to dial; repeatable
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) peer: Vec<Address>,
    /// Address to announce instead of the interfaces' own; repeatable
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Vec<Address>,
    /// Use only this network interface for mDNS; repeatable
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: Vec<String>,
    /// Don't use this network interface for mDNS; repeatable
    #[arg(long, value_name = "NAME")]
    pub(crate) exclude_interface: Vec<String>,
    /// Don't find nodes on this host by the folder of sockets
    #[arg(long)]
    pub(crate) no_local: bool,
    /// Folder of this host's sockets and key; created if missing, and this user's own. Nodes that are
    /// to meet on this host need the same [default: peerbus in $XDG_RUNTIME_DIR if that is this
    /// user's, else peerbus-UID in the folder for temporary files]
    #[arg(long, value_name = "DIR", env = "PEERBUS_RUNTIME_DIR")]
    pub(crate) runtime_dir: Option<PathBuf>,
    /// Don't use multicast DNS
    #[arg(long)]
    pub(crate) no_mdns: bool,
    /// Connections to accept from networks [default: 1024]
    #[arg(long, value_name = "COUNT")]
    max_connections: Option<usize>,
    /// Processor time given for lower latency: eager readers poll for their peers' bytes, frugal
    /// ones sleep, balanced ones poll where that paid lately [default: balanced]
    #[arg(long, value_name = "HOW", value_enum)]
    pub(crate) latency: Option<LatencyOption>,
    /// Memory that all peers together may take [default: 512]
    #[arg(long, value_name = "MIB")]
    peer_memory: Option<u32>,
    /// Log lines per second about what peers cause [default: 25]
    #[arg(long, value_name = "COUNT")]
    log_lines: Option<u32>,
    /// Don't announce peers to each other, and don't dial announced peers
    #[arg(long)]
    pub(crate) no_gossip: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LatencyOption {
    Eager,
    Balanced,
    Frugal,
}

impl From<LatencyOption> for Latency {
    fn from(option: LatencyOption) -> Self {
        match option {
            LatencyOption::Eager => Self::Eager,
            LatencyOption::Balanced => Self::Balanced,
            LatencyOption::Frugal => Self::Frugal,
        }
    }
}

impl NodeOptions {
    pub(crate) async fn start(&self) -> anyhow::Result<Node> {
        let config = match &self.broker {
            Some(url) => self.over_broker(self.config()?, url)?,
            None => self.config()?,
        };
        config.start().await.context("the node can't start")
    }

    /// Starts a node of the mesh, and a node of the broker with the same name and identity.
    pub(crate) async fn start_both(&self) -> anyhow::Result<(Node, Node)> {
        let url = self.broker.as_ref().context("no broker given; name it with --broker URL")?;
        let inner = self.config()?.start().await.context("the node of the mesh can't start")?;
        let outer = Node::builder().mesh(self.mesh.clone()).name(inner.name());
        let mut outer = self.retrying(outer);
        if let Some(path) = self.kept_identity() {
            outer = outer.identity(path);
        }
        let outer = self.over_broker(outer, url)?.start().await;
        Ok((inner, outer.context("the node of the broker can't start")?))
    }

    /// The path of the identity file, if the identity is kept.
    fn kept_identity(&self) -> Option<PathBuf> {
        let in_store = || Some(self.outbox.as_ref()?.join("identity"));
        self.identity.clone().or_else(in_store)
    }

    fn retrying(&self, mut config: Config) -> Config {
        if let Some(most) = self.max_connections {
            config = config.max_connections(most);
        }
        if let Some(latency) = self.latency {
            config = config.latency(latency.into());
        }
        if let Some(mib) = self.peer_memory {
            config = config.peer_memory(u64::from(mib) << 20);
        }
        if let Some(lines) = self.log_lines {
            config = config.log_lines(lines);
        }
        if let Some(attempts) = self.max_attempts {
            config = config.max_attempts(attempts);
        }
        if let Some(after) = self.forget_subscribers_after {
            config = config.forget_subscribers_after(Some(after));
        }
        if let Some((first, longest)) = self.backoff {
            config = config.backoff(first, longest);
        }
        config
    }

    fn over_broker(&self, config: Config, url: &Secret) -> anyhow::Result<Config> {
        if url.reveal().contains('@') {
            secrets::warn_if_on_command_line(url, "--broker-credentials-file");
        }
        let mut config = config.broker(url.clone());
        if let Some(credentials) = secrets::credentials(self.broker_credentials_file.as_deref())? {
            config = config.broker_credentials(credentials);
        }
        if let Some(path) = &self.broker_ca {
            config = config.broker_ca(path);
        }
        Ok(config)
    }

    fn config(&self) -> anyhow::Result<Config> {
        self.trust.warn_if_on_command_line();
        let mut config = Node::builder()
            .trust(self.trust.trust()?)
            .mesh(self.mesh.clone())
            .mdns(!self.no_mdns)
            .gossip(!self.no_gossip);
        if let Some(path) = &self.trust.rules {
            config = config.rules_file(path);
        }
        if let Some(dir) = &self.runtime_dir {
            config = config.runtime_dir(dir);
        }
        if self.no_local {
            config = config.local(false);
        }
        if let Some(name) = &self.name {
            config = config.name(name);
        }
        if let Some(path) = &self.identity {
            config = config.identity(path);
        }
        if let Some(dir) = &self.outbox {
            config = config.outbox(dir);
        }
        config = self.retrying(config);
        config = self.listen.iter().fold(config, |config, addr| config.listen(*addr));
        config = self.peer.iter().cloned().fold(config, Config::peer);
        config = self.advertise.iter().cloned().fold(config, Config::advertise);
        config = self.interface.iter().fold(config, |config, name| config.interface(name));
        let excluded = self.exclude_interface.iter();
        Ok(excluded.fold(config, |config, name| config.exclude_interface(name)))
    }

    /// Explains how to reach other hosts, for a node that is limited to this host.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        let here = self.broker.is_none() && matches!(self.trust.trust(), Ok(Trust::ThisHost));
        here.then_some(
            "to join a LAN: --mesh-key-file FILE; `peerbus keygen --mesh FILE` makes a key",
        )
    }
}

fn parse_backoff(text: &str) -> Result<(Duration, Duration), String> {
    let (first, longest) = text.split_once("..").ok_or("it is two times, such as 200ms..60s")?;
    let parse =
        |text| humantime::parse_duration(text).map_err(|error| format!("{text:?}: {error}"));
    Ok((parse(first)?, parse(longest)?))
}

/// The recipient of a message or request.
#[derive(Args, Clone)]
pub(crate) struct To {
    /// Name of the service; with --node, the id of a node
    #[arg(value_name = "SERVICE")]
    to: String,
    /// SERVICE is the id of a node, the recipient itself
    #[arg(long)]
    node: bool,
    /// Time to wait for the recipient
    #[arg(long, value_name = "TIME", default_value = "3s")]
    pub(crate) wait: humantime::Duration,
}

impl To {
    /// The recipient, present or not.
    pub(crate) fn parse(&self) -> anyhow::Result<Recipient> {
        Ok(match self.node {
            true => Recipient::Node(self.to.parse()?),
            false => Recipient::Service(self.to.parse()?),
        })
    }

    /// The recipient, once a node serves it.
    pub(crate) async fn find(&self, node: &Node) -> anyhow::Result<Recipient> {
        if self.node {
            let id: NodeId = self.to.parse()?;
            if !node.peers().is_empty() && node.peers().iter().all(|it| it.id == NodeId::BROKER) {
                // Only a send shows if the node is present.
                return Ok(Recipient::Node(id));
            }
            let within = tokio::time::Instant::now() + *self.wait;
            let mut peers = 0;
            while !node.peers().iter().any(|peer| peer.id == id) {
                peers = node.peers().len().max(peers) + 1;
                let left = within.saturating_duration_since(tokio::time::Instant::now());
                node.wait_for_peers(peers, left).await.with_context(|| {
                    format!("timed out after {}: no node {id} was found", self.wait)
                })?;
            }
            return Ok(Recipient::Node(id));
        }
        let service: peerbus::ServiceName = self.to.parse()?;
        node.wait_for_service(&service, *self.wait).await.map_err(|_| {
            if let Some(trouble) = broker_trouble(node) {
                return anyhow::anyhow!(trouble);
            }
            let met = node.peers().len();
            let why = node.unreachable().into_iter().next();
            let why = why.map(|it| format!("; can't reach {}", it.last_error)).unwrap_or_default();
            anyhow::anyhow!(
                "timed out after {}: no node serves {service} (met {met} nodes){why}",
                self.wait
            )
        })?;
        Ok(Recipient::Service(service))
    }
}

/// The reason for which the broker can't be reached, if there is one and it can't.
pub(crate) fn broker_trouble(node: &Node) -> Option<String> {
    let broker = node.unreachable().into_iter().find(|it| it.id == Some(NodeId::BROKER))?;
    Some(format!("the broker at {} can't be reached: {}", broker.address, broker.last_error))
}

/// The body of a message.
#[derive(Args, Clone)]
pub(crate) struct BodyArg {
    /// The body [default: read from standard input]
    body: Option<String>,
}

impl BodyArg {
    pub(crate) fn read(&self) -> anyhow::Result<Vec<u8>> {
        match &self.body {
            Some(body) => Ok(body.clone().into_bytes()),
            None => read_within(std::io::stdin(), Config::DEFAULT_MAX_BODY),
        }
    }
}

/// Reads a body of at most `limit` bytes, and no more than one byte beyond it.
fn read_within(input: impl std::io::Read, limit: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut input.take(limit as u64 + 1), &mut bytes)
        .context("the body can't be read from standard input")?;
    anyhow::ensure!(
        bytes.len() <= limit,
        "the standard input is longer than a body may be ({limit} bytes); send it in parts"
    );
    Ok(bytes)
}

/// A signal ended a command before its work was done.
#[derive(Debug)]
pub(crate) struct Interrupted {
    /// The work that was left, for people.
    pub(crate) text: String,
    /// The usual exit code: 128 and the number of the signal.
    pub(crate) code: u8,
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Interrupted {}

/// Waits for Ctrl-C or SIGTERM. Returns the exit code of a command whose work is not done.
pub(crate) async fn interrupted() -> u8 {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => return 130,
                _ = terminate.recv() => return 143,
            }
        }
    }
    let _no_signals = tokio::signal::ctrl_c().await;
    130
}

/// The time limit for the delivery of the last messages of one-shot commands.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);

/// Waits up to `wait` until stored messages are processed, and reports what happens to the rest.
pub(crate) async fn settle(
    node: &Node,
    receipts: Vec<Receipt>,
    wait: Duration,
    json: bool,
) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + wait;
    let (mut processed, mut dead, mut at_broker) = (0u64, Vec::new(), 0u64);
    for receipt in receipts {
        let id = receipt.id();
        match tokio::time::timeout_at(deadline, receipt.processed()).await {
            Ok(Ok(())) => processed += 1,
            Ok(Err(DeliveryError::Unsupported(_))) => at_broker += 1,
            Ok(Err(error)) => dead.push(format!("{id}: {error}")),
            Err(_) => {}
        }
    }
    // Messages that earlier runs left.
    while node.outbox_size().pending > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let kept = node.shutdown_within(DRAIN).await.pending + at_broker;
    let value = json!({ "processed": processed, "dead_letters": dead, "kept": kept });
    crate::output::line(json, &value, || match kept {
        _ if at_broker > 0 => format!("{at_broker} kept by the broker until they are processed"),
        0 => format!("{processed} processed"),
        _ => format!("{processed} processed; {kept} kept in the outbox for the next run"),
    })?;
    anyhow::ensure!(dead.is_empty(), "{} became dead letters: {}", dead.len(), dead.join("; "));
    Ok(())
}

/// Shuts down a node; returns an error if any of its messages was not delivered.
pub(crate) async fn finish(node: &Node) -> anyhow::Result<()> {
    let report = node.shutdown_within(DRAIN).await;
    match (report.undelivered, report.in_doubt) {
        (0, 0) => Ok(()),
        (lost, doubt) => anyhow::bail!("{lost} messages were not delivered, {doubt} are in doubt"),
    }
}
