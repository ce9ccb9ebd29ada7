//! Links over the `zeromq` crate, which listens on a private Unix socket and nowhere else.
//!
//! ```text
//!  nodes of this host ── DEALER ─▶ ┌────────────────┐
//!                                  │ ROUTER, on its │ ─▶ one task reads it and hands each
//!  tunnel (TCP, gated) ─ pump ───▶ │ private socket │    batch to its link
//!                                  └────────────────┘
//! ```
//!
//! This is the only file of the library that names the crate. Its limits, and our answers, are
//! listed in `docs/transport.md`.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_core::Stream;
use futures_util::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use zeromq::util::PeerIdentity;
use zeromq::{
    DealerRecvHalf, DealerSendHalf, DealerSocket, MultiPeerBackend, RouterRecvHalf, RouterSendHalf,
    RouterSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend, ZmqMessage,
};

use super::private::{PrivateSocket, PrivateStream};
use super::{Acceptor, DialError, Link, Receiver};
use crate::engine::{Connection, TargetKey};
use crate::peer::{Address, NodeId, random_bytes};

/// A ZMTP identity: the node's id and 16 random bytes, so that no two connections share one.
pub(crate) const IDENTITY_LEN: usize = NodeId::LEN + 16;

/// How long a local dial may take; the far side is on this host.
const LOCAL_DIAL_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) fn new_identity(id: &NodeId) -> Bytes {
    let mut identity = Vec::with_capacity(IDENTITY_LEN);
    identity.extend_from_slice(id.as_bytes());
    identity.extend_from_slice(&random_bytes::<16>());
    identity.into()
}

fn claimed_id(identity: &[u8]) -> Option<NodeId> {
    let (id, rest) = identity.split_first_chunk::<{ NodeId::LEN }>()?;
    (rest.len() == 16).then_some(NodeId::from_bytes(*id))
}

/// Something a pump shares with the link that runs over it.
pub(crate) trait Pump: Send + Sync {
    fn close(&self);
    fn last_heard(&self) -> Instant;
}

/// What the front door knows of a connection before the socket library sees it.
pub(crate) struct Registration {
    pub(crate) connection: Connection,
    pub(crate) pump: Arc<dyn Pump>,
    /// Told when the link is live.
    pub(crate) live: oneshot::Sender<()>,
}

enum Entry {
    Registered(Registration),
    Live(Arc<dyn Receiver>),
}

/// A node's ROUTER, and the way to others on this host.
pub(crate) struct ZmqPort {
    shared: Arc<Shared>,
    socket: PrivateSocket,
    /// The ROUTER ends with this.
    stop: watch::Sender<bool>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    id: NodeId,
    /// Whether nodes of this host may come in directly.
    open_to_host: bool,
    entries: Mutex<HashMap<Bytes, Entry>>,
    acceptor: Arc<dyn Acceptor>,
    backend: Arc<dyn MultiPeerBackend>,
    sender: RouterSendHalf,
    runtime: Handle,
}

impl ZmqPort {
    /// Listens on `path`, which must not exist.
    ///
    /// # Errors
    /// What the system says of the socket.
    pub(crate) async fn bind(
        path: &Path,
        id: NodeId,
        open_to_host: bool,
        acceptor: Arc<dyn Acceptor>,
    ) -> io::Result<Self> {
        let mut options = SocketOptions::default();
        options.peer_identity(identity(new_identity(&id)));
        let mut router = RouterSocket::with_options(options);
        let monitor = router.monitor();
        let socket = PrivateSocket::bind(&mut router, path).await?;
        let backend = router.backend();
        let (sender, receiver) = router.split();
        let shared = Arc::new(Shared {
            id,
            open_to_host,
            entries: Mutex::default(),
            acceptor,
            backend,
            sender,
            runtime: Handle::current(),
        });
        let (stop, stopped) = watch::channel(false);
        let reader = tokio::spawn(read_router(shared.clone(), receiver, monitor, stopped));
        Ok(Self {
            shared,
            socket,
            stop,
            reader: Mutex::new(Some(reader)),
        })
    }

    /// A stream to the ROUTER, for a pump.
    pub(crate) async fn connect(&self) -> io::Result<PrivateStream> {
        self.socket.connect().await
    }

    /// Announces a gated connection under the identity that the gate gave it.
    pub(crate) fn register(&self, identity: Bytes, registration: Registration) {
        self.shared
            .lock()
            .insert(identity, Entry::Registered(registration));
    }

    /// Takes back a registration that never became a link.
    pub(crate) fn unregister(&self, identity: &Bytes) {
        let mut entries = self.shared.lock();
        if let Some(Entry::Registered(_)) = entries.get(identity) {
            entries.remove(identity);
        }
    }

