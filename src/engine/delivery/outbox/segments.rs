//! The content of each journal segment: its messages, and its records about messages elsewhere.

use std::collections::BTreeMap;

use crate::engine::delivery::ranges::Ranges;
use crate::journal::Position;

/// The size of a segment without entries, in bytes.
const EMPTY: u64 = 48;

/// A segment on the disk.
#[derive(Debug, Default)]
pub(super) struct Segment {
    /// The known length, in bytes.
    pub(super) size: u64,
    /// The number of unsettled messages stored here, and their bytes.
    pub(super) live: u64,
    pub(super) live_bytes: u64,
    /// All messages stored here, also those since moved or settled.
    pub(super) messages: Ranges,
    /// The messages about which its other entries hold records.
    pub(super) told: Ranges,
    /// The segment is no longer needed, and is to be removed.
    pub(super) goes: bool,
}

/// The segments on the disk, by number.
#[derive(Debug, Default)]
pub(super) struct Segments {
    all: BTreeMap<u64, Segment>,
    /// The newest known segment; zero before there is one.
    pub(super) newest: u64,
    /// The bytes written so far.
    pub(super) written: u64,
}

impl Segments {
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &Segment)> {
        self.all.iter().map(|(number, segment)| (*number, segment))
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, number: u64) -> Option<&Segment> {
        self.all.get(&number)
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Segment> {
        self.all.get_mut(&number)
    }

    /// Records an entry at a position; returns true if its segment is new.
    pub(super) fn reach(&mut self, position: Position) -> bool {
        let is_new = position.segment > self.newest;
        self.newest = self.newest.max(position.segment);
        let segment = self.all.entry(position.segment).or_default();
        let end = position.offset + u64::from(position.length);
        let more = end.saturating_sub(segment.size);
        segment.size += more;
        self.written += more;
        is_new
    }

    /// Adds the segments between `last` and `new`, which may exist after failed writes.
    pub(super) fn suspect(&mut self, last: u64, new: u64) {
        for number in last + 1..new {
            self.all.entry(number).or_default().size += EMPTY;
        }
    }

    /// Sets the existing segments and their lengths; the last is the current one.
    pub(super) fn found(&mut self, segments: &[(u64, u64)]) {
        let mut known = std::mem::take(&mut self.all);
        for (number, length) in segments {
            let mut segment = known.remove(number).unwrap_or_default();
            segment.size = segment.size.max(*length);
            self.all.insert(*number, segment);
        }
        self.newest = self.all.last_key_value().map_or(0, |(number, _)| *number);
    }

    /// Adds an unsettled message to a segment.
    pub(super) fn enter(&mut self, number: u64, message: u64, size: u32) {
        let segment = self.all.entry(number).or_default();
        segment.live += 1;
        segment.live_bytes += u64::from(size);
        segment.messages.insert(message);
    }

    /// Adds a message to a segment that is settled by now.
    pub(super) fn store(&mut self, number: u64, message: u64) {
        self.all.entry(number).or_default().messages.insert(message);
    }

    /// Removes a settled or moved message; returns true if it was the last.
    pub(super) fn leave(&mut self, number: u64, size: u32) -> bool {
        let Some(segment) = self.all.get_mut(&number) else { return false };
        segment.live -= 1;
        segment.live_bytes -= u64::from(size);
        segment.live == 0
    }

    /// Records that an entry of a segment holds records about messages.
    pub(super) fn tell(&mut self, number: u64, messages: impl Iterator<Item = u64>) {
        let segment = self.all.entry(number).or_default();
        messages.for_each(|message| _ = segment.told.insert(message));
    }

    /// Records the same for the messages from `first` to `last`.
    pub(super) fn tell_range(&mut self, number: u64, first: u64, last: u64) {
        self.all.entry(number).or_default().told.insert_range(first, last);
    }

    pub(super) fn remove(&mut self, number: u64) -> bool {
        self.all.remove(&number).is_some()
    }
}
