//! Keeps the manifest: what it says is never ahead of what is on the disk.

use std::io;
use std::sync::Arc;

use super::manifest::{List, Slot, Witness};
use super::recovery::Resume;
use super::segment::HEADER;
use super::storage::Storage;

pub(super) struct ManifestWriter {
    storage: Arc<dyn Storage>,
    /// Its generation is that of the list that was written last.
    list: List,
    /// The turn of the slot that was written last, and what it says.
    turn: u64,
    slot: Option<Slot>,
    /// A list on the disk may still name segments that were forgotten.
    stale: bool,
    /// A write of it failed, and that was told.
    fails: bool,
}

impl ManifestWriter {
    /// Goes on in the manifest that is there, or begins one that tells of what is there.
    pub(super) fn begin(storage: Arc<dyn Storage>, salt: u64, resume: &Resume) -> io::Result<Self> {
        let (turn, generation, room) = (resume.turn, resume.generation, resume.room);
        let list = List { salt, generation, room, segments: resume.listed.clone() };
        let mut writer = Self { storage, list, turn, slot: None, stale: false, fails: false };
        if room == 0 {
            writer.replace()?;
        }
        Ok(writer)
    }

    /// A segment was begun, behind all others.
    pub(super) fn begun(&mut self, segment: u64) {
        self.list.segments.push(Witness { segment, end: HEADER, messages: Some(0), closed: false });
        let written = self.write();
        self.tell(written);
    }

    /// A segment was stored up to there. That is not synced.
    pub(super) fn synced(&mut self, witness: Witness) {
        self.turn += 1;
        let slot = Slot { salt: self.list.salt, turn: self.turn, witness };
        let written = self.storage.write_manifest(slot.place(), &slot.encode());
        self.slot = Some(slot);
        self.tell(written);
    }

    /// A segment ends there. The list says so when it is written next.
    pub(super) fn ended(&mut self, witness: Witness) {
        let known = self.list.segments.iter_mut().rev().find(|it| it.segment == witness.segment);
        if let Some(known) = known {
            *known = witness;
        }
    }

    /// Says of both lists what the last segment holds: the journal is closed.
    pub(super) fn close(&mut self, witness: Witness) -> io::Result<()> {
        self.ended(witness);
        self.write_both()
    }

    /// Forgets segments; when this has ended well, they may go.
    pub(super) fn forget(&mut self, gone: impl Fn(u64) -> bool) -> io::Result<()> {
        let before = self.list.segments.len();
        self.list.segments.retain(|it| !gone(it.segment));
        self.stale |= self.list.segments.len() < before;
        // Both lists: should one be damaged later, the other misses nothing.
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
            // The other list may be the only one that can be read: this one is tried again.
            self.list.generation -= 1;
        }
        synced
    }

    /// Writes it to a file of its own, with room for more.
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

    /// What it said before is still true, and tells of less.
    fn tell(&mut self, written: io::Result<()>) {
        match written {
            Ok(()) => self.fails = false,
            Err(error) if !self.fails => {
                tracing::warn!(%error, "the journal's manifest can't be written: damage to what is stored from now on may go unnoticed");
                self.fails = true;
            }
            Err(_) => {}
        }
    }
}
