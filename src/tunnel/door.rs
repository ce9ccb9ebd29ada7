//! The listeners and the dialler.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::{BoxFuture, select_ok};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::admissions::{Admissions, Most, Place};
use super::connection::{self, Context};
use super::ended::Ended;
use super::socket::{Listener, Socket};
use super::{End, GateLimits, Latency, Tls, Watch, descriptors};
use crate::engine::{Connection, MAX_ADDRESSES, TargetKey};
use crate::link::{Acceptor, DialError};
use crate::peer::Address;
use crate::sync::{Mutex, Rank, lock};

/// The front door's limits. The connection limits apply to networks; processes of the same user
/// are limited by [`MOST_LOCAL`].
#[derive(Clone)]
pub(crate) struct FrontDoorConfig {
    /// TLS; `None` accepts every peer from a network, in clear text.
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) gate: GateLimits,
    /// The time limit of a connection up to its READY.
    pub(crate) handshake_timeout: Duration,
    pub(crate) latency: Latency,
    /// The most connections in their handshake, and after it.
    pub(crate) max_pending: usize,
    pub(crate) max_connections: usize,
    /// Limits dialling to loopback addresses.
    pub(crate) loopback_only: bool,
}

/// Limits for processes of the same user: a guard against a runaway program, not an attacker.
const MOST_LOCAL: Most = Most { open: 4096, pending: 1024 };
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Shorter, since the remote side is on this host.
const LOCAL_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const FIRST_ACCEPT_RETRY: Duration = Duration::from_millis(10);
const LONGEST_ACCEPT_RETRY: Duration = Duration::from_secs(1);
/// The interval at which a lasting failure to accept is logged.
const TELL_EVERY: Duration = Duration::from_secs(30);

/// Accepts and dials all connections of a node or a broker: TCP, and Unix sockets of this host.
pub(crate) struct FrontDoor {
    config: FrontDoorConfig,
    context: Context,
    watch: Arc<dyn Watch>,
    network: Arc<Admissions>,
    local: Arc<Admissions>,
    tasks: Mutex<JoinSet<()>>,
}

impl FrontDoor {
    pub(crate) fn new(
        config: FrontDoorConfig,
        end: End,
        acceptor: Arc<dyn Acceptor>,
        watch: Arc<dyn Watch>,
    ) -> Self {
        let context = Context {
            end,
            gate: config.gate,
            tls: config.tls.clone(),
            handshake_timeout: config.handshake_timeout,
            latency: config.latency,
            acceptor,
        };
        let network = Most { open: config.max_connections, pending: config.max_pending };
        let [network, local] = descriptors::share([network, MOST_LOCAL]).map(Admissions::new);
        let tasks = Mutex::new(Rank::Leaf, JoinSet::new());
        Self { config, context, watch, network, local, tasks }
    }

    /// Listens on TCP; returns the bound address, with its port.
    pub(crate) async fn listen(self: &Arc<Self>, addr: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(addr).await?;
        let bound = listener.local_addr()?;
        self.spawn(accept(Arc::downgrade(self), Listener::Tcp(listener)));
        Ok(bound)
    }

    /// Listens on a Unix socket at `path`, which must not exist and is removed with the listener.
    /// The folder must be accessible to this user only.
    /// The listener ends with the node, or when it is aborted.
    pub(crate) fn listen_local(self: &Arc<Self>, path: &Path) -> io::Result<AbortHandle> {
        let listener = Listener::bind_local(path)?;
        Ok(self.spawn(accept(Arc::downgrade(self), listener)))
    }

    /// Dials all addresses at once and keeps the first connection. Returns when the link is up.
    pub(crate) async fn dial(
        self: &Arc<Self>,
        target: &TargetKey,
        addresses: &[Address],
    ) -> Result<(), DialError> {
        let (socket, address) = match addresses.first() {
            Some(Address::Local(path)) => (dial_local(path).await?, Address::Local(path.clone())),
            _ => self.dial_tcp(addresses).await?,
        };
        let name = address.to_string();
        let connection = Connection {
            target: Some(target.clone()),
            address: Some(address),
            ..Connection::default()
        };
        let (live, went_live) = oneshot::channel();
        let (told, ended) = oneshot::channel();
        let run = self.run(socket, connection, live, None);
        self.spawn(async move {
            let _no_longer_awaited = told.send(run.await);
        });
        tokio::select! {
            biased;
            Ok(()) = went_live => Ok(()),
            ended = ended => Err(DialError::Failed(match ended {
                Ok(Ended::Refused(refusal)) => format!("{name}: {refusal}"),
                Ok(Ended::Failed(error)) => format!("{name}: {error}"),
                Ok(Ended::Closed) | Err(_) => format!("{name}: the peer closed the connection"),
            })),
        }
    }

