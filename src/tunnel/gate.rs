//! The frame gate: reads ZMTP 3 (RFC 23) as it passes, and cuts what the socket library could
//! not stand.
//!
//! ```text
//!  greeting (64 bytes) ─▶ READY, identity checked and replaced ─▶ frames, counted
//! ```
//!
//! A pure state machine. The crate behind it trusts a frame's length (73 bytes can make it abort
//! the process), a peer's identity (one can take another's place), and any number of parts.

use super::Refusal;
use crate::peer::NodeId;
use crate::wire::{MAX_BATCH, MAX_FRAMES, MAX_HEADER};

const GREETING_LEN: usize = 64;
/// Two properties, of which one is an identity of 48 bytes, take far less.
const MAX_READY: usize = 512;

const FLAG_MORE: u8 = 0b001;
const FLAG_LONG: u8 = 0b010;
const FLAG_COMMAND: u8 = 0b100;

/// How large what passes may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GateLimits {
    /// The most bytes in all frames of one multipart message.
    pub(crate) message: u64,
    pub(crate) frames: usize,
}

impl GateLimits {
    /// What a node needs whose bodies are at most `max_body` bytes long.
    pub(crate) fn for_bodies(max_body: u64) -> Self {
        let single = max_body + 2 * MAX_HEADER as u64;
        Self {
            message: single.max(2 * MAX_BATCH as u64),
            frames: MAX_FRAMES,
        }
    }
}

/// What a peer said of itself in its READY.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) claimed: NodeId,
    socket_type: &'static str,
}

#[derive(Debug)]
enum State {
    Greeting,
    Ready,
    Header,
    Length {
        left: u8,
        long: bool,
        more: bool,
        value: u64,
    },
    Body {
        left: u64,
        more: bool,
    },
}

/// Watches one direction of a connection: from the network inwards.
#[derive(Debug)]
pub(super) struct Gate {
    limits: GateLimits,
    state: State,
    /// The handshake, until it is whole.
    buffered: Vec<u8>,
    frames: usize,
    bytes: u64,
}

impl Gate {
    pub(super) fn new(limits: GateLimits) -> Self {
        Self {
            limits,
            state: State::Greeting,
            buffered: Vec::new(),
            frames: 0,
            bytes: 0,
        }
    }

    /// Takes bytes of the handshake. Returns what the READY said and how many bytes of the input
    /// it took, once it is whole; what follows is for [`Gate::inspect`].
    ///
    /// # Errors
    /// The [`Refusal`] that cuts the connection.
    pub(super) fn handshake(&mut self, input: &[u8]) -> Result<Option<(Ready, usize)>, Refusal> {
        let before = self.buffered.len();
        let most = GREETING_LEN + 9 + MAX_READY;
        self.buffered
            .extend_from_slice(&input[..input.len().min(most - before)]);
        if let State::Greeting = self.state {
            check_greeting(&self.buffered)?;
            if self.buffered.len() < GREETING_LEN {
                return Ok(None);
            }
            self.state = State::Ready;
        }
        let Some((ready, len)) = read_ready(&self.buffered[GREETING_LEN..])? else {
            return Ok(None);
        };
        self.state = State::Header;
        self.buffered = Vec::new();
        Ok(Some((ready, GREETING_LEN + len - before)))
    }

