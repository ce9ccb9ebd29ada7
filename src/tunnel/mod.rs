//! The front door: our TCP listener and dialler, and the gate that every byte from a network has
//! to pass.
//!
//! ```text
//!  network ═ TCP ═▶ [gate] ─ batches ─▶ node
//!          ◀═══════════════ frames ◀───
//! ```
//!
//! On the network a node speaks ZMTP 3.0, so that any ZeroMQ ROUTER or DEALER can talk to it. It
//! speaks it here rather than through the `zeromq` crate, which trusts what it reads: a frame's
//! length (73 bytes make it abort the process), a peer's identity, any number of parts. The gate
//! has to read every frame anyway; handing them on as batches costs less than pumping the bytes
//! through a socket of this host to have them read again.
//!
//! Encryption will stand between the network and the gate.

mod connection;
mod door;
mod gate;
mod zmtp;

pub(crate) use door::{FrontDoor, FrontDoorConfig};
pub(crate) use gate::GateLimits;

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
    #[error("it ended before its handshake")]
    EndedEarly,
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
    fn handle_refusal(&self, address: Address, refusal: Refusal);
}
