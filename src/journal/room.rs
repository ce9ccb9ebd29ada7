//! The room on a journal's disk, and the part of it that is kept for when the disk is full: what
//! frees room has to be written first.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::storage::Storage;
use super::{Need, Options};

/// After the disk was full, it is asked so often whether there is room again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The same when it has just said so, and there was none.
const DOUBT: Duration = Duration::from_secs(1);
/// What is kept: such a part of a segment, and no more than that, in bytes.
const SPARE_PART: u64 = 16;
const MOST_SPARE: u64 = 4 * 1024 * 1024;
/// Or so often what a segment began with, rounded up: as much again may come behind it, and then
/// what the next one begins with, which can be as long as both.
const SPARE_FIRSTS: u64 = 3;
const SPARE_STEP: u64 = 1024 * 1024;
/// Beside a segment that is written once more there is room for what else is urgent: such a part
/// of it, or so much if that is more (and segments are not as short as in tests).
const BESIDE_PART: u64 = 4;
const BESIDE: u64 = 1024 * 1024;
/// Such a part of what is kept is for what has segments removed alone; and such a part of that also
/// when nothing else can be done about a full disk.
const LAST_PART: u64 = 2;
const LEAST_PART: u64 = 8;
/// With less room than for so many segments it is scarce.
const SCARCE: u64 = 4;
/// A disk is as large as this many segments at the least, unless they would be too short.
const SEGMENTS: u64 = 32;
const SHORTEST_SEGMENT: u64 = 1024 * 1024;

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) level: Level,
    /// What may be taken of it when nothing but what is urgent is written, in bytes.
    pub(crate) bytes: u64,
    /// The last of that is for what has segments removed alone.
    pub(crate) last: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Ample,
    /// It would do for a few more segments.
    Scarce,
    /// Only what is urgent is stored.
    Full,
}

/// What the owner of a journal is told of its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DiskNews {
    Room(Room),
    /// Of the segments that were to be removed by a list, these are gone.
    Removed(Vec<u64>),
}

/// Is told of the disk, by the thread that writes.
pub(crate) type Watch = Box<dyn FnMut(DiskNews) + Send>;

/// How long segments are that can be cleaned on a disk of that size, in bytes; no longer than
/// `longest`.
pub(super) fn fitting_segment(disk: u64, longest: u64) -> u64 {
    (disk / SEGMENTS).max(SHORTEST_SEGMENT).min(longest)
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// So many bytes are kept.
    Kept(u64),
    /// The disk is full, and only what is urgent is written: so many bytes of it at the least. The
    /// room is taken again when there is some, which is looked at then.
    Given { left: u64, last: u64, look: Instant },
    /// The disk can't, for another reason than that it is full.
    None,
}

/// The room that is kept.
pub(super) struct Spare {
    storage: Arc<dyn Storage>,
    segment_size: u64,
    is_cleaned: bool,
    state: State,
    /// How long the last entry is that was to begin a segment, in bytes.
    first: u64,
}

impl Spare {
    pub(super) fn new(storage: Arc<dyn Storage>, options: &Options) -> Self {
        let Options { segment_size, cleaned: is_cleaned, .. } = *options;
        Self { storage, segment_size, is_cleaned, state: State::None, first: 0 }
    }

    /// Only what is urgent is to be written.
    pub(super) fn is_given(&self) -> bool {
        matches!(self.state, State::Given { .. })
    }

    /// Whether so many bytes may be written now that only what is urgent is.
    pub(super) fn admits(&self, need: Need, bytes: u64) -> bool {
        let (left, last) = match self.state {
            State::Given { left, last, .. } => (left, last),
            State::Kept(_) | State::None => (u64::MAX, 0),
        };
        let kept_back = match need {
            Need::None => return false,
            // Whatever is there.
            _ if last == 0 => return true,
            Need::Urgent => last,
            Need::Emergency => last / LEAST_PART,
            Need::Removal => 0,
        };
        left >= kept_back.saturating_add(bytes)
    }

    /// When to look whether there is room again.
    pub(super) fn looks_at(&self) -> Option<Instant> {
        match self.state {
            State::Given { look, .. } => Some(look),
            State::Kept(_) | State::None => None,
        }
    }

    /// An entry of that length began a segment.
    pub(super) fn began_with(&mut self, length: u64) {
        self.first = length;
    }

