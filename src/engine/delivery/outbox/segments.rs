//! What lies in which segment of the journal, and what its entries say of messages elsewhere.

use std::collections::BTreeMap;

use crate::engine::delivery::ranges::Ranges;
use crate::journal::Position;

/// What a segment takes without an entry, in bytes.
const EMPTY: u64 = 48;

/// A segment that is on the disk.
#[derive(Debug, Default)]
pub(super) struct Segment {
    /// How long it is, as far as is known, in bytes.
    pub(super) size: u64,
    /// How many messages lie in it that are not settled, and their bytes.
    pub(super) live: u64,
    pub(super) live_bytes: u64,
    /// All messages that are stored in it, also those that lie elsewhere by now or are settled.
    pub(super) messages: Ranges,
    /// Those of which its other entries say something.
    pub(super) told: Ranges,
    /// It is no longer wanted, and will be removed.
    pub(super) goes: bool,
}

/// The segments that are on the disk, by number.
#[derive(Debug, Default)]
pub(super) struct Segments {
    all: BTreeMap<u64, Segment>,
    /// The one that is being written, as far as is known; zero before there is one.
    pub(super) newest: u64,
    /// How much was written to them by now, in bytes.
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

    /// There is an entry in the journal there; whether it is in a segment that is new.
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

    /// The segments before that one, which is new, may be there too: a write to them failed.
    pub(super) fn suspect(&mut self, last: u64, new: u64) {
        for number in last + 1..new {
            self.all.entry(number).or_default().size += EMPTY;
        }
    }

    /// These are on the disk, with their lengths; the last is the one that is being written.
    pub(super) fn found(&mut self, segments: &[(u64, u64)]) {
        let mut known = std::mem::take(&mut self.all);
        for (number, length) in segments {
            let mut segment = known.remove(number).unwrap_or_default();
            segment.size = segment.size.max(*length);
            self.all.insert(*number, segment);
        }
        self.newest = self.all.last_key_value().map_or(0, |(number, _)| *number);
    }

    /// A message of that size lies there.
    pub(super) fn enter(&mut self, number: u64, message: u64, size: u32) {
        let segment = self.all.entry(number).or_default();
        segment.live += 1;
        segment.live_bytes += u64::from(size);
        segment.messages.insert(message);
    }

    /// A message is stored there that is settled by now.
    pub(super) fn store(&mut self, number: u64, message: u64) {
        self.all.entry(number).or_default().messages.insert(message);
    }

    /// It is settled, or lies elsewhere; whether it was the last.
    pub(super) fn leave(&mut self, number: u64, size: u32) -> bool {
        let Some(segment) = self.all.get_mut(&number) else { return false };
        segment.live -= 1;
        segment.live_bytes -= u64::from(size);
        segment.live == 0
    }

    /// An entry there says something of messages.
    pub(super) fn tell(&mut self, number: u64, messages: impl Iterator<Item = u64>) {
        let segment = self.all.entry(number).or_default();
        messages.for_each(|message| _ = segment.told.insert(message));
    }

    /// The same of all from `first` to `last`.
    pub(super) fn tell_range(&mut self, number: u64, first: u64, last: u64) {
        self.all.entry(number).or_default().told.insert_range(first, last);
    }

    pub(super) fn remove(&mut self, number: u64) -> bool {
        self.all.remove(&number).is_some()
    }
}
