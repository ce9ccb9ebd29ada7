//! A mesh over sockets: the front door, its listeners, and discovery.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use tokio::task::AbortHandle;

use super::receive::NodeAcceptor;
use super::transport::Transport;
use super::{MeshCarrier, MeshParts};
use crate::address::MeshName;
use crate::config::Config;
use crate::core::{Core, Reporter};
use crate::discovery::{self, Sink, local};
use crate::identity::{Identity, NodeId};
use crate::link::Acceptor;
use crate::peer::Address;
use crate::trust::{Access, LetIn, Rules, Trust, TrustError, TrustedKeys, Watched};
use crate::tunnel::{End, FrontDoor, FrontDoorConfig, GateLimits, Refusal, Tls, Watch};

/// The error of opening a mesh's sockets.
#[derive(Debug)]
pub(crate) enum SocketError {
    SocketDir { dir: PathBuf, source: io::Error },
    Trust(TrustError),
    Listen { addr: SocketAddr, source: io::Error },
    Mdns(String),
}

impl From<TrustError> for SocketError {
    fn from(error: TrustError) -> Self {
        Self::Trust(error)
    }
}

/// Counts and reports the connections that the front door refused.
struct DoorWatch(Weak<Reporter>);

impl Watch for DoorWatch {
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal) {
        if let Some(reporter) = self.0.upgrade() {
            reporter.counters.refused(refusal.as_str());
            reporter.report_refusal(address, refusal.to_string());
        }
    }
}

impl MeshCarrier {
    /// Creates a mesh over TCP, TLS and this host's Unix sockets; also returns its addresses.
    pub(crate) async fn over_sockets(
        core: &Arc<Core>,
        parts: MeshParts,
        identity: &Identity,
    ) -> Result<(Arc<Self>, Vec<SocketAddr>), SocketError> {
        let config = &core.config;
        let folder = || local::prepare(config.runtime_dir.as_deref(), &config.mesh);
        let folder = || folder().map_err(|(dir, source)| SocketError::SocketDir { dir, source });
        let sockets = meets_locally(config).then(folder).transpose()?;
        let root = || {
            let dir = sockets.clone().map_or_else(folder, Ok)?;
            Ok::<_, SocketError>(dir.parent().unwrap_or(&dir).to_owned())
        };
        let let_in = LetIn::new(&config.trust, root)?;
        let (rules, local) = (config.rules.as_ref(), meets_locally(config));
        let access = Access::new(rules, &config.trust, local, let_in.clone())?;
        let door = |carrier: &Weak<Self>| {
            let acceptor: Arc<dyn Acceptor> = Arc::new(NodeAcceptor(carrier.clone()));
            Arc::new(front_door(core, identity, &let_in, acceptor))
        };
        let mut opened = None;
        let carrier = Self::new(core, parts, |carrier| {
            let door = opened.insert(door(carrier)).clone();
            (Transport::Sockets(door), Some(access.clone()))
        });
        let listening = match opened {
            Some(door) => carrier.open(&door, sockets, access).await,
            None => Ok(Vec::new()),
        };
        match listening {
            Ok(listening) => Ok((carrier, listening)),
            Err(error) => {
                // Nothing is left behind: no socket, no lock of the store.
                carrier.close_files().await;
                Err(error)
            }
        }
    }

    /// Starts the listeners and discovery.
    async fn open(
        self: &Arc<Self>,
        door: &Arc<FrontDoor>,
        sockets: Option<PathBuf>,
        access: Access,
    ) -> Result<Vec<SocketAddr>, SocketError> {
        self.begin();
        let (core, config) = (&self.core, &self.core.config);
        let mut place = Place {
            door: Arc::downgrade(door),
            let_in: access.let_in().clone(),
            runtime_dir: config.runtime_dir.clone(),
            mesh: config.mesh.clone(),
            socket: None,
            failed: false,
        };
        if let Some(dir) = &sockets {
            let listening = place.listen(dir);
            listening.map_err(|(dir, source)| SocketError::SocketDir { dir, source })?;
        }
        let mut listening = Vec::new();
        for addr in wanted(config) {
            let bound = door.listen(addr).await;
            listening.push(bound.map_err(|source| SocketError::Listen { addr, source })?);
        }
        if matches!(config.trust, Trust::Open { anywhere: true }) {
            tracing::warn!(
                ?listening,
                "trust is open: anyone who reaches this node can read, forge and join"
            );
        }
        let let_in = access.let_in().clone();
        if let LetIn::TrustedKeys(keys) = &let_in {
            if config.rules.is_none() {
                tracing::warn!(
                    "there are no rules, so trusted nodes may do nothing here; set some (--rules)"
                );
            }
            core.spawn(watch_trusted_keys(self.clone(), keys.clone()));
            access.warn_of_unknown_subjects();
        }
        core.spawn(watch_rules(self.clone(), access));
        let reachable = reachable(&listening, &config.advertise);
        self.with_mesh(|mesh, _| mesh.set_addresses(reachable));
        let carrier = self.clone();
        let sink: Sink = Arc::new(move |discovered| carrier.handle_discovered(discovered));
        discovery::fixed::announce(&config.peers, &sink);
        for (host, port) in config.peers.iter().filter_map(discovery::fixed::name) {
            core.spawn(discovery::names::watch(host.to_owned(), port, sink.clone()));
        }
        core.spawn(local::watch(move || place.renew(), sink.clone()));
        if config.mdns && !listening.is_empty() {
            let beacon = discovery::mdns::Beacon {
                id: core.id,
                name: core.name.clone(),
                mesh: config.mesh.clone(),
                trust: config.trust.as_str(),
                let_in,
                listening: listening.clone(),
                advertise: config.advertise.clone(),
                interfaces: config.interfaces.clone(),
                excluded_interfaces: config.excluded_interfaces.clone(),
            };
            core.spawn(discovery::mdns::start(beacon, sink).map_err(SocketError::Mdns)?);
        }
        Ok(listening)
    }
}

