//! The disks of a store: what is written on them, and when.

use super::store::Store;
use super::{Later, SimNode};
use crate::engine::delivery::Now;
use crate::engine::sim::Random;
use crate::engine::sim::disk::Disk;
use crate::engine::sim::ledger::Ledger;
use crate::journal::Level;
use crate::journal::stepped::EntryKind;

/// How often a disk that is full is looked at, in microseconds.
const LOOKS: u64 = 200_000;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Which {
    Outbox,
    Inbox,
}

/// The disks of a store, which outlive its node.
pub(in super::super) struct Disks {
    pub(in super::super) outbox: Disk,
    pub(in super::super) inbox: Disk,
}

impl Disks {
    fn of(&mut self, which: Which) -> &mut Disk {
        match which {
            Which::Outbox => &mut self.outbox,
            Which::Inbox => &mut self.inbox,
        }
    }
}

impl Store {
    pub(super) fn append(
        &mut self,
        which: Which,
        token: Option<u64>,
        entry: Vec<u8>,
        kind: EntryKind,
    ) {
        if !self.closed {
            self.disks.of(which).append(token, entry, kind);
        }
    }

    /// What was being written is written, or could not be.
    fn finish(&mut self, now: Now, which: Which, random: &mut Random, ledger: &mut Ledger) {
        let disk = self.disks.of(which);
        let fails = disk.failing && !random.once_in(3);
        let written = disk.finish(fails, random);
        let failed = written.iter().any(|(_, result)| result.is_err());
        let seen = &mut ledger.promises.seen;
        seen.when("failed writes", failed);
        if failed && which == Which::Outbox {
            self.failed_at = Some(now.time);
        }
        let room = (which == Which::Outbox).then(|| disk.changed_room()).flatten();
        if let Some(room) = room {
            seen.when("disks that were full", room.level == Level::Full);
            self.outbox.handle_room(now, room);
        }
        for (token, result) in written {
            match which {
                Which::Outbox => self.outbox.handle_appended(now, token, result),
                Which::Inbox => self.inbox.handle_appended(token, result),
            }
        }
    }

    /// Writes all that waits, and closes the disks. What follows from it is written no more.
    pub(super) fn close(&mut self, now: Now, random: &mut Random, ledger: &mut Ledger) {
        self.closed = true;
        for which in [Which::Inbox, Which::Outbox] {
            self.finish(now, which, random, ledger);
            while self.disks.of(which).begin() {
                self.finish(now, which, random, ledger);
            }
        }
    }
}

impl SimNode {
    /// Has the disks write what waits, once everything is decided.
    pub(in super::super) fn use_disks(&mut self) {
        if self.dead {
            return;
        }
        for which in [Which::Outbox, Which::Inbox] {
            let Some(store) = self.store.as_mut().filter(|it| !it.closed) else { return };
            let disk = store.disks.of(which);
            let begun = disk.begin();
            let removed = which == Which::Outbox && disk.has_removed();
            if begun {
                let takes = self.random.between(20, 400);
                self.later(takes, Later::Written(which));
            }
            if removed {
                let takes = self.random.between(20, 400);
                self.later(takes, Later::Removed);
            }
        }
        let Some(store) = &mut self.store else { return };
        if !store.looks && store.disks.outbox.level() == Level::Full {
            store.looks = true;
            self.later(LOOKS, Later::Look);
        }
    }

    pub(super) fn handle_written(&mut self, which: Which, ledger: &mut Ledger) {
        let Self { store: Some(store), random, now, .. } = self else { return };
        if !store.closed {
            store.finish(*now, which, random, ledger);
        }
    }

    pub(super) fn handle_removed(&mut self) {
        let now = self.now;
        let store = self.store();
        let gone = store.disks.outbox.removed();
        if let Some(room) = store.disks.outbox.changed_room() {
            store.outbox.handle_room(now, room);
        }
        store.outbox.handle_removed(now, &gone);
    }

    pub(super) fn look_for_room(&mut self) {
        let now = self.now;
        let store = self.store();
        store.looks = false;
        let room = store.disks.outbox.look_for_room();
        store.outbox.handle_room(now, room);
    }
}
