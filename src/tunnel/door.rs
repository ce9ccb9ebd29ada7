//! The listener and the dialler, with their limits.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::future::{BoxFuture, select_ok};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::connection::{self, Context, Ended};
use super::{GateLimits, Refusal, Tls, Watch};
use crate::engine::{Connection, MAX_ADDRESSES, TargetKey};
use crate::identity::NodeId;
use crate::link::{Acceptor, DialError};
use crate::peer::Address;
use crate::sync::lock;

/// The front door's limits.
#[derive(Clone)]
pub(crate) struct FrontDoorConfig {
    /// None lets anybody in, in clear text.
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) gate: GateLimits,
    /// How long a connection may take to its READY.
    pub(crate) handshake_timeout: Duration,
    pub(crate) max_pending: usize,
    pub(crate) max_pending_per_address: usize,
    pub(crate) max_connections: usize,
    /// Nothing beyond this host is dialled.
    pub(crate) loopback_only: bool,
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_ACCEPT_RETRY: Duration = Duration::from_millis(10);
const LONGEST_ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// TCP in and out of a node.
pub(crate) struct FrontDoor {
    config: FrontDoorConfig,
    context: Context,
    watch: Arc<dyn Watch>,
    admissions: Arc<Mutex<Admissions>>,
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Default)]
struct Admissions {
    connections: usize,
    pending: usize,
    pending_from: HashMap<IpAddr, usize>,
}

impl FrontDoor {
    pub(crate) fn new(
        config: FrontDoorConfig,
        id: NodeId,
        acceptor: Arc<dyn Acceptor>,
        watch: Arc<dyn Watch>,
    ) -> Self {
        let (gate, handshake_timeout) = (config.gate, config.handshake_timeout);
        let context = Context { id, gate, tls: config.tls.clone(), handshake_timeout, acceptor };
        Self { config, context, watch, admissions: Arc::default(), tasks: Mutex::default() }
    }

    /// Listens; returns the address with the port that was bound.
    pub(crate) async fn listen(self: &Arc<Self>, addr: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(addr).await?;
        let bound = listener.local_addr()?;
        let door = Arc::downgrade(self);
        self.spawn(accept(door, listener));
        Ok(bound)
    }

