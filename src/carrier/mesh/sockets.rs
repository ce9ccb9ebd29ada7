//! A mesh over sockets: the front door, its listeners, and discovery.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use super::receive::NodeAcceptor;
use super::transport::Transport;
use super::{MeshCarrier, MeshParts};
use crate::config::Config;
use crate::core::{Core, Event, Reporter};
use crate::discovery::{self, Sink, local};
use crate::identity::{Identity, NodeId};
use crate::link::Acceptor;
use crate::peer::Address;
use crate::trust::{Access, LetIn, Trust, TrustError, TrustedKeys, Watched};
use crate::tunnel::{FrontDoor, FrontDoorConfig, GateLimits, Refusal, Tls, Watch};

/// The error of opening a mesh's sockets.
#[derive(Debug)]
pub(crate) enum SocketError {
    SocketDir { dir: PathBuf, source: io::Error },
    Trust(TrustError),
    Listen { addr: SocketAddr, source: io::Error },
    Mdns(String),
}

/// Counts and reports the connections that the front door refused.
struct DoorWatch(Weak<Reporter>);

impl Watch for DoorWatch {
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal) {
        if let Some(reporter) = self.0.upgrade() {
            reporter.counters.refused(refusal.as_str());
            let from = address.as_ref().map(tracing::field::display);
            tracing::debug!(address = from, %refusal, "the front door cut a connection");
            reporter.report_unlogged(Event::Refused { address, reason: refusal.to_string() });
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
        let dir = local::prepare(config.runtime_dir.as_deref(), &config.mesh)
            .map_err(|(dir, source)| SocketError::SocketDir { dir, source })?;
        let let_in =
            LetIn::new(&config.trust, dir.parent().unwrap_or(&dir)).map_err(SocketError::Trust)?;
        let door = |carrier: &Weak<Self>| {
            let acceptor: Arc<dyn Acceptor> = Arc::new(NodeAcceptor(carrier.clone()));
            Arc::new(front_door(core, identity, &let_in, acceptor))
        };
        let mut opened = None;
        let carrier = Self::new(core, parts, |carrier| {
            let door = opened.insert(door(carrier)).clone();
            let access = Access::new(config.rules.clone(), let_in.clone());
            (Transport::Sockets(door), Some(access))
        });
        let listening = match opened {
            Some(door) => carrier.open(&door, dir, &let_in).await,
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
        dir: PathBuf,
        let_in: &LetIn,
    ) -> Result<Vec<SocketAddr>, SocketError> {
        self.begin();
        let (core, config) = (&self.core, &self.core.config);
        let mut watching = None;
        if meets_locally(config) {
            let path = local::fresh_socket(&dir);
            let refused = |source| SocketError::SocketDir { dir: path.clone(), source };
            door.listen_local(&path).map_err(refused)?;
            watching = Some((dir, path));
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
        if let LetIn::TrustedKeys(watched) = let_in {
            if config.rules.is_none() {
                tracing::warn!(
                    "there are no rules, so trusted nodes may do nothing here; set some (--rules)"
                );
            }
            core.spawn(watch_trusted_keys(self.clone(), watched.clone()));
        }
        let reachable = reachable(&listening, &config.advertise);
        self.with_mesh(|mesh, _| mesh.set_addresses(reachable));
        let carrier = self.clone();
        let sink: Sink = Arc::new(move |discovered| carrier.handle_discovered(discovered));
        discovery::fixed::announce(&config.peers, &sink);
        if let Some((dir, path)) = watching {
            core.spawn(local::watch(dir, path, sink.clone()));
        }
        if config.mdns && !listening.is_empty() {
            let beacon = discovery::mdns::Beacon {
                id: core.id,
                name: core.name.clone(),
                mesh: config.mesh.clone(),
                trust: config.trust.as_str(),
                let_in: let_in.clone(),
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
        max_pending: config.max_pending_handshakes,
        max_pending_per_address: config.max_pending_per_address,
        max_connections: config.max_connections,
        loopback_only: !config.trust.reaches_networks(),
    };
    let watch = Arc::new(DoorWatch(Arc::downgrade(&core.reporter)));
    FrontDoor::new(door_config, core.id, acceptor, watch)
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
async fn watch_trusted_keys(carrier: Arc<MeshCarrier>, watched: Arc<Watched>) {
    let changed = |before: &TrustedKeys, now: &TrustedKeys| {
        let as_before = |id: &NodeId| now.get(id).is_some() && now.get(id) == before.get(id);
        carrier.with_mesh(|mesh, now| mesh.handle_trust_changed(now, as_before));
        if let Some(durable) = &carrier.durable {
            durable.handle_distrusted(|id| before.get(id).is_some() && now.get(id).is_none());
        }
    };
    watched.watch(changed).await;
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
