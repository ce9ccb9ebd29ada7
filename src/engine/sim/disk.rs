//! A disk with a real journal on it, which writes in groups: a crash tears what was not synced,
//! and writes may fail.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Random;
use crate::journal::crashing::{Disk as Bytes, Lost};
use crate::journal::stepped::{EntryKind, Stepped};
use crate::journal::{Entry, Level, Need, NotStored, Options, Persist, Position, Recovery, Room};

/// What ends without warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crash {
    /// What the system has survives.
    Process,
    /// Only what was synced survives for sure.
    Machine,
}

struct Write {
    token: Option<u64>,
    bytes: Vec<u8>,
    kind: EntryKind,
}

enum Step {
    Write(Write),
    RemoveBefore(u64),
    Remove(Vec<u64>),
}

#[derive(Default)]
pub(super) struct Disk {
    bytes: Arc<Bytes>,
    /// `None` while nobody has it open.
    journal: Option<Stepped>,
    waiting: VecDeque<Step>,
    being_written: Vec<Write>,
    pub(super) failing: bool,
    /// Its journal's segments are cleaned.
    is_cleaned: bool,
    /// Segments that were removed from a list, of which nobody was told yet.
    removed: Vec<u64>,
    told: Option<Level>,
}

/// About how large a segment is, in bytes.
pub(super) const SEGMENT: u64 = 3000;

impl Disk {
    /// One for a journal whose segments are cleaned.
    pub(super) fn cleaned() -> Self {
        Self { is_cleaned: true, ..Self::default() }
    }

    /// It holds that much at the most, in bytes.
    pub(super) fn limit(&self, capacity: u64) {
        self.bytes.limit(capacity);
    }

    /// Hands out what is on it, and goes on from there.
    pub(super) fn open(&mut self, take: impl FnMut(Entry<'_>)) -> Recovery {
        let cleaned = self.is_cleaned;
        let options = Options { segment_size: SEGMENT, cleaned, ..Options::default() };
        let (journal, recovery) = Stepped::open(&self.bytes, &options, take).unwrap();
        self.journal = Some(journal);
        recovery
    }

    pub(super) fn append(&mut self, token: Option<u64>, bytes: Vec<u8>, kind: EntryKind) {
        self.waiting.push_back(Step::Write(Write { token, bytes, kind }));
    }

    pub(super) fn remove_before(&mut self, segment: u64) {
        self.waiting.push_back(Step::RemoveBefore(segment));
    }

    pub(super) fn remove(&mut self, segments: Vec<u64>) {
        self.waiting.push_back(Step::Remove(segments));
    }

    /// The segments that are there, and how long each is, in bytes.
    pub(super) fn segments(&self) -> Vec<(u64, u64)> {
        self.journal.as_ref().expect("it is open").segments()
    }

    /// How much room there is, when it has been looked at.
    pub(super) fn look_for_room(&mut self) -> Room {
        let room = self.journal.as_mut().expect("it is open").look_for_room();
        self.told = Some(room.level);
        room
    }

    /// The same if nobody was told of a change.
    pub(super) fn changed_room(&mut self) -> Option<Room> {
        let room = self.journal.as_ref().expect("it is open").room();
        let changed = self.told != Some(room.level);
        self.told = Some(room.level);
        changed.then_some(room)
    }

    pub(super) fn level(&self) -> Level {
        self.journal.as_ref().expect("it is open").room().level
    }

    pub(super) fn has_removed(&self) -> bool {
        !self.removed.is_empty()
    }

    /// Segments that were removed from a list since this was asked last.
    pub(super) fn removed(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.removed)
    }

