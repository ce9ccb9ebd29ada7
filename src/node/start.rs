//! From a configuration to a running node.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::BoxFuture;

use super::broker::{BrokerGate, Brokered};
use super::driver;
use super::receive::NodeAcceptor;
use super::shared::{DoorWatch, Shared};
use super::store::{self, Store, StoreError};
use super::transport::Transport;
use super::{Inner, Node};
use crate::broker::{BrokerClient, BrokerUrl, BrokerUrlError, Me};
use crate::clock::unix_ms;
use crate::config::Config;
use crate::discovery::{self, Discovered, Sink, local};
use crate::engine::delivery::{Now, OutboxConfig};
use crate::engine::{Mesh, MeshConfig, Sighting, Time};
use crate::identity::{Identity, IdentityError, Incarnation, NodeId, random_u64};
use crate::journal::Options;
use crate::link::Acceptor;
use crate::peer::{Address, Source};
use crate::trust::{
    Access, LetIn, MeshKeyFileError, Trust, TrustError, TrustedKeys, TrustedKeysError, Watched,
};
use crate::tunnel::{FrontDoor, FrontDoorConfig, GateLimits, Tls};
use crate::wire::{LANES, Limits};

/// A node that can't start, and which setting has to change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Settings that contradict each other or make no sense.
    #[error("{0}")]
    Config(String),
    /// The identity file can't be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The key that the nodes of this user share on this host can't be read or made.
    #[error(transparent)]
    HostKey(MeshKeyFileError),
    /// The file of trusted keys can't be used.
    #[error(transparent)]
    TrustedKeys(TrustedKeysError),
    /// The store can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The address can't be listened on.
    #[error("can't listen on {addr}: {source}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The broker's address can't be used.
    #[error(transparent)]
    BrokerUrl(#[from] BrokerUrlError),
    /// The broker refuses this node, and will do so again: wrong credentials, say, or a queue
    /// that is there with other settings.
    #[error("the broker {url} refuses: {reason}")]
    Broker {
        /// Where it is.
        url: BrokerUrl,
        /// What it said.
        reason: String,
    },
    /// The private socket can't be made.
    #[error("can't use the socket folder {dir}: {source}", dir = dir.display())]
    SocketDir {
        /// The folder.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Multicast DNS can't be used.
    #[error("mDNS can't be used: {0}; it can be turned off (--no-mdns)")]
    Mdns(String),
}

impl From<TrustError> for StartError {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::MeshKey(error) => Self::HostKey(error),
            TrustError::TrustedKeys(error) => Self::TrustedKeys(error),
        }
    }
}

impl Node {
    /// Boxed, so that all that a node does is compiled here and not again in each crate that
    /// starts one.
    #[inline(never)]
    pub(crate) fn start(config: Config) -> BoxFuture<'static, Result<Self, StartError>> {
        Box::pin(Self::start_here(config))
    }

    async fn start_here(config: Config) -> Result<Self, StartError> {
        config.check()?;
        if let Some(dir) = &config.outbox {
            store::prepare(dir)?;
        }
        let kept = config.outbox.as_ref().map(|dir| dir.join(store::IDENTITY));
        let identity = match config.identity.as_ref().or(kept.as_ref()) {
            Some(path) => Identity::load_or_create(path)?,
            None => Identity::ephemeral(),
        };
        let id = identity.node_id();
        let started = Instant::now();
        let opened = match &config.outbox {
            Some(dir) => Some(open_store(dir.clone(), id, &config, started).await?),
            None => None,
        };
        let incarnation = Incarnation(random_u64());
        let name = config.name.clone().unwrap_or_else(host_name);
        let limits = Limits { max_body: config.max_body as u64, windows: [config.window; LANES] };
        let mesh_config = MeshConfig {
            id,
            incarnation,
            mesh: config.mesh.clone(),
            name: name.clone(),
            limits,
            gossip: config.gossip,
            loopback_only: !config.trust.reaches_networks(),
        };
        let mesh = Mesh::new(mesh_config, random_u64());
        let shared = Shared::new(id, name, config, limits, mesh, started, opened);
        let shared = Arc::new(shared);
        shared.begin_delivery();
        let acceptor: Arc<dyn Acceptor> = Arc::new(NodeAcceptor(Arc::downgrade(&shared)));
        keep_freed_memory(shared.config.window);
        // From here on the node's tasks end with it, whatever fails.
        let mut inner = Inner { shared: shared.clone(), listening: Vec::new() };
        match (&shared.config.broker, &shared.config.memory) {
            (Some(url), _) => start_broker(&shared, url).await?,
            (None, Some(network)) => start_memory(&shared, network, &acceptor),
            (None, None) => inner.listening = start_sockets(&shared, &identity, acceptor).await?,
        }
        shared.spawn(driver::run(shared.clone()));
        shared.spawn(driver::report_groups(shared.clone()));
        let logged = shared.clone();
        shared.spawn(async move { logged.log.keep_writing().await });
        if shared.store.is_some() {
            shared.spawn(shared.clone().watch_routes());
            shared.spawn(shared.clone().keep_reading());
        }
        Ok(Self { inner: Arc::new(inner) })
    }
}

