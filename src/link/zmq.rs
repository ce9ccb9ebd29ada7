//! Links over the `zeromq` crate, which listens on a private Unix socket and nowhere else.
//!
//! ```text
//!                                  ┌────────────────┐
//!  nodes of this host ── DEALER ─▶ │ ROUTER, on its │ ─▶ one task reads it and hands each
//!                                  │ private socket │    batch to its link
//!                                  └────────────────┘
//! ```
//!
//! The socket lies in a folder that only this user may enter, so that no stranger's byte reaches
//! the crate. Only the embedded broker names it too. What it can't do, and our answer:
//!
//! | Limit of `zeromq` 0.7.0 | So |
//! |---|---|
//! | no limit on frames, parts, handshake time or connections | networks are the front door's (`tunnel`); the crate serves this host only |
//! | 100,000 messages queue for a peer, and `send` means no more than that | the flow hands over two batches at most, and sees by their owners' drop when they are encoded |
//! | a ROUTER takes a peer's word for its identity, and a second one replaces the first | 16 random bytes in every identity |
//! | no heartbeat, no reconnect | both are the engine's |
//! | dropping a DEALER leaves its writer to finish what is queued | late batches of a link that ended are ignored by its id |
//! | a DEALER's `recv` hangs at the end of the stream | the monitor tells; behind it, the heartbeat |
//! | a PUB drops silently | fan-out is ours, drops are counted |

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use futures_util::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use zeromq::util::PeerIdentity;
use zeromq::{
    DealerRecvHalf, DealerSendHalf, DealerSocket, MultiPeerBackend, RouterRecvHalf, RouterSendHalf,
    RouterSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend, ZmqError, ZmqMessage,
};

use super::{Acceptor, DialError, Link, Receiver, claimed_id, new_identity};
use crate::engine::{Connection, TargetKey};
use crate::identity::NodeId;
use crate::peer::Address;
use crate::sync::lock;

/// How long a local dial may take; the far side is on this host.
const LOCAL_DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A node's ROUTER, and the way to others on this host.
pub(crate) struct ZmqPort {
    shared: Arc<Shared>,
    path: PathBuf,
    /// The ROUTER ends with this.
    stop: watch::Sender<bool>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    id: NodeId,
    /// The links that came in, by ZMTP identity.
    receivers: Mutex<HashMap<Bytes, Arc<dyn Receiver>>>,
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
        acceptor: Arc<dyn Acceptor>,
    ) -> io::Result<Self> {
        let mut options = SocketOptions::default();
        options.peer_identity(identity(new_identity(&id)));
        let mut router = RouterSocket::with_options(options);
        let monitor = router.monitor();
        router.bind(&endpoint(path)).await.map_err(to_io)?;
        let backend = router.backend();
        let (sender, receiver) = router.split();
        let shared = Arc::new(Shared {
            id,
            receivers: Mutex::default(),
            acceptor,
            backend,
            sender,
            runtime: Handle::current(),
        });
        let (stop, stopped) = watch::channel(false);
        let reader = tokio::spawn(read_router(shared.clone(), receiver, monitor, stopped));
        Ok(Self { shared, path: path.into(), stop, reader: Mutex::new(Some(reader)) })
    }

    /// Connects straight to another node's socket on this host.
    pub(crate) async fn dial(&self, target: &TargetKey, path: &Path) -> Result<(), DialError> {
        let mut options = SocketOptions::default();
        options.peer_identity(identity(new_identity(&self.shared.id)));
        options.connect_timeout(LOCAL_DIAL_TIMEOUT);
        let mut dealer = DealerSocket::with_options(options);
        let mut monitor = dealer.monitor();
        dealer.connect(&endpoint(path)).await.map_err(|error| DialError(error.to_string()))?;
        let claimed = match monitor.next().await {
            Some(SocketEvent::Connected(_, peer)) => claimed_id(&peer),
            _ => None,
        };
        let Some(claimed) = claimed else {
            return Err(DialError("what answered there is no node".into()));
        };
        let (sender, receiver) = dealer.split();
        let (closed, closing) = watch::channel(false);
        let link = DealerLink { sender: Ordered::new(sender, &self.shared.runtime), closed };
        let connection = Connection {
            claimed: Some(claimed),
            target: Some(target.clone()),
            address: Some(Address::Local(path.into())),
            ..Connection::default()
        };
        let taker = self.shared.acceptor.handle_connected(Arc::new(link), connection);
        tokio::spawn(read_dealer(receiver, monitor, closing, taker));
        Ok(())
    }

    /// Stops listening and reading, and removes the socket's file.
    pub(crate) async fn close(&self) {
        self.stop.send_replace(true);
        let reader = lock(&self.reader).take();
        if let Some(reader) = reader {
            let _panicked = reader.await;
        }
        // They hold the node, which holds this port.
        self.shared.lock().clear();
        let _gone_already = std::fs::remove_file(&self.path);
    }
}

impl Drop for ZmqPort {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        let _gone_already = std::fs::remove_file(&self.path);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Bytes, Arc<dyn Receiver>>> {
        lock(&self.receivers)
    }

    /// The receiver of an identity's batches; makes the link if it is new.
    fn receiver(&self, identity: &Bytes) -> Option<Arc<dyn Receiver>> {
        let mut receivers = self.lock();
        if let Some(receiver) = receivers.get(identity) {
            return Some(receiver.clone());
        }
        let connection = Connection {
            claimed: Some(claimed_id(identity)?),
            address: Some(Address::Local(PathBuf::new())),
            ..Connection::default()
        };
        let link = RouterLink {
            identity: identity.clone(),
            backend: self.backend.clone(),
            sender: Ordered::new(self.sender.clone(), &self.runtime),
        };
        // The table stays locked, so that a batch can't overtake its link.
        let receiver = self.acceptor.handle_connected(Arc::new(link), connection);
        receivers.insert(identity.clone(), receiver.clone());
        Some(receiver)
    }
}

fn identity(bytes: Bytes) -> PeerIdentity {
    PeerIdentity::try_from(bytes).expect("48 bytes are an identity")
}

fn endpoint(path: &Path) -> String {
    format!("ipc://{}", path.display())
}

pub(crate) fn to_io(error: ZmqError) -> io::Error {
    match error {
        ZmqError::Network(error) => error,
        other => io::Error::other(other.to_string()),
    }
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
                    let gone = shared.lock().remove(&Bytes::from(peer));
                    if let Some(receiver) = gone {
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
    tracing::debug!("a connection whose identity is no node's is cut");
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

/// A link to a node of this host that dialled us.
struct RouterLink {
    identity: Bytes,
    backend: Arc<dyn MultiPeerBackend>,
    sender: Ordered<RouterSendHalf>,
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
        self.backend.peer_disconnected(&identity(self.identity.clone()));
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
        Self { state: Arc::new(Mutex::new(SendState::Idle(half))), runtime: runtime.clone() }
    }

    fn send(&self, frames: VecDeque<Bytes>) {
        let mut state = lock(&self.state);
        *state = match std::mem::replace(&mut *state, SendState::Closed) {
            SendState::Closed => SendState::Closed,
            SendState::Busy(mut waiting) => {
                waiting.push_back(frames);
                SendState::Busy(waiting)
            }
            SendState::Idle(half) => {
                let mut sending = start(half, frames);
                match sending.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
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
        *lock(&self.state) = SendState::Closed;
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
        let mut state = lock(&state);
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
