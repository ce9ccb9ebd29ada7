//! A journal without a thread, on a disk that crashes: it writes when it is told to.

use std::sync::Arc;

use super::crashing::{Disk, Mount};
use super::queue::{Append, Batch, Removal};
use super::storage::Storage;
use super::writer::Writer;
use super::{
    Done, Entry, JournalError, Need, NotStored, Options, Persist, Position, Recovery, Room, begin,
    lengths, read_entry,
};

/// How an entry is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// As the first of a segment, and synced.
    First,
    Synced,
    /// It is synced, but not written when the disk is full.
    Offered,
    /// They are synced, and may have the last room of a full disk.
    Emergency,
    Removal,
    /// It needn't be synced.
    Note,
}

/// The journal.
pub(crate) struct Stepped {
    storage: Arc<dyn Storage>,
    salt: u64,
    writer: Writer,
}

impl Stepped {
    /// Opens the journal of a disk; what is in it is handed to `take`.
    pub(crate) fn open(
        disk: &Arc<Disk>,
        options: &Options,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        let storage: Arc<dyn Storage> = Arc::new(Mount(disk.clone()));
        let (writer, salt, recovery) = begin(&storage, options, Box::new(|_| {}), take)?;
        Ok((Self { storage, salt, writer }, recovery))
    }

    /// Writes what was gathered; each entry counts as one message.
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

    /// Reads an entry that was stored.
    pub(crate) fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        read_entry(&*self.storage, self.salt, position)
    }

    /// How much room there is, when it has been looked at.
    pub(crate) fn look_for_room(&mut self) -> Room {
        self.writer.look_for_room();
        self.writer.room()
    }

    /// How much room there is.
    pub(crate) fn room(&self) -> Room {
        self.writer.room()
    }

    /// The segments that are there, and how long each is, in bytes.
    pub(crate) fn segments(&self) -> Vec<(u64, u64)> {
        lengths(&*self.storage, self.writer.number()).unwrap_or_default()
    }

    /// Removes the segments before that one.
    pub(crate) fn remove_before(&mut self, segment: u64) {
        self.writer.remove(&Removal::Before(segment));
    }

    /// Removes segments, any of them but the one that is being written.
    pub(crate) fn remove(&mut self, segments: Vec<u64>) {
        self.writer.remove(&Removal::These(segments));
    }
}
