//! ZMTP 3.1 (RFC 37), as far as a node and the embedded broker speak it: the NULL mechanism, ROUTER
//! and DEALER, frames, PING and PONG.

use super::Refusal;
use crate::identity::{NodeId, random_bytes};
use crate::link::new_identity;

/// The first byte of a TLS handshake record.
pub(super) const TLS_HANDSHAKE: u8 = 0x16;

pub(super) const GREETING_LEN: usize = 64;
/// The length of a greeting's signature.
pub(super) const SIGNATURE_LEN: usize = 10;
/// The maximum length of a command's body. A READY of a node has two properties, one of them an
/// identity of 48 bytes, and is far shorter.
pub(super) const MAX_COMMAND: usize = 512;
/// The maximum length of a socket's identity.
const MAX_IDENTITY: usize = 255;
/// The maximum length of a PING's context.
const MAX_CONTEXT: usize = 16;

pub(super) const FLAG_MORE: u8 = 0b001;
pub(super) const FLAG_LONG: u8 = 0b010;
pub(super) const FLAG_COMMAND: u8 = 0b100;

/// The socket that one end of a connection is, and the peers that it accepts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// A node's ROUTER. Its peers are ROUTERs and DEALERs whose identity begins with a node id.
    Node(NodeId),
    /// The embedded broker's ROUTER. Its peers are DEALERs with any identity, or none.
    Broker,
    /// A node's DEALER, connected to the embedded broker's ROUTER.
    BrokerClient,
}

impl End {
    /// The READY command of a new connection.
    pub(super) fn ready(self) -> Vec<u8> {
        match self {
            Self::Node(id) => ready(b"ROUTER", &new_identity(&id)),
            Self::Broker => ready(b"ROUTER", b""),
            Self::BrokerClient => ready(b"DEALER", &random_bytes::<16>()),
        }
    }

    fn accepts(self, socket_type: &[u8]) -> bool {
        match self {
            Self::Node(_) => matches!(socket_type, b"ROUTER" | b"DEALER"),
            Self::Broker => socket_type == b"DEALER",
            Self::BrokerClient => socket_type == b"ROUTER",
        }
    }

    /// Reads the node id at the beginning of the peer's identity, if this end requires one.
    fn claim(self, identity: &[u8]) -> Result<Option<NodeId>, Refusal> {
        match self {
            Self::Node(_) => {
                let id = identity.first_chunk().ok_or(Refusal::Identity)?;
                NodeId::checked(*id).map(Some).map_err(|_| Refusal::WeakKey)
            }
            Self::Broker | Self::BrokerClient => Ok(None),
        }
    }
}

/// A peer's READY command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    /// The claimed node id, if the peer is a node.
    pub(super) claimed: Option<NodeId>,
}

/// The greeting: signature, version 3.1, the mechanism NULL.
pub(super) fn greeting() -> [u8; GREETING_LEN] {
    let mut greeting = [0; GREETING_LEN];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[11] = 1;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

/// The READY command of a socket.
pub(super) fn ready(socket_type: &[u8], identity: &[u8]) -> Vec<u8> {
    let mut command = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", socket_type), ("Identity", identity)] {
        command.push(name.len() as u8);
        command.extend_from_slice(name.as_bytes());
        command.extend_from_slice(&(value.len() as u32).to_be_bytes());
        command.extend_from_slice(value);
    }
    [&[FLAG_COMMAND, command.len() as u8], &command[..]].concat()
}

/// The PONG that answers a PING with this context.
pub(super) fn pong(context: &[u8]) -> Vec<u8> {
    let body = [b"\x04PONG", context].concat();
    [&[FLAG_COMMAND, body.len() as u8], &body[..]].concat()
}

