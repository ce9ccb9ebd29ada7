//! One connection: its handshake, then batches in both directions, in one task.
//!
//! ```text
//!  TCP ───────────────┐
//!  TCP ── TLS ────────┼─▶ ZMTP handshake ─▶ gate ─▶ Receiver
//!  Unix ─ same user? ─┘                  ◀─ writer ◀─ Link
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::yield_now;
use tokio::time::{timeout, timeout_at};

use super::admissions::{Place, Standing};
use super::ended::Ended;
use super::gate::{Gate, Received};
use super::patience::{Latency, Patience, Sent};
use super::socket::Socket;
use super::zmtp::{End, Ready};
use super::{GateLimits, Refusal, Tls, zmtp};
use crate::engine::{Connection, Origin};
use crate::identity::NodeId;
use crate::link::{Acceptor, Link, Receiver, SLICE};

/// The time limit for writing the queued batches when this side closes.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// The maximum size of one read.
const READ_BUFFER: usize = 64 * 1024;
const FIRST_BUFFER: usize = 4 * 1024;
/// The size above which a frame is written directly instead of buffered.
const GATHER: usize = 16 * 1024;
/// The number of PONGs that wait for a peer. Further PINGs of one that doesn't read stay unanswered.
const PONGS: usize = 16;

/// The context that all connections of a front door share.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) end: End,
    pub(super) gate: GateLimits,
    /// TLS for connections from networks; `None` in open mode, which uses clear text.
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) handshake_timeout: Duration,
    pub(super) latency: Latency,
    pub(super) acceptor: Arc<dyn Acceptor>,
}

/// A link over a byte stream.
struct StreamLink {
    outbox: mpsc::UnboundedSender<Vec<Bytes>>,
    closing: watch::Sender<bool>,
    started: Instant,
    heard_after_ms: Arc<AtomicU64>,
    admitted: Arc<AtomicBool>,
    /// The standing of an accepted connection.
    standing: Option<Arc<Standing>>,
}

impl Link for StreamLink {
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

    fn prove(&self) {
        if let Some(standing) = &self.standing {
            standing.prove();
        }
    }

    fn last_heard(&self) -> Option<Instant> {
        Some(self.started + Duration::from_millis(self.heard_after_ms.load(Ordering::Relaxed)))
    }
}

/// Runs a connection to its end. `place` is that of an accepted connection; `live` is notified when
/// the link is up.
pub(super) async fn run(
    socket: Socket,
    context: Context,
    connection: Connection,
    live: oneshot::Sender<()>,
    place: Option<(Place, oneshot::Receiver<()>)>,
) -> Ended {
    let Some((place, evicted)) = place else {
        return open(socket, context, connection, live, None).await;
    };
    tokio::select! {
        ended = open(socket, context, connection, live, Some(&place)) => ended,
        Ok(()) = evicted => Refusal::MadeRoom.into(),
    }
}

async fn open(
    socket: Socket,
    context: Context,
    connection: Connection,
    live: oneshot::Sender<()>,
    place: Option<&Place>,
) -> Ended {
    let dialled = connection.target.is_some();
    let deadline = tokio::time::Instant::now() + context.handshake_timeout;
    let tls = context.tls.clone();
    let opening = Opening { context, connection, live, place, deadline };
    match (socket, tls) {
        #[cfg(unix)]
        (Socket::Unix(unix), _) => {
            match super::socket::unix::is_same_user(&unix) {
                Ok(true) => {}
                Ok(false) => return Refusal::OtherUser.into(),
                Err(error) => return error.into(),
            }
            let (from_peer, to_peer) = unix.into_split();
            opening.run(from_peer, to_peer, Checked::SameUser).await
        }
        (Socket::Tcp(tcp), None) => {
            let _refused_by_the_system = tcp.set_nodelay(true);
            let (from_peer, to_peer) = tcp.into_split();
            opening.run(from_peer, to_peer, Checked::Nothing).await
        }
        (Socket::Tcp(tcp), Some(tls)) => {
            let _refused_by_the_system = tcp.set_nodelay(true);
            let (stream, peer) = match timeout_at(deadline, tls.open(tcp, dialled)).await {
                Ok(Ok(opened)) => opened,
                Ok(Err(ended)) => return ended,
                Err(_) => return Refusal::HandshakeTimeout.into(),
            };
            let (from_peer, to_peer) = tokio::io::split(stream);
            opening.run(from_peer, to_peer, Checked::Key(peer, tls)).await
        }
    }
}

