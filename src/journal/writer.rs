//! The thread that writes.

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

/// How much goes in one write, in bytes.
const MOST_AT_ONCE: usize = 4 * 1024 * 1024;
/// After so long without anything to write, what was written last gets its mark.
const IDLE: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    /// `None` after a failure, until the next segment is begun. It goes before what locks the
    /// directory does: its end is cut off then.
    file: Option<Box<dyn SegmentFile>>,
    storage: Arc<dyn Storage>,
    manifest: ManifestWriter,
    sink: Sink,
    durability: Durability,
    segment_size: u64,
    spare: Spare,
    /// Is told of the disk.
    pub(super) watch: Watch,
    header: Header,
    /// The number of the segment that was begun last.
    current: u64,
    /// Those before it that hold no entry.
    empty: BTreeSet<u64>,
    /// Where the next record will lie.
    end: u64,
    /// How many messages are stored before that.
    messages: u64,
    /// Up to where the disk has it, and how many messages.
    synced: u64,
    synced_messages: u64,
    has_entries: bool,
    /// The folder was removed, and that was told.
    is_gone: bool,
    /// Earlier entries that needn't be synced at once may not be on the disk, though the system had
    /// taken them. Their owner hears of it by an error of the next ones.
    is_unsure: bool,
    /// Up to where a mark says so.
    marked: u64,
    /// When what the disk doesn't have yet has to be synced.
    sync_by: Option<Instant>,
    buf: Vec<u8>,
    // Room that is used over and over.
    results: Results,
    for_sink: Vec<(u64, Stored)>,
}

/// A write that failed.
struct Failed {
    error: io::Error,
    /// Some of it may be on the disk.
    is_written: bool,
}

impl From<io::Error> for Failed {
    /// Before anything was written.
    fn from(error: io::Error) -> Self {
        Self { error, is_written: false }
    }
}

impl From<Failed> for NotStored {
    fn from(Failed { error, is_written }: Failed) -> Self {
        Self { reason: Arc::new(error), may_turn_up: is_written }
    }
}

/// What became of entries, in their order.
pub(super) type Results = Vec<Stored>;

impl Writer {
    /// Begins the first segment behind those that are there.
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
            // No segment of this version is without a manifest, whatever comes between.
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
        // What is full may come free without a word that is written.
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

    /// The segment that is being written, or would be if there were room.
    pub(super) fn number(&self) -> u64 {
        self.header.number
    }

    /// How much room there is.
    pub(super) fn room(&self) -> Room {
        self.spare.room()
    }

    /// Writes what comes, until there won't be more.
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
                tracing::error!(%error, "the journal can't be synced");
            }
        }
        if self.durability != Durability::OsBuffer
            && let Err(error) = self.sync()
        {
            tracing::error!(%error, "the journal can't be synced");
        }
        if let Err(error) = self.mark().and_then(|()| self.sync()) {
            // What it would have said is on the disk.
            tracing::debug!(%error, "the journal has no last mark");
        }
        self.close();
    }

    /// Has the manifest say where it ends.
    fn close(&mut self) {
        let closed = self.file.is_some() && self.synced == self.end;
        let witness = Witness { closed, ..self.witness() };
        if let Err(error) = self.manifest.close(witness) {
            tracing::warn!(%error, "the journal's manifest can't be written");
        }
    }

    /// What the disk has of the current segment.
    fn witness(&self) -> Witness {
        let (segment, messages) = (self.current, Some(self.synced_messages));
        Witness { segment, end: self.synced, messages, closed: false }
    }

    /// After how long without anything to write there is something else to do.
    fn pause(&self) -> Option<Duration> {
        let due = self.sync_by.into_iter().chain(self.spare.looks_at()).min();
        match due {
            Some(by) => Some(by.saturating_duration_since(Instant::now()).min(IDLE)),
            None if self.is_marked() => None,
            None => Some(IDLE),
        }
    }

    /// Takes the room again that was given up when the disk was full, if there is as much.
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

    /// Stores entries, in as many writes as it takes, and tells after each.
    fn store_and_tell(&mut self, bytes: &[u8], appends: &mut [Append]) {
        // A segment is not to be much longer than it should.
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

    /// Writes all of it, or only what is urgent if the disk is full; what became of each is added
    /// to `results`.
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
                    let gave = is_full(&problem.error) && !self.is_unsure && self.spare.give();
                    let problem = NotStored::from(problem);
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

    /// Writes entries; where each lies is added to `results`.
    fn write<'a>(
        &mut self,
        bytes: &[u8],
        appends: impl Iterator<Item = &'a Append> + Clone,
        results: &mut Results,
    ) -> Result<(), Failed> {
        let Some(first) = appends.clone().next() else { return Ok(()) };
        if std::mem::take(&mut self.is_unsure) {
            return Err(io::Error::other("what was written before may not be on the disk").into());
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
            // Some of it may be there. What the file holds beyond `end` doesn't count; what was
            // written before and needn't be synced at once had better last all the same.
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
                    // Nobody knows what is on the disk; another sync of this file might say that
                    // all is well though it isn't.
                    self.file = None;
                    return Err(Failed { error, is_written: true });
                }
                self.synced = end;
                self.synced_messages = messages;
                self.manifest.synced(self.witness());
            }
            Durability::Interval(pause) => {
                // One that no clock will ever show is never due.
                self.sync_by = self.sync_by.or_else(|| Instant::now().checked_add(pause));
            }
            Durability::Sync | Durability::OsBuffer => {}
        }
        if let Err(error) = self.file.as_ref().map_or(Ok(()), |file| file.check()) {
            // What is written to a file without a name is gone with the process.
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

    /// Says once that the folder is gone, since whatever is tried from then on fails by it.
    fn told(&mut self, error: io::Error) -> io::Error {
        if Gone::is(&error) && !std::mem::replace(&mut self.is_gone, true) {
            tracing::error!(%error, "nothing can be stored any more");
        }
        error
    }

    fn is_marked(&self) -> bool {
        self.file.is_none() || self.synced <= self.marked || self.spare.is_given()
    }

    /// Says behind what is synced that it is: damage to it can't be taken for a torn write then.
    /// While there is more to write, the next write says so.
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

    /// Goes on in a new segment.
    fn turn_over(&mut self) -> io::Result<()> {
        // A segment that failed is not synced again.
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
        // A number is never used twice, even if the attempt fails.
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
        // What makes them unwanted has to outlast them, however late it may be synced otherwise.
        let mut removed = self.sync().and_then(|()| self.remove_synced(removal));
        // A manifest that has outgrown its file needs some room to free more.
        if removed.as_ref().is_err_and(is_full) && self.spare.give() {
            removed = self.remove_synced(removal);
        }
        if let Err(error) = removed {
            tracing::warn!(%error, "old segments can't be removed");
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
        // After a failure none is being written.
        let end = self.file.as_ref().map_or(self.header.number, |_| self.current);
        let goes =
            |segment| segment < end && (removal.takes(segment) || self.empty.contains(&segment));
        // What is missing is reported for as long as there is something older.
        let oldest = there.iter().copied().find(|segment| !goes(*segment));
        let is_over = |segment| goes(segment) || Some(segment) < oldest;
        // The manifest goes first: what it doesn't list is not missed.
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
        // A full disk would gather empty ones.
        drop(file);
        let _best_effort = storage.remove(header.number);
        return Err(error);
    }
    Ok(file)
}
