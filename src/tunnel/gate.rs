//! The frame gate: parses a peer's bytes into batches, and rejects what no node sends.
//!
//! ```text
//!  greeting (64 bytes) ─▶ READY ─▶ frames, counted ─▶ batches
//!                                └▶ commands, counted ─▶ PINGs; others are passed over
//! ```
//!
//! A pure state machine. A peer's claim alone never allocates: a frame's length is checked before
//! its first byte is awaited, and memory grows only with the bytes that have arrived.

use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};

use super::Refusal;
use super::zmtp::{
    End, FLAG_COMMAND, FLAG_LONG, FLAG_MORE, GREETING_LEN, MAX_COMMAND, Ready, check_greeting,
    ping_context, read_ready,
};
use crate::message::MAX_HEADER;
use crate::wire::{MAX_BATCH, MAX_FRAMES};

/// The size limits of multipart messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GateLimits {
    /// The maximum number of bytes in all frames of one multipart message.
    pub(crate) message: u64,
    pub(crate) frames: usize,
}

impl GateLimits {
    /// The limits for a node whose bodies are at most `max_body` bytes long.
    pub(crate) fn for_bodies(max_body: u64) -> Self {
        let single = max_body + 2 * MAX_HEADER as u64;
        Self { message: single.max(2 * MAX_BATCH as u64), frames: MAX_FRAMES }
    }
}

/// The maximum size of a multipart message from a peer whose hello is not accepted yet.
pub(super) const MAX_STRANGERS_MESSAGE: u64 = 64 * 1024;

/// The number of commands that a peer may send at once, and in each further second. A client of
/// libzmq sends one per `ZMQ_HEARTBEAT_IVL`.
const COMMANDS_AT_ONCE: u32 = 256;
const COMMANDS_A_SECOND: u32 = 128;

/// An arrival after the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Received {
    Batch(Vec<Bytes>),
    /// A PING with this context, which wants its PONG.
    Ping(Bytes),
}

/// Parses and checks the inbound direction of one connection.
#[derive(Debug)]
pub(super) struct Gate {
    end: End,
    limits: GateLimits,
    admitted: bool,
    greeted: bool,
    /// The frames of an incomplete multipart message.
    frames: Vec<Bytes>,
    /// The size of those frames and the next one.
    bytes: u64,
    /// The next frame, once its header was read.
    expected: Option<Frame>,
    commands: Commands,
}

/// The header of a frame.
#[derive(Debug, Clone, Copy)]
enum Frame {
    Message { len: usize, more: bool },
    Command { len: usize },
}

impl Gate {
    pub(super) fn new(end: End, limits: GateLimits) -> Self {
        Self {
            end,
            limits,
            admitted: false,
            greeted: false,
            frames: Vec::new(),
            bytes: 0,
            expected: None,
            commands: Commands::default(),
        }
    }

    /// Records that the peer's hello was accepted: the configured limit holds from now on.
    pub(super) fn admit(&mut self) {
        self.admitted = true;
    }

    /// Returns true if a valid greeting has arrived.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Consumes the handshake from `input`. Returns the peer's READY once the handshake is
    /// complete. The bytes after it are for [`Gate::next`].
    ///
    /// # Errors
    /// The [`Refusal`] with which to cut the connection.
    pub(super) fn handshake(&mut self, input: &mut BytesMut) -> Result<Option<Ready>, Refusal> {
        if !self.greeted {
            check_greeting(&input[..input.len().min(GREETING_LEN)])?;
            if input.len() < GREETING_LEN {
                return Ok(None);
            }
            input.advance(GREETING_LEN);
            self.greeted = true;
        }
        let most = input.len().min(9 + MAX_COMMAND);
        let Some((ready, len)) = read_ready(&input[..most], self.end)? else { return Ok(None) };
        input.advance(len);
        Ok(Some(ready))
    }

    /// Consumes the next whole batch or PING from `input`. Other commands are passed over. libzmq
    /// sends a PING even between the frames of a message.
    ///
    /// # Errors
    /// The [`Refusal`] with which to cut the connection.
    pub(super) fn next(
        &mut self,
        input: &mut BytesMut,
        now: Instant,
    ) -> Result<Option<Received>, Refusal> {
        loop {
            let frame = match self.expected {
                Some(frame) => frame,
                None => match self.frame_header(input, now)? {
                    Some(frame) => frame,
                    None => return Ok(None),
                },
            };
            self.expected = Some(frame);
            let (Frame::Message { len, .. } | Frame::Command { len }) = frame;
            if input.len() < len {
                return Ok(None);
            }
            self.expected = None;
            let bytes = input.split_to(len);
            match frame {
                Frame::Command { .. } => {
                    if let Some(context) = ping_context(&bytes)? {
                        return Ok(Some(Received::Ping(Bytes::copy_from_slice(context))));
                    }
                }
                Frame::Message { more, .. } => {
                    self.frames.push(bytes.freeze());
                    if !more {
                        self.bytes = 0;
                        return Ok(Some(Received::Batch(std::mem::take(&mut self.frames))));
                    }
                }
            }
        }
    }

    /// Consumes a frame's header, if it is complete, and counts the announced length.
    fn frame_header(
        &mut self,
        input: &mut BytesMut,
        now: Instant,
    ) -> Result<Option<Frame>, Refusal> {
        let Some(flags) = input.first().copied() else { return Ok(None) };
        let (is_command, more) = (flags & FLAG_COMMAND != 0, flags & FLAG_MORE != 0);
        if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 || is_command && more {
            return Err(Refusal::Flags);
        }
        if !is_command && self.frames.len() >= self.limits.frames {
            return Err(Refusal::TooManyFrames);
        }
        let (head, len) = if flags & FLAG_LONG == 0 {
            (2, input.get(1).map(|len| u64::from(*len)))
        } else {
            let len = input.get(1..9).and_then(|len| len.try_into().ok());
            (9, len.map(u64::from_be_bytes))
        };
        let Some(len) = len else { return Ok(None) };
        if is_command {
            if len > MAX_COMMAND as u64 {
                return Err(Refusal::Command);
            }
            if !self.commands.take(now) {
                return Err(Refusal::TooManyCommands);
            }
            input.advance(head);
            return Ok(Some(Frame::Command { len: len as usize }));
        }
        self.bytes = self.bytes.saturating_add(len);
        let most = if self.admitted { u64::MAX } else { MAX_STRANGERS_MESSAGE };
        if self.bytes > self.limits.message.min(most) {
            return Err(Refusal::TooLarge);
        }
        input.advance(head);
        Ok(Some(Frame::Message { len: len as usize, more }))
    }
}

/// The commands of a peer, limited by a token bucket.
#[derive(Debug, Default)]
struct Commands {
    /// The number of tokens taken, and when they were last counted.
    taken: u32,
    counted: Option<Instant>,
}

impl Commands {
    /// Takes a token; returns false if there is none.
    fn take(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(*self.counted.get_or_insert(now));
        let earned = since.as_millis().saturating_mul(u128::from(COMMANDS_A_SECOND)) / 1000;
        if earned > 0 {
            self.taken = self.taken.saturating_sub(u32::try_from(earned).unwrap_or(u32::MAX));
            self.counted = Some(now);
        }
        self.taken += 1;
        self.taken <= COMMANDS_AT_ONCE
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
