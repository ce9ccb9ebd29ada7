//! An in-memory disk that crashes, fails and fills up on purpose. A crash keeps any part of the
//! unsynced bytes.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::storage::{SegmentFile, Storage};
use crate::sync::lock_unranked as lock;

/// Sector sizes in bytes. A disk writes sectors in any order; a crash tears the sector in progress.
/// Some disks have small sectors, so that short writes span several.
const SECTORS: [usize; 2] = [64, 512];

/// A pseudo-random number generator (SplitMix64).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

#[derive(Clone, Default)]
pub(super) struct FileState {
    pub(super) bytes: Vec<u8>,
    /// The length that a crash certainly keeps.
    synced: usize,
    /// The directory entry is durable.
    linked: bool,
    /// The offset from which a crash may have torn the file.
    pub(super) unsure: Option<usize>,
}

impl FileState {
    /// Applies a crash to the file.
    fn crash(&mut self, random: &mut Random, room: &mut u64, lost: &mut Lost) {
        if self.synced < self.bytes.len() {
            self.unsure.get_or_insert(self.synced);
        }
        let unsynced = self.bytes.len() - self.synced;
        let reached = random.below(unsynced as u64 + 1) as usize;
        lost.cut += u64::from(reached < unsynced);
        self.bytes.truncate(self.synced + reached);
        let size = SECTORS[random.below(SECTORS.len() as u64) as usize];
        let mut at = self.synced;
        while at < self.bytes.len() {
            let end = ((at / size + 1) * size).min(self.bytes.len());
            let sector = &mut self.bytes[at..end];
            let (before, behind) = sector.split_at_mut(random.below(sector.len() as u64) as usize);
            match random.below(6) {
                0 => {
                    sector.fill(0);
                    lost.sectors += 1;
                }
                1 => {
                    before.fill(0);
                    lost.torn += 1;
                }
                2 => {
                    behind.fill(0);
                    lost.torn += 1;
                }
                _ => {}
            }
            at = end;
        }
        if random.below(2) == 0 {
            // The file had preallocated space.
            let more = random.below(2000).min(*room);
            *room -= more;
            self.bytes.resize(self.bytes.len() + more as usize, 0);
        }
    }
}

/// The manifest, written in place.
#[derive(Clone, Default)]
pub(super) struct ManifestState {
    pub(super) bytes: Vec<u8>,
    /// The content that a crash certainly keeps.
    synced: Vec<u8>,
    /// The writes since the last sync: offset and bytes.
    writes: Vec<(usize, Vec<u8>)>,
}

impl ManifestState {
    fn whole(bytes: Vec<u8>) -> Self {
        Self { synced: bytes.clone(), bytes, writes: Vec::new() }
    }

    /// The manifest after a crash: each sector written since the last sync is old, new, or torn.
    fn crash(&self, random: &mut Random) -> Self {
        let mut left = self.synced.clone();
        for (start, bytes) in &self.writes {
            let size = SECTORS[random.below(SECTORS.len() as u64) as usize];
            let mut at = *start;
            while at < start + bytes.len() {
                let end = ((at / size + 1) * size).min(start + bytes.len());
                let new = &bytes[at - start..end - start];
                let cut = random.below(new.len() as u64) as usize;
                match random.below(4) {
                    0 => {}
                    1 => left[at..at + cut].copy_from_slice(&new[..cut]),
                    2 => left[at + cut..end].copy_from_slice(&new[cut..]),
                    _ => left[at..end].copy_from_slice(new),
                }
                at = end;
            }
        }
        Self::whole(left)
    }
}

/// The damage that a crash did.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Lost {
    /// Files that lost bytes at the end.
    pub(crate) cut: u64,
    /// Sectors that became all zeros.
    pub(crate) sectors: u64,
    /// Sectors that became partly zeros.
    pub(crate) torn: u64,
}

