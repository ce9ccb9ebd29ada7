//! The front door: our listeners and our dialler, and the gate that every byte of a peer has to
//! pass.
//!
//! ```text
//!  network ═ TCP ═ TLS ═════════▶ [gate] ─ batches ─▶ node
//!  this host ═ Unix, same user ═▶        ◀─ frames ──
//! ```
//!
//! A node speaks ZMTP 3.0 (RFC 23), so that any ZeroMQ ROUTER or DEALER can talk to it. It speaks
//! it here rather than through the `zeromq` crate, which trusts what it reads: a frame's length
//! (73 bytes make it abort the process), a peer's identity, any number of parts; and whose waits
//! for its own locks hang a node whose peers come and go (zmq.rs#210). The gate has to read every
//! frame anyway; handing them on as batches costs less than pumping the bytes through a socket of
//! this host to have them read again.
//!
//! TLS stands between a network and the gate, unless the node is open to anybody ([`tls`]). A Unix
//! socket lies in a folder that only its user may enter, and both ends check the other's
//! credentials; nothing is encrypted there.

mod admissions;
mod connection;
mod door;
mod gate;
mod socket;
mod tls;
mod zmtp;

pub(crate) use door::{FrontDoor, FrontDoorConfig};
pub(crate) use gate::GateLimits;
pub(crate) use tls::{MAX_PROOFS, Tls};

use crate::peer::Address;

/// Why the front door refused or cut a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("too many connections")]
    Connections,
    #[error("too many handshakes at once")]
    PendingHandshakes,
    #[error("too many handshakes at once from one address")]
    PendingFromAddress,
    #[error("no handshake in time")]
    HandshakeTimeout,
    #[error("it closed the connection during the handshake; it may be in another trust mode")]
    EndedEarly,
    #[error("it does not encrypt; this node does (--trust open would talk to it)")]
    ClearText,
    #[error("it encrypts; this node does not (--trust open)")]
    Encrypted,
    #[error("its TLS is broken, or not what nodes use")]
    Tls,
    #[error("its introduction is broken")]
    Introduction,
    #[error("it did not prove the mesh key")]
    MeshKey,
    #[error("its key is not among the trusted keys")]
    UnknownKey,
    #[error("it does not trust this node's key, or this node has not its mesh key")]
    TurnedAway,
    #[error("it claims another node's id than that of its key")]
    Impostor,
    #[error("it runs as another user")]
    OtherUser,
    #[error("what it speaks is not ZMTP 3")]
    NotZmtp,
    #[error("it asks for a ZMTP mechanism other than NULL")]
    Mechanism,
    #[error("its first command is no READY, or one too long or broken")]
    Ready,
    #[error("its socket is of a type that can't be talked to")]
    SocketType,
    #[error("its ZMTP identity does not begin with a node id")]
    Identity,
    #[error("a command after the handshake")]
    Command,
    #[error("reserved bits in a frame's flags")]
    Flags,
    #[error("a frame or a batch over the limit")]
    TooLarge,
    #[error("more frames than a batch may have")]
    TooManyFrames,
}

impl Refusal {
    /// The name under which it is counted.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::PendingHandshakes => "pending_handshakes",
            Self::PendingFromAddress => "pending_from_address",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::EndedEarly => "ended_early",
            Self::ClearText => "clear_text",
            Self::Encrypted => "encrypted",
            Self::Tls => "tls",
            Self::Introduction => "introduction",
            Self::MeshKey => "mesh_key",
            Self::UnknownKey => "unknown_key",
            Self::TurnedAway => "turned_away",
            Self::Impostor => "impostor",
            Self::OtherUser => "other_user",
            Self::NotZmtp => "not_zmtp",
            Self::Mechanism => "mechanism",
            Self::Ready => "ready",
            Self::SocketType => "socket_type",
            Self::Identity => "identity",
            Self::Command => "command",
            Self::Flags => "flags",
            Self::TooLarge => "too_large",
            Self::TooManyFrames => "too_many_frames",
        }
    }
}

/// Told what the front door turned away.
pub(crate) trait Watch: Send + Sync {
    /// Of a process of this host that connected, there is no address.
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal);
}

/// For the fuzzer: a stranger's bytes, all at once and in pieces, before and after its hello.
#[cfg(fuzzing)]
pub(crate) fn check_stream(bytes: &[u8]) {
    for (piece, admitted) in [(bytes.len().max(1), true), (7, false)] {
        let mut gate = gate::Gate::new(GateLimits::for_bodies(1 << 20));
        let (mut input, mut shaken) = (bytes::BytesMut::new(), false);
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            if !shaken {
                match gate.handshake(&mut input) {
                    Ok(Some(_)) => shaken = true,
                    Ok(None) => continue,
                    Err(_) => return,
                }
                if admitted {
                    gate.admit();
                }
            }
            while let Ok(Some(batch)) = gate.next_batch(&mut input) {
                assert!(batch.len() <= crate::wire::MAX_FRAMES);
            }
        }
    }
}
