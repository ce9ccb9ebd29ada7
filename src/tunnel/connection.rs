//! One TCP connection: its handshake, then batches in and out.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{timeout, timeout_at};

use super::gate::Gate;
use super::{GateLimits, Refusal, Tls, zmtp};
use crate::engine::Connection;
use crate::identity::NodeId;
use crate::link::{Acceptor, Link, new_identity};

/// How long what is still queued may take to be written when this side closes.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How much is read at once.
const READ_BUFFER: usize = 64 * 1024;
const FIRST_BUFFER: usize = 4 * 1024;
/// A longer frame is written as it is rather than gathered.
const GATHER: usize = 16 * 1024;

/// What all connections of a front door share.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) id: NodeId,
    pub(super) gate: GateLimits,
    /// None where anybody is let in, in clear text.
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) handshake_timeout: Duration,
    pub(super) acceptor: Arc<dyn Acceptor>,
}

/// How a connection ended.
#[derive(Debug)]
pub(super) enum Ended {
    Closed,
    Failed(io::Error),
    Refused(Refusal),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The link that runs over a connection.
struct TcpLink {
    outbox: mpsc::UnboundedSender<Vec<Bytes>>,
    closing: watch::Sender<bool>,
    started: Instant,
    heard_after_ms: Arc<AtomicU64>,
    admitted: Arc<AtomicBool>,
}

impl Link for TcpLink {
    fn send(&self, frames: Vec<Bytes>) {
        if !*self.closing.borrow() {
            let _gone = self.outbox.send(frames);
        }
    }

    fn close(&self) {
        self.closing.send_replace(true);
    }

    fn admit(&self) {
        self.admitted.store(true, Ordering::Relaxed);
    }

    fn last_heard(&self) -> Option<Instant> {
        Some(self.started + Duration::from_millis(self.heard_after_ms.load(Ordering::Relaxed)))
    }
}

/// Runs a connection to its end. `pending` is dropped when the handshake is over, `live` told
/// when the link is there.
pub(super) async fn run(
    tcp: TcpStream,
    context: Context,
    connection: Connection,
    live: oneshot::Sender<()>,
    pending: impl Send,
) -> Ended {
    let _refused_by_the_system = tcp.set_nodelay(true);
    let dialled = connection.target.is_some();
    let deadline = tokio::time::Instant::now() + context.handshake_timeout;
    let Opened { mut from_net, to_net, mut input, peer } =
        match timeout_at(deadline, open(tcp, &context, dialled)).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(ended)) => return ended,
            Err(_) => return Refusal::HandshakeTimeout.into(),
        };
    drop(pending);

    let (outbox, batches) = mpsc::unbounded_channel();
    let (closing, mut closed_here) = watch::channel(false);
    let heard_after_ms = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let heard = heard_after_ms.clone();
    let admitted = Arc::new(AtomicBool::new(false));
    let accepted = admitted.clone();
    let link = Arc::new(TcpLink { outbox, closing, started, heard_after_ms, admitted });
    let connection = Connection { claimed: Some(peer), ..connection };
    let receiver = context.acceptor.handle_connected(link.clone(), connection);
    // Who lost our trust since it was checked may have been overlooked when links were cut.
    if context.tls.is_some_and(|tls| !tls.trusts(&peer)) {
        link.close();
    }
    let _no_longer_awaited = live.send(());

    let reading = async {
        loop {
            loop {
                if accepted.load(Ordering::Relaxed) {
                    input.gate.admit();
                }
                let Some(batch) = input.gate.next_batch(&mut input.bytes)? else { break };
                receiver.handle_batch(batch);
            }
            if input.read_from(&mut from_net).await? == 0 {
                return Ok::<(), Ended>(());
            }
            let elapsed = started.elapsed().as_millis() as u64;
            heard.store(elapsed, Ordering::Relaxed);
        }
    };
    let closed_here = async {
        let _link_lives = closed_here.wait_for(|closed| *closed).await;
    };
    let (asked, end_asked) = oneshot::channel();
    let mut writing = std::pin::pin!(write(batches, to_net, end_asked));
    let ended = tokio::select! {
        read = reading => read.map_or_else(|ended| ended, |()| Ended::Closed),
        written = &mut writing => written.map_or_else(Ended::from, |()| Ended::Closed),
        () = closed_here => {
            let _writer_ended = asked.send(());
            let _too_slow = timeout(FLUSH_TIMEOUT, writing).await;
            Ended::Closed
        }
    };
    receiver.handle_closed();
    ended
}

type FromNet = Box<dyn AsyncRead + Send + Unpin>;
type ToNet = Box<dyn AsyncWrite + Send + Unpin>;

