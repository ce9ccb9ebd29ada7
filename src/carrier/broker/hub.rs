//! The embedded broker: one ROUTER on loopback, for comparisons without installed software.
//!
//! Each node has one DEALER, so that its messages are read in order: a subscription before the
//! message that it awaits. A message is a list of frames, of which the first is one of the bytes
//! below.
//!
//! | From a node | | To a node | |
//! |---|---|---|---|
//! | `H` | mesh, node id: hello | `W` | title: welcome |
//! | `S` `U` | pattern: subscribe, unsubscribe | `K` | done |
//! | `V` `X` | service: serve, withdraw | | |
//! | `P` | topic, head, body: publish | `P` | topic, head, body |
//! | `C` | service, id, head, body: to one instance | `C` | service, head, body |
//! | `N` | node id, id, head, body: to that node | `N` | head, body |
//! | `A` | head, body: to every node | `A` | head, body |
//! | `F` | count: bytes taken | `R` | id: no receiver |
//! | `.` | ping | `.` | pong |
//! | `B` | goodbye | `D` | count: messages of the node that were dropped |

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use zeromq::{
    Endpoint, Host, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketOptions,
    SocketRecv, SocketSend, ZmqMessage,
};

use crate::address::{Pattern, Topic};
use crate::engine::PatternTrie;
use crate::opaque::opaque;

/// The most bytes of a node in flight or unread; further messages are dropped.
pub(super) const WINDOW: u64 = 8 * 1024 * 1024;
/// The cost of a message besides its bytes. So a window holds fewer messages than the 100,000 that
/// the socket library queues for a peer before it blocks all senders.
pub(super) const MESSAGE_COST: u64 = 128;
/// The silence after which a node or the broker is gone.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// The interval at which drops are reported and silent nodes removed.
const TICK: Duration = Duration::from_millis(100);
/// The most patterns and services of one node.
const MAX_WISHES: usize = 10_000;

/// A broker within this process, on loopback: best effort, without storage or authentication.
///
/// With it, broker mode can be tried and measured without installed software. The broker drops
/// messages that a node does not take in time (8 MiB), and notifies their sender.
pub struct EmbeddedBroker {
    addr: SocketAddr,
    counts: Arc<Counts>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

opaque!(EmbeddedBroker, |it| addr: it.addr);

/// The error of starting an embedded broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddedBrokerError {
    /// The address is not on loopback.
    #[error(
        "{0} is beyond this host; the embedded broker has no authentication: give a loopback address"
    )]
    BeyondThisHost(SocketAddr),
    /// The address can't be listened on.
    #[error("can't listen on {addr}: {text}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The system's error.
        text: String,
    },
}

/// The counters of an embedded broker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BrokerReport {
    /// The number of connected nodes.
    pub nodes: u64,
    /// The number of received messages.
    pub received: u64,
    /// The number of sent messages; those on topics count once for each node.
    pub sent: u64,
    /// The number of messages dropped for nodes that were too slow.
    pub dropped: u64,
}

impl fmt::Display for BrokerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nodes, received, sent, dropped } = self;
        write!(f, "{nodes} nodes, {received} received, {sent} sent, {dropped} dropped")
    }
}

#[derive(Debug, Default)]
struct Counts {
    nodes: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    dropped: AtomicU64,
}

impl EmbeddedBroker {
    /// Starts a broker; port 0 picks a free port.
    ///
    /// # Errors
    /// [`EmbeddedBrokerError`] if the address is beyond loopback or can't be listened on.
    pub async fn start(addr: SocketAddr) -> Result<Self, EmbeddedBrokerError> {
        Self::boxed(addr).await
    }

