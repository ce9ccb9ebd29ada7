//! A node's configuration: defaults that work on this host, and checked setters.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::address::MeshName;
use crate::carrier::broker::BrokerUrl;
use crate::engine::delivery::RetryPolicy;
use crate::journal::Durability;
use crate::link::memory::MemoryNetwork;
use crate::opaque::opaque;
use crate::peer::Address;
use crate::trust::{MeshKey, Rules, Trust};
use crate::tunnel::MAX_PROOFS;

/// How a node starts. [`Node::builder`](crate::Node::builder) makes one; [`Config::start`] uses it.
///
/// The defaults make a node that talks to the nodes of the same user on this host. A LAN takes
/// one setting: [`Config::mesh_key`].
#[derive(Clone)]
#[must_use = "a configuration does nothing until it is started"]
pub struct Config {
    pub(crate) name: Option<String>,
    pub(crate) mesh: MeshName,
    pub(crate) identity: Option<PathBuf>,
    pub(crate) trust: Trust,
    pub(crate) rules: Option<Rules>,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) peers: Vec<Address>,
    pub(crate) advertise: Vec<Address>,
    pub(crate) interfaces: Vec<String>,
    pub(crate) excluded_interfaces: Vec<String>,
    pub(crate) local: bool,
    pub(crate) mdns: bool,
    pub(crate) gossip: bool,
    pub(crate) memory: Option<MemoryNetwork>,
    pub(crate) broker: Option<String>,
    pub(crate) broker_ca: Option<PathBuf>,
    pub(crate) max_body: usize,
    pub(crate) window: u64,
    pub(crate) send_queue: u64,
    pub(crate) subscription_queue: u64,
    pub(crate) heartbeat: Duration,
    pub(crate) suspect_after: Duration,
    pub(crate) dead_after: Duration,
    pub(crate) request_deadline: Duration,
    pub(crate) service_grace: Duration,
    pub(crate) fail_fast: bool,
    pub(crate) handshake_timeout: Duration,
    pub(crate) max_pending_handshakes: usize,
    pub(crate) max_pending_per_address: usize,
    pub(crate) max_connections: usize,
    pub(crate) runtime_dir: Option<PathBuf>,
    pub(crate) outbox: Option<PathBuf>,
    pub(crate) durability: Durability,
    pub(crate) outbox_bytes: u64,
    pub(crate) outbox_messages: u64,
    pub(crate) lease: Duration,
    pub(crate) retry: RetryPolicy,
    pub(crate) hold_keys: bool,
    pub(crate) reassign_after: Option<Duration>,
    pub(crate) gone_after: Duration,
}

// The keys in `trust` and the broker's address don't show their secrets.
opaque!(Config, |it|
    name: it.name,
    mesh: it.mesh,
    trust: it.trust,
    listen: it.listen,
    peers: it.peers,
    outbox: it.outbox,
    broker: it.broker_url()
);

impl Default for Config {
    fn default() -> Self {
        Self {
            name: None,
            mesh: MeshName::default(),
            identity: None,
            trust: Trust::ThisHost,
            rules: None,
            listen: Vec::new(),
            peers: Vec::new(),
            advertise: Vec::new(),
            interfaces: Vec::new(),
            excluded_interfaces: Vec::new(),
            local: cfg!(unix),
            mdns: true,
            gossip: true,
            memory: None,
            broker: None,
            broker_ca: None,
            max_body: 1024 * 1024,
            window: 4 * 1024 * 1024,
            send_queue: 4 * 1024 * 1024,
            subscription_queue: 2 * 1024 * 1024,
            heartbeat: Duration::from_secs(1),
            suspect_after: Duration::from_secs(3),
            dead_after: Duration::from_secs(5),
            request_deadline: Duration::from_secs(10),
            service_grace: Duration::from_secs(1),
            fail_fast: true,
            handshake_timeout: Duration::from_secs(5),
            max_pending_handshakes: 128,
            max_pending_per_address: 8,
            max_connections: 1024,
            runtime_dir: None,
            outbox: None,
            durability: Durability::Sync,
            outbox_bytes: 1024 * 1024 * 1024,
            outbox_messages: 1_000_000,
            lease: Duration::from_secs(30),
            retry: RetryPolicy::default(),
            hold_keys: false,
            reassign_after: None,
            gone_after: Duration::from_secs(3600),
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])*
        pub fn $name(mut self, $name: $type) -> Self {
            self.$name = $name;
            self
        })*
    };
}