    /// Connects straight to another node's socket on this host.
    pub(crate) async fn dial(&self, target: &TargetKey, path: &Path) -> Result<(), DialError> {
        let mut options = SocketOptions::default();
        options.peer_identity(identity(new_identity(&self.shared.id)));
        options.connect_timeout(LOCAL_DIAL_TIMEOUT);
        let mut dealer = DealerSocket::with_options(options);
        let mut monitor = dealer.monitor();
        let endpoint = PrivateSocket::endpoint(path);
        dealer
            .connect(&endpoint)
            .await
            .map_err(|error| DialError(error.to_string()))?;
        let claimed = match monitor.next().await {
            Some(SocketEvent::Connected(_, peer)) => claimed_id(&peer),
            _ => None,
        };
        let Some(claimed) = claimed else {
            return Err(DialError("what answered there is no node".into()));
        };
        let (sender, receiver) = dealer.split();
        let (closed, closing) = watch::channel(false);
        let link = DealerLink {
            sender: Ordered::new(sender, &self.shared.runtime),
            closed,
        };
        let connection = Connection {
            claimed: Some(claimed),
            target: Some(target.clone()),
            address: Some(Address::Local(path.into())),
        };
        let taker = self
            .shared
            .acceptor
            .handle_connected(Arc::new(link), connection);
        tokio::spawn(read_dealer(receiver, monitor, closing, taker));
        Ok(())
    }

    /// Stops listening and reading, and removes the socket's file.
    pub(crate) async fn close(&self) {
        self.stop.send_replace(true);
        let reader = self
            .reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(reader) = reader {
            let _panicked = reader.await;
        }
        self.socket.remove();
    }
}

impl Drop for ZmqPort {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        self.socket.remove();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Bytes, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receiver of an identity's batches; makes the link if it is new and legitimate.
    fn receiver(self: &Arc<Self>, identity: &Bytes) -> Option<Arc<dyn Receiver>> {
        let mut entries = self.lock();
        if let Some(Entry::Live(receiver)) = entries.get(identity) {
            return Some(receiver.clone());
        }
        let (connection, pump, live) = match entries.remove(identity) {
            Some(Entry::Live(_)) => return None,
            Some(Entry::Registered(Registration {
                connection,
                pump,
                live,
            })) => (connection, Some(pump), Some(live)),
            None if self.open_to_host => {
                let claimed = claimed_id(identity)?;
                let connection = Connection {
                    claimed: Some(claimed),
                    target: None,
                    address: Some(Address::Local(PathBuf::new())),
                };
                (connection, None, None)
            }
            None => return None,
        };
        let link = RouterLink {
            identity: identity.clone(),
            backend: self.backend.clone(),
            sender: Ordered::new(self.sender.clone(), &self.runtime),
            pump,
        };
        // The table stays locked, so that a batch can't overtake its link.
        let receiver = self.acceptor.handle_connected(Arc::new(link), connection);
        entries.insert(identity.clone(), Entry::Live(receiver.clone()));
        drop(entries);
        if let Some(live) = live {
            let _no_longer_awaited = live.send(());
        }
        Some(receiver)
    }
}

fn identity(bytes: Bytes) -> PeerIdentity {
    PeerIdentity::try_from(bytes).expect("48 bytes are an identity")
}

/// Splits what arrives by link. A batch is handled here, without a hop: handling one only
/// appends to bounded queues, so no slow subscriber stalls the others.
async fn read_router(
    shared: Arc<Shared>,
    mut router: RouterRecvHalf,
    mut monitor: impl Stream<Item = SocketEvent> + Unpin,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            biased;
            // Batches come before the news that their connection ended.
            received = router.recv() => {
                let Ok(message) = received else { return };
                let mut frames = message.into_vecdeque();
                let Some(identity) = frames.pop_front() else { continue };
                match shared.receiver(&identity) {
                    Some(receiver) => receiver.handle_batch(frames.into()),
                    None => kick(&shared, identity),
                }
            }
            event = monitor.next() => match event {
                Some(SocketEvent::Accepted(_, peer)) => {
                    let bytes = Bytes::from(peer);
                    if shared.receiver(&bytes).is_none() {
                        kick(&shared, bytes);
                    }
                }
                Some(SocketEvent::Disconnected(peer)) => {
                    let entry = shared.lock().remove(&Bytes::from(peer));
                    if let Some(Entry::Live(receiver)) = entry {
                        receiver.handle_closed();
                    }
                }
                Some(_) => {}
                None => return,
            },
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
    }
}

