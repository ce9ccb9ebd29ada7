//! The front door: the listeners, the dialler, and the gate that checks every byte from a peer.
//!
//! ```text
//!  network ═ TCP ═ TLS ═════════▶ [gate] ─ batches ─▶ node
//!  this host ═ Unix, same user ═▶        ◀─ frames ──
//! ```
//!
//! A node speaks ZMTP 3.1 (RFC 37), so any ZeroMQ ROUTER or DEALER can talk to it. The protocol is
//! implemented here because the `zeromq` crate trusts its input: a frame's length (73 bytes make it
//! abort the process), a peer's identity, and any number of parts. Its waits for its own locks
//! also hang a node whose peers come and go (zmq.rs#210). Both ends of a connection to the embedded
//! broker ([`End`]) come through the same door, for the same reasons. The gate must read every frame anyway;
//! passing batches on costs less than copying the bytes through a local socket to be parsed again.
//!
//! TLS stands between a network and the gate, except in open mode ([`tls`]). A Unix socket lies in
//! a folder that only its user may enter, and both ends check each other's credentials; it is not
//! encrypted.

mod admissions;
mod connection;
mod descriptors;
mod door;
mod ended;
mod gate;
mod patience;
mod socket;
mod tls;
mod zmtp;

pub(crate) use door::{FrontDoor, FrontDoorConfig};
pub(crate) use gate::GateLimits;
pub use patience::Latency;
pub(crate) use tls::{MAX_PROOFS, Tls};
pub(crate) use zmtp::End;

use crate::peer::Address;

/// The reason for which the front door refused or cut a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("all places are taken by connections in use; --max-connections allows more")]
    Connections,
    #[error("it made room for another connection, as too many are open that carry no messages")]
    MadeRoom,
    #[error("the handshake timed out")]
    HandshakeTimeout,
    #[error(
        "the peer closed the connection during the handshake; check that its trust mode is the same"
    )]
    EndedEarly,
    #[error("the peer does not encrypt (--trust open), and this node does; use one trust mode")]
    ClearText,
    #[error("the peer encrypts, and this node (--trust open) does not; use one trust mode")]
    Encrypted,
    #[error("the peer's TLS is invalid, or not that of a node")]
    Tls,
    #[error("the peer's introduction is invalid")]
    Introduction,
    #[error("the peer did not prove the mesh key")]
    MeshKey,
    #[error(
        "the peer did not prove the key that this user's nodes share on this host (host.key in the \
         socket folder); check that its trust mode and its socket folder are the same"
    )]
    HostKey,
    #[error("the peer's key is not among the trusted keys")]
    UnknownKey,
    #[error("the peer does not trust this node's key, or has another mesh key or host.key")]
    TurnedAway,
    #[error("the peer claims a node id that is not its key")]
    Impostor,
    #[error("the peer runs as another user")]
    OtherUser,
    #[error("the peer does not speak ZMTP 3")]
    NotZmtp,
    #[error("the peer requires a ZMTP mechanism other than NULL")]
    Mechanism,
    #[error("the peer's first command is not a valid READY")]
    Ready,
    #[error("the peer's ZMTP socket type is not one that can be talked to here")]
    SocketType,
    #[error("the peer's ZMTP identity does not begin with a node id")]
    Identity,
    #[error(
        "the peer's public key is of small order, so anyone can sign for it, or its id is reserved; \
         make a key with `peerbus keygen`"
    )]
    WeakKey,
    #[error("an invalid or too long ZMTP command")]
    Command,
    #[error("more ZMTP commands in a second than the limit")]
    TooManyCommands,
    #[error("reserved bits in a frame's flags")]
    Flags,
    #[error("a frame or a batch over the limit")]
    TooLarge,
    #[error("more frames than a batch may have")]
    TooManyFrames,
}

impl Refusal {
    /// The name under which the refusal is counted.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::MadeRoom => "made_room",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::EndedEarly => "ended_early",
            Self::ClearText => "clear_text",
            Self::Encrypted => "encrypted",
            Self::Tls => "tls",
            Self::Introduction => "introduction",
            Self::MeshKey => "mesh_key",
            Self::HostKey => "host_key",
            Self::UnknownKey => "unknown_key",
            Self::TurnedAway => "turned_away",
            Self::Impostor => "impostor",
            Self::OtherUser => "other_user",
            Self::NotZmtp => "not_zmtp",
            Self::Mechanism => "mechanism",
            Self::Ready => "ready",
            Self::SocketType => "socket_type",
            Self::Identity => "identity",
            Self::WeakKey => "weak_key",
            Self::Command => "command",
            Self::TooManyCommands => "too_many_commands",
            Self::Flags => "flags",
            Self::TooLarge => "too_large",
            Self::TooManyFrames => "too_many_frames",
        }
    }
}

/// Receives reports of refused connections.
pub(crate) trait Watch: Send + Sync {
    /// Reports a refusal. `address` is `None` if a process of this host connected.
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal);
}

/// The greeting and READY of a DEALER without an identity, for tests.
#[cfg(test)]
pub(crate) fn client_handshake() -> Vec<u8> {
    [&zmtp::greeting()[..], &zmtp::ready(b"DEALER", b"")].concat()
}

/// For the fuzzer: a peer's bytes, all at once and in pieces, before and after its hello.
#[cfg(fuzzing)]
pub(crate) fn check_stream(bytes: &[u8]) {
    let node = End::Node(crate::identity::NodeId::from_bytes([9; 32]));
    let now = std::time::Instant::now();
    let cuts = [(node, bytes.len().max(1), true), (node, 7, false), (End::Broker, 7, true)];
    for (end, piece, admitted) in cuts {
        let mut gate = gate::Gate::new(end, GateLimits::for_bodies(1 << 20));
        let (mut input, mut shaken) = (bytes::BytesMut::new(), false);
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            if !shaken {
                match gate.handshake(&mut input) {
                    Ok(Some(_)) => shaken = true,
                    Ok(None) => continue,
                    Err(_) => break,
                }
                if admitted {
                    gate.admit();
                }
            }
            while let Ok(Some(received)) = gate.next(&mut input, now) {
                match received {
                    gate::Received::Batch(batch) => assert!(batch.len() <= crate::wire::MAX_FRAMES),
                    gate::Received::Ping(context) => assert!(context.len() <= 16),
                }
            }
        }
    }
}