    /// Boxed, so that it is compiled once, here, and not in each crate that starts a broker.
    #[inline(never)]
    fn boxed(addr: SocketAddr) -> BoxFuture<'static, Result<Self, EmbeddedBrokerError>> {
        Box::pin(Self::start_here(addr))
    }

    async fn start_here(addr: SocketAddr) -> Result<Self, EmbeddedBrokerError> {
        if !addr.ip().is_loopback() {
            return Err(EmbeddedBrokerError::BeyondThisHost(addr));
        }
        let refused = |text: String| EmbeddedBrokerError::Listen { addr, text };
        let mut router = RouterSocket::with_options(SocketOptions::default());
        let bound = router.bind(&format!("tcp://{addr}")).await;
        let port = match bound.map_err(|error| refused(error.to_string()))? {
            Endpoint::Tcp(Host::Ipv4(_) | Host::Ipv6(_) | Host::Domain(_), port) => port,
            other => return Err(refused(format!("it bound {other}"))),
        };
        let (sender, receiver) = router.split();
        let (stop, stopped) = watch::channel(false);
        let counts = Arc::new(Counts::default());
        let hub = Hub::new(sender, counts.clone());
        let task = tokio::spawn(hub.run(receiver, stopped));
        Ok(Self { addr: SocketAddr::new(addr.ip(), port), counts, stop, task })
    }

    /// The address on which it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The URL for nodes.
    pub fn url(&self) -> String {
        format!("peerbus://{}", self.addr)
    }

    /// The counters so far.
    pub fn report(&self) -> BrokerReport {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        BrokerReport {
            nodes: get(&self.counts.nodes),
            received: get(&self.counts.received),
            sent: get(&self.counts.sent),
            dropped: get(&self.counts.dropped),
        }
    }

    /// Stops the broker. Nodes notice within 5 s, and reconnect when one listens there again.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let _panicked = (&mut self.task).await;
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

type Name = Bytes;
type Frames = Vec<Bytes>;

/// A connected node.
struct Client {
    mesh: String,
    id: Bytes,
    /// The client's number among the subscribers.
    number: u64,
    patterns: Vec<Pattern>,
    services: Vec<Bytes>,
    /// The number of bytes that it has not taken yet.
    outstanding: u64,
    /// The number of its dropped messages that are not reported to it yet.
    untold: u64,
    heard: Instant,
}

/// The nodes, subscriptions and services of one mesh.
#[derive(Default)]
struct Mesh {
    topics: PatternTrie<Name>,
    /// The nodes that serve a name; the first is next.
    services: HashMap<Bytes, Vec<Name>>,
    nodes: BTreeMap<Bytes, Name>,
}

struct Hub {
    sender: RouterSendHalf,
    clients: HashMap<Name, Client>,
    meshes: HashMap<String, Mesh>,
    next: u64,
    counts: Arc<Counts>,
}

impl Hub {
    fn new(sender: RouterSendHalf, counts: Arc<Counts>) -> Self {
        Self { sender, clients: HashMap::new(), meshes: HashMap::new(), next: 0, counts }
    }

