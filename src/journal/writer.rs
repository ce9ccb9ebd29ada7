//! The writer thread of a journal.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::manifest::Witness;
use super::manifest_writer::ManifestWriter;
use super::queue::{Append, Batch, Queue, Removal, Taken};
use super::recovery::Resume;
use super::room::{DiskNews, Room, Spare, Watch, is_full};
use super::segment::{HEADER, Header, MARK, VERSION, entry_tag, record_size};
use super::storage::{Gone, SegmentFile, Storage};
use super::{Done, Durability, NotStored, Options, Persist, Position, Sink, Stored};

/// The largest size of a write, in bytes.
const MOST_AT_ONCE: usize = 4 * 1024 * 1024;
/// The idle time after which a mark is written behind the last write.
const IDLE: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    /// `None` after a failure, until the next segment is begun. It is dropped before the storage,
    /// which holds the directory's lock, as dropping it truncates the file.
    file: Option<Box<dyn SegmentFile>>,
    storage: Arc<dyn Storage>,
    manifest: ManifestWriter,
    sink: Sink,
    durability: Durability,
    segment_size: u64,
    spare: Spare,
    /// The callback for news of the disk.
    pub(super) watch: Watch,
    header: Header,
    /// The number of the last segment begun.
    current: u64,
    /// The earlier segments without an entry.
    empty: BTreeSet<u64>,
    /// The offset of the next record.
    end: u64,
    /// The number of messages before `end`.
    messages: u64,
    /// The synced offset, and the number of messages before it.
    synced: u64,
    synced_messages: u64,
    has_entries: bool,
    /// The folder was removed, and this was logged.
    is_gone: bool,
    /// Earlier entries, written without a sync, may not be on the disk. Their owner is notified by
    /// an error of the next entries.
    is_unsure: bool,
    /// The synced offset that the last mark records.
    marked: u64,
    /// The deadline for syncing what is not yet synced.
    sync_by: Option<Instant>,
    buf: Vec<u8>,
    // Reused buffers.
    results: Results,
    for_sink: Vec<(u64, Stored)>,
}

/// The error of a failed write.
struct Failed {
    error: io::Error,
    /// Some of the bytes may be on the disk.
    is_written: bool,
}

impl From<io::Error> for Failed {
    /// An error before anything was written.
    fn from(error: io::Error) -> Self {
        Self { error, is_written: false }
    }
}

impl From<Failed> for NotStored {
    fn from(Failed { error, is_written }: Failed) -> Self {
        Self { reason: Arc::new(error), may_turn_up: is_written }
    }
}

/// The outcomes of entries, in order.
pub(super) type Results = Vec<Stored>;

impl Writer {
    /// Begins a segment after the existing ones.
    pub(super) fn begin(
        storage: Arc<dyn Storage>,
        options: &Options,
        sink: Sink,
        salt: u64,
        resume: Resume,
    ) -> io::Result<Self> {
        let number = resume.last + 1;
        let before = resume.listed.last();
        let (previous, previous_end) = before.map_or((0, HEADER), |it| (it.segment, it.end));
        let header = Header { version: VERSION, salt, number, previous, previous_end };
        let begin = || {
            // The manifest is written first: every segment of this version has one, even after a
            // crash.
            let manifest = ManifestWriter::begin(storage.clone(), salt, &resume)?;
            Ok((manifest, begin_segment(&*storage, &header)))
        };
        let is_over = |begun: &io::Result<(_, io::Result<_>)>| match begun {
            Ok((_, file)) => file.as_ref().is_err_and(is_full),
            Err(error) => is_full(error),
        };
        let mut begun = begin();
        if is_over(&begun) && storage.give_spare()? {
            begun = begin();
        }
        let (mut manifest, file) = begun?;
        // Space may be freed without a write: a full disk is no error here.
        let (file, current) = match file {
            Ok(file) => (Some(file), number),
            Err(error) if is_full(&error) => (None, previous),
            Err(error) => return Err(error),
        };
        if file.is_some() {
            manifest.begun(number);
        }
        let mut writer = Self {
            spare: Spare::new(storage.clone(), options),
            watch: Box::new(|_| {}),
            storage,
            manifest,
            empty: resume.empty,
            sink,
            durability: options.durability,
            segment_size: options.segment_size,
            header,
            current,
            file,
            end: HEADER,
            messages: 0,
            synced: HEADER,
            synced_messages: 0,
            has_entries: false,
            is_gone: false,
            is_unsure: false,
            marked: HEADER,
            sync_by: None,
            buf: Vec::new(),
            results: Vec::new(),
            for_sink: Vec::new(),
        };
        writer.spare.take();
        Ok(writer)
    }

