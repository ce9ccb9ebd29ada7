//! A journal without a writer thread, on a disk that crashes: it writes when called.

use std::sync::Arc;

use super::crashing::{Disk, Mount};
use super::queue::{Append, Batch, Removal};
use super::storage::Storage;
use super::writer::Writer;
use super::{
    Done, Entry, JournalError, Need, NotStored, Options, Persist, Position, Recovery, Room, begin,
    lengths, read_entry,
};

/// The way in which an entry is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// At the start of a segment, with a sync.
    First,
    Synced,
    /// With a sync, but not on a full disk.
    Offered,
    /// With a sync, also with the last space of a full disk.
    Emergency,
    Removal,
    /// Without a sync.
    Note,
}

/// A journal that runs on the caller's thread.
pub(crate) struct Stepped {
    storage: Arc<dyn Storage>,
    salt: u64,
    writer: Writer,
}

impl Stepped {
    /// Opens the journal of a disk; its entries are passed to `take`.
    pub(crate) fn open(
        disk: &Arc<Disk>,
        options: &Options,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        let storage: Arc<dyn Storage> = Arc::new(Mount(disk.clone()));
        let (writer, salt, recovery) = begin(&storage, options, Box::new(|_| {}), take)?;
        Ok((Self { storage, salt, writer }, recovery))
    }

    /// Writes a batch; each entry counts as one message.
    pub(crate) fn write(
        &mut self,
        gathered: impl Iterator<Item = (Vec<u8>, EntryKind)>,
    ) -> Vec<Result<Position, NotStored>> {
        let (mut batch, mut results) = (Batch::default(), Vec::new());
        for (payload, kind) in gathered {
            let first = kind == EntryKind::First;
            let need = match kind {
                EntryKind::Offered => Need::None,
                EntryKind::Synced | EntryKind::Note => Need::Urgent,
                EntryKind::Emergency => Need::Emergency,
                EntryKind::First | EntryKind::Removal => Need::Removal,
            };
            let persist = if kind == EntryKind::Note { Persist::Flush } else { Persist::Sync };
            let append = Append { persist, first, need, messages: 1, ..Append::new(Done::Nobody) };
            batch.push(&payload, append);
        }
        self.writer.store(&batch.bytes, &batch.appends, &mut results);
        results
    }

    /// Reads a stored entry.
    pub(crate) fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        read_entry(&*self.storage, self.salt, position)
    }

    /// Returns the disk space after a check.
    pub(crate) fn look_for_room(&mut self) -> Room {
        self.writer.look_for_room();
        self.writer.room()
    }

    /// Returns the disk space as last checked.
    pub(crate) fn room(&self) -> Room {
        self.writer.room()
    }

    /// Returns the existing segments and their lengths in bytes.
    pub(crate) fn segments(&self) -> Vec<(u64, u64)> {
        lengths(&*self.storage, self.writer.number()).unwrap_or_default()
    }

    /// Removes the segments before `segment`.
    pub(crate) fn remove_before(&mut self, segment: u64) {
        self.writer.remove(&Removal::Before(segment));
    }

    /// Removes segments; any but the current one.
    pub(crate) fn remove(&mut self, segments: Vec<u64>) {
        self.writer.remove(&Removal::These(segments));
    }
}
