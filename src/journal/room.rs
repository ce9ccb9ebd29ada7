//! The free space of a journal's disk, and the spare file, which reserves space for when the disk
//! is full: entries must be written before segments can be removed.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::storage::Storage;
use super::{Need, Options};

/// The interval at which a full disk is checked for free space.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The interval after a disk reported free space but had none.
const DOUBT: Duration = Duration::from_secs(1);
/// The size of the spare file: this fraction of a segment, at most this many bytes.
const SPARE_PART: u64 = 16;
const MOST_SPARE: u64 = 4 * 1024 * 1024;
/// Or this multiple of the entry that began the last segment, rounded up: other entries of that
/// size may follow it, and then the entry that begins the next segment, which can be as long as
/// both.
const SPARE_FIRSTS: u64 = 3;
const SPARE_STEP: u64 = 1024 * 1024;
/// Space for other urgent entries beside a rewritten segment: this fraction of the segment, or this
/// many bytes if that is more (unless segments are as short as in tests).
const BESIDE_PART: u64 = 4;
const BESIDE: u64 = 1024 * 1024;
/// The fraction of the reserve that urgent entries leave to removals; and the fraction of that
/// which [`Need::Sending`] and [`Need::Emergency`] leave too.
const LAST_PART: u64 = 2;
const SENDING_PART: u64 = 2;
const LEAST_PART: u64 = 8;
/// Space is scarce if fewer than this many segments fit.
const SCARCE: u64 = 4;
/// The least number of segments that fit a disk, unless they would be shorter than this.
const SEGMENTS: u64 = 32;
const SHORTEST_SEGMENT: u64 = 1024 * 1024;

/// The free space of a journal's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) level: Level,
    /// The bytes that may be written if only urgent entries are.
    pub(crate) bytes: u64,
    /// The last bytes of that, for entries of [`Need::Removal`] alone.
    pub(crate) last: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Ample,
    /// Only a few more segments fit.
    Scarce,
    /// Only urgent entries are stored.
    Full,
}

/// News of a journal's disk, for its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DiskNews {
    Room(Room),
    /// The removed segments of a list passed to [`super::Journal::remove`].
    Removed(Vec<u64>),
}

/// A callback for news of the disk, called by the writer thread.
pub(crate) type Watch = Box<dyn FnMut(DiskNews) + Send>;

/// Returns the segment length in bytes for a cleaned journal on a disk of that size; at most
/// `longest`.
pub(super) fn fitting_segment(disk: u64, longest: u64) -> u64 {
    (disk / SEGMENTS).max(SHORTEST_SEGMENT).min(longest)
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// This many bytes are reserved.
    Kept(u64),
    /// The disk is full, and only urgent entries are written; at least `left` bytes of them fit. At
    /// `look`, the reserve is taken again if there is space.
    Given { left: u64, last: u64, look: Instant },
    /// The reserve can't be taken, for another reason than a full disk.
    None,
}

/// The reserved space.
pub(super) struct Spare {
    storage: Arc<dyn Storage>,
    segment_size: u64,
    is_cleaned: bool,
    state: State,
    /// The length in bytes of the last entry that began a segment.
    first: u64,
}

impl Spare {
    pub(super) fn new(storage: Arc<dyn Storage>, options: &Options) -> Self {
        let Options { segment_size, cleaned: is_cleaned, .. } = *options;
        Self { storage, segment_size, is_cleaned, state: State::None, first: 0 }
    }

    /// Returns true if only urgent entries may be written.
    pub(super) fn is_given(&self) -> bool {
        matches!(self.state, State::Given { .. })
    }

    /// Returns true if entries of that need and size may be written to a full disk.
    pub(super) fn admits(&self, need: Need, bytes: u64) -> bool {
        let (left, last) = match self.state {
            State::Given { left, last, .. } => (left, last),
            State::Kept(_) | State::None => (u64::MAX, 0),
        };
        let kept_back = match need {
            Need::None => return false,
            // All that is left.
            _ if last == 0 => return true,
            Need::Urgent => last,
            Need::Sending => last / SENDING_PART,
            Need::Emergency => last / LEAST_PART,
            Need::Removal => 0,
        };
        left >= kept_back.saturating_add(bytes)
    }

    /// The time of the next check for free space.
    pub(super) fn looks_at(&self) -> Option<Instant> {
        match self.state {
            State::Given { look, .. } => Some(look),
            State::Kept(_) | State::None => None,
        }
    }

    /// Records the length of an entry that began a segment.
    pub(super) fn began_with(&mut self, length: u64) {
        self.first = length;
    }

    /// Counts bytes written.
    pub(super) fn wrote(&mut self, bytes: u64) {
        if let State::Given { left, .. } = &mut self.state {
            *left = left.saturating_sub(bytes);
        }
    }

    /// Counts bytes removed.
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
        // Space for rewriting a long segment is not reserved before it may be needed.
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

    /// Takes the reserve, if there is enough free space.
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
                    tracing::info!("the disk has free space again");
                }
                State::Kept(wanted)
            }
            Err(error) if is_full(&error) => {
                if !was_given {
                    tracing::warn!("the disk is full: only entries that free space are stored");
                }
                given(if free.is_none() || was_given { DOUBT } else { LOOK_AGAIN })
            }
            Err(error) => {
                tracing::warn!(%error, "can't reserve space for when the disk is full");
                State::None
            }
        };
    }

    /// Gives up the reserve; returns true if there was one.
    ///
    /// # Errors
    /// The system's error if the reserve can't be released. It is taken again with the next segment.
    pub(super) fn give(&mut self) -> io::Result<bool> {
        let State::Kept(kept) = self.state else { return Ok(false) };
        self.state = State::None;
        let gave = self.storage.give_spare().map_err(|error| {
            let text = format!("the disk is full, and its reserve can't be released: {error}");
            io::Error::new(error.kind(), text)
        })?;
        if gave {
            tracing::warn!("the disk is full: only entries that free space are stored");
            let look = Instant::now() + LOOK_AGAIN;
            let last = if self.is_cleaned { kept / LAST_PART } else { 0 };
            self.state = State::Given { left: kept, last, look };
        }
        Ok(gave)
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