    /// Returns the current segment, or the next one if the disk was too full to begin it.
    pub(super) fn number(&self) -> u64 {
        self.header.number
    }

    /// Returns the disk space as last checked.
    pub(super) fn room(&self) -> Room {
        self.spare.room()
    }

    /// Writes queued batches until the queue is closed.
    pub(super) fn run(mut self, queue: &Queue) {
        let mut batch = Batch::default();
        loop {
            let taken = queue.take(&mut batch, self.pause());
            let done = match taken {
                Taken::Batch => {
                    self.perform(&mut batch);
                    self.sync_if_due()
                }
                Taken::Nothing if self.sync_by.is_some() => self.sync_if_due(),
                Taken::Nothing if self.spare.is_given() => Ok(()),
                Taken::Nothing => self.mark(),
                Taken::Closed => break,
            };
            if self.spare.looks_at().is_some_and(|at| at <= Instant::now()) {
                self.look_for_room();
            }
            if let Err(error) = done {
                tracing::error!(%error, "can't sync the journal");
            }
        }
        if self.durability != Durability::OsBuffer
            && let Err(error) = self.sync()
        {
            tracing::error!(%error, "can't sync the journal");
        }
        if let Err(error) = self.mark().and_then(|()| self.sync()) {
            // Without the mark, the synced data is still on the disk.
            tracing::debug!(%error, "can't write the journal's last mark");
        }
        self.close();
    }

    /// Writes the journal's end to the manifest.
    fn close(&mut self) {
        let closed = self.file.is_some() && self.synced == self.end;
        let witness = Witness { closed, ..self.witness() };
        if let Err(error) = self.manifest.close(witness) {
            tracing::warn!(%error, "can't write the journal's manifest");
        }
    }

    /// Returns the synced state of the current segment.
    fn witness(&self) -> Witness {
        let (segment, messages) = (self.current, Some(self.synced_messages));
        Witness { segment, end: self.synced, messages, closed: false }
    }

    /// Returns the time to wait for a batch before other work is due.
    fn pause(&self) -> Option<Duration> {
        let due = self.sync_by.into_iter().chain(self.spare.looks_at()).min();
        match due {
            Some(by) => Some(by.saturating_duration_since(Instant::now()).min(IDLE)),
            None if self.is_marked() => None,
            None => Some(IDLE),
        }
    }

    /// Takes the reserve again after a full disk, if there is enough space.
    pub(super) fn look_for_room(&mut self) {
        if self.spare.is_given() {
            self.spare.take();
            self.tell_room();
        }
    }

    fn tell_room(&mut self) {
        let room = self.room();
        (self.watch)(DiskNews::Room(room));
    }

    fn sync_if_due(&mut self) -> io::Result<()> {
        match self.sync_by {
            Some(by) if by <= Instant::now() => self.sync(),
            Some(_) | None => Ok(()),
        }
    }

    fn perform(&mut self, batch: &mut Batch) {
        let Batch { bytes, appends, removals } = batch;
        let mut appends = &mut appends[..];
        let mut before = 0;
        for (place, removal) in removals.drain(..) {
            let (first, rest) = appends.split_at_mut(place - before);
            (appends, before) = (rest, place);
            self.store_and_tell(bytes, first);
            self.remove(&removal);
        }
        self.store_and_tell(bytes, appends);
        batch.clear();
        self.buf.clear();
        self.buf.shrink_to(MOST_AT_ONCE);
    }