    /// Looks at bytes after the handshake; they may be forwarded if this returns Ok.
    ///
    /// # Errors
    /// The [`Refusal`] that cuts the connection.
    pub(super) fn inspect(&mut self, mut input: &[u8]) -> Result<(), Refusal> {
        while !input.is_empty() {
            self.state = match self.state {
                State::Greeting | State::Ready => return Err(Refusal::Ready),
                State::Header => {
                    let flags = input[0];
                    input = &input[1..];
                    if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 {
                        return Err(Refusal::Flags);
                    }
                    if flags & FLAG_COMMAND != 0 {
                        return Err(Refusal::Command);
                    }
                    self.frames += 1;
                    if self.frames > self.limits.frames {
                        return Err(Refusal::TooManyFrames);
                    }
                    let long = flags & FLAG_LONG != 0;
                    let left = if long { 8 } else { 1 };
                    State::Length {
                        left,
                        long,
                        more: flags & FLAG_MORE != 0,
                        value: 0,
                    }
                }
                State::Length {
                    left,
                    long,
                    more,
                    value,
                } => {
                    let value = value << 8 | u64::from(input[0]);
                    input = &input[1..];
                    if left > 1 {
                        State::Length {
                            left: left - 1,
                            long,
                            more,
                            value,
                        }
                    } else {
                        self.bytes = self.bytes.saturating_add(value);
                        if self.bytes > self.limits.message {
                            return Err(Refusal::TooLarge);
                        }
                        self.after_body(value, more)
                    }
                }
                State::Body { left, more } => {
                    let passed = left.min(input.len() as u64);
                    input = &input[passed as usize..];
                    self.after_body(left - passed, more)
                }
            };
        }
        Ok(())
    }

    fn after_body(&mut self, left: u64, more: bool) -> State {
        if left > 0 {
            return State::Body { left, more };
        }
        if !more {
            self.frames = 0;
            self.bytes = 0;
        }
        State::Header
    }
}

/// Checks as much of a greeting as there is.
fn check_greeting(bytes: &[u8]) -> Result<(), Refusal> {
    let at = |place: usize| bytes.get(place).copied();
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

/// Reads a READY command, if all of it is there; how many bytes it took.
fn read_ready(bytes: &[u8]) -> Result<Option<(Ready, usize)>, Refusal> {
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
    let ready = parse_ready(command)?;
    Ok(Some((ready, head + len)))
}

fn parse_ready(command: &[u8]) -> Result<Ready, Refusal> {
    let mut rest = command.strip_prefix(b"\x05READY").ok_or(Refusal::Ready)?;
    let (mut claimed, mut socket_type) = (None, None);
    while !rest.is_empty() {
        let (name, value, after) = property(rest).ok_or(Refusal::Ready)?;
        rest = after;
        if name.eq_ignore_ascii_case(b"Identity") {
            let id = value.first_chunk().ok_or(Refusal::Identity)?;
            claimed = Some(NodeId::from_bytes(*id));
        } else if name.eq_ignore_ascii_case(b"Socket-Type") {
            socket_type = Some(match value {
                b"ROUTER" => "ROUTER",
                b"DEALER" => "DEALER",
                _ => return Err(Refusal::SocketType),
            });
        }
    }
    Ok(Ready {
        claimed: claimed.ok_or(Refusal::Identity)?,
        socket_type: socket_type.ok_or(Refusal::SocketType)?,
    })
}

/// A property's name and value, and what follows.
fn property(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (len, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*len))?;
    let (len, rest) = rest.split_first_chunk()?;
    let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((name, value, rest))
}

/// The greeting that the socket library gets to see: ours, whatever the peer's says. It waits for
/// one before it sends its READY, so this is not held back until the peer's READY is here.
pub(super) fn inner_greeting() -> [u8; GREETING_LEN] {
    let mut greeting = [0; GREETING_LEN];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

/// The peer's READY as the socket library gets to see it: with the identity under which this
/// side knows the connection.
pub(super) fn inner_ready(ready: &Ready, identity: &[u8]) -> Vec<u8> {
    let mut command = b"\x05READY".to_vec();
    for (name, value) in [
        ("Socket-Type", ready.socket_type.as_bytes()),
        ("Identity", identity),
    ] {
        command.push(name.len() as u8);
        command.extend_from_slice(name.as_bytes());
        command.extend_from_slice(&(value.len() as u32).to_be_bytes());
        command.extend_from_slice(value);
    }
    let mut bytes = vec![FLAG_COMMAND, command.len() as u8];
    bytes.extend_from_slice(&command);
    bytes
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