/// The evidence of the peer's identity from the layer below ZMTP.
enum Checked {
    Nothing,
    SameUser,
    /// The accepted holder of this key.
    Key(NodeId, Arc<Tls>),
}

/// A connection with an open stream, before its ZMTP handshake.
struct Opening<'a> {
    context: Context,
    connection: Connection,
    live: oneshot::Sender<()>,
    place: Option<&'a Place>,
    deadline: tokio::time::Instant,
}

impl Opening<'_> {
    async fn run(
        self,
        mut from_peer: impl AsyncRead + Unpin,
        mut to_peer: impl AsyncWrite + Unpin,
        checked: Checked,
    ) -> Ended {
        let Self { context, connection, live, place, deadline } = self;
        let mut input = Input::new(context.end, context.gate);
        let dialled = connection.target.is_some();
        let shaking = handshake(&mut from_peer, &mut to_peer, &mut input, context.end, dialled);
        let claimed = match timeout_at(deadline, shaking).await {
            Ok(Ok(ready)) => ready.claimed,
            Ok(Err(ended)) => return ended,
            Err(_) => return Refusal::HandshakeTimeout.into(),
        };
        if matches!(checked, Checked::Key(verified, _) if Some(verified) != claimed) {
            return Refusal::Impostor.into();
        }
        if let Some(Err(refusal)) = place.map(Place::open) {
            return refusal.into();
        }
        let origin = match checked {
            Checked::SameUser => Origin::SameUser,
            Checked::Nothing | Checked::Key(..) => Origin::Network,
        };
        let connection = Connection { origin, claimed, ..connection };
        let (link, ends) = StreamLink::new(place.map(Place::standing));
        let link = Arc::new(link);
        let receiver = context.acceptor.handle_connected(link.clone(), connection);
        let receiver = Closing(receiver);
        // A peer that lost trust after the check may have been missed when links were cut.
        if let Checked::Key(peer, tls) = checked
            && !tls.trusts(&peer)
        {
            link.close();
        }
        drop(link);
        let _no_longer_awaited = live.send(());
        ends.run(from_peer, to_peer, input, context.latency, &*receiver.0).await
    }
}

/// Notifies a receiver of the end of its connection, also if the connection's task is dropped.
struct Closing(Arc<dyn Receiver>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.handle_closed();
    }
}

/// The connection task's side of a [`StreamLink`].
struct LinkEnds {
    batches: mpsc::UnboundedReceiver<Vec<Bytes>>,
    closed: watch::Receiver<bool>,
    started: Instant,
    heard_after_ms: Arc<AtomicU64>,
    admitted: Arc<AtomicBool>,
}

