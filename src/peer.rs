//! Peers: their addresses, services and subscriptions, and how they were found.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::address::{Pattern, ServiceName};
use crate::identity::{Incarnation, NodeId};

/// An address at which a node may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Address {
    /// A Unix socket in this host's directory of the mesh.
    Local(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
    /// A host name and port, to be resolved at each dial; or an IPv6 address with the name of an
    /// interface as its zone (RFC 4007), such as `fe80::1%eth0`.
    Host(String, u16),
    /// A node of an in-memory network, by its number.
    Memory(u64),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(addr) => addr.fmt(f),
            Self::Host(host, port) if host.contains('%') => write!(f, "[{host}]:{port}"),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
            Self::Memory(node) => write!(f, "memory:{node}"),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The text is not an address to dial.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an address: write HOST:PORT, such as 192.168.1.7:4000 or node.example:4000"
)]
#[non_exhaustive]
pub struct ParseAddressError {
    /// The text as given.
    pub text: String,
}

impl FromStr for Address {
    type Err = ParseAddressError;
    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return Ok(Self::Tcp(addr));
        }
        let bad = || ParseAddressError { text: text.into() };
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse().map_err(|_| bad())?;
        if let Some(zoned) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            return is_zoned(zoned).then(|| Self::Host(zoned.into(), port)).ok_or_else(bad);
        }
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if host.is_empty() || !host.chars().all(ok) {
            return Err(bad());
        }
        Ok(Self::Host(host.into(), port))
    }
}

/// Returns true for an IPv6 address with the name of an interface.
fn is_zoned(text: &str) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '@');
    let Some((ip, zone)) = text.split_once('%') else { return false };
    ip.parse::<std::net::Ipv6Addr>().is_ok() && !zone.is_empty() && zone.chars().all(ok)
}

/// The means by which a peer was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Source {
    /// The socket directory of this host.
    Local,
    /// Multicast DNS on the network (RFC 6762 and RFC 6763).
    Mdns,
    /// An address in the configuration.
    Fixed,
    /// An announcement by another peer.
    Gossip,
    /// An inbound connection from the peer.
    Inbound,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "socket folder",
            Self::Mdns => "mDNS",
            Self::Fixed => "address",
            Self::Gossip => "gossip",
            Self::Inbound => "inbound connection",
        })
    }
}

/// A service that a peer announces.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceInfo {
    /// Its name.
    pub name: ServiceName,
    /// The number of calls that the peer runs at once.
    pub concurrency: u32,
}

/// A peer with a live link.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PeerInfo {
    /// Its node id.
    pub id: NodeId,
    /// Its incarnation: which start of the node this is.
    pub incarnation: Incarnation,
    /// Its human name; names may repeat.
    pub name: String,
    /// The means by which it was found.
    pub source: Source,
    /// The remote address of the link, as far as this side knows it.
    pub address: Option<Address>,
    /// The patterns that it subscribes to.
    pub patterns: Vec<Pattern>,
    /// The services that it offers.
    pub services: Vec<ServiceInfo>,
    /// The duration of its silence, if long enough to suspect it (3 s by default).
    pub suspect_for: Option<Duration>,
}

/// A known address at which no peer could be reached.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Unreachable {
    /// The address.
    pub address: Address,
    /// The id of the expected node, if known.
    pub id: Option<NodeId>,
    /// The means by which it was found.
    pub source: Source,
    /// The number of failed attempts since the last success.
    pub failures: u32,
    /// The error of the last attempt.
    pub last_error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        assert_eq!("10.0.0.1:7".parse(), Ok(Address::Tcp("10.0.0.1:7".parse().unwrap())));
        assert_eq!("[::1]:7".parse(), Ok(Address::Tcp("[::1]:7".parse().unwrap())));
        assert_eq!("box.local:7".parse(), Ok(Address::Host("box.local".into(), 7)));
        let zoned: Address = "[fe80::1%eth0]:7".parse().unwrap();
        assert_eq!(zoned, Address::Host("fe80::1%eth0".into(), 7));
        assert_eq!(zoned.to_string(), "[fe80::1%eth0]:7");
        for text in ["[fe80::1%]:7", "[box%eth0]:7", "[fe80::1%a b]:7", "[::1", "[fe80::1]x:7"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
        for text in ["", "box", "box:", ":7", "box:99999", "a b:7", "tcp://a:7"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