    /// Stores entries, in as many writes as needed, and reports the outcomes after each.
    fn store_and_tell(&mut self, bytes: &[u8], appends: &mut [Append]) {
        // A segment must not grow much beyond its size.
        let most = MOST_AT_ONCE.min(self.segment_size as usize);
        let mut size = 0;
        let one_write = |_: &Append, next: &Append| {
            size += next.length as usize;
            let fits = size < most;
            if !fits {
                size = 0;
            }
            fits
        };
        for together in appends.chunk_by_mut(one_write) {
            let mut results = std::mem::take(&mut self.results);
            self.store(bytes, together, &mut results);
            for (append, result) in together.iter_mut().zip(results.drain(..)) {
                match std::mem::replace(&mut append.done, Done::Nobody) {
                    Done::Waiter(waiter) => _ = waiter.send(result),
                    Done::Sink(token) => self.for_sink.push((token, result)),
                    Done::Nobody => {}
                }
            }
            self.results = results;
            if !self.for_sink.is_empty() {
                (self.sink)(self.for_sink.drain(..));
            }
        }
    }

    /// Writes all entries, or only urgent ones if the disk is full; their outcomes are added to
    /// `results`.
    pub(super) fn store(&mut self, bytes: &[u8], appends: &[Append], results: &mut Results) {
        for together in appends.chunk_by(|_, next| !next.first) {
            self.store_together(bytes, together, results);
        }
    }

    fn store_together(&mut self, bytes: &[u8], appends: &[Append], results: &mut Results) {
        let full = || Failed::from(io::Error::from(io::ErrorKind::StorageFull)).into();
        let mut error = None;
        if !self.spare.is_given() {
            let before = results.len();
            match self.write(bytes, appends.iter(), results) {
                Ok(()) => {
                    if appends.first().is_some_and(|append| append.first) {
                        self.spare.take();
                    }
                    return;
                }
                Err(problem) => {
                    results.truncate(before);
                    let gives = is_full(&problem.error) && !self.is_unsure;
                    let (gave, problem) = match gives.then(|| self.spare.give()).transpose() {
                        Ok(gave) => (gave.unwrap_or_default(), NotStored::from(problem)),
                        Err(error) => (false, NotStored::from(Failed { error, ..problem })),
                    };
                    if gave {
                        self.tell_room();
                    } else {
                        self.is_unsure = false;
                        results.extend(appends.iter().map(|_| Err(problem.clone())));
                        return;
                    }
                    error = Some(problem);
                }
            }
        }
        let error = error.unwrap_or_else(full);
        let mut size = 0;
        let fits = |append: &Append| {
            let more = record_size(u64::from(append.length));
            let fits = self.spare.admits(append.need, size + more);
            size += if fits { more } else { 0 };
            fits
        };
        let fitting: Vec<bool> = appends.iter().map(fits).collect();
        let mut written = Results::new();
        let urgent = appends.iter().zip(&fitting).filter(|(_, fits)| **fits).map(|(it, _)| it);
        let problem = self.write(bytes, urgent, &mut written).err();
        self.is_unsure &= problem.is_none();
        let problem = problem.map(NotStored::from);
        let mut written = written.into_iter();
        results.extend(fitting.iter().map(|fits| match &problem {
            _ if !fits => Err(error.clone()),
            Some(problem) => Err(problem.clone()),
            None => written.next().unwrap_or_else(|| Err(error.clone())),
        }));
    }