/// The place of a node among those of its user on this host: its socket, and the key of the host.
struct Place {
    door: Weak<FrontDoor>,
    let_in: LetIn,
    runtime_dir: Option<PathBuf>,
    mesh: MeshName,
    /// The socket and its listener, if the node has one.
    socket: Option<(PathBuf, AbortHandle)>,
    /// The last attempt to make it again failed.
    failed: bool,
}

impl Place {
    fn listen(&mut self, dir: &Path) -> Result<(), (PathBuf, io::Error)> {
        let Some(door) = self.door.upgrade() else { return Ok(()) };
        let path = local::fresh_socket(dir);
        let listener = door.listen_local(&path).map_err(|source| (path.clone(), source))?;
        if let Some((_, removed)) = self.socket.replace((path, listener)) {
            removed.abort();
        }
        Ok(())
    }

    /// Makes the socket and the key again, if they were removed. Returns the node's socket.
    fn renew(&mut self) -> Option<PathBuf> {
        let is_there = self.socket.as_ref().is_none_or(|(path, _)| path.exists());
        let renewed = match is_there {
            true => self.let_in.renew().map_err(|error| error.to_string()),
            false => self.make_again(),
        };
        match renewed {
            Ok(()) => self.failed = false,
            Err(_) if self.failed => {}
            Err(error) => {
                self.failed = true;
                tracing::warn!(
                    error,
                    "this node's socket or the host's key can't be checked, or made again: other \
                     nodes of this host may not find this one"
                );
            }
        }
        self.socket.as_ref().map(|(path, _)| path.clone())
    }

    fn make_again(&mut self) -> Result<(), String> {
        let told = |(path, error): (PathBuf, io::Error)| format!("{}: {error}", path.display());
        let dir = local::prepare(self.runtime_dir.as_deref(), &self.mesh).map_err(told)?;
        self.let_in.renew().map_err(|error| error.to_string())?;
        self.listen(&dir).map_err(told)?;
        tracing::warn!(
            dir = %dir.display(),
            "the socket of this node was removed: it has made another one"
        );
        Ok(())
    }
}

fn front_door(
    core: &Core,
    identity: &Identity,
    let_in: &LetIn,
    acceptor: Arc<dyn Acceptor>,
) -> FrontDoor {
    let config = &core.config;
    let tls = match let_in {
        LetIn::Anybody => None,
        let_in => Some(Arc::new(Tls::new(identity, let_in.clone()))),
    };
    let door_config = FrontDoorConfig {
        tls,
        gate: GateLimits::for_bodies(config.max_body as u64),
        handshake_timeout: config.handshake_timeout,
        latency: config.latency,
        max_pending: config.max_pending_handshakes,
        max_connections: config.max_connections,
        loopback_only: !config.trust.reaches_networks(),
    };
    let watch = Arc::new(DoorWatch(Arc::downgrade(&core.reporter)));
    FrontDoor::new(door_config, End::Node(core.id), acceptor, watch)
}

/// Returns true if the nodes of this host find each other by Unix sockets.
fn meets_locally(config: &Config) -> bool {
    cfg!(unix) && config.local
}

/// Returns the addresses to listen on.
fn wanted(config: &Config) -> Vec<SocketAddr> {
    let any_port = |ip| vec![SocketAddr::from((ip, 0))];
    match config.listen.as_slice() {
        [] if config.trust.reaches_networks() => any_port(Ipv4Addr::UNSPECIFIED),
        // Without the socket folder, the nodes of this host connect over loopback TCP.
        [] if !meets_locally(config) => any_port(Ipv4Addr::LOCALHOST),
        listen => listen.to_vec(),
    }
}

/// Cuts the links of nodes that are no longer trusted, or whose roles changed. The latter connect
/// again with their new roles.
async fn watch_trusted_keys(carrier: Arc<MeshCarrier>, keys: Arc<Watched<TrustedKeys>>) {
    let changed = |before: &TrustedKeys, now: &TrustedKeys| {
        let as_before = |id: &NodeId| now.get(id).is_some() && now.get(id) == before.get(id);
        carrier.with_mesh(|mesh, now| mesh.handle_trust_changed(now, as_before));
        if let Some(durable) = &carrier.durable {
            durable.handle_distrusted(|id| before.get(id).is_some() && now.get(id).is_none());
        }
    };
    keys.watch(changed).await;
}

/// Cuts the links of nodes whose rights changed. They connect again with their new rights.
async fn watch_rules(carrier: Arc<MeshCarrier>, access: Access) {
    let Some(rules) = access.rules() else { return };
    let changed = |before: &Rules, now: &Rules| {
        access.warn_of_unknown_subjects();
        let as_before =
            |id: &NodeId| access.grants_by(Some(before), id) == access.grants_by(Some(now), id);
        carrier.with_mesh(|mesh, now| mesh.handle_trust_changed(now, as_before));
    };
    rules.watch(changed).await;
}

/// Returns the addresses at which a node that listens on `listening` can be dialled.
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
