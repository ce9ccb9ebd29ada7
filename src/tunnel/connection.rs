//! One TCP connection: its handshake through the gate, then the pump.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::gate::{Gate, inner_greeting, inner_ready};
use super::{GateLimits, Refusal};
use crate::engine::Connection;
use crate::link::zmq::{Pump, Registration, ZmqPort, new_identity};

/// How long what is still queued may take to be written when the connection is closed by us.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

const FIRST_BUFFER: usize = 4 * 1024;
const LARGEST_BUFFER: usize = 64 * 1024;

/// Bytes on their way; it grows while reads fill it.
struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    fn new() -> Self {
        Self {
            bytes: vec![0; FIRST_BUFFER],
        }
    }

    /// Reads once; nothing at the end of the stream.
    async fn read_from(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<&[u8]> {
        let len = from.read(&mut self.bytes).await?;
        if len == self.bytes.len() && len < LARGEST_BUFFER {
            self.bytes.resize(2 * len, 0);
        }
        Ok(&self.bytes[..len])
    }
}

/// What the link that runs over the pump holds of it.
struct Handle {
    closing: watch::Sender<bool>,
    started: Instant,
    heard_after_ms: AtomicU64,
}

impl Handle {
    fn new() -> Self {
        Self {
            closing: watch::Sender::new(false),
            started: Instant::now(),
            heard_after_ms: AtomicU64::new(0),
        }
    }

    fn heard(&self) {
        let elapsed = self.started.elapsed().as_millis() as u64;
        self.heard_after_ms.store(elapsed, Ordering::Relaxed);
    }
}

impl Pump for Handle {
    fn close(&self) {
        self.closing.send_replace(true);
    }

    fn last_heard(&self) -> Instant {
        self.started + Duration::from_millis(self.heard_after_ms.load(Ordering::Relaxed))
    }
}

/// How a connection ended that was not refused.
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

/// Runs a connection to its end. `admitted` is dropped when the handshake is over.
pub(super) async fn run(
    tcp: TcpStream,
    port: Arc<ZmqPort>,
    limits: GateLimits,
    handshake_timeout: Duration,
    connection: Connection,
    live: oneshot::Sender<()>,
    admitted: impl Send,
) -> Ended {
    let _refused_by_the_system = tcp.set_nodelay(true);
    let (mut from_net, to_net) = tcp.into_split();
    let deadline = tokio::time::Instant::now() + handshake_timeout;
    let mut buffer = Buffer::new();
    let mut first = Vec::new();
    if connection.target.is_none() {
        // A stranger who says nothing costs the socket library nothing.
        let read = tokio::time::timeout_at(deadline, buffer.read_from(&mut from_net)).await;
        match read {
            Err(_) => return Refusal::HandshakeTimeout.into(),
            Ok(Err(error)) => return error.into(),
            Ok(Ok([])) => return Refusal::EndedEarly.into(),
            Ok(Ok(bytes)) => first.extend_from_slice(bytes),
        }
    }
    let inner = match port.connect().await {
        Ok(inner) => inner,
        Err(error) => return error.into(),
    };
    let (from_inner, mut to_inner) = inner.into_split();
    let handle = Arc::new(Handle::new());
    let mut outward = pin!(outward(from_inner, to_net));
    let inward = async {
        to_inner.write_all(&inner_greeting()).await?;
        let mut gate = Gate::new(limits);
        let shaking = handshake(&mut gate, &mut from_net, &mut buffer, first);
        let (ready, rest) = tokio::time::timeout_at(deadline, shaking)
            .await
            .map_err(|_| Refusal::HandshakeTimeout)??;
        drop(admitted);
        let identity = new_identity(&ready.claimed);
        let connection = Connection {
            claimed: Some(ready.claimed),
            ..connection
        };
        let registration = Registration {
            connection,
            pump: handle.clone(),
            live,
        };
        let _unregister = Unregister {
            port: &port,
            identity: identity.clone(),
        };
        port.register(identity.clone(), registration);
        to_inner.write_all(&inner_ready(&ready, &identity)).await?;
        gate.inspect(&rest)?;
        to_inner.write_all(&rest).await?;
        loop {
            let bytes = buffer.read_from(&mut from_net).await?;
            if bytes.is_empty() {
                return Ok::<(), Ended>(());
            }
            handle.heard();
            gate.inspect(bytes)?;
            to_inner.write_all(bytes).await?;
        }
    };
    let mut closing = handle.closing.subscribe();
    let closed_here = async {
        let _sender_lives = closing.wait_for(|closing| *closing).await;
    };
    tokio::select! {
        ended = inward => match ended {
            Ok(()) => Ended::Closed,
            Err(ended) => ended,
        },
        ended = &mut outward => ended.map_or_else(Ended::from, |()| Ended::Closed),
        () = closed_here => {
            let _too_slow = timeout(FLUSH_TIMEOUT, outward).await;
            Ended::Closed
        }
    }
}

/// Reads until the READY is whole; returns it and the bytes behind it.
async fn handshake(
    gate: &mut Gate,
    from_net: &mut (impl AsyncRead + Unpin),
    buffer: &mut Buffer,
    first: Vec<u8>,
) -> Result<(super::gate::Ready, Vec<u8>), Ended> {
    let mut bytes = first;
    loop {
        if let Some((ready, taken)) = gate.handshake(&bytes)? {
            return Ok((ready, bytes.split_off(taken)));
        }
        let read = buffer.read_from(from_net).await?;
        if read.is_empty() {
            return Err(Refusal::EndedEarly.into());
        }
        bytes.clear();
        bytes.extend_from_slice(read);
    }
}

async fn outward(
    mut from_inner: impl AsyncRead + Unpin,
    mut to_net: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = Buffer::new();
    loop {
        let bytes = buffer.read_from(&mut from_inner).await?;
        if bytes.is_empty() {
            return to_net.shutdown().await;
        }
        to_net.write_all(bytes).await?;
    }
}

/// Takes a registration back if it never became a link.
struct Unregister<'a> {
    port: &'a ZmqPort,
    identity: bytes::Bytes,
}

impl Drop for Unregister<'_> {
    fn drop(&mut self) {
        self.port.unregister(&self.identity);
    }
}
