//! Multicast DNS: announces this node, and finds others (RFC 6762, RFC 6763).
//!
//! The instance's name is the node id, so that names never conflict. The TXT record holds the mesh,
//! the trust mode, the human name, and addresses that replace the interfaces' own. Under a mesh key
//! it also holds a tag for each key, which only holders of the key can make; a node that sees no
//! tag of its own keys doesn't dial. Anyone can repeat a record, so it is a hint; the handshake
//! establishes the peer's identity.
//!
//! This is the only file that names the mdns-sd crate.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mdns_sd::{IfKind, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use tokio::time::sleep;

use super::{Discovered, Sink};
use crate::address::MeshName;
use crate::engine::{MAX_ADDRESSES, Sighting, TargetKey};
use crate::identity::NodeId;
use crate::peer::{Address, Source};
use crate::trust::LetIn;
#[cfg(any(test, fuzzing))]
use crate::trust::MeshKey;

const SERVICE: &str = "_peerbus._tcp.local.";
/// The version of the TXT record. Records of another version have another meaning.
const VERSION: &str = "1";
/// The prefix of the keys of advertised addresses.
const ADDRESS: &str = "addr";
/// The prefix of the keys of the mesh keys' tags.
const TAG: &str = "tag";
/// The time limit for the goodbye at shutdown.
const GOODBYE: Duration = Duration::from_millis(200);
/// The interval at which changed interfaces are detected, in seconds.
const INTERFACE_CHECK: u32 = 2;
const BROWSE_AGAIN: Duration = Duration::from_secs(1);

/// The announcement of a node.
#[derive(Clone)]
pub(crate) struct Beacon {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) mesh: MeshName,
    /// The trust mode's name.
    pub(crate) trust: &'static str,
    pub(crate) let_in: LetIn,
    pub(crate) listening: Vec<SocketAddr>,
    pub(crate) advertise: Vec<Address>,
    pub(crate) interfaces: Vec<String>,
    pub(crate) excluded_interfaces: Vec<String>,
}

impl Beacon {
    /// Returns true if the node listens on loopback only.
    fn is_for_loopback(&self) -> bool {
        self.listening.iter().all(|addr| addr.ip().is_loopback())
    }
}

/// Announces the node; the returned future reports other nodes until it is dropped.
///
/// # Errors
/// The reason multicast can't be used, as text.
pub(crate) fn start(
    beacon: Beacon,
    sink: Sink,
) -> Result<impl Future<Output = ()> + Send + 'static, String> {
    let known: Vec<String> = if_addrs::get_if_addrs()
        .map(|found| found.into_iter().map(|interface| interface.name).collect())
        .unwrap_or_default();
    if let Some(missing) = beacon.interfaces.iter().find(|name| !known.contains(name)) {
        return Err(format!(
            "no network interface {missing:?}; choose one of {}",
            known.join(", ")
        ));
    }
    let words = |error: mdns_sd::Error| error.to_string();
    let daemon = ServiceDaemon::new().map_err(words)?;
    let _default_is_fine = daemon.set_ip_check_interval(INTERFACE_CHECK);
    choose_interfaces(&daemon, &beacon).map_err(words)?;
    let info = service_info(&beacon).map_err(words)?;
    let guard = Guard { fullname: info.get_fullname().to_owned(), daemon };
    guard.daemon.register(info).map_err(words)?;
    Ok(watch(guard, beacon, sink))
}

fn choose_interfaces(daemon: &ServiceDaemon, beacon: &Beacon) -> mdns_sd::Result<()> {
    if beacon.is_for_loopback() {
        daemon.disable_interface(IfKind::All)?;
        daemon.enable_interface(vec![IfKind::LoopbackV4, IfKind::LoopbackV6])?;
    } else if !beacon.interfaces.is_empty() {
        daemon.disable_interface(IfKind::All)?;
        for name in &beacon.interfaces {
            daemon.enable_interface(IfKind::Name(name.clone()))?;
        }
    }
    for name in &beacon.excluded_interfaces {
        daemon.disable_interface(IfKind::Name(name.clone()))?;
    }
    Ok(())
}