    /// Dials all addresses at once and keeps the first that answers. Returns when the link is
    /// live.
    pub(crate) async fn dial(
        self: &Arc<Self>,
        target: &TargetKey,
        addresses: &[Address],
    ) -> Result<(), DialError> {
        let candidates = self.resolve(addresses).await?;
        let attempts = candidates.into_iter().map(|addr| -> BoxFuture<'static, _> {
            Box::pin(async move {
                match timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await {
                    Ok(Ok(tcp)) => Ok((tcp, addr)),
                    Ok(Err(error)) => Err(DialError(format!("{addr}: {error}"))),
                    Err(_) => Err(DialError(format!("{addr}: no answer within 5 s"))),
                }
            })
        });
        let ((tcp, addr), _losers) = select_ok(attempts).await?;
        let connection = Connection {
            target: Some(target.clone()),
            address: Some(Address::Tcp(addr)),
            ..Connection::default()
        };
        let (live, went_live) = oneshot::channel();
        let (told, ended) = oneshot::channel();
        let run = self.run(tcp, connection, live, ());
        self.spawn(async move {
            let _no_longer_awaited = told.send(run.await);
        });
        tokio::select! {
            biased;
            Ok(()) = went_live => Ok(()),
            ended = ended => Err(DialError(match ended {
                Ok(Ended::Refused(refusal)) => format!("{addr}: {refusal}"),
                Ok(Ended::Failed(error)) => format!("{addr}: {error}"),
                Ok(Ended::Closed) | Err(_) => format!("{addr}: it closed the connection"),
            })),
        }
    }

    async fn resolve(&self, addresses: &[Address]) -> Result<Vec<SocketAddr>, DialError> {
        let mut found = Vec::new();
        let mut failed = None;
        for address in addresses {
            match address {
                Address::Tcp(addr) => found.push(*addr),
                Address::Host(host, port) => {
                    let lookup = timeout(CONNECT_TIMEOUT, lookup_host((host.as_str(), *port)));
                    match lookup.await.unwrap_or_else(|late| Err(late.into())) {
                        Ok(addrs) => found.extend(addrs.take(MAX_ADDRESSES)),
                        Err(error) => failed = Some(format!("{address} does not resolve: {error}")),
                    }
                }
                Address::Local(_) | Address::Memory(_) => {}
            }
        }
        let before = found.len();
        if self.config.loopback_only {
            found.retain(|addr| addr.ip().is_loopback());
        }
        match (found.is_empty(), before, failed) {
            (false, ..) => Ok(found),
            (true, 0, failed) => Err(DialError(failed.unwrap_or("no address to dial".into()))),
            (true, ..) => Err(DialError(
                "beyond this host; nothing there is dialled without a mesh key (--mesh-key) or \
                 trusted keys (--trusted-keys)"
                    .into(),
            )),
        }
    }

    fn run(
        &self,
        tcp: TcpStream,
        connection: Connection,
        live: oneshot::Sender<()>,
        admitted: impl Send + 'static,
    ) -> impl Future<Output = Ended> + Send + 'static {
        let (context, watch) = (self.context.clone(), self.watch.clone());
        async move {
            let address = connection.address.clone();
            let ended = connection::run(tcp, context, connection, live, admitted).await;
            if let (Ended::Refused(refusal), Some(address)) = (&ended, address) {
                watch.handle_refusal(address, *refusal);
            }
            ended
        }
    }

    fn admit(&self, address: IpAddr) -> Result<(Permit, ConnectionPermit), Refusal> {
        let address = site(address);
        let mut admissions = lock(&self.admissions);
        let from = admissions.pending_from.get(&address).copied().unwrap_or_default();
        if admissions.connections >= self.config.max_connections {
            return Err(Refusal::Connections);
        }
        if admissions.pending >= self.config.max_pending {
            return Err(Refusal::PendingHandshakes);
        }
        if from >= self.config.max_pending_per_address {
            return Err(Refusal::PendingFromAddress);
        }
        admissions.connections += 1;
        admissions.pending += 1;
        admissions.pending_from.insert(address, from + 1);
        let permit = Permit { admissions: self.admissions.clone(), address };
        Ok((permit, ConnectionPermit(self.admissions.clone())))
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Stops listening and cuts what is left.
    pub(crate) async fn close(&self) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
    }
}

async fn accept(door: Weak<FrontDoor>, listener: TcpListener) {
    let mut retry = FIRST_ACCEPT_RETRY;
    loop {
        let accepted = listener.accept().await;
        let Some(door) = door.upgrade() else { return };
        match accepted {
            Ok((tcp, addr)) => {
                retry = FIRST_ACCEPT_RETRY;
                let address = Address::Tcp(addr);
                match door.admit(addr.ip()) {
                    Ok((pending, open)) => {
                        let connection =
                            Connection { address: Some(address), ..Connection::default() };
                        let run = door.run(tcp, connection, oneshot::channel().0, pending);
                        door.spawn(async move {
                            let _open = open;
                            run.await;
                        });
                    }
                    Err(refusal) => door.watch.handle_refusal(address, refusal),
                }
            }
            Err(error) => {
                // Out of file descriptors, say: trying again at once would only spin.
                tracing::warn!(%error, ?retry, "accepting a connection failed");
                drop(door);
                sleep(retry).await;
                retry = (retry * 2).min(LONGEST_ACCEPT_RETRY);
            }
        }
    }
}

/// What one host has to itself: an IPv4 address, or the /64 of an IPv6 one (RFC 4291).
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// A place among the pending handshakes.
struct Permit {
    admissions: Arc<Mutex<Admissions>>,
    address: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut admissions = lock(&self.admissions);
        admissions.pending -= 1;
        if let Some(count) = admissions.pending_from.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                admissions.pending_from.remove(&self.address);
            }
        }
    }
}

/// A place among all accepted connections.
struct ConnectionPermit(Arc<Mutex<Admissions>>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        lock(&self.0).connections -= 1;
    }
}
