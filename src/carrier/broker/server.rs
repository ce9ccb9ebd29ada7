//! The embedded broker: a [`Hub`] behind the front door, on loopback.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::hub::{Hub, MAX_BODY};
use super::outlet::Outlet;
use crate::engine::Connection;
use crate::link::{Acceptor, Link, Receiver};
use crate::opaque::opaque;
use crate::peer::Address;
use crate::sync::{Mutex, Rank, lock};
use crate::tunnel::{End, FrontDoor, FrontDoorConfig, GateLimits, Latency, Refusal, Watch};

/// The interval at which drops are reported and silent clients removed.
const TICK: Duration = Duration::from_millis(100);
/// The most frames of a message: an operation and its four fields, and some for later versions.
const MAX_FRAMES: usize = 8;
/// All clients are on this host, with one address: it has half of the pending handshakes.
const MAX_PENDING: usize = 256;

/// A broker within this process, on loopback: best effort, without storage or authentication.
///
/// With it, broker mode can be tried and measured without installed software. The broker drops
/// messages that a node does not take in time (8 MiB), and notifies their sender. It ends the
/// connection of a client that breaks the protocol, sends a message with a body over 8 MiB, or reads
/// no answers. It accepts 1,024 connections. Dropping it stops it.
pub struct EmbeddedBroker {
    addr: SocketAddr,
    shared: Arc<Shared>,
    door: Arc<FrontDoor>,
    ticks: JoinHandle<()>,
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
    /// The number of connections that were refused or cut for breaking the protocol.
    pub refused: u64,
}

impl fmt::Display for BrokerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nodes, received, sent, dropped, refused } = self;
        write!(
            f,
            "{nodes} nodes, {received} received, {sent} sent, {dropped} dropped, {refused} refused"
        )
    }
}

/// The parts that connections share.
struct Shared {
    hub: Mutex<Hub>,
    refused: AtomicU64,
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
        let hub = Mutex::new(Rank::Table, Hub::default());
        let shared = Arc::new(Shared { hub, refused: AtomicU64::new(0) });
        let config = FrontDoorConfig {
            tls: None,
            gate: GateLimits { frames: MAX_FRAMES, ..GateLimits::for_bodies(MAX_BODY as u64) },
            handshake_timeout: Duration::from_secs(5),
            latency: Latency::default(),
            max_pending: MAX_PENDING,
            max_connections: 1024,
            loopback_only: true,
        };
        let acceptor = Arc::new(Entrance(shared.clone()));
        let door = Arc::new(FrontDoor::new(config, End::Broker, acceptor.clone(), acceptor));
        let bound = door.listen(addr).await;
        let addr =
            bound.map_err(|error| EmbeddedBrokerError::Listen { addr, text: error.to_string() })?;
        let ticks = tokio::spawn(tick(shared.clone()));
        Ok(Self { addr, shared, door, ticks })
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
        let refused = self.shared.refused.load(Ordering::Relaxed);
        BrokerReport { refused, ..lock(&self.shared.hub).report() }
    }

    /// Stops the broker, and cuts all connections. Nodes reconnect when one listens there again.
    pub async fn stop(self) {
        self.door.close().await;
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        self.ticks.abort();
    }
}

async fn tick(shared: Arc<Shared>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        lock(&shared.hub).handle_tick(Instant::now());
    }
}

/// Takes new connections to the hub.
struct Entrance(Arc<Shared>);

impl Acceptor for Entrance {
    fn handle_connected(&self, link: Arc<dyn Link>, _: Connection) -> Arc<dyn Receiver> {
        let outlet = Outlet::new(link);
        let client = lock(&self.0.hub).handle_connected(Instant::now(), outlet);
        Arc::new(Port { shared: self.0.clone(), client })
    }
}

impl Watch for Entrance {
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal) {
        self.0.refused.fetch_add(1, Ordering::Relaxed);
        let from = address.as_ref().map(tracing::field::display);
        tracing::debug!(address = from, %refusal, "the embedded broker cut a connection");
    }
}

/// One client's connection to the hub.
struct Port {
    shared: Arc<Shared>,
    client: u64,
}

impl Receiver for Port {
    fn handle_batch(&self, frames: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        lock(&self.shared.hub).handle(self.client, &frames);
        None
    }

    fn handle_closed(&self) {
        lock(&self.shared.hub).handle_closed(self.client);
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