/// A disk whose files live in memory.
#[derive(Default)]
pub(crate) struct Disk {
    pub(super) files: Mutex<BTreeMap<u64, FileState>>,
    pub(super) manifest: Mutex<Option<ManifestState>>,
    /// Files whose removal is not yet durable.
    removed: Mutex<BTreeMap<u64, FileState>>,
    /// A countdown: the write or sync that brings it to zero fails. Any part of such a write may
    /// reach the file.
    pub(crate) write_fails: AtomicU64,
    /// The releases of the reserve until one fails; 0 is never.
    pub(crate) give_fails: AtomicU64,
    pub(crate) sync_fails: AtomicU64,
    /// The same countdown for writes and syncs of the manifest.
    pub(super) manifest_fails: AtomicU64,
    /// The capacity in bytes, or zero for no limit; and the bytes reserved by the spare file.
    pub(super) capacity: AtomicU64,
    pub(super) spare: AtomicU64,
    /// A countdown of removals, directory syncs and manifest syncs, at whose end the machine dies.
    pub(super) steps_left: AtomicU64,
    /// The disk as the machine left it when it died.
    pub(super) left: Mutex<Option<Arc<Disk>>>,
    /// The damage of the crash that produced this disk.
    pub(crate) lost: Lost,
}

/// Counts down; returns true if this call reaches zero.
fn fails(countdown: &AtomicU64) -> bool {
    countdown.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) == Ok(1)
}

impl Disk {
    /// Copies the disk and its files.
    pub(crate) fn copy(&self) -> Self {
        let (files, manifest) = (lock(&self.files).clone(), lock(&self.manifest).clone());
        let (files, manifest) = (Mutex::new(files), Mutex::new(manifest));
        Self { files, manifest, ..self.as_large() }
    }

    /// Returns an empty disk of the same capacity.
    fn as_large(&self) -> Self {
        let same = |number: &AtomicU64| AtomicU64::new(number.load(Ordering::SeqCst));
        Self { capacity: same(&self.capacity), spare: same(&self.spare), ..Self::default() }
    }

    /// Limits the capacity, in bytes.
    pub(crate) fn limit(&self, capacity: u64) {
        self.capacity.store(capacity, Ordering::SeqCst);
    }

    /// The disk after a crash: any part of the unsynced bytes survives, or is zeroed.
    pub(crate) fn crash(&self, seed: u64) -> Arc<Self> {
        let (mut random, mut lost) = (Random(seed), Lost::default());
        // Files are preallocated only while there is ample space.
        let (mut left, mut room) = (BTreeMap::new(), (self.room() / 2) as u64);
        // Both locks are held: the snapshot is consistent although another thread writes.
        let (files, manifest) = (lock(&self.files), lock(&self.manifest));
        for (number, file) in &*files {
            if !file.linked && random.below(2) == 0 {
                continue;
            }
            let mut file = file.clone();
            file.crash(&mut random, &mut room, &mut lost);
            left.insert(*number, file);
        }
        for (number, file) in &*lock(&self.removed) {
            if random.below(2) == 0 {
                left.insert(*number, file.clone());
            }
        }
        for file in left.values_mut() {
            (file.synced, file.linked) = (file.bytes.len(), true);
        }
        let manifest = manifest.as_ref().map(|it| it.crash(&mut random));
        let (files, manifest) = (Mutex::new(left), Mutex::new(manifest));
        Arc::new(Self { files, manifest, lost, ..self.as_large() })
    }

    /// The number of free bytes.
    fn room(&self) -> usize {
        let capacity = match self.capacity.load(Ordering::SeqCst) {
            0 => u64::MAX,
            capacity => capacity,
        };
        capacity.saturating_sub(self.taken()).try_into().unwrap_or(usize::MAX)
    }

    /// Fills the disk: limits the capacity to the bytes in use.
    pub(crate) fn fill(&self) {
        self.capacity.store(self.taken(), Ordering::SeqCst);
    }

    fn taken(&self) -> u64 {
        let files: usize = lock(&self.files).values().map(|file| file.bytes.len()).sum();
        let manifest = lock(&self.manifest).as_ref().map_or(0, |it| it.bytes.len());
        (files + manifest) as u64 + self.spare.load(Ordering::SeqCst)
    }

    /// Counts down to the death of the machine.
    fn step(&self) {
        if fails(&self.steps_left) {
            let seed = lock(&self.files).len() as u64;
            *lock(&self.left) = Some(self.crash(seed));
        }
    }

    pub(super) fn change(&self, number: u64, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut lock(&self.files).get_mut(&number).unwrap().bytes);
    }
}

struct Writing {
    disk: Arc<Disk>,
    number: u64,
    written: usize,
}

/// The [`Storage`] of the disk.
pub(super) struct Mount(pub(super) Arc<Disk>);

