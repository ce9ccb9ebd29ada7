//! ZMTP 3.0 (RFC 23), as far as a node speaks it: the NULL mechanism, ROUTER, frames.

use super::Refusal;
use crate::identity::NodeId;

/// The first byte of a TLS handshake record.
pub(super) const TLS_HANDSHAKE: u8 = 0x16;

pub(super) const GREETING_LEN: usize = 64;
/// The length of a greeting's signature.
pub(super) const SIGNATURE_LEN: usize = 10;
/// A READY has two properties, one of them an identity of 48 bytes, and is far shorter.
pub(super) const MAX_READY: usize = 512;

pub(super) const FLAG_MORE: u8 = 0b001;
pub(super) const FLAG_LONG: u8 = 0b010;
pub(super) const FLAG_COMMAND: u8 = 0b100;

/// The greeting: signature, version 3.0, the mechanism NULL.
pub(super) fn greeting() -> [u8; GREETING_LEN] {
    let mut greeting = [0; GREETING_LEN];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

/// The READY command of a ROUTER with this identity.
pub(super) fn ready(identity: &[u8]) -> Vec<u8> {
    let mut command = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", &b"ROUTER"[..]), ("Identity", identity)] {
        command.push(name.len() as u8);
        command.extend_from_slice(name.as_bytes());
        command.extend_from_slice(&(value.len() as u32).to_be_bytes());
        command.extend_from_slice(value);
    }
    let mut bytes = vec![FLAG_COMMAND, command.len() as u8];
    bytes.extend_from_slice(&command);
    bytes
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

/// Parses a READY command, if it is complete: the claimed node id, and the length in bytes.
pub(super) fn read_ready(bytes: &[u8]) -> Result<Option<(NodeId, usize)>, Refusal> {
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
    if len > MAX_READY as u64 {
        return Err(Refusal::Ready);
    }
    let len = len as usize;
    let Some(command) = bytes.get(head..head + len) else {
        return Ok(None);
    };
    Ok(Some((parse_ready(command)?, head + len)))
}

fn parse_ready(command: &[u8]) -> Result<NodeId, Refusal> {
    let mut rest = command.strip_prefix(b"\x05READY").ok_or(Refusal::Ready)?;
    let (mut claimed, mut typed) = (None, false);
    while !rest.is_empty() {
        let (name, value, after) = property(rest).ok_or(Refusal::Ready)?;
        rest = after;
        if name.eq_ignore_ascii_case(b"Identity") {
            let id = value.first_chunk().ok_or(Refusal::Identity)?;
            claimed = Some(NodeId::from_bytes(*id));
        } else if name.eq_ignore_ascii_case(b"Socket-Type") {
            typed = matches!(value, b"ROUTER" | b"DEALER");
            if !typed {
                return Err(Refusal::SocketType);
            }
        }
    }
    if !typed {
        return Err(Refusal::SocketType);
    }
    claimed.ok_or(Refusal::Identity)
}

/// Splits off a property: its name, its value, and the rest.
fn property(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (len, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*len))?;
    let (len, rest) = rest.split_first_chunk()?;
    let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((name, value, rest))
}