fn kick(shared: &Shared, bytes: Bytes) {
    tracing::debug!("a connection that nobody registered is cut");
    if let Ok(identity) = PeerIdentity::try_from(bytes) {
        shared.backend.peer_disconnected(&identity);
    }
}

async fn read_dealer(
    mut dealer: DealerRecvHalf,
    mut monitor: impl Stream<Item = SocketEvent> + Unpin,
    mut closing: watch::Receiver<bool>,
    receiver: Arc<dyn Receiver>,
) {
    loop {
        tokio::select! {
            biased;
            received = dealer.recv() => match received {
                Ok(message) => receiver.handle_batch(message.into_vecdeque().into()),
                Err(_) => break,
            },
            // At end of file `recv` hangs; only the monitor tells.
            event = monitor.next() => {
                if matches!(event, Some(SocketEvent::Disconnected(_)) | None) {
                    break;
                }
            }
            _ = closing.wait_for(|closed| *closed) => break,
        }
    }
    receiver.handle_closed();
}

/// A link that came in through the ROUTER: from this host, or through the tunnel.
struct RouterLink {
    identity: Bytes,
    backend: Arc<dyn MultiPeerBackend>,
    sender: Ordered<RouterSendHalf>,
    pump: Option<Arc<dyn Pump>>,
}

impl Link for RouterLink {
    fn send(&self, frames: Vec<Bytes>) {
        let mut message = VecDeque::with_capacity(frames.len() + 1);
        message.push_back(self.identity.clone());
        message.extend(frames);
        self.sender.send(message);
    }

    fn close(&self) {
        // The crate's writer still writes what it was handed, then drops the stream.
        self.backend
            .peer_disconnected(&identity(self.identity.clone()));
        if let Some(pump) = &self.pump {
            pump.close();
        }
    }

    fn last_heard(&self) -> Option<Instant> {
        self.pump.as_ref().map(|pump| pump.last_heard())
    }
}

/// A link to a node of this host that we dialled.
struct DealerLink {
    sender: Ordered<DealerSendHalf>,
    closed: watch::Sender<bool>,
}

impl Link for DealerLink {
    fn send(&self, frames: Vec<Bytes>) {
        self.sender.send(frames.into());
    }

    fn close(&self) {
        self.sender.close();
        self.closed.send_replace(true);
    }
}

type Sending<S> = Pin<Box<dyn Future<Output = S> + Send>>;

/// Completes sends in the caller's own poll, and by a task only when one can't complete there.
struct Ordered<S> {
    state: Arc<Mutex<SendState<S>>>,
    runtime: Handle,
}

enum SendState<S> {
    Idle(S),
    /// A task completes a send; what comes meanwhile waits behind it.
    Busy(VecDeque<VecDeque<Bytes>>),
    Closed,
}

impl<S: SocketSend + Send + 'static> Ordered<S> {
    fn new(half: S, runtime: &Handle) -> Self {
        Self {
            state: Arc::new(Mutex::new(SendState::Idle(half))),
            runtime: runtime.clone(),
        }
    }

    fn send(&self, frames: VecDeque<Bytes>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = match std::mem::replace(&mut *state, SendState::Closed) {
            SendState::Closed => SendState::Closed,
            SendState::Busy(mut waiting) => {
                waiting.push_back(frames);
                SendState::Busy(waiting)
            }
            SendState::Idle(half) => {
                let mut sending = start(half, frames);
                match sending
                    .as_mut()
                    .poll(&mut Context::from_waker(Waker::noop()))
                {
                    Poll::Ready(half) => SendState::Idle(half),
                    Poll::Pending => {
                        self.runtime.spawn(finish(self.state.clone(), sending));
                        SendState::Busy(VecDeque::new())
                    }
                }
            }
        };
    }

    fn close(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = SendState::Closed;
    }
}

fn start<S: SocketSend + Send + 'static>(mut half: S, frames: VecDeque<Bytes>) -> Sending<S> {
    Box::pin(async move {
        if let Ok(message) = ZmqMessage::try_from(frames) {
            // An error means that the connection is gone, which its reader tells.
            let _gone = half.send(message).await;
        }
        half
    })
}

async fn finish<S: SocketSend + Send + 'static>(
    state: Arc<Mutex<SendState<S>>>,
    mut sending: Sending<S>,
) {
    loop {
        let half = sending.await;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let SendState::Busy(waiting) = &mut *state else {
            return;
        };
        match waiting.pop_front() {
            Some(frames) => sending = start(half, frames),
            None => {
                *state = SendState::Idle(half);
                return;
            }
        }
    }
}