    /// So much was written.
    pub(super) fn wrote(&mut self, bytes: u64) {
        if let State::Given { left, .. } = &mut self.state {
            *left = left.saturating_sub(bytes);
        }
    }

    /// So much was removed.
    pub(super) fn freed(&mut self, bytes: u64) {
        if let State::Given { left, .. } = &mut self.state {
            *left = left.saturating_add(bytes);
        }
    }

    pub(super) fn room(&self) -> Room {
        let free = self.storage.free();
        match self.state {
            State::Given { left, last, .. } => {
                Room { level: Level::Full, bytes: free.unwrap_or(u64::MAX).min(left), last }
            }
            State::Kept(_) | State::None => {
                let level = if self.is_scarce(free) { Level::Scarce } else { Level::Ample };
                let kept = if let State::Kept(kept) = self.state { kept } else { 0 };
                Room { level, bytes: free.unwrap_or(u64::MAX).saturating_add(kept), last: 0 }
            }
        }
    }

    fn is_scarce(&self, free: Option<u64>) -> bool {
        free.is_some_and(|free| free < SCARCE * self.segment_size)
    }

    fn wanted(&self, free: Option<u64>) -> u64 {
        let usual = (self.segment_size / SPARE_PART).min(MOST_SPARE);
        let beside = (self.segment_size / BESIDE_PART).max(BESIDE.min(3 * self.segment_size));
        let cleaning = self.segment_size + beside;
        let usual = match SPARE_FIRSTS * self.first {
            _ if self.is_cleaned && cleaning <= MOST_SPARE => cleaning,
            more if more > usual && !self.is_cleaned => more.next_multiple_of(SPARE_STEP),
            _ => usual,
        };
        // A long segment is not kept room for before it may be wanted.
        let is_long = || {
            let lengths = self.storage.segments().map(|segments| {
                let lengths = segments.into_iter().map(|segment| self.storage.length(segment));
                lengths.map(Result::unwrap_or_default).sum::<u64>()
            });
            lengths.is_ok_and(|length| length >= 2 * self.segment_size)
        };
        match self.is_cleaned && usual < cleaning && self.is_scarce(free) && is_long() {
            true => cleaning,
            false => usual,
        }
    }

    /// Takes the room, if there is as much.
    pub(super) fn take(&mut self) {
        let free = self.storage.free();
        let wanted = self.wanted(free);
        if let State::Kept(kept) = self.state
            && kept >= wanted
        {
            return;
        }
        let left = match self.state {
            State::Given { left, .. } => left,
            State::Kept(kept) => kept.saturating_add(free.unwrap_or_default()),
            State::None => free.unwrap_or(u64::MAX),
        };
        let last = if self.is_cleaned { wanted / LAST_PART } else { 0 };
        let given = |pause| State::Given { left, last, look: Instant::now() + pause };
        if self.is_given() && free.is_some_and(|free| free < wanted) {
            self.state = given(LOOK_AGAIN);
            return;
        }
        let was_given = self.is_given();
        self.state = match self.storage.take_spare(wanted) {
            Ok(()) => {
                if was_given {
                    tracing::info!("the disk has room again");
                }
                State::Kept(wanted)
            }
            Err(error) if is_full(&error) => {
                if !was_given {
                    tracing::warn!("the disk is full: only what frees room is stored");
                }
                given(if free.is_none() || was_given { DOUBT } else { LOOK_AGAIN })
            }
            Err(error) => {
                tracing::warn!(%error, "no room can be kept for when the disk is full");
                State::None
            }
        };
    }

    /// Gives it up; whether there was any.
    pub(super) fn give(&mut self) -> bool {
        let State::Kept(kept) = self.state else { return false };
        let gave = self.storage.give_spare().unwrap_or_default();
        if gave {
            tracing::warn!("the disk is full: only what frees room is stored");
            let look = Instant::now() + LOOK_AGAIN;
            let last = if self.is_cleaned { kept / LAST_PART } else { 0 };
            self.state = State::Given { left: kept, last, look };
        }
        gave
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fit_their_disk() {
        const MIB: u64 = 1024 * 1024;
        for (disk, segment) in [(24, 1), (320, 10), (2048, 64), (1 << 20, 64)] {
            assert_eq!(fitting_segment(disk * MIB, 64 * MIB), segment * MIB, "{disk} MiB");
        }
        assert_eq!(fitting_segment(u64::MAX, 3000), 3000);
    }
}
