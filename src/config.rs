//! A node's configuration: defaults that work on this host, and checked setters.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::address::MeshName;
use crate::carrier::broker::{BrokerUrl, Credentials};
use crate::engine::delivery::RetryPolicy;
use crate::journal::Durability;
use crate::link::memory::MemoryNetwork;
use crate::opaque::opaque;
use crate::peer::Address;
use crate::secret::Secret;
use crate::trust::{MeshKey, Rules, RulesSource, Trust};
use crate::tunnel::{Latency, MAX_PROOFS};

/// A node's configuration. [`Node::builder`](crate::Node::builder) makes one; [`Config::start`]
/// starts the node.
///
/// The defaults make a node that talks to the nodes of the same user on this host. A LAN needs
/// one setting: [`Config::mesh_key`].
#[derive(Clone)]
#[must_use = "a configuration does nothing until it is started"]
pub struct Config {
    pub(crate) name: Option<String>,
    pub(crate) mesh: MeshName,
    pub(crate) identity: Option<PathBuf>,
    pub(crate) trust: Trust,
    pub(crate) rules: Option<RulesSource>,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) peers: Vec<Address>,
    pub(crate) advertise: Vec<Address>,
    pub(crate) interfaces: Vec<String>,
    pub(crate) excluded_interfaces: Vec<String>,
    pub(crate) local: bool,
    pub(crate) mdns: bool,
    pub(crate) gossip: bool,
    pub(crate) memory: Option<MemoryNetwork>,
    pub(crate) broker: Option<Secret>,
    pub(crate) broker_credentials: Option<Credentials>,
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
    pub(crate) latency: Latency,
    pub(crate) max_pending_handshakes: usize,
    pub(crate) max_connections: usize,
    pub(crate) peer_memory: u64,
    pub(crate) dials_per_second: u32,
    pub(crate) log_lines: u32,
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
    pub(crate) forget_subscribers_after: Option<Duration>,
}

