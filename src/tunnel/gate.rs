//! The frame gate: turns bytes from a network into batches, and cuts what no node sends.
//!
//! ```text
//!  greeting (64 bytes) ─▶ READY with a node's identity ─▶ frames, counted ─▶ batches
//! ```
//!
//! A pure state machine. Nothing is allocated on a peer's word: a frame's length is checked
//! before a byte of it is awaited, and memory grows with the bytes that have arrived.

use bytes::{Buf, Bytes, BytesMut};

use super::Refusal;
use super::zmtp::{
    FLAG_COMMAND, FLAG_LONG, FLAG_MORE, GREETING_LEN, MAX_READY, check_greeting, read_ready,
};
use crate::identity::NodeId;
use crate::message::MAX_HEADER;
use crate::wire::{MAX_BATCH, MAX_FRAMES};

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
        Self { message: single.max(2 * MAX_BATCH as u64), frames: MAX_FRAMES }
    }
}

/// The most bytes in one multipart message of a peer whose hello was not accepted yet.
pub(super) const MAX_STRANGERS_MESSAGE: u64 = 64 * 1024;

/// Watches the inward direction of one connection.
#[derive(Debug)]
pub(super) struct Gate {
    limits: GateLimits,
    admitted: bool,
    greeted: bool,
    /// The frames of a multipart message whose end has not come.
    frames: Vec<Bytes>,
    /// What those and the frame to come hold.
    bytes: u64,
    /// The frame to come, once its header was read: its length, and whether more follow.
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

    /// The peer's hello is accepted: from the next message on the configured limit holds.
    pub(super) fn admit(&mut self) {
        self.admitted = true;
    }

    /// Whether the peer's greeting was seen and is one of ours.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Takes the handshake out of the bytes that have arrived; whom the peer claims to be, once
    /// it is whole. What follows is for [`Gate::next_batch`].
    ///
    /// # Errors
    /// The [`Refusal`] that cuts the connection.
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

    /// Takes the next whole batch out of the bytes that have arrived.
    ///
    /// # Errors
    /// The [`Refusal`] that cuts the connection.
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

    /// Reads a frame's header, if all of it is there, and counts what it announces.
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