    async fn run(mut self, mut receiver: RouterRecvHalf, mut stopped: watch::Receiver<bool>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = ended(&mut stopped) => return,
                received = receiver.recv() => {
                    let Ok(message) = received else { return };
                    let mut frames = message.into_vec();
                    if frames.len() >= 2 {
                        let name = frames.remove(0);
                        self.handle(name, frames).await;
                    }
                }
                _ = ticks.tick() => self.tick().await,
            }
        }
    }

    /// Handles a message of a node; an invalid one is ignored.
    async fn handle(&mut self, name: Name, frames: Frames) {
        if let (b"H", [_, mesh, id]) = (&frames[0][..], &frames[..]) {
            return self.handle_hello(name, mesh, id.clone()).await;
        }
        let Some(client) = self.clients.get_mut(&name) else { return };
        client.heard = Instant::now();
        match (&frames[0][..], &frames[1..]) {
            (b"P", [topic, head, body]) => self.publish(&name, topic, head, body).await,
            (b"C", [service, id, head, body]) => {
                self.count_received();
                let message = vec![op(b"C"), service.clone(), head.clone(), body.clone()];
                let taker = self.next_instance(&name, service);
                self.send_or_return(&name, taker, id, message).await;
            }
            (b"N", [node, id, head, body]) => {
                self.count_received();
                let message = vec![op(b"N"), head.clone(), body.clone()];
                let taker = self.mesh(&name).and_then(|mesh| mesh.nodes.get(node).cloned());
                self.send_or_return(&name, taker, id, message).await;
            }
            (b"A", [head, body]) => {
                let all = self.mesh(&name).map(|mesh| mesh.nodes.values().cloned().collect());
                let all: Vec<Name> = all.unwrap_or_default();
                for node in all {
                    self.send(&node, vec![op(b"A"), head.clone(), body.clone()]).await;
                }
            }
            (b"S", [pattern]) => self.handle_subscribe(&name, pattern).await,
            (b"U", [pattern]) => self.handle_unsubscribe(&name, pattern),
            (b"V", [service]) => self.handle_serve(&name, service).await,
            (b"X", [service]) => self.handle_withdraw(&name, service),
            (b"F", [count]) => {
                client.outstanding = client.outstanding.saturating_sub(number(count));
            }
            (b".", []) => _ = self.send(&name, vec![op(b".")]).await,
            (b"B", []) => self.remove(&name),
            _ => {}
        }
    }

    async fn handle_hello(&mut self, name: Name, mesh: &Bytes, id: Bytes) {
        self.remove(&name);
        self.next += 1;
        let mesh = String::from_utf8_lossy(mesh).into_owned();
        self.meshes.entry(mesh.clone()).or_default().nodes.insert(id.clone(), name.clone());
        let client = Client {
            mesh,
            id,
            number: self.next,
            patterns: Vec::new(),
            services: Vec::new(),
            outstanding: 0,
            untold: 0,
            heard: Instant::now(),
        };
        self.clients.insert(name.clone(), client);
        self.counts.nodes.store(self.clients.len() as u64, Ordering::Relaxed);
        let title = concat!("peerbus broker ", env!("CARGO_PKG_VERSION"));
        self.send(&name, vec![op(b"W"), Bytes::from_static(title.as_bytes())]).await;
    }

    async fn publish(&mut self, from: &Name, topic: &Bytes, head: &Bytes, body: &Bytes) {
        self.count_received();
        let Some(parsed) = text(topic).and_then(|text| text.parse::<Topic>().ok()) else { return };
        let Some(mesh) = self.mesh(from) else { return };
        let takers = mesh.topics.matches(&parsed).into_iter();
        let takers: Vec<Name> = takers.map(|(_, name)| name.clone()).collect();
        for taker in takers {
            let message = vec![op(b"P"), topic.clone(), head.clone(), body.clone()];
            self.hand_on(from, &taker, message).await;
        }
    }

    /// Returns the next of the nodes that serve a name.
    fn next_instance(&mut self, asker: &Name, service: &Bytes) -> Option<Name> {
        let mesh = self.clients.get(asker)?.mesh.clone();
        let instances = self.meshes.get_mut(&mesh)?.services.get_mut(service)?;
        instances.rotate_left(1);
        instances.last().cloned()
    }

    async fn send_or_return(&mut self, from: &Name, to: Option<Name>, id: &Bytes, message: Frames) {
        match to {
            Some(to) => self.hand_on(from, &to, message).await,
            None => _ = self.send(from, vec![op(b"R"), id.clone()]).await,
        }
    }

    /// Passes a message on; a drop is reported to its sender later.
    async fn hand_on(&mut self, from: &Name, to: &Name, message: Frames) {
        if !self.send(to, message).await
            && let Some(client) = self.clients.get_mut(from)
        {
            client.untold += 1;
        }
    }

    async fn handle_subscribe(&mut self, name: &Name, pattern: &Bytes) {
        let Some(client) = self.clients.get_mut(name) else { return };
        if let Some(pattern) = text(pattern).and_then(|text| text.parse::<Pattern>().ok())
            && client.patterns.len() < MAX_WISHES
            && !client.patterns.contains(&pattern)
        {
            let mesh = self.meshes.entry(client.mesh.clone()).or_default();
            mesh.topics.insert(&pattern, client.number, name.clone());
            client.patterns.push(pattern);
        }
        self.send(name, vec![op(b"K")]).await;
    }

    fn handle_unsubscribe(&mut self, name: &Name, pattern: &Bytes) {
        let Some(client) = self.clients.get_mut(name) else { return };
        let Some(mesh) = self.meshes.get_mut(&client.mesh) else { return };
        if let Some(place) = client.patterns.iter().position(|it| it.as_str().as_bytes() == pattern)
        {
            let pattern = client.patterns.swap_remove(place);
            mesh.topics.remove(&pattern, client.number);
        }
    }

    async fn handle_serve(&mut self, name: &Name, service: &Bytes) {
        let Some(client) = self.clients.get_mut(name) else { return };
        if client.services.len() < MAX_WISHES && !client.services.contains(service) {
            client.services.push(service.clone());
            let mesh = self.meshes.entry(client.mesh.clone()).or_default();
            mesh.services.entry(service.clone()).or_default().push(name.clone());
        }
        self.send(name, vec![op(b"K")]).await;
    }

    fn handle_withdraw(&mut self, name: &Name, service: &Bytes) {
        let Some(client) = self.clients.get_mut(name) else { return };
        client.services.retain(|it| it != service);
        if let Some(mesh) = self.meshes.get_mut(&client.mesh) {
            mesh.withdraw(name, service);
        }
    }

    fn remove(&mut self, name: &Name) {
        let Some(client) = self.clients.remove(name) else { return };
        self.counts.nodes.store(self.clients.len() as u64, Ordering::Relaxed);
        let Some(mesh) = self.meshes.get_mut(&client.mesh) else { return };
        for pattern in &client.patterns {
            mesh.topics.remove(pattern, client.number);
        }
        for service in &client.services {
            mesh.withdraw(name, service);
        }
        if mesh.nodes.get(&client.id) == Some(name) {
            mesh.nodes.remove(&client.id);
        }
        if mesh.nodes.is_empty() {
            self.meshes.remove(&client.mesh);
        }
    }

    async fn tick(&mut self) {
        let silent = self.clients.iter().filter(|(_, client)| client.heard.elapsed() > SILENCE);
        for name in silent.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.remove(&name);
        }
        let untold = self.clients.iter_mut().filter(|(_, client)| client.untold > 0);
        let untold: Vec<(Name, u64)> = untold
            .map(|(name, client)| (name.clone(), std::mem::take(&mut client.untold)))
            .collect();
        for (name, count) in untold {
            self.send(&name, vec![op(b"D"), Bytes::copy_from_slice(&count.to_be_bytes())]).await;
        }
    }

    /// Sends a message if its receiver has room for it. Returns false if it is dropped.
    async fn send(&mut self, to: &Name, mut frames: Frames) -> bool {
        let Some(client) = self.clients.get_mut(to) else { return false };
        let is_message = matches!(&frames[0][..], b"P" | b"C" | b"N");
        if is_message {
            let cost = cost(&frames);
            if client.outstanding > 0 && client.outstanding + cost > WINDOW {
                self.counts.dropped.fetch_add(1, Ordering::Relaxed);
                return false;
            }
            client.outstanding += cost;
            self.counts.sent.fetch_add(1, Ordering::Relaxed);
        }
        frames.insert(0, to.clone());
        let Ok(message) = ZmqMessage::try_from(frames) else { return false };
        if self.sender.send(message).await.is_err() {
            // The connection was lost.
            self.remove(to);
            return false;
        }
        true
    }

    fn mesh(&self, name: &Name) -> Option<&Mesh> {
        self.meshes.get(&self.clients.get(name)?.mesh)
    }

    fn count_received(&self) {
        self.counts.received.fetch_add(1, Ordering::Relaxed);
    }
}

impl Mesh {
    fn withdraw(&mut self, name: &Name, service: &Bytes) {
        if let Some(instances) = self.services.get_mut(service) {
            instances.retain(|it| it != name);
            if instances.is_empty() {
                self.services.remove(service);
            }
        }
    }
}

async fn ended(stopped: &mut watch::Receiver<bool>) {
    let _owner_is_gone = stopped.wait_for(|stopped| *stopped).await;
}

/// Returns the cost of a message in its receiver's window: all frames but the first.
pub(super) fn cost(frames: &[Bytes]) -> u64 {
    MESSAGE_COST + frames[1..].iter().map(|frame| frame.len() as u64).sum::<u64>()
}

pub(super) fn op(byte: &'static [u8; 1]) -> Bytes {
    Bytes::from_static(byte)
}

pub(super) fn number(bytes: &Bytes) -> u64 {
    <[u8; 8]>::try_from(&bytes[..]).map_or(0, u64::from_be_bytes)
}

pub(super) fn text(bytes: &Bytes) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}