impl Config {
    /// The human name, shown to other nodes; the host's name by default. Names may repeat.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Keeps the node's identity in this file, which is created if it is missing. Without it an
    /// identity is drawn for this run.
    pub fn identity(mut self, path: impl Into<PathBuf>) -> Self {
        self.identity = Some(path.into());
        self
    }

    /// Talks to whoever else holds this key, on any network: [`Trust::MeshKey`]. May be called
    /// several times while a mesh goes from one key to the next; takes the place of another
    /// mode.
    pub fn mesh_key(mut self, key: MeshKey) -> Self {
        self.trust = match self.trust {
            Trust::MeshKey(mut keys) => {
                keys.push(key);
                Trust::MeshKey(keys)
            }
            _ => Trust::MeshKey(vec![key]),
        };
        self
    }

    /// What peers may do with this node over a network: publish, subscribe, send, serve. Without
    /// rules they may do everything; but in the mode [`Trust::TrustedKeys`] nothing.
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = Some(rules);
        self
    }

    /// Listens on this TCP address; may be called several times. Port 0 takes a free one.
    ///
    /// Without it, a node whose trust mode reaches networks listens on a free port of all IPv4
    /// interfaces. One that is for this host alone can listen on loopback only.
    pub fn listen(mut self, addr: SocketAddr) -> Self {
        self.listen.push(addr);
        self
    }

    /// Dials this address, and again whenever the link is lost; may be called several times.
    pub fn peer(mut self, address: Address) -> Self {
        self.peers.push(address);
        self
    }

    /// Announces this address by mDNS in place of the interfaces' own: for containers and port
    /// mappings. May be called several times.
    pub fn advertise(mut self, address: Address) -> Self {
        self.advertise.push(address);
        self
    }

    /// Uses this network interface for mDNS, and no other that is not named as well.
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interfaces.push(name.into());
        self
    }

    /// Leaves this network interface out of mDNS.
    pub fn exclude_interface(mut self, name: impl Into<String>) -> Self {
        self.excluded_interfaces.push(name.into());
        self
    }

    /// Joins a network within this process, in place of sockets and discovery: for tests.
    pub fn memory(mut self, network: &MemoryNetwork) -> Self {
        self.memory = Some(network.clone());
        self
    }

    /// Has all messages carried by a broker, in place of links to other nodes: the address is
    /// that of a [`BrokerUrl`](crate::BrokerUrl), with user and password if it takes any. The
    /// mesh's name still separates nodes that share a broker.
    ///
    /// What the broker has no means for is an error that says so
    /// ([`Unsupported`](crate::Unsupported)). The broker keeps guaranteed messages, so there is no
    /// outbox; and it knows who may connect, so there are no keys.
    pub fn broker(mut self, url: impl Into<String>) -> Self {
        self.broker = Some(url.into());
        self
    }

    /// A file of certificates (PEM) by which a broker's own is checked, besides the system's.
    pub fn broker_ca(mut self, path: impl Into<PathBuf>) -> Self {
        self.broker_ca = Some(path.into());
        self
    }

    setters! {
        /// Whom the node talks to: [`Trust::ThisHost`] by default.
        trust: Trust;
        /// The mesh to join; `default` unless set. Nodes of different meshes never talk.
        mesh: MeshName;
        /// Whether to find the nodes of the same user on this host by their socket directory;
        /// true by default, except on Windows.
        local: bool;
        /// Whether to announce this node, and to find others, by multicast DNS; true by
        /// default. It needs a TCP address to listen on.
        mdns: bool;
        /// Whether to tell peers of each other and to dial whom they tell of; true by default.
        /// So one reachable peer is enough to join a mesh.
        gossip: bool;
        /// The longest body that this node takes, in bytes: 1 MiB by default, and never more
        /// than half of [`Config::window`].
        max_body: usize;
        /// The credit that a peer has in each lane (events, calls, replies), in bytes: what may
        /// be on its way or unread. 4 MiB by default, 512 KiB at the least.
        window: u64;
        /// What may wait here for each peer and lane, in bytes: 4 MiB by default. Beyond it
        /// messages for that peer are dropped and counted.
        send_queue: u64;
        /// What may wait in each local subscription, in bytes: 2 MiB by default. Beyond it the
        /// newest message is dropped, and counted at its sender.
        subscription_queue: u64;
        /// After how much silence in a direction an empty batch is sent: 1 s by default.
        heartbeat: Duration;
        /// After how much silence a peer is suspected: 3 s by default.
        suspect_after: Duration;
        /// After how much silence a peer is dead: 5 s by default.
        dead_after: Duration;
        /// How long a request may take unless it says so itself: 10 s by default.
        request_deadline: Duration;
        /// How long a request waits for an instance of its service: 1 s by default.
        service_grace: Duration;
        /// Whether a request for a service that nobody offers fails at once when any peer is
        /// up; true by default. Otherwise it waits out the grace.
        fail_fast: bool;
        /// How long a connection from a network may take for its handshake: 5 s by default.
        handshake_timeout: Duration;
        /// The most connections from networks in their handshake at once: 128 by default.
        /// Processes of the same user on this host, over Unix sockets, have limits of their own:
        /// 1,024 handshakes and 4,096 connections.
        max_pending_handshakes: usize;
        /// How many of those from one address: 8 by default.
        max_pending_per_address: usize;
        /// The most accepted connections from networks: 1,024 by default.
        max_connections: usize;
        /// When a guaranteed message counts as stored: [`Durability::Sync`] by default.
        durability: Durability;
        /// How much the outbox holds, in bytes of messages that are not processed or are dead
        /// letters: 1 GiB by default. Beyond it guaranteed messages are refused.
        outbox_bytes: u64;
        /// How many messages the outbox holds: 1,000,000 by default.
        outbox_messages: u64;
        /// How long the handler of a guaranteed message may take, unless it extends that
        /// ([`Call::extend`](crate::Call::extend)): 30 s by default.
        lease: Duration;
        /// Whether a dead letter holds up the guaranteed messages with its key, until it is
        /// replayed or purged (`peerbus outbox`); false by default: they go on without it.
        hold_keys: bool;
        /// After how long without its node a guaranteed message to a service, which that node
        /// may have had, goes to another instance; never by default, since both may process it,
        /// each of them once.
        reassign_after: Option<Duration>;
        /// After how long without a peer that guaranteed messages wait for it is reported
        /// ([`Event::PeerGone`](crate::Event::PeerGone)): an hour by default. They are kept.
        gone_after: Duration;
    }

    /// Keeps guaranteed messages in this folder, which is created if it is missing: those that
    /// this node sends until they are processed, and what it needs to know of those that it has
    /// processed. One process uses it at a time. Without it the node can neither send nor take
    /// guaranteed messages.
    ///
    /// It also keeps the node's identity, unless [`Config::identity`] names another file: who
    /// comes back with another identity is another node, for which nothing was kept.
    pub fn outbox(mut self, dir: impl Into<PathBuf>) -> Self {
        self.outbox = Some(dir.into());
        self
    }

    /// How often the handler of a guaranteed message may fail before the message is a dead letter:
    /// 10 times by default, at least once. 1 tries each message once.
    ///
    /// It counts for the messages that this node sends. Over a broker it counts for those that it
    /// handles; with RabbitMQ it is a setting of the queue, so all nodes that send or handle such
    /// messages need the same.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.retry.max_attempts = attempts;
        self
    }

    /// How long a guaranteed message is left alone before it is tried again: `first` after the
    /// first attempt, twice as long after each one more, and never longer than `longest`. By
    /// default from 200 ms to 60 s; `first` is 1 ms at the least. Over links these are the most,
    /// and each pause is drawn at random below it, so that what failed together does not come
    /// together again.
    ///
    /// It counts for the same messages as [`Config::max_attempts`].
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        (self.retry.first, self.retry.longest) = (first, longest);
        self
    }

    /// The folder under which the meshes of this host keep their sockets, in place of
    /// `peerbus` in `$XDG_RUNTIME_DIR` or the system's folder for temporary files.
    pub fn runtime_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(dir.into());
        self
    }

    /// What no node could work with.
    pub(crate) fn check(&self) -> Result<(), String> {
        let problem = |text: String| Err(text);
        if self.window < 512 * 1024 {
            return problem(format!("window is {} bytes; at least 524288 are needed", self.window));
        }
        if self.max_body as u64 > self.window / 2 {
            return problem(format!(
                "max_body is {} bytes, more than half of the window of {}",
                self.max_body, self.window
            ));
        }
        if !(self.heartbeat < self.suspect_after && self.suspect_after < self.dead_after) {
            return problem(
                "heartbeat, suspect_after and dead_after must grow in this order".into(),
            );
        }
        if self
            .name
            .as_ref()
            .is_some_and(|name| name.len() > 255 || name.chars().any(char::is_control))
        {
            return problem("name takes at most 255 bytes and no control characters".into());
        }
        if self.lease.is_zero() {
            return problem("lease is zero; no handler could ever end in time".into());
        }
        self.check_retry()?;
        self.check_trust()?;
        self.check_broker()?;
        if let Some(addr) =
            self.advertise.iter().find(|addr| !matches!(addr, Address::Tcp(_) | Address::Host(..)))
        {
            return problem(format!("{addr} can't be advertised; a TCP address can"));
        }
        Ok(())
    }

    /// The broker's address, which doesn't show its password.
    fn broker_url(&self) -> Option<BrokerUrl> {
        self.broker.as_deref()?.parse().ok()
    }

    fn check_retry(&self) -> Result<(), String> {
        let problem = |text: String| Err(text);
        let RetryPolicy { max_attempts, first, longest } = self.retry;
        if max_attempts == 0 {
            return problem("max_attempts is 0; no guaranteed message could be tried".into());
        }
        if first < Duration::from_millis(1) {
            return problem(format!("backoff begins with {first:?}; at least 1 ms is needed"));
        }
        if longest < first {
            return problem(format!(
                "backoff begins with {first:?}, above its longest, {longest:?}"
            ));
        }
        Ok(())
    }

    fn check_broker(&self) -> Result<(), String> {
        let needless = match &self.broker {
            None => return Ok(()),
            Some(_) if self.outbox.is_some() => "the broker keeps guaranteed messages: no outbox",
            Some(_) if !matches!(self.trust, Trust::ThisHost) || self.rules.is_some() => {
                "the broker decides who may do what: no keys, trust or rules"
            }
            Some(_)
                if !self.listen.is_empty() || !self.peers.is_empty() || self.memory.is_some() =>
            {
                "a broker takes the place of links: no addresses to listen on or to dial"
            }
            Some(_) => return Ok(()),
        };
        Err(format!("in broker mode {needless}"))
    }

    fn check_trust(&self) -> Result<(), String> {
        let problem = |text: String| Err(text);
        if let Trust::MeshKey(keys) = &self.trust
            && !(1..=MAX_PROOFS).contains(&keys.len())
        {
            return problem(format!("{} mesh keys; one to {MAX_PROOFS} can be used", keys.len()));
        }
        let beyond = self.listen.iter().find(|addr| !addr.ip().is_loopback());
        match (beyond, &self.trust) {
            (Some(addr), Trust::ThisHost) => problem(format!(
                "{addr} is beyond this host, which takes a mesh key (--mesh-key) or trusted keys \
                 (--trusted-keys); `peerbus keygen --mesh` makes a mesh key"
            )),
            (Some(addr), Trust::Open { anywhere: false }) => problem(format!(
                "{addr} is beyond this host; anybody there could read, forge and join \
                 (--trust open --anywhere allows it)"
            )),
            _ => Ok(()),
        }
    }
}
