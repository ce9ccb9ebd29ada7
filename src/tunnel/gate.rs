//! The frame gate: parses a peer's bytes into batches, and rejects what no node sends.
//!
//! ```text
//!  greeting (64 bytes) ─▶ READY with a node's identity ─▶ frames, counted ─▶ batches
//! ```
//!
//! A pure state machine. A peer's claim alone never allocates: a frame's length is checked before
//! its first byte is awaited, and memory grows only with the bytes that have arrived.

use bytes::{Buf, Bytes, BytesMut};

use super::Refusal;
use super::zmtp::{
    FLAG_COMMAND, FLAG_LONG, FLAG_MORE, GREETING_LEN, MAX_READY, check_greeting, read_ready,
};
use crate::identity::NodeId;
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

/// Parses and checks the inbound direction of one connection.
#[derive(Debug)]
pub(super) struct Gate {
    limits: GateLimits,
    admitted: bool,
    greeted: bool,
    /// The frames of an incomplete multipart message.
    frames: Vec<Bytes>,
    /// The size of those frames and the next one.
    bytes: u64,
    /// The next frame, once its header was read: its length, and whether more follow.
    expected: Option<(usize, bool)>,
}

impl Gate {
    pub(super) fn new(limits: GateLimits) -> Self {
        Self {
            limits,
            admitted: false,
            greeted: false,
            frames: Vec::new(),
            bytes: 0,
            expected: None,
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

    /// Consumes the handshake from `input`. Returns the claimed node id once the handshake is
    /// complete. The bytes after it are for [`Gate::next_batch`].
    ///
    /// # Errors
    /// The [`Refusal`] with which to cut the connection.
    pub(super) fn handshake(&mut self, input: &mut BytesMut) -> Result<Option<NodeId>, Refusal> {
        if !self.greeted {
            check_greeting(&input[..input.len().min(GREETING_LEN)])?;
            if input.len() < GREETING_LEN {
                return Ok(None);
            }
            input.advance(GREETING_LEN);
            self.greeted = true;
        }
        let most = input.len().min(9 + MAX_READY);
        let Some((claimed, len)) = read_ready(&input[..most])? else { return Ok(None) };
        input.advance(len);
        Ok(Some(claimed))
    }

    /// Consumes the next whole batch from `input`.
    ///
    /// # Errors
    /// The [`Refusal`] with which to cut the connection.
    pub(super) fn next_batch(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<Vec<Bytes>>, Refusal> {
        loop {
            let (len, more) = match self.expected {
                Some(frame) => frame,
                None => match self.frame_header(input)? {
                    Some(frame) => frame,
                    None => return Ok(None),
                },
            };
            self.expected = Some((len, more));
            if input.len() < len {
                return Ok(None);
            }
            self.expected = None;
            self.frames.push(input.split_to(len).freeze());
            if !more {
                self.bytes = 0;
                return Ok(Some(std::mem::take(&mut self.frames)));
            }
        }
    }

    /// Consumes a frame's header, if it is complete, and counts the announced length.
    fn frame_header(&mut self, input: &mut BytesMut) -> Result<Option<(usize, bool)>, Refusal> {
        let Some(flags) = input.first().copied() else { return Ok(None) };
        if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 {
            return Err(Refusal::Flags);
        }
        if flags & FLAG_COMMAND != 0 {
            return Err(Refusal::Command);
        }
        if self.frames.len() >= self.limits.frames {
            return Err(Refusal::TooManyFrames);
        }
        let (head, len) = if flags & FLAG_LONG == 0 {
            (2, input.get(1).map(|len| u64::from(*len)))
        } else {
            let len = input.get(1..9).and_then(|len| len.try_into().ok());
            (9, len.map(u64::from_be_bytes))
        };
        let Some(len) = len else { return Ok(None) };
        self.bytes = self.bytes.saturating_add(len);
        let most = if self.admitted { u64::MAX } else { MAX_STRANGERS_MESSAGE };
        if self.bytes > self.limits.message.min(most) {
            return Err(Refusal::TooLarge);
        }
        input.advance(head);
        Ok(Some((len as usize, flags & FLAG_MORE != 0)))
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