    async fn dial_tcp(&self, addresses: &[Address]) -> Result<(Socket, Address), DialError> {
        let candidates = self.resolve(addresses).await?;
        let attempts = candidates.into_iter().map(|addr| -> BoxFuture<'static, _> {
            Box::pin(async move {
                match timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await {
                    Ok(Ok(tcp)) => Ok((tcp, addr)),
                    Ok(Err(_)) if lacks_zone(&addr) => Err(DialError::Failed(format!(
                        "{addr}: a link-local address requires its interface, as in [fe80::1%eth0]:4000"
                    ))),
                    Ok(Err(error)) => Err(DialError::Failed(format!("{addr}: {error}"))),
                    Err(_) => {
                        Err(DialError::Failed(format!("{addr}: timed out after 5 s: no answer")))
                    }
                }
            })
        });
        let ((tcp, addr), _losers) = select_ok(attempts).await?;
        Ok((Socket::Tcp(tcp), Address::Tcp(addr)))
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
                        Err(error) => failed = Some(unresolved(address, host, &error)),
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
            (true, 0, failed) => {
                Err(DialError::Failed(failed.unwrap_or("no address to dial".into())))
            }
            (true, ..) => Err(DialError::Failed(
                "beyond this host; dialling there requires a mesh key (--mesh-key) or \
                 trusted keys (--trusted-keys)"
                    .into(),
            )),
        }
    }

    fn run(
        &self,
        socket: Socket,
        connection: Connection,
        live: oneshot::Sender<()>,
        place: Option<(Place, oneshot::Receiver<()>)>,
    ) -> impl Future<Output = Ended> + Send + 'static {
        let (context, watch) = (self.context.clone(), self.watch.clone());
        async move {
            let address = connection.address.clone();
            let ended = connection::run(socket, context, connection, live, place).await;
            // A refusal on a socket file is reported to the dialler only: the file may belong to a
            // process that is exiting, or to another program.
            if let Ended::Refused(refusal) = &ended
                && !matches!(address, Some(Address::Local(_)))
            {
                watch.handle_refusal(address, *refusal);
            }
            ended
        }
    }

    /// Handles an accepted connection.
    fn take(&self, socket: Socket, from: Option<SocketAddr>) {
        let admissions = if from.is_some() { &self.network } else { &self.local };
        let address = from.map(Address::Tcp);
        let place = admissions.admit(from.map(|addr| addr.ip()));
        let connection = Connection { address, ..Connection::default() };
        let run = self.run(socket, connection, oneshot::channel().0, Some(place));
        self.spawn(async move { _ = run.await });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task)
    }

    /// Stops listening and cuts all connections.
    pub(crate) async fn close(&self) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
    }
}

fn unresolved(address: &Address, host: &str, error: &io::Error) -> String {
    match host.split_once('%') {
        Some((_, zone)) => format!("{address}: no interface {zone}"),
        None => format!("{address} does not resolve: {error}"),
    }
}

/// Returns true for an address that has a meaning on one interface only, and names none.
fn lacks_zone(addr: &SocketAddr) -> bool {
    matches!(addr, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0)
}

async fn accept(door: Weak<FrontDoor>, listener: Listener) {
    let (mut retry, mut told) = (FIRST_ACCEPT_RETRY, None::<Instant>);
    loop {
        let accepted = listener.accept().await;
        let Some(door) = door.upgrade() else { return };
        match accepted {
            Ok((socket, from)) => {
                retry = FIRST_ACCEPT_RETRY;
                door.take(socket, from);
            }
            Err(error) => {
                // For example out of file descriptors: an immediate retry would only spin.
                if told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
                    told = Some(Instant::now());
                    tracing::warn!(
                        %error,
                        "this node can't accept connections, and goes on trying; if it has too many \
                         files open, raise the limit (ulimit -n)"
                    );
                }
                drop(door);
                sleep(retry).await;
                retry = (retry * 2).min(LONGEST_ACCEPT_RETRY);
            }
        }
    }
}

/// Connects to a process of this host.
async fn dial_local(path: &Path) -> Result<Socket, DialError> {
    let name = path.display();
    match timeout(LOCAL_CONNECT_TIMEOUT, Socket::connect_local(path)).await {
        Ok(Ok(socket)) => Ok(socket),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(DialError::DeadSocket(path.to_owned()))
        }
        Ok(Err(error)) => Err(DialError::Failed(format!("unix:{name}: {error}"))),
        Err(_) => Err(DialError::Failed(format!("unix:{name}: timed out after 2 s: no answer"))),
    }
}
