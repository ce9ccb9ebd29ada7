//! A disk with a journal on it, as its user sees it: entries that are written in groups, that a
//! crash may lose unless they were synced, and that may fail to be written.

use std::collections::VecDeque;

use super::Random;
use crate::journal::Position;

/// What ends without warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crash {
    /// What the system has survives.
    Process,
    /// Only what was synced survives for sure.
    Machine,
}

#[derive(Debug)]
struct Write {
    token: Option<u64>,
    bytes: Vec<u8>,
    sync: bool,
}

#[derive(Debug, Default)]
pub(super) struct Disk {
    entries: Vec<(Position, Vec<u8>)>,
    /// So many of them are synced.
    synced: usize,
    appended: u64,
    waiting: VecDeque<Write>,
    being_written: Vec<Write>,
    pub(super) failing: bool,
}

/// How many entries a segment takes.
const SEGMENT: u64 = 20;

impl Disk {
    pub(super) fn append(&mut self, token: Option<u64>, bytes: Vec<u8>, sync: bool) {
        self.waiting.push_back(Write { token, bytes, sync });
    }

    /// Begins to write what waits; whether there is anything, and nothing is written already.
    pub(super) fn begin(&mut self) -> bool {
        if !self.being_written.is_empty() || self.waiting.is_empty() {
            return false;
        }
        self.being_written = self.waiting.drain(..).collect();
        true
    }

    /// What was being written is written, or could not be.
    pub(super) fn finish(&mut self, fails: bool) -> Vec<(u64, Result<Position, String>)> {
        let writes = std::mem::take(&mut self.being_written);
        let sync = writes.iter().any(|write| write.sync);
        let mut results = Vec::new();
        for Write { token, bytes, .. } in writes {
            let result = match fails {
                true => Err("the disk fails".to_owned()),
                false => Ok(self.keep(bytes)),
            };
            results.extend(token.map(|token| (token, result)));
        }
        if sync && !fails {
            self.synced = self.entries.len();
        }
        results
    }

    fn keep(&mut self, bytes: Vec<u8>) -> Position {
        self.appended += 1;
        let (segment, length) = (1 + self.appended / SEGMENT, bytes.len() as u32);
        let position = Position { segment, offset: self.appended, length };
        self.entries.push((position, bytes));
        position
    }

    /// Loses what a crash loses; how many entries that were written are gone.
    pub(super) fn crash(&mut self, crash: Crash, random: &mut Random) -> u64 {
        self.waiting.clear();
        // Some of what was being written may have reached the file.
        let writes = std::mem::take(&mut self.being_written);
        let reached = random.below(writes.len() as u64 + 1) as usize;
        for write in writes.into_iter().take(reached) {
            self.keep(write.bytes);
        }
        let written = self.entries.len();
        if crash == Crash::Machine {
            let unsynced = (written - self.synced) as u64;
            self.entries.truncate(self.synced + random.below(unsynced + 1) as usize);
        }
        self.synced = self.entries.len();
        // The next life begins another segment.
        self.appended = (self.appended / SEGMENT + 1) * SEGMENT;
        (written - self.entries.len()) as u64
    }

    pub(super) fn remove_before(&mut self, segment: u64) {
        let before = self.entries.len();
        self.entries.retain(|(position, _)| position.segment >= segment);
        self.synced = self.synced.saturating_sub(before - self.entries.len());
    }

    pub(super) fn read(&self) -> impl Iterator<Item = (Position, &[u8])> {
        self.entries.iter().map(|(position, bytes)| (*position, &bytes[..]))
    }

    pub(super) fn at(&self, position: Position) -> Option<&[u8]> {
        let found = self.entries.iter().find(|(other, _)| *other == position);
        found.map(|(_, bytes)| &bytes[..])
    }
}