impl StreamLink {
    fn new(standing: Option<Arc<Standing>>) -> (Self, LinkEnds) {
        let (outbox, batches) = mpsc::unbounded_channel();
        let (closing, closed) = watch::channel(false);
        let started = Instant::now();
        let (heard_after_ms, admitted) =
            (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let ends = LinkEnds {
            batches,
            closed,
            started,
            heard_after_ms: heard_after_ms.clone(),
            admitted: admitted.clone(),
        };
        (Self { outbox, closing, started, heard_after_ms, admitted, standing }, ends)
    }
}

impl LinkEnds {
    /// Moves batches in both directions until either side closes or the stream ends.
    async fn run(
        self,
        mut from_peer: impl AsyncRead + Unpin,
        to_peer: impl AsyncWrite + Unpin,
        mut input: Input,
        latency: Latency,
        receiver: &dyn Receiver,
    ) -> Ended {
        let Self { batches, mut closed, started, heard_after_ms, admitted } = self;
        let (pong, pongs) = mpsc::channel(PONGS);
        let (sent, mut patience) = (Sent::new(started), Patience::new(latency));
        let reading = async {
            let mut busy = Duration::ZERO;
            loop {
                let now = Instant::now();
                loop {
                    if admitted.load(Ordering::Relaxed) {
                        input.gate.admit();
                    }
                    match input.gate.next(&mut input.bytes, now)? {
                        Some(Received::Batch(batch)) => {
                            let begun = Instant::now();
                            if let Some(rest) = receiver.handle_batch(batch) {
                                rest.await;
                            }
                            busy += begun.elapsed();
                        }
                        Some(Received::Ping(context)) => _ = pong.try_send(context),
                        None => break,
                    }
                    if busy >= SLICE {
                        busy = Duration::ZERO;
                        yield_now().await;
                    }
                }
                if patience.wait(input.read_from(&mut from_peer), &sent).await? == 0 {
                    return Ok::<(), Ended>(());
                }
                heard_after_ms.store(started.elapsed().as_millis() as u64, Ordering::Relaxed);
            }
        };
        let closed_here = async {
            let _link_lives = closed.wait_for(|closed| *closed).await;
        };
        let (asked, end_asked) = oneshot::channel();
        let mut writing = std::pin::pin!(write(batches, pongs, to_peer, end_asked, &sent));
        tokio::select! {
            // The writer first: what it sends tells the reader for how long to poll.
            biased;
            written = &mut writing => written.map_or_else(Ended::from, |()| Ended::Closed),
            read = reading => read.map_or_else(|ended| ended, |()| Ended::Closed),
            () = closed_here => {
                let _writer_ended = asked.send(());
                let _too_slow = timeout(FLUSH_TIMEOUT, writing).await;
                Ended::Closed
            }
        }
    }
}

/// Bytes from the peer that don't form a whole batch yet.
struct Input {
    bytes: BytesMut,
    gate: Gate,
    /// The space to reserve for a read; it doubles while reads fill it.
    chunk: usize,
}

impl Input {
    fn new(end: End, limits: GateLimits) -> Self {
        Self { bytes: BytesMut::new(), gate: Gate::new(end, limits), chunk: FIRST_BUFFER }
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

/// Exchanges greetings and READYs. The accepting side sends nothing before the dialler's bytes.
async fn handshake(
    from_peer: &mut (impl AsyncRead + Unpin),
    to_peer: &mut (impl AsyncWrite + Unpin),
    input: &mut Input,
    end: End,
    dialled: bool,
) -> Result<Ready, Ended> {
    let my_ready = end.ready();
    let (mut greeted, mut readied) = (false, false);
    if dialled {
        to_peer.write_all(&zmtp::greeting()).await?;
        to_peer.flush().await?;
        greeted = true;
    }
    loop {
        if input.read_from(from_peer).await? == 0 {
            return Err(Refusal::EndedEarly.into());
        }
        let ready = input.gate.handshake(&mut input.bytes)?;
        // Some peers send only their signature until they have received ours.
        if !greeted && (input.gate.is_greeted() || input.bytes.len() >= zmtp::SIGNATURE_LEN) {
            to_peer.write_all(&zmtp::greeting()).await?;
            greeted = true;
        }
        if !readied && input.gate.is_greeted() {
            to_peer.write_all(&my_ready).await?;
            readied = true;
        }
        to_peer.flush().await?;
        if let Some(ready) = ready {
            return Ok(ready);
        }
    }
}

/// Writes batches and PONGs, all queued ones before each flush, until the end is requested.
async fn write(
    mut batches: mpsc::UnboundedReceiver<Vec<Bytes>>,
    mut pongs: mpsc::Receiver<Bytes>,
    mut to_peer: impl AsyncWrite + Unpin,
    mut end_asked: oneshot::Receiver<()>,
    sent: &Sent,
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(FIRST_BUFFER);
    loop {
        tokio::select! {
            biased;
            Some(context) = pongs.recv() => buffer.extend_from_slice(&zmtp::pong(&context)),
            batch = batches.recv() => match batch {
                Some(batch) => write_batch(&mut to_peer, &mut buffer, batch).await?,
                None => return to_peer.shutdown().await,
            },
            _ = &mut end_asked => return to_peer.shutdown().await,
        }
        while let Ok(batch) = batches.try_recv() {
            if let Ok(context) = pongs.try_recv() {
                buffer.extend_from_slice(&zmtp::pong(&context));
            }
            write_batch(&mut to_peer, &mut buffer, batch).await?;
        }
        to_peer.write_all(&buffer).await?;
        // TLS buffers what it could not write at once.
        to_peer.flush().await?;
        sent.note();
        buffer.clear();
        buffer.shrink_to(READ_BUFFER);
        if !batches.is_empty() {
            // The writer is polled first: one that always has more to write leaves the reader time.
            yield_now().await;
        }
    }
}

/// Buffers the small frames of a batch, and writes the large ones directly.
async fn write_batch(
    to_peer: &mut (impl AsyncWrite + Unpin),
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
            to_peer.write_all(buffer).await?;
            buffer.clear();
        }
        if frame.len() > GATHER {
            to_peer.write_all(frame).await?;
        }
    }
    Ok(())
}
