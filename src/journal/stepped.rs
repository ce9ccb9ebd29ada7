//! A journal without a thread, on a disk that crashes: it writes when it is told to.

use std::sync::Arc;

use super::crashing::{Disk, Mount};
use super::storage::Storage;
use super::writer::{Append, Writer};
use super::{Done, Entry, JournalError, NotStored, Options, Position, Recovery, begin, read_entry};

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
        let (writer, salt, recovery) = begin(&storage, options, Box::new(drop), take)?;
        Ok((Self { storage, salt, writer }, recovery))
    }

    /// Writes payloads, each with whether it is to be synced, as one write.
    pub(crate) fn write(
        &mut self,
        payloads: impl Iterator<Item = (Vec<u8>, bool)>,
    ) -> Vec<Result<Position, NotStored>> {
        let append = |(payload, sync)| Append { payload, sync, urgent: true, done: Done::Nobody };
        self.writer.store(&payloads.map(append).collect::<Vec<_>>())
    }

    /// Reads an entry that was stored.
    pub(crate) fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        read_entry(&*self.storage, self.salt, position)
    }

    /// Removes the segments before that one.
    pub(crate) fn remove_before(&mut self, segment: u64) {
        self.writer.remove_before(segment);
    }
}