fn service_info(beacon: &Beacon) -> mdns_sd::Result<ServiceInfo> {
    let id = beacon.id.to_string();
    let host = format!("{id}.local.");
    // An SRV record has one port: that of the first address that other hosts can reach.
    let beyond = beacon.listening.iter().find(|addr| !addr.ip().is_loopback());
    let port = beyond.or(beacon.listening.first()).map_or(0, SocketAddr::port);
    // A TXT string is limited to 255 bytes.
    let name: String = beacon.name.chars().take(60).collect();
    let mut txt = vec![
        ("mesh".to_owned(), beacon.mesh.to_string()),
        ("v".to_owned(), VERSION.to_owned()),
        ("trust".to_owned(), beacon.trust.to_owned()),
        ("name".to_owned(), name),
    ];
    // Only a key's first value counts (RFC 6763, section 6.4), so each address has its own key.
    for (number, address) in beacon.advertise.iter().enumerate() {
        txt.push((format!("{ADDRESS}{number}"), address.to_string()));
    }
    for (number, key) in beacon.let_in.mesh_keys().iter().enumerate() {
        txt.push((format!("{TAG}{number}"), key.tag(&beacon.id)));
    }
    let everywhere = beacon.listening.iter().any(|addr| addr.ip().is_unspecified());
    let ips: Vec<IpAddr> = beacon
        .listening
        .iter()
        .filter(|addr| addr.port() == port && !addr.ip().is_unspecified())
        .map(SocketAddr::ip)
        .collect();
    let mut info = if everywhere {
        let info = ServiceInfo::new(SERVICE, &id, &host, "", port, txt.as_slice())?;
        let mut info = info.enable_addr_auto();
        let bound = beacon.listening.iter().filter(|addr| addr.port() == port);
        info.set_interfaces(bound.map(|addr| reached_at(addr.ip())).collect());
        info
    } else {
        ServiceInfo::new(SERVICE, &id, &host, ips.as_slice(), port, txt.as_slice())?
    };
    // No other node has this name.
    info.set_requires_probe(false);
    Ok(info)
}

/// Returns the interfaces at whose addresses a node that is bound to `ip` can be reached.
fn reached_at(ip: IpAddr) -> IfKind {
    match ip {
        IpAddr::V4(v4) if v4.is_unspecified() => IfKind::IPv4,
        // It takes IPv4 too.
        IpAddr::V6(v6) if v6.is_unspecified() => IfKind::All,
        ip => IfKind::Addr(ip),
    }
}

async fn watch(guard: Guard, beacon: Beacon, sink: Sink) {
    loop {
        if let Ok(found) = guard.daemon.browse(SERVICE) {
            while let Ok(event) = found.recv_async().await {
                match event {
                    ServiceEvent::ServiceResolved(service) => {
                        if let Some(sighting) = sighting(&service, &beacon) {
                            sink(Discovered::Seen(sighting));
                        }
                    }
                    ServiceEvent::ServiceRemoved(_, fullname) => {
                        if let Some(id) = node_id(&fullname) {
                            sink(Discovered::Gone(TargetKey::Node(id)));
                        }
                    }
                    _ => {}
                }
            }
        }
        // The daemon closes a full channel.
        sleep(BROWSE_AGAIN).await;
    }
}

fn node_id(fullname: &str) -> Option<NodeId> {
    fullname.split('.').next()?.parse().ok()
}

fn sighting(service: &ResolvedService, beacon: &Beacon) -> Option<Sighting> {
    let id = node_id(&service.fullname)?;
    let mesh = service.get_property_val_str("mesh")?;
    let trust = service.get_property_val_str("trust")?;
    let version = service.get_property_val_str("v")?;
    if id == beacon.id
        || mesh != beacon.mesh.as_str()
        || trust != beacon.trust
        || version != VERSION
        || !beacon.let_in.trusts(&id)
    {
        return None;
    }
    let numbered = |name: &'static str| {
        let properties = service.txt_properties.iter();
        properties.filter(move |property| property.key().starts_with(name))
    };
    let ours: Vec<String> = beacon.let_in.mesh_keys().iter().map(|key| key.tag(&id)).collect();
    if !ours.is_empty() && !numbered(TAG).any(|tag| ours.iter().any(|our| our == tag.val_str())) {
        return None;
    }
    let mut addresses: Vec<Address> =
        numbered(ADDRESS).filter_map(|property| property.val_str().parse().ok()).collect();
    if addresses.is_empty() {
        let port = service.get_port();
        addresses
            .extend(service.get_addresses().iter().map(|ip| Address::Tcp(socket_addr(ip, port))));
    }
    if !beacon.is_for_loopback() {
        // Other hosts must not announce addresses of this host's loopback.
        addresses.retain(|addr| !matches!(addr, Address::Tcp(addr) if addr.ip().is_loopback()));
    }
    addresses.sort_unstable();
    addresses.truncate(MAX_ADDRESSES);
    Some(Sighting { source: Source::Mdns, id: Some(id), addresses })
}

fn socket_addr(ip: &ScopedIp, port: u16) -> SocketAddr {
    match ip {
        ScopedIp::V6(v6) => {
            let scope = v6.scope_id().index;
            std::net::SocketAddrV6::new(*v6.addr(), port, 0, scope).into()
        }
        other => SocketAddr::new(other.to_ip_addr(), port),
    }
}