    /// Writes entries; their positions are added to `results`.
    fn write<'a>(
        &mut self,
        bytes: &[u8],
        appends: impl Iterator<Item = &'a Append> + Clone,
        results: &mut Results,
    ) -> Result<(), Failed> {
        let Some(first) = appends.clone().next() else { return Ok(()) };
        if std::mem::take(&mut self.is_unsure) {
            return Err(io::Error::other(
                "earlier entries may be lost after a failed write or sync",
            )
            .into());
        }
        let is_over = self.end >= self.segment_size || (first.first && self.end > HEADER);
        if self.file.is_none() || is_over {
            self.turn_over().map_err(|error| self.told(error))?;
        }
        let (Some(file), start) = (self.file.as_mut(), self.end) else {
            return Err(io::Error::other("no segment is open").into());
        };
        self.buf.clear();
        let mut end = start;
        self.header.encode_record(end, MARK, &self.synced.to_le_bytes(), &mut self.buf);
        end += record_size(8);
        for append in appends.clone() {
            let length = append.length;
            let tag = entry_tag(append.messages);
            self.header.encode_record(end, tag, append.payload(bytes), &mut self.buf);
            results.push(Ok(Position { segment: self.header.number, offset: end, length }));
            end += record_size(u64::from(length));
        }
        if let Err(error) = file.append(&self.buf) {
            // A part may have been written. Bytes in the file beyond `end` don't count; earlier
            // entries written without a sync should still be preserved.
            let is_written = file.retract().is_err();
            self.is_unsure |= is_written;
            self.file = None;
            return Err(Failed { error, is_written });
        }
        let messages = appends.clone().map(|append| u64::from(append.messages)).sum::<u64>();
        let messages = self.messages + messages;
        self.marked = self.synced;
        match self.durability {
            Durability::Sync if appends.clone().any(|append| append.persist == Persist::Sync) => {
                if let Err(error) = file.sync() {
                    // The content on disk is unknown; another sync of this file could succeed
                    // although data was lost.
                    self.file = None;
                    return Err(Failed { error, is_written: true });
                }
                self.synced = end;
                self.synced_messages = messages;
                self.manifest.synced(self.witness());
            }
            Durability::Interval(pause) => {
                // A time beyond the clock's range is never due.
                self.sync_by = self.sync_by.or_else(|| Instant::now().checked_add(pause));
            }
            Durability::Sync | Durability::OsBuffer => {}
        }
        if let Err(error) = self.file.as_ref().map_or(Ok(()), |file| file.check()) {
            // Data written to an unlinked file is lost when the process ends.
            self.file = None;
            return Err(Failed { error: self.told(error), is_written: true });
        }
        self.is_gone = false;
        if first.first {
            self.spare.began_with(u64::from(first.length));
        }
        self.spare.wrote(end - start);
        self.end = end;
        self.messages = messages;
        self.has_entries = true;
        Ok(())
    }

    /// Logs once that the folder is gone, as every later write fails for the same reason.
    fn told(&mut self, error: io::Error) -> io::Error {
        if Gone::is(&error) && !std::mem::replace(&mut self.is_gone, true) {
            tracing::error!(%error, "can't store any more entries");
        }
        error
    }

    fn is_marked(&self) -> bool {
        self.file.is_none() || self.synced <= self.marked || self.spare.is_given()
    }

    /// Writes a mark behind the synced data, so that later damage to it can't be taken for a torn
    /// write. Under load, the next write contains the mark.
    fn mark(&mut self) -> io::Result<()> {
        let Some(file) = self.file.as_mut().filter(|_| self.synced > self.marked) else {
            return Ok(());
        };
        self.buf.clear();
        self.header.encode_record(self.end, MARK, &self.synced.to_le_bytes(), &mut self.buf);
        if let Err(error) = file.append(&self.buf) {
            self.is_unsure |= file.retract().is_err();
            self.file = None;
            return Err(error);
        }
        self.end += record_size(8);
        self.marked = self.synced;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_by = None;
        if let Some(file) = self.file.as_mut()
            && self.synced < self.end
        {
            if let Err(error) = file.sync() {
                self.is_unsure = true;
                self.file = None;
                return Err(error);
            }
            self.synced = self.end;
            self.synced_messages = self.messages;
            self.manifest.synced(self.witness());
        }
        Ok(())
    }

    /// Closes the current segment and begins a new one.
    fn turn_over(&mut self) -> io::Result<()> {
        // A failed segment is not synced again.
        self.sync()?;
        self.file = None;
        if self.current == self.header.number {
            self.header.previous = self.current;
            self.header.previous_end = self.end;
            let (segment, messages) = (self.current, Some(self.messages));
            self.manifest.ended(Witness { segment, end: self.end, messages, closed: true });
            if !self.has_entries {
                self.empty.insert(segment);
            }
        }
        // A number is never reused, even if the attempt fails.
        self.header.number += 1;
        self.file = Some(begin_segment(&*self.storage, &self.header)?);
        self.current = self.header.number;
        (self.end, self.synced, self.marked) = (HEADER, HEADER, HEADER);
        (self.messages, self.synced_messages, self.has_entries) = (0, 0, false);
        self.manifest.begun(self.current);
        self.spare.wrote(HEADER);
        if !self.spare.is_given() {
            self.spare.take();
        }
        self.tell_room();
        Ok(())
    }

    pub(super) fn remove(&mut self, removal: &Removal) {
        if self.is_gone {
            return;
        }
        // The records that make these segments obsolete must be synced before the removal, even if
        // their sync is not due.
        let mut removed = self.sync().and_then(|()| self.remove_synced(removal));
        // A manifest that outgrew its file needs space before more can be freed.
        if removed.as_ref().is_err_and(is_full) {
            match self.spare.give() {
                Ok(true) => removed = self.remove_synced(removal),
                Ok(false) => {}
                Err(error) => removed = Err(error),
            }
        }
        if let Err(error) = removed {
            tracing::warn!(%error, "can't remove old segments");
        }
        if self.spare.is_given() {
            self.spare.take();
        }
        self.tell_room();
        if let Removal::These(segments) = removal {
            let left = self.storage.segments();
            let is_gone = |segment: &u64| left.as_ref().is_ok_and(|left| !left.contains(segment));
            let gone = segments.iter().copied().filter(is_gone).collect();
            (self.watch)(DiskNews::Removed(gone));
        }
    }
}