/// Reads the store on a thread of its own, since that may take a while.
async fn open_store(
    dir: PathBuf,
    me: NodeId,
    config: &Config,
    started: Instant,
) -> Result<Store, StartError> {
    let outbox = OutboxConfig {
        me,
        epoch: random_u64(),
        seed: random_u64(),
        max_bytes: config.outbox_bytes,
        max_messages: config.outbox_messages,
        window_bytes: config.window.min(config.send_queue) / 2,
        retry: config.retry,
        hold_keys: config.hold_keys,
        segment_size: Options::default().segment_size,
        reassign_after: config.reassign_after,
        gone_after: config.gone_after,
    };
    let options = Options { durability: config.durability, ..Options::default() };
    let open = move || {
        let now = Now { time: Time::after_start(started.elapsed()), unix_ms: unix_ms() };
        Store::open(&dir, &options, outbox, now)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    Ok(opened.map_err(|error| StartError::Config(error.to_string()))??)
}

/// Connects to the broker; one that can't be reached now is tried again and again.
async fn start_broker(shared: &Arc<Shared>, url: &str) -> Result<(), StartError> {
    let url: BrokerUrl = url.parse()?;
    let config = &shared.config;
    let me = Me {
        id: shared.id,
        name: shared.name.clone(),
        mesh: config.mesh.clone(),
        ca: config.broker_ca.clone(),
        lease: config.lease,
        retry: config.retry,
    };
    let gate = Arc::new(BrokerGate(Arc::downgrade(shared)));
    let (client, task) = BrokerClient::new(url.clone(), me, config.send_queue, gate);
    let _first = shared.broker.set(Brokered::new(client));
    let first = task.connect_first().await;
    let first = first.map_err(|error| StartError::Broker { url, reason: error.text })?;
    shared.spawn(task.run(first));
    Ok(())
}

fn start_memory(
    shared: &Arc<Shared>,
    network: &crate::link::memory::MemoryNetwork,
    acceptor: &Arc<dyn Acceptor>,
) {
    let port = network.join(shared.id, acceptor);
    let others = network.others(port.number);
    let _first = shared.transport.set(Transport::Memory(port));
    for address in others {
        let sighting = Sighting { source: Source::Fixed, id: None, addresses: vec![address] };
        shared.handle_discovered(Discovered::Seen(sighting));
    }
}

async fn start_sockets(
    shared: &Arc<Shared>,
    identity: &Identity,
    acceptor: Arc<dyn Acceptor>,
) -> Result<Vec<SocketAddr>, StartError> {
    let config = &shared.config;
    let dir = local::prepare(config.runtime_dir.as_deref(), &config.mesh)
        .map_err(|(dir, source)| StartError::SocketDir { dir, source })?;
    let let_in = LetIn::new(&config.trust, dir.parent().unwrap_or(&dir))?;
    let _first = shared.access.set(Access::new(config.rules.clone(), let_in.clone()));
    let tls = match &let_in {
        LetIn::Anybody => None,
        let_in => Some(Arc::new(Tls::new(identity, let_in.clone()))),
    };
    let door_config = FrontDoorConfig {
        tls,
        gate: GateLimits::for_bodies(config.max_body as u64),
        handshake_timeout: config.handshake_timeout,
        max_pending: config.max_pending_handshakes,
        max_pending_per_address: config.max_pending_per_address,
        max_connections: config.max_connections,
        loopback_only: !config.trust.reaches_networks(),
    };
    let watch = Arc::new(DoorWatch(Arc::downgrade(shared)));
    let door = Arc::new(FrontDoor::new(door_config, shared.id, acceptor, watch));
    let _first = shared.transport.set(Transport::Sockets(door.clone()));
    let mut watching = None;
    if meets_locally(config) {
        let path = local::fresh_socket(&dir);
        let refused = |source| StartError::SocketDir { dir: path.clone(), source };
        door.listen_local(&path).map_err(refused)?;
        watching = Some((dir, path));
    }

    let mut listening = Vec::new();
    for addr in wanted(config) {
        let bound = door.listen(addr).await;
        listening.push(bound.map_err(|source| StartError::Listen { addr, source })?);
    }
    if matches!(config.trust, Trust::Open { anywhere: true }) {
        tracing::warn!(?listening, "whoever reaches this node can read, forge and join");
    }
    if let LetIn::TrustedKeys(watched) = &let_in {
        if config.rules.is_none() {
            tracing::warn!("there are no rules, so trusted nodes may do nothing here (--rules)");
        }
        shared.spawn(watch_trusted_keys(shared.clone(), watched.clone()));
    }

    let reachable = reachable(&listening, &config.advertise);
    shared.with_mesh(|mesh, _| mesh.set_addresses(reachable));

    let node = shared.clone();
    let sink: Sink = Arc::new(move |discovered| node.handle_discovered(discovered));
    discovery::fixed::announce(&config.peers, &sink);
    if let Some((dir, path)) = watching {
        shared.spawn(local::watch(dir, path, sink.clone()));
    }
    if config.mdns && !listening.is_empty() {
        let beacon = discovery::mdns::Beacon {
            id: shared.id,
            name: shared.name.clone(),
            mesh: config.mesh.clone(),
            trust: config.trust.as_str(),
            let_in: let_in.clone(),
            listening: listening.clone(),
            advertise: config.advertise.clone(),
            interfaces: config.interfaces.clone(),
            excluded_interfaces: config.excluded_interfaces.clone(),
        };
        let watching = discovery::mdns::start(beacon, sink).map_err(StartError::Mdns)?;
        shared.spawn(watching);
    }
    Ok(listening)
}

/// Whether the nodes of this host meet over Unix sockets, where there are some.
fn meets_locally(config: &Config) -> bool {
    cfg!(unix) && config.local
}

/// The addresses to listen on.
fn wanted(config: &Config) -> Vec<SocketAddr> {
    let any_port = |ip| vec![SocketAddr::from((ip, 0))];
    match config.listen.as_slice() {
        [] if config.trust.reaches_networks() => any_port(Ipv4Addr::UNSPECIFIED),
        // Without the socket folder, loopback TCP is how the nodes of this host meet.
        [] if !meets_locally(config) => any_port(Ipv4Addr::LOCALHOST),
        listen => listen.to_vec(),
    }
}

/// Cuts the links of whoever is trusted no longer, or has other roles now: they come back with
/// those.
async fn watch_trusted_keys(shared: Arc<Shared>, watched: Arc<Watched>) {
    let changed = |before: &TrustedKeys, now: &TrustedKeys| {
        let as_before = |id: &NodeId| now.get(id).is_some() && now.get(id) == before.get(id);
        shared.with_mesh(|mesh, now| mesh.handle_trust_changed(now, as_before));
    };
    watched.watch(changed).await;
}

/// Keeps glibc from handing memory back to the system only to ask for it again, message for
/// message: in two runs of three, a receiver of 64 KiB bodies did so, at a third of its rate. It
/// gives back what is free at the end of its heap beyond twice the largest mapped
/// block that was ever freed (`mallopt(3)`, `M_MMAP_THRESHOLD`), so one of a window's size is
/// mapped and freed, untouched. Other allocators don't mind.
fn keep_freed_memory(window: u64) {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(window as usize)));
}

/// The addresses under which a node that listens at `listening` can be dialled.
fn reachable(listening: &[SocketAddr], advertise: &[Address]) -> Vec<Address> {
    if !advertise.is_empty() {
        return advertise.to_vec();
    }
    let mut addresses = Vec::new();
    for bound in listening {
        if !bound.ip().is_unspecified() {
            addresses.push(Address::Tcp(*bound));
            continue;
        }
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default().into_iter();
        let ips = interfaces.map(|interface| interface.ip());
        let of_its_kind = ips.filter(|ip| ip.is_ipv4() == bound.is_ipv4() && !ip.is_loopback());
        addresses.extend(of_its_kind.map(|ip| Address::Tcp((ip, bound.port()).into())));
    }
    addresses
}

#[cfg(unix)]
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host_name() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_else(|_| "node".into())
}
