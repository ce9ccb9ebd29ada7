//! Writes the manifest, which never claims more than is durable.

use std::io;
use std::sync::Arc;

use super::manifest::{List, Slot, Witness};
use super::recovery::Resume;
use super::segment::HEADER;
use super::storage::Storage;

pub(super) struct ManifestWriter {
    storage: Arc<dyn Storage>,
    /// The list; its generation is that of the last write.
    list: List,
    /// The turn of the last slot written, and that slot.
    turn: u64,
    slot: Option<Slot>,
    /// A list on disk may still name forgotten segments.
    stale: bool,
    /// A write failed, and was logged.
    fails: bool,
}

impl ManifestWriter {
    /// Continues the existing manifest, or creates one that lists the existing segments.
    pub(super) fn begin(storage: Arc<dyn Storage>, salt: u64, resume: &Resume) -> io::Result<Self> {
        let (turn, generation, room) = (resume.turn, resume.generation, resume.room);
        let list = List { salt, generation, room, segments: resume.listed.clone() };
        let mut writer = Self { storage, list, turn, slot: None, stale: false, fails: false };
        if room == 0 {
            writer.replace()?;
        }
        Ok(writer)
    }

    /// Adds a new segment, after all others.
    pub(super) fn begun(&mut self, segment: u64) {
        self.list.segments.push(Witness { segment, end: HEADER, messages: Some(0), closed: false });
        let written = self.write();
        self.tell(written);
    }

    /// Writes the synced state of the current segment. The write itself is not synced.
    pub(super) fn synced(&mut self, witness: Witness) {
        self.turn += 1;
        let slot = Slot { salt: self.list.salt, turn: self.turn, witness };
        let written = self.storage.write_manifest(slot.place(), &slot.encode());
        self.slot = Some(slot);
        self.tell(written);
    }

    /// Records the end of a segment. The next write of the list includes it.
    pub(super) fn ended(&mut self, witness: Witness) {
        let known = self.list.segments.iter_mut().rev().find(|it| it.segment == witness.segment);
        if let Some(known) = known {
            *known = witness;
        }
    }

    /// Writes the end of the last segment to both lists: the journal is closed.
    pub(super) fn close(&mut self, witness: Witness) -> io::Result<()> {
        self.ended(witness);
        self.write_both()
    }

    /// Forgets segments. On success their files may be removed.
    pub(super) fn forget(&mut self, gone: impl Fn(u64) -> bool) -> io::Result<()> {
        let before = self.list.segments.len();
        self.list.segments.retain(|it| !gone(it.segment));
        self.stale |= self.list.segments.len() < before;
        // Both lists are written: if one is damaged later, the other is complete.
        if self.stale {
            self.write_both()?;
            self.stale = false;
        }
        Ok(())
    }

    pub(super) fn lists(&self, segment: u64) -> bool {
        self.list.segments.binary_search_by_key(&segment, |it| it.segment).is_ok()
    }

    fn write_both(&mut self) -> io::Result<()> {
        self.write()?;
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        if !self.list.fits() {
            return self.replace();
        }
        self.list.generation += 1;
        let written = self.storage.write_manifest(self.list.place(), &self.list.encode());
        let synced = written.and_then(|()| self.storage.sync_manifest());
        if synced.is_err() {
            // The other list may be the only readable one: the next write goes here again.
            self.list.generation -= 1;
        }
        synced
    }

    /// Writes the list to a new file, with more room.
    fn replace(&mut self) -> io::Result<()> {
        let mut list = self.list.clone();
        list.generation += 1;
        list.make_room();
        let mut bytes = list.file();
        if let Some(slot) = &self.slot {
            let encoded = slot.encode();
            bytes[slot.place() as usize..][..encoded.len()].copy_from_slice(&encoded);
        }
        self.storage.replace_manifest(&bytes)?;
        self.list = list;
        Ok(())
    }

    /// Logs the first failed write in a row. The manifest on disk is then correct but older.
    fn tell(&mut self, written: io::Result<()>) {
        match written {
            Ok(()) => self.fails = false,
            Err(error) if !self.fails => {
                tracing::warn!(%error, "can't write the journal's manifest: damage to entries stored from now on may go unnoticed");
                self.fails = true;
            }
            Err(_) => {}
        }
    }
}