/// A connection whose handshake is over.
struct Opened {
    from_net: FromNet,
    to_net: ToNet,
    input: Input,
    peer: NodeId,
}

async fn open(tcp: TcpStream, context: &Context, dialled: bool) -> Result<Opened, Ended> {
    let mut input = Input::new(context.gate);
    let (mut from_net, mut to_net, verified): (FromNet, ToNet, _) = match &context.tls {
        Some(tls) => {
            let (stream, peer) = tls.open(tcp, dialled).await?;
            let (from_net, to_net) = tokio::io::split(stream);
            (Box::new(from_net), Box::new(to_net), Some(peer))
        }
        None => {
            let (from_net, to_net) = tcp.into_split();
            (Box::new(from_net), Box::new(to_net), None)
        }
    };
    let claimed = handshake(&mut from_net, &mut to_net, &mut input, &context.id, dialled).await?;
    match verified {
        Some(verified) if verified != claimed => Err(Refusal::Impostor.into()),
        _ => Ok(Opened { from_net, to_net, input, peer: claimed }),
    }
}

/// Bytes from the network that are not a whole batch yet.
struct Input {
    bytes: BytesMut,
    gate: Gate,
    /// How much to make room for; it grows while reads fill it.
    chunk: usize,
}

impl Input {
    fn new(limits: GateLimits) -> Self {
        Self { bytes: BytesMut::new(), gate: Gate::new(limits), chunk: FIRST_BUFFER }
    }

    async fn read_from(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        self.bytes.reserve(self.chunk);
        let len = from.read_buf(&mut self.bytes).await?;
        if len >= self.chunk {
            self.chunk = (2 * self.chunk).min(READ_BUFFER);
        }
        Ok(len)
    }
}

/// Exchanges greetings and READYs. Who was dialled says nothing to a stranger who says nothing.
async fn handshake(
    from_net: &mut (impl AsyncRead + Unpin),
    to_net: &mut (impl AsyncWrite + Unpin),
    input: &mut Input,
    me: &NodeId,
    dialled: bool,
) -> Result<NodeId, Ended> {
    let ready = zmtp::ready(&new_identity(me));
    let (mut greeted, mut readied) = (false, false);
    if dialled {
        to_net.write_all(&zmtp::greeting()).await?;
        to_net.flush().await?;
        greeted = true;
    }
    loop {
        if input.read_from(from_net).await? == 0 {
            return Err(Refusal::EndedEarly.into());
        }
        let claimed = input.gate.handshake(&mut input.bytes)?;
        // Some say no more than their signature until they have seen ours.
        if !greeted && (input.gate.is_greeted() || input.bytes.len() >= zmtp::SIGNATURE_LEN) {
            to_net.write_all(&zmtp::greeting()).await?;
            greeted = true;
        }
        if !readied && input.gate.is_greeted() {
            to_net.write_all(&ready).await?;
            readied = true;
        }
        to_net.flush().await?;
        if let Some(claimed) = claimed {
            return Ok(claimed);
        }
    }
}

/// Writes batches, those that have gathered at once, until it is asked to end.
async fn write(
    mut batches: mpsc::UnboundedReceiver<Vec<Bytes>>,
    mut to_net: impl AsyncWrite + Unpin,
    mut end_asked: oneshot::Receiver<()>,
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(FIRST_BUFFER);
    loop {
        let next = tokio::select! {
            biased;
            batch = batches.recv() => batch,
            _ = &mut end_asked => None,
        };
        let Some(batch) = next else { return to_net.shutdown().await };
        write_batch(&mut to_net, &mut buffer, batch).await?;
        while let Ok(batch) = batches.try_recv() {
            write_batch(&mut to_net, &mut buffer, batch).await?;
        }
        to_net.write_all(&buffer).await?;
        // TLS keeps what it could not write at once.
        to_net.flush().await?;
        buffer.clear();
        buffer.shrink_to(READ_BUFFER);
    }
}

/// Gathers a batch in the buffer, as far as that is cheaper than writing it.
async fn write_batch(
    to_net: &mut (impl AsyncWrite + Unpin),
    buffer: &mut Vec<u8>,
    batch: Vec<Bytes>,
) -> io::Result<()> {
    let last = batch.len().saturating_sub(1);
    for (number, frame) in batch.iter().enumerate() {
        zmtp::push_frame_header(buffer, frame.len(), number < last);
        if frame.len() <= GATHER {
            buffer.extend_from_slice(frame);
        }
        if frame.len() > GATHER || buffer.len() > READ_BUFFER {
            to_net.write_all(buffer).await?;
            buffer.clear();
        }
        if frame.len() > GATHER {
            to_net.write_all(frame).await?;
        }
    }
    Ok(())
}