    /// Begins to write what waits; whether there is anything, and nothing is written already.
    pub(super) fn begin(&mut self) -> bool {
        if !self.being_written.is_empty() {
            return false;
        }
        let journal = self.journal.as_mut().expect("it is open");
        while let Some(Step::RemoveBefore(_) | Step::Remove(_)) = self.waiting.front() {
            match self.waiting.pop_front() {
                Some(Step::RemoveBefore(segment)) => journal.remove_before(segment),
                Some(Step::Remove(segments)) => {
                    journal.remove(segments.clone());
                    self.removed.extend(segments);
                }
                Some(Step::Write(_)) | None => unreachable!("it was looked at"),
            }
        }
        while let Some(Step::Write(_)) = self.waiting.front()
            && let Some(Step::Write(write)) = self.waiting.pop_front()
        {
            self.being_written.push(write);
        }
        !self.being_written.is_empty()
    }

    /// What was being written is written, or could not be.
    pub(super) fn finish(
        &mut self,
        fails: bool,
        random: &mut Random,
    ) -> Vec<(u64, Result<Position, NotStored>)> {
        if fails {
            let countdown = match random.once_in(2) {
                true => &self.bytes.write_fails,
                false => &self.bytes.sync_fails,
            };
            countdown.store(1, Ordering::SeqCst);
        }
        let tokens: Vec<_> = self.being_written.iter().map(|write| write.token).collect();
        let results = self.write();
        self.fail_no_more();
        let results = tokens.into_iter().zip(results);
        results.filter_map(|(token, result)| Some((token?, result))).collect()
    }

    fn write(&mut self) -> Vec<Result<Position, NotStored>> {
        let writes = std::mem::take(&mut self.being_written).into_iter();
        let journal = self.journal.as_mut().expect("it is open");
        journal.write(writes.map(|write| (write.bytes, write.kind)))
    }

    fn fail_no_more(&self) {
        self.bytes.write_fails.store(0, Ordering::SeqCst);
        self.bytes.sync_fails.store(0, Ordering::SeqCst);
    }

    /// Ends who has it open; what that took from it.
    pub(super) fn crash(&mut self, crash: Crash, random: &mut Random) -> Lost {
        self.waiting.clear();
        self.removed.clear();
        if !self.being_written.is_empty() {
            // Nothing comes behind what is being written, as after a write that fails.
            let behind = self.being_written.iter().skip(1);
            if let Some(next) = behind.map(|it| it.kind).position(|it| it == EntryKind::First) {
                self.being_written.truncate(next + 1);
            }
            // Some of it reached the file, or all, and was not synced.
            self.bytes.write_fails.store(random.below(2), Ordering::SeqCst);
            self.bytes.sync_fails.store(1, Ordering::SeqCst);
            self.write();
            self.fail_no_more();
        }
        self.journal = None;
        if crash == Crash::Process {
            return Lost::default();
        }
        self.bytes = self.bytes.crash(random.next());
        self.bytes.lost
    }

    /// Ends who has it open, when nothing is being written.
    pub(super) fn close(&mut self) {
        self.journal = None;
    }

    /// Stores something while the disk is well and nobody else writes.
    pub(super) fn store(&mut self, bytes: Vec<u8>) {
        self.being_written.push(Write { token: None, bytes, kind: EntryKind::Removal });
        assert!(self.write().iter().all(Result::is_ok));
    }

    /// What a backup of it would hold now, while nobody has it open.
    pub(super) fn copy(&self) -> Self {
        let bytes = Arc::new(self.bytes.copy());
        Self { bytes, is_cleaned: self.is_cleaned, ..Self::default() }
    }

    pub(super) fn at(&self, position: Position) -> Option<Vec<u8>> {
        self.journal.as_ref()?.read(position).ok()
    }
}

pub(super) fn kind(persist: Persist, need: Need) -> EntryKind {
    match persist {
        Persist::Sync if need == Need::None => EntryKind::Offered,
        Persist::Sync if need == Need::Emergency => EntryKind::Emergency,
        Persist::Sync if need == Need::Removal => EntryKind::Removal,
        Persist::Sync => EntryKind::Synced,
        Persist::Flush | Persist::Lazy => EntryKind::Note,
    }
}