impl Storage for Mount {
    fn segments(&self) -> io::Result<Vec<u64>> {
        Ok(lock(&self.0.files).keys().copied().collect())
    }

    fn create(&self, number: u64) -> io::Result<Box<dyn SegmentFile>> {
        let before = lock(&self.0.files).insert(number, FileState::default());
        assert!(before.is_none(), "segment {number} is written twice");
        Ok(Box::new(Writing { disk: self.0.clone(), number, written: 0 }))
    }

    fn read(&self, number: u64, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let files = lock(&self.0.files);
        let bytes = files.get(&number).ok_or(io::ErrorKind::NotFound)?.bytes.get(at as usize..);
        let bytes = bytes.unwrap_or_default();
        let count = bytes.len().min(buf.len());
        buf[..count].copy_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn length(&self, number: u64) -> io::Result<u64> {
        let files = lock(&self.0.files);
        Ok(files.get(&number).ok_or(io::ErrorKind::NotFound)?.bytes.len() as u64)
    }

    fn sync(&self, number: u64) -> io::Result<()> {
        let mut files = lock(&self.0.files);
        let file = files.get_mut(&number).ok_or(io::ErrorKind::NotFound)?;
        file.synced = file.bytes.len();
        Ok(())
    }

    fn remove(&self, number: u64) -> io::Result<()> {
        let file = lock(&self.0.files).remove(&number).ok_or(io::ErrorKind::NotFound)?;
        lock(&self.0.removed).insert(number, file);
        self.0.step();
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        lock(&self.0.files).values_mut().for_each(|file| file.linked = true);
        lock(&self.0.removed).clear();
        self.0.step();
        Ok(())
    }

    fn free(&self) -> Option<u64> {
        (self.0.capacity.load(Ordering::SeqCst) > 0).then(|| self.0.room() as u64)
    }

    fn manifest(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(lock(&self.0.manifest).as_ref().map(|manifest| manifest.bytes.clone()))
    }

    fn replace_manifest(&self, bytes: &[u8]) -> io::Result<()> {
        if fails(&self.0.manifest_fails) || self.0.room() < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.step();
        *lock(&self.0.manifest) = Some(ManifestState::whole(bytes.to_vec()));
        self.0.step();
        Ok(())
    }

    fn write_manifest(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut manifest = lock(&self.0.manifest);
        let manifest = manifest.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let failed = fails(&self.0.manifest_fails);
        let bytes = if failed { &bytes[..bytes.len() / 2] } else { bytes };
        manifest.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
        manifest.writes.push((at as usize, bytes.to_vec()));
        if failed { Err(io::Error::other("the disk failed")) } else { Ok(()) }
    }

    fn sync_manifest(&self) -> io::Result<()> {
        if fails(&self.0.manifest_fails) {
            return Err(io::Error::other("the disk failed"));
        }
        self.0.step();
        if let Some(manifest) = &mut *lock(&self.0.manifest) {
            *manifest = ManifestState::whole(std::mem::take(&mut manifest.bytes));
        }
        self.0.step();
        Ok(())
    }

    fn take_spare(&self, bytes: u64) -> io::Result<()> {
        let more = bytes - self.0.spare.load(Ordering::SeqCst).min(bytes);
        if (self.0.room() as u64) < more {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.spare.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn give_spare(&self) -> io::Result<bool> {
        if fails(&self.0.give_fails) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(self.0.spare.swap(0, Ordering::SeqCst) > 0)
    }
}

impl SegmentFile for Writing {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.disk.room();
        let full = fails(&self.disk.write_fails) || room < bytes.len();
        let reached = Random(bytes.len() as u64).below(room.min(bytes.len()) as u64 + 1) as usize;
        let taken = if full { reached } else { bytes.len() };
        self.disk.change(self.number, |file| file.extend_from_slice(&bytes[..taken]));
        if full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.written += taken;
        Ok(())
    }

    fn retract(&mut self) -> io::Result<()> {
        let written = self.written;
        if let Some(file) = lock(&self.disk.files).get_mut(&self.number) {
            file.bytes.truncate(written);
        }
        self.sync()
    }

    fn check(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if fails(&self.disk.sync_fails) {
            return Err(io::Error::other("the disk failed"));
        }
        if let Some(file) = lock(&self.disk.files).get_mut(&self.number) {
            file.synced = file.bytes.len();
        }
        Ok(())
    }
}