// The keys in `trust` don't show their secrets, and the broker's address is shown without them.
opaque!(Config, |it|
    name: it.name,
    mesh: it.mesh,
    trust: it.trust,
    listen: it.listen,
    peers: it.peers,
    outbox: it.outbox,
    broker: it.broker.as_ref().map(|url| match url.reveal().parse::<BrokerUrl>() {
        Ok(url) => url.to_string(),
        // Anything may stand there.
        Err(_) => url.to_string(),
    })
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
            broker_credentials: None,
            broker_ca: None,
            max_body: Self::DEFAULT_MAX_BODY,
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
            latency: Latency::default(),
            max_pending_handshakes: 512,
            max_connections: 1024,
            peer_memory: 512 * 1024 * 1024,
            dials_per_second: 64,
            log_lines: 25,
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
            forget_subscribers_after: Some(Duration::from_secs(30 * 24 * 3600)),
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
    /// The longest body of a node with the default configuration, in bytes: 1 MiB.
    pub const DEFAULT_MAX_BODY: usize = 1024 * 1024;

    /// The human name, shown to other nodes; the host's name by default. Names may repeat.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Keeps the node's identity in this file, which is created if it is missing. Without a file,
    /// each start draws a new identity.
    pub fn identity(mut self, path: impl Into<PathBuf>) -> Self {
        self.identity = Some(path.into());
        self
    }

    /// Connects to every node that holds this key, on any network: [`Trust::MeshKey`]. May be
    /// called several times, to rotate a mesh's key. Replaces any other trust mode.
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

    /// Limits what peers may do with this node over a network: publish, subscribe, send, serve.
    /// Without rules they may do everything, or nothing in the mode [`Trust::TrustedKeys`].
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = Some(RulesSource::Given(rules));
        self
    }

    /// Loads the [rules](Config::rules) from this file, and again within a second of a change: a
    /// peer whose rights changed loses its link, and connects again with the new ones. If the
    /// changed file can't be used, the last valid rules stay in force, with a warning.
    pub fn rules_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.rules = Some(RulesSource::File(path.into()));
        self
    }

    /// Listens on this TCP address; may be called several times. Port 0 picks a free port.
    ///
    /// Without it, a node whose trust mode reaches networks listens on a free port of all IPv4
    /// interfaces. A node in the mode [`Trust::ThisHost`] can listen on loopback only.
    pub fn listen(mut self, addr: SocketAddr) -> Self {
        self.listen.push(addr);
        self
    }

    /// Dials this address, and redials whenever the link is lost; may be called several times.
    pub fn peer(mut self, address: Address) -> Self {
        self.peers.push(address);
        self
    }

    /// Announces this address by mDNS instead of the interfaces' own, for containers and port
    /// mappings. May be called several times.
    pub fn advertise(mut self, address: Address) -> Self {
        self.advertise.push(address);
        self
    }

    /// Restricts mDNS to this network interface; may be called several times.
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interfaces.push(name.into());
        self
    }

    /// Leaves this network interface out of mDNS.
    pub fn exclude_interface(mut self, name: impl Into<String>) -> Self {
        self.excluded_interfaces.push(name.into());
        self
    }

    /// Joins an in-memory network instead of using sockets and discovery: for tests. Neither keys nor
    /// rules bind its nodes, which are parts of one process.
    pub fn memory(mut self, network: &MemoryNetwork) -> Self {
        self.memory = Some(network.clone());
        self
    }

    /// Sends all messages through a broker instead of links to other nodes. The address is a
    /// [`BrokerUrl`], with or without credentials ([`Config::broker_credentials`]). The mesh's name
    /// still separates nodes that share a broker.
    ///
    /// An operation that the broker can't perform fails with [`Unsupported`](crate::Unsupported).
    /// The broker keeps guaranteed messages, so there is no outbox, and it decides who may connect,
    /// so there are no keys.
    pub fn broker(mut self, url: impl Into<Secret>) -> Self {
        self.broker = Some(url.into());
        self
    }

    /// The credentials by which the broker knows this node, if its address has none.
    ///
    /// Neither this crate nor the broker's client logs them while it connects, at any level. But a
    /// program that logs the targets `async_nats` and `lapin` below `warn` logs what those crates
    /// choose, message bodies among it.
    pub fn broker_credentials(mut self, credentials: Credentials) -> Self {
        self.broker_credentials = Some(credentials);
        self
    }

    /// A PEM file of CA certificates that the broker's certificate may chain to, besides the
    /// system's.
    pub fn broker_ca(mut self, path: impl Into<PathBuf>) -> Self {
        self.broker_ca = Some(path.into());
        self
    }

    setters! {
        /// The peers that the node accepts: [`Trust::ThisHost`] by default.
        trust: Trust;
        /// The mesh to join; `default` unless set. Nodes of different meshes never talk.
        mesh: MeshName;
        /// Finds the nodes of the same user on this host by their socket directory; true by
        /// default, except on Windows.
        local: bool;
        /// Announces this node, and finds others, by multicast DNS; true by default. Requires a TCP
        /// address to listen on.
        mdns: bool;
        /// Announces peers to each other, and dials announced peers; true by default. With gossip,
        /// one reachable peer is enough to join a mesh.
        gossip: bool;
        /// The longest accepted body, in bytes: 1 MiB by default, and never more than half of
        /// [`Config::window`].
        max_body: usize;
        /// The credit of a peer in each lane (events, calls, replies, guaranteed messages), in
        /// bytes in flight or unread: 4 MiB by default, at least 512 KiB.
        window: u64;
        /// The limit of the send queue of each peer and lane, in bytes: 4 MiB by default. Beyond
        /// it, messages for that peer are dropped and counted.
        send_queue: u64;
        /// The limit of each local subscription's queue, in bytes: 2 MiB by default. Beyond it, the
        /// newest message is dropped, and counted at its sender.
        subscription_queue: u64;
        /// The processor time given for lower latency: [`Latency::Balanced`] by default.
        latency: Latency;
        /// The silence in a direction after which an empty batch is sent: 1 s by default.
        heartbeat: Duration;
        /// The silence after which a peer is suspected: 3 s by default.
        suspect_after: Duration;
        /// The silence after which a peer is dead: 5 s by default.
        dead_after: Duration;
        /// The deadline of a request that sets none itself: 10 s by default.
        request_deadline: Duration;
        /// The time that a request waits for an instance of its service: 1 s by default.
        service_grace: Duration;
        /// Fails a request for a service without instances at once when any peer is up; true by
        /// default. Otherwise the request waits up to the grace period.
        fail_fast: bool;
        /// The time limit of the handshake of a connection from a network: 5 s by default.
        handshake_timeout: Duration;
        /// The maximum number of connections from networks in their handshake: 512 by default.
        /// Beyond it, the oldest of the address with the most makes room.
        max_pending_handshakes: usize;
        /// The maximum number of accepted connections from networks: 1,024 by default. Beyond it,
        /// one that has carried no message makes room, of the address with the most; if all have
        /// carried one, one of another address that has over half of all; else newcomers are refused.
        ///
        /// Connections over Unix sockets, from processes of the same user on this host, have limits
        /// of their own: 1,024 handshakes and 4,096 connections. All limits are lowered to what the
        /// process's limit of file descriptors (`ulimit -n`) leaves.
        max_connections: usize;
        /// The memory for what all peers together send and this node has not handled, for what is
        /// queued for them, and for what they announce: 512 MiB by default, at least 16 MiB. Once
        /// half of it is taken, the link of a peer that takes more than an equal share of the other
        /// half is cut.
        peer_memory: u64;
        /// The most addresses per second that are dialled because of multicast DNS, and because of
        /// other nodes' hints: 64 of each by default, and four seconds' worth at once. Others can
        /// name any address there.
        dials_per_second: u32;
        /// The most log lines per second about what peers and messages cause: 25 by default, and
        /// four seconds' worth at once. Further ones are counted in the log.
        log_lines: u32;
        /// The point at which a guaranteed message counts as stored: [`Durability::Sync`] by
        /// default.
        durability: Durability;
        /// The capacity of the outbox, in bytes of messages that are unprocessed or dead letters:
        /// 1 GiB by default. Beyond it, guaranteed messages are refused.
        outbox_bytes: u64;
        /// The capacity of the outbox, in messages: 1,000,000 by default.
        outbox_messages: u64;
        /// The time limit of the handler of a guaranteed message, unless it extends that
        /// ([`Call::extend`](crate::Call::extend)): 30 s by default.
        lease: Duration;
        /// Holds back the guaranteed messages with the key of a dead letter until that is replayed
        /// or purged (`peerbus outbox`); false by default: they are delivered without it.
        hold_keys: bool;
        /// The absence of a node after which a guaranteed message to a service, which that node may
        /// have received, is reassigned to another instance. Never by default, since both may
        /// process it, each once.
        reassign_after: Option<Duration>;
        /// The absence of a peer after which its queued guaranteed messages are reported
        /// ([`Event::PeerGone`](crate::Event::PeerGone)): one hour by default. They are kept.
        gone_after: Duration;
        /// The absence of a peer after which its durable subscriptions end here, with the messages
        /// kept for them ([`Event::SubscriptionLapsed`](crate::Event::SubscriptionLapsed)): 30 days
        /// by default. `None` keeps them for good. None ends in the first `gone_after` of this
        /// node's run.
        forget_subscribers_after: Option<Duration>;
    }

    /// Keeps guaranteed messages in this folder, which is created if it is missing: sent messages
    /// until they are processed, and the record of the received messages that were processed. One
    /// process uses it at a time. Without it, the node can neither send nor receive guaranteed
    /// messages.
    ///
    /// The folder also keeps the node's identity, unless [`Config::identity`] names another file: a
    /// node that restarts with another identity is another node, for which nothing was kept.
    pub fn outbox(mut self, dir: impl Into<PathBuf>) -> Self {
        self.outbox = Some(dir.into());
        self
    }

    /// The number of handler failures that make a guaranteed message a dead letter: 10 by default,
    /// at least 1, which tries each message once.
    ///
    /// The limit applies to the messages that this node sends. Over a broker it applies to those
    /// that it handles; with RabbitMQ it is a setting of the queue, so all nodes that send or
    /// handle such messages need the same.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.retry.max_attempts = attempts;
        self
    }

    /// The backoff of guaranteed messages: `first` after the first attempt, twice as long after
    /// each further one, and never longer than `longest`. By default from 200 ms to 60 s; `first`
    /// is at least 1 ms. Over links these are upper bounds, and each pause is drawn at random
    /// below them, so that messages that failed together are not retried together.
    ///
    /// The backoff applies to the same messages as [`Config::max_attempts`]. Over RabbitMQ it is at
    /// most 10 minutes, since the broker waits for an answer no longer than its `consumer_timeout`.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        (self.retry.first, self.retry.longest) = (first, longest);
        self
    }

    /// The folder under which the meshes of this host keep their sockets, and the key by which this
    /// user's nodes know each other over loopback TCP. It is created if it is missing, with mode
    /// 0700, and must belong to this user. Nodes that are to meet on this host need the same.
    ///
    /// By default it is `peerbus` in `$XDG_RUNTIME_DIR`, if that belongs to this user, and otherwise
    /// `peerbus-UID` in the system's folder for temporary files.
    pub fn runtime_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(dir.into());
        self
    }

    /// Rejects settings with which no node can work.
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
        if self.name.as_ref().is_some_and(|name| name.len() > 255 || !crate::text::is_visible(name))
        {
            return problem("name takes at most 255 bytes and no control characters".into());
        }
        if self.peer_memory < 16 << 20 {
            return problem(format!(
                "peer_memory is {} bytes; at least 16777216 are needed",
                self.peer_memory
            ));
        }
        if self.dials_per_second == 0 {
            return problem("dials_per_second is 0; turn off mdns and gossip instead".into());
        }
        if self.lease.is_zero() {
            return problem("lease is zero; set a positive duration".into());
        }
        self.check_retry()?;
        self.check_trust()?;
        self.check_broker()?;
        if let Some(addr) =
            self.advertise.iter().find(|addr| !matches!(addr, Address::Tcp(_) | Address::Host(..)))
        {
            return problem(format!("{addr} can't be advertised; give a TCP address"));
        }
        Ok(())
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
            None if self.broker_credentials.is_some() => {
                return Err(
                    "credentials for a broker are given, and no broker; name it (--broker)".into(),
                );
            }
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
        if let Some(RulesSource::Given(rules)) = &self.rules {
            rules.check(&self.trust, self.local).map_err(|error| format!("rules: {error}"))?;
        }
        let beyond = self.listen.iter().find(|addr| !addr.ip().is_loopback());
        match (beyond, &self.trust) {
            (Some(addr), Trust::ThisHost) => problem(format!(
                "{addr} is beyond this host; that requires a mesh key (--mesh-key) or trusted keys \
                 (--trusted-keys); `peerbus keygen --mesh` makes a mesh key"
            )),
            (Some(addr), Trust::Open { anywhere: false }) => problem(format!(
                "{addr} is beyond this host; anyone there could read, forge and join \
                 (--trust open --anywhere allows it)"
            )),
            _ => Ok(()),
        }
    }
}