/// Returns the context of a PING; `None` for any other command.
///
/// # Errors
/// [`Refusal::Command`] if the bytes are not a command, or the PING is invalid.
pub(super) fn ping_context(body: &[u8]) -> Result<Option<&[u8]>, Refusal> {
    let (len, rest) = body.split_first().ok_or(Refusal::Command)?;
    let (name, data) = rest.split_at_checked(usize::from(*len)).ok_or(Refusal::Command)?;
    if name.is_empty() {
        return Err(Refusal::Command);
    }
    if name != b"PING" {
        return Ok(None);
    }
    // The first two bytes are its time to live. A silent peer is noticed without it.
    match data.get(2..) {
        Some(context) if context.len() <= MAX_CONTEXT => Ok(Some(context)),
        _ => Err(Refusal::Command),
    }
}

pub(super) fn push_frame_header(buffer: &mut Vec<u8>, len: usize, more: bool) {
    let more = if more { FLAG_MORE } else { 0 };
    match u8::try_from(len) {
        Ok(short) => buffer.extend_from_slice(&[more, short]),
        Err(_) => {
            buffer.push(more | FLAG_LONG);
            buffer.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
}

/// Checks the greeting as far as it has arrived.
pub(super) fn check_greeting(bytes: &[u8]) -> Result<(), Refusal> {
    let at = |place: usize| bytes.get(place).copied();
    if at(0) == Some(TLS_HANDSHAKE) {
        return Err(Refusal::Encrypted);
    }
    if at(0).is_some_and(|byte| byte != 0xff) || at(9).is_some_and(|byte| byte != 0x7f) {
        return Err(Refusal::NotZmtp);
    }
    if at(10).is_some_and(|major| major < 3) {
        return Err(Refusal::NotZmtp);
    }
    const NULL: [u8; 20] = *b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    match bytes.get(12..32) {
        Some(mechanism) if mechanism != NULL => Err(Refusal::Mechanism),
        _ => Ok(()),
    }
}

/// Parses a READY command, if it is complete; also returns its length in bytes.
pub(super) fn read_ready(bytes: &[u8], end: End) -> Result<Option<(Ready, usize)>, Refusal> {
    let Some(flags) = bytes.first() else {
        return Ok(None);
    };
    let (head, len) = match *flags {
        FLAG_COMMAND => (2, bytes.get(1).map(|len| u64::from(*len))),
        flags if flags == FLAG_COMMAND | FLAG_LONG => {
            let len = bytes.get(1..9).and_then(|len| len.try_into().ok());
            (9, len.map(u64::from_be_bytes))
        }
        _ => return Err(Refusal::Ready),
    };
    let Some(len) = len else { return Ok(None) };
    if len > MAX_COMMAND as u64 {
        return Err(Refusal::Ready);
    }
    let len = len as usize;
    let Some(command) = bytes.get(head..head + len) else {
        return Ok(None);
    };
    Ok(Some((parse_ready(command, end)?, head + len)))
}

fn parse_ready(command: &[u8], end: End) -> Result<Ready, Refusal> {
    let mut rest = command.strip_prefix(b"\x05READY").ok_or(Refusal::Ready)?;
    let (mut identity, mut socket_type) = (None, None);
    while !rest.is_empty() {
        let (name, value, after) = property(rest).ok_or(Refusal::Ready)?;
        rest = after;
        let known = if name.eq_ignore_ascii_case(b"Identity") {
            &mut identity
        } else if name.eq_ignore_ascii_case(b"Socket-Type") {
            &mut socket_type
        } else {
            continue;
        };
        if known.replace(value).is_some() {
            return Err(Refusal::Ready);
        }
    }
    if !socket_type.is_some_and(|socket_type| end.accepts(socket_type)) {
        return Err(Refusal::SocketType);
    }
    let identity = identity.unwrap_or_default();
    if identity.len() > MAX_IDENTITY {
        return Err(Refusal::Identity);
    }
    Ok(Ready { claimed: end.claim(identity)? })
}

/// Splits off a property: its name, its value, and the rest.
fn property(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (len, rest) = bytes.split_first().filter(|(len, _)| **len > 0)?;
    let (name, rest) = rest.split_at_checked(usize::from(*len))?;
    let (len, rest) = rest.split_first_chunk()?;
    let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((name, value, rest))
}