/// For the fuzzer: the strings that other nodes announce.
#[cfg(fuzzing)]
pub(crate) fn check_txt(mut strings: &[u8]) {
    let me = Beacon {
        id: NodeId::from_bytes([1; 32]),
        name: "x".into(),
        mesh: MeshName::default(),
        trust: "mesh-key",
        let_in: LetIn::MeshKey(vec![MeshKey::generate()].into()),
        listening: Vec::new(),
        advertise: Vec::new(),
        interfaces: Vec::new(),
        excluded_interfaces: Vec::new(),
    };
    let mut txt = Vec::new();
    while let [len, rest @ ..] = strings {
        let (text, rest) = rest.split_at(usize::from(*len).min(rest.len()));
        let text = String::from_utf8_lossy(text);
        let (key, value) = text.split_once('=').unwrap_or((&text, ""));
        txt.push((key.to_owned(), value.to_owned()));
        strings = rest;
    }
    let id = NodeId::from_bytes([2; 32]).to_string();
    let host = format!("{id}.local.");
    if let Ok(info) = ServiceInfo::new(SERVICE, &id, &host, "10.0.0.1", 4000, txt.as_slice()) {
        let service = info.as_resolved_service();
        for beacon in [Beacon { trust: "open", let_in: LetIn::Anybody, ..me.clone() }, me] {
            let _sighting = sighting(&service, &beacon);
        }
    }
}

/// Sends the goodbye when the node ends.
struct Guard {
    daemon: ServiceDaemon,
    fullname: String,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Ok(gone) = self.daemon.unregister(&self.fullname) {
            let _too_slow = gone.recv_timeout(GOODBYE);
        }
        let _gone_already = self.daemon.shutdown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beacon(byte: u8) -> Beacon {
        Beacon {
            id: NodeId::from_bytes([byte; 32]),
            name: "x".into(),
            mesh: MeshName::default(),
            trust: "open",
            let_in: LetIn::Anybody,
            listening: vec!["10.1.2.3:4000".parse().unwrap()],
            advertise: Vec::new(),
            interfaces: Vec::new(),
            excluded_interfaces: Vec::new(),
        }
    }

    fn seen(announced: &Beacon, by: &Beacon) -> Option<Sighting> {
        sighting(&service_info(announced).unwrap().as_resolved_service(), by)
    }

    #[test]
    fn what_is_announced_is_seen_by_the_others_of_the_mesh() {
        let (alice, mut bob) = (beacon(1), beacon(2));
        let address = Address::Tcp(alice.listening[0]);
        let sighting = seen(&alice, &bob).unwrap();
        assert_eq!((sighting.id, sighting.addresses), (Some(alice.id), vec![address]));
        assert_eq!(seen(&alice, &alice), None, "it is ourselves");
        bob.mesh = "other".parse().unwrap();
        assert_eq!(seen(&alice, &bob), None, "it is of another mesh");
    }

    #[test]
    fn a_node_is_announced_only_where_it_listens() {
        let kind = |ip: &str| reached_at(ip.parse().unwrap());
        assert!(matches!(kind("0.0.0.0"), IfKind::IPv4));
        assert!(matches!(kind("::"), IfKind::All));
        assert!(matches!(kind("fe80::1"), IfKind::Addr(_)));
    }

    #[test]
    fn nodes_see_those_with_whom_they_share_a_mesh_key() {
        let [old, new, other] = [(); 3].map(|()| MeshKey::generate());
        let keyed = |byte, keys: &[&MeshKey]| Beacon {
            trust: "mesh-key",
            let_in: LetIn::MeshKey(std::sync::Arc::new(keys.iter().copied().cloned().collect())),
            ..beacon(byte)
        };
        let alice = keyed(1, &[&old, &new]);
        assert!(seen(&alice, &keyed(2, &[&old])).is_some());
        assert!(seen(&alice, &keyed(2, &[&new])).is_some());
        assert!(seen(&alice, &keyed(2, &[&other])).is_none());
        assert!(seen(&alice, &beacon(2)).is_none(), "another mode");
        // A copied tag is useless, since it covers the node id.
        let mut thief = service_info(&keyed(3, &[])).unwrap().as_resolved_service();
        let stolen = service_info(&alice).unwrap().as_resolved_service();
        thief.txt_properties = stolen.txt_properties;
        assert!(sighting(&thief, &keyed(2, &[&old])).is_none());
    }

    #[test]
    fn advertised_addresses_take_the_place_of_the_interfaces_own() {
        let mut alice = beacon(1);
        alice.advertise = vec!["box.example:7".parse().unwrap(), "192.0.2.9:8".parse().unwrap()];
        let mut wanted = alice.advertise.clone();
        wanted.sort_unstable();
        assert_eq!(seen(&alice, &beacon(2)).unwrap().addresses, wanted);
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        let mut alice = beacon(1);
        alice.interfaces = vec!["nope0".into()];
        let error = start(alice, std::sync::Arc::new(|_| {})).err().unwrap();
        assert!(error.contains("nope0"), "{error}");
    }
}