impl Writer {
    fn remove_synced(&mut self, removal: &Removal) -> io::Result<()> {
        let there = self.storage.segments()?;
        // After a failure, no segment is current.
        let end = self.file.as_ref().map_or(self.header.number, |_| self.current);
        let goes =
            |segment| segment < end && (removal.takes(segment) || self.empty.contains(&segment));
        // A missing segment is reported for as long as an older one exists.
        let oldest = there.iter().copied().find(|segment| !goes(*segment));
        let is_over = |segment| goes(segment) || Some(segment) < oldest;
        // The manifest is written first: a segment that it does not list is not missed.
        self.manifest.forget(is_over)?;
        self.empty.retain(|segment| self.manifest.lists(*segment));
        let old = there.into_iter().filter(|segment| *segment < end);
        let gone: Vec<_> = old.filter(|segment| !self.manifest.lists(*segment)).collect();
        for segment in &gone {
            let length = self.storage.length(*segment).unwrap_or_default();
            self.storage.remove(*segment)?;
            self.spare.freed(length);
        }
        if gone.is_empty() { Ok(()) } else { self.storage.sync_directory() }
    }
}

fn begin_segment(storage: &dyn Storage, header: &Header) -> io::Result<Box<dyn SegmentFile>> {
    let mut file = storage.create(header.number)?;
    let begun = file.append(&header.encode()).and_then(|()| file.sync());
    if let Err(error) = begun.and_then(|()| storage.sync_directory()) {
        // Without this, a full disk would gather empty segments.
        drop(file);
        let _best_effort = storage.remove(header.number);
        return Err(error);
    }
    Ok(file)
}
