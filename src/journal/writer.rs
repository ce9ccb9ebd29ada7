//! The thread that writes.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::recovery::Resume;
use super::segment::{ENTRY, HEADER, Header, MARK, record_size};
use super::storage::{SegmentFile, Storage};
use super::{Done, Durability, NotStored, Options, Position, Sink};

/// How much is gathered for one write, in bytes.
const MOST_AT_ONCE: usize = 4 * 1024 * 1024;
/// After so long without anything to write, what was written last gets its mark.
const IDLE: Duration = Duration::from_secs(1);
/// After the disk was full, it is asked so often whether there is room again.
const SPARE_RETRY: Duration = Duration::from_secs(1);
/// The room that is kept for when the disk is full: such a part of a segment, and in bytes.
const SPARE_PART: u64 = 16;
const MOST_SPARE: u64 = 4 * 1024 * 1024;
/// Or so often what a segment began with, rounded up: as much again may come behind it, and then
/// what the next one begins with, which can be as long as both.
const SPARE_FIRSTS: u64 = 3;
const SPARE_STEP: u64 = 1024 * 1024;

pub(super) enum Command {
    Append(Append),
    RemoveBefore(u64),
    Close,
}

pub(super) struct Append {
    pub(super) payload: Vec<u8>,
    /// Whether it is to be synced before it is done; otherwise it is once the system has it.
    pub(super) sync: bool,
    /// It may have the room that is kept for when the disk is full.
    pub(super) urgent: bool,
    /// It begins a segment.
    pub(super) first: bool,
    pub(super) done: Done,
}

/// The room that is kept for when the disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spare {
    Kept,
    /// The disk is full, and only what is urgent is written. The room is taken again when there is
    /// some, which is looked at then.
    Given(Instant),
    /// The disk can't, for another reason than that it is full.
    None,
}

pub(super) struct Writer {
    storage: Arc<dyn Storage>,
    sink: Sink,
    durability: Durability,
    segment_size: u64,
    spare: Spare,
    /// How long the last entry is that was to begin a segment, in bytes.
    first: u64,
    header: Header,
    /// The number of the segment that was begun last.
    current: u64,
    /// `None` after a failure, until the next segment is begun.
    file: Option<Box<dyn SegmentFile>>,
    /// Where the next record will lie.
    end: u64,
    /// Up to where the disk has it.
    synced: u64,
    /// Up to where a mark says so.
    marked: u64,
    /// When what the disk doesn't have yet has to be synced.
    sync_by: Option<Instant>,
    buf: Vec<u8>,
}

impl Writer {
    /// Begins the first segment behind those that are there.
    pub(super) fn begin(
        storage: Arc<dyn Storage>,
        options: &Options,
        sink: Sink,
        salt: u64,
        resume: &Resume,
    ) -> io::Result<Self> {
        let previous = resume.last.unwrap_or_default();
        let number = previous + 1;
        let header = Header { salt, number, previous, previous_end: resume.end };
        let mut file = begin_segment(&*storage, &header);
        if file.as_ref().is_err_and(is_full) && storage.give_spare()? {
            file = begin_segment(&*storage, &header);
        }
        let file = file?;
        let mut writer = Self {
            storage,
            sink,
            durability: options.durability,
            segment_size: options.segment_size,
            spare: Spare::None,
            first: 0,
            header,
            current: number,
            file: Some(file),
            end: HEADER,
            synced: HEADER,
            marked: HEADER,
            sync_by: None,
            buf: Vec::new(),
        };
        writer.take_spare();
        Ok(writer)
    }

    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        while let Some(command) = self.wait(commands) {
            let after = match command {
                Command::Append(first) => self.gather(first, commands),
                other => Some(other),
            };
            match after {
                Some(Command::RemoveBefore(segment)) => self.remove_before(segment),
                Some(Command::Close) => break,
                Some(Command::Append(_)) | None => {}
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
    }

    /// Stores an append with all that are there already; the other command that came behind them.
    fn gather(&mut self, first: Append, commands: &Receiver<Command>) -> Option<Command> {
        let (mut size, mut after) = (first.payload.len(), None);
        let mut gathered = vec![first];
        while size < MOST_AT_ONCE {
            match commands.try_recv() {
                Ok(Command::Append(next)) => {
                    size += next.payload.len();
                    gathered.push(next);
                }
                Ok(other) => {
                    after = Some(other);
                    break;
                }
                Err(_nothing_more) => break,
            }
        }
        let written = self.store(&gathered);
        let mut for_sink = Vec::new();
        for (append, result) in gathered.into_iter().zip(written) {
            match append.done {
                Done::Waiter(waiter) => _ = waiter.send(result),
                Done::Sink(token) => for_sink.push((token, result)),
                Done::Nobody => {}
            }
        }
        if !for_sink.is_empty() {
            (self.sink)(for_sink);
        }
        after
    }

    /// The next command; syncs when that is due meanwhile.
    fn wait(&mut self, commands: &Receiver<Command>) -> Option<Command> {
        loop {
            let pause = match self.sync_by {
                Some(by) => by.saturating_duration_since(Instant::now()),
                None if self.is_marked() => return commands.recv().ok(),
                None => IDLE,
            };
            match commands.recv_timeout(pause) {
                Ok(command) => return Some(command),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let due = self.sync_by.is_some();
                    if let Err(error) = if due { self.sync() } else { self.mark() } {
                        tracing::error!(%error, "the journal can't be synced");
                    }
                }
            }
        }
    }

    /// Writes all of it, or only what is urgent if the disk is full; what became of each.
    pub(super) fn store(&mut self, gathered: &[Append]) -> Vec<Result<Position, NotStored>> {
        let of_one_segment = gathered.chunk_by(|_, next| !next.first);
        of_one_segment.flat_map(|together| self.store_together(together)).collect()
    }

    fn store_together(&mut self, gathered: &[Append]) -> Vec<Result<Position, NotStored>> {
        if let Spare::Given(retry) = self.spare
            && Instant::now() >= retry
        {
            self.take_spare();
        }
        let mut error = NotStored(Arc::new(io::ErrorKind::StorageFull.into()));
        if !matches!(self.spare, Spare::Given(_)) {
            match self.write(gathered) {
                Ok(positions) => {
                    if gathered.first().is_some_and(|append| append.first) {
                        self.take_spare();
                    }
                    return positions.into_iter().map(Ok).collect();
                }
                Err(problem) => {
                    let gave = is_full(&problem) && self.give_spare();
                    error = NotStored(Arc::new(problem));
                    if !gave {
                        return gathered.iter().map(|_| Err(error.clone())).collect();
                    }
                }
            }
        }
        let urgent = gathered.iter().filter(|append| append.urgent);
        let written = self.write(urgent).map_err(|error| NotStored(Arc::new(error)));
        let mut written = written.map(Vec::into_iter);
        let results = gathered.iter().map(|append| match &mut written {
            Ok(positions) if append.urgent => positions.next().ok_or_else(|| error.clone()),
            Err(problem) if append.urgent => Err(problem.clone()),
            Ok(_) | Err(_) => Err(error.clone()),
        });
        results.collect()
    }

    fn wanted_spare(&self) -> u64 {
        let usual = (self.segment_size / SPARE_PART).min(MOST_SPARE);
        match SPARE_FIRSTS * self.first {
            more if more > usual => more.next_multiple_of(SPARE_STEP),
            _ => usual,
        }
    }

    /// Takes the room for when the disk is full, if there is as much.
    fn take_spare(&mut self) {
        let bytes = self.wanted_spare();
        self.spare = match self.storage.take_spare(bytes) {
            Ok(()) => Spare::Kept,
            Err(error) if is_full(&error) => {
                tracing::warn!("the disk is full: only what frees room is stored");
                Spare::Given(Instant::now() + SPARE_RETRY)
            }
            Err(error) => {
                tracing::warn!(%error, "no room can be kept for when the disk is full");
                Spare::None
            }
        };
    }

    /// Gives it up; whether there was any.
    fn give_spare(&mut self) -> bool {
        let gave = self.storage.give_spare().unwrap_or_default();
        if gave {
            tracing::warn!("the disk is full: only what frees room is stored");
            self.spare = Spare::Given(Instant::now() + SPARE_RETRY);
        }
        gave
    }

    fn write<'a>(
        &mut self,
        gathered: impl IntoIterator<Item = &'a Append, IntoIter: Clone>,
    ) -> io::Result<Vec<Position>> {
        let gathered = gathered.into_iter();
        let Some(first) = gathered.clone().next() else { return Ok(Vec::new()) };
        let is_over = self.end >= self.segment_size || (first.first && self.end > HEADER);
        if self.file.is_none() || is_over {
            self.turn_over()?;
        }
        let (Some(file), start) = (self.file.as_mut(), self.end) else {
            return Err(io::Error::other("no segment is open"));
        };
        self.buf.clear();
        let mut end = start;
        self.header.encode_record(end, MARK, &self.synced.to_le_bytes(), &mut self.buf);
        end += record_size(8);
        let mut positions = Vec::new();
        for Append { payload, .. } in gathered.clone() {
            let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
            self.header.encode_record(end, ENTRY, payload, &mut self.buf);
            positions.push(Position { segment: self.header.number, offset: end, length });
            end += record_size(u64::from(length));
        }
        if let Err(error) = file.append(&self.buf) {
            // Some of it may be there. What the file holds beyond `end` doesn't count; what was
            // written before and needn't be synced at once had better last all the same.
            let _best_effort = file.sync();
            self.file = None;
            return Err(error);
        }
        self.marked = self.synced;
        match self.durability {
            Durability::Sync if gathered.clone().any(|append| append.sync) => {
                if let Err(error) = file.sync() {
                    // Nobody knows what is on the disk; another sync of this file might say that
                    // all is well though it isn't.
                    self.file = None;
                    return Err(error);
                }
                self.synced = end;
            }
            Durability::Interval(pause) => {
                // One that no clock will ever show is never due.
                self.sync_by = self.sync_by.or_else(|| Instant::now().checked_add(pause));
            }
            Durability::Sync | Durability::OsBuffer => {}
        }
        if first.first {
            self.first = first.payload.len() as u64;
        }
        self.end = end;
        Ok(positions)
    }

    fn is_marked(&self) -> bool {
        self.file.is_none() || self.synced <= self.marked || matches!(self.spare, Spare::Given(_))
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
                self.file = None;
                return Err(error);
            }
            self.synced = self.end;
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
        }
        // A number is never used twice, even if the attempt fails.
        self.header.number += 1;
        self.file = Some(begin_segment(&*self.storage, &self.header)?);
        self.current = self.header.number;
        (self.end, self.synced, self.marked) = (HEADER, HEADER, HEADER);
        Ok(())
    }

    pub(super) fn remove_before(&mut self, segment: u64) {
        // What makes them unwanted has to outlast them, however late it may be synced otherwise.
        let synced = self.sync();
        let removed = synced.and_then(|()| self.storage.segments()).and_then(|segments| {
            let old = segments.into_iter().take_while(|old| *old < segment.min(self.current));
            for old in old {
                // One at a time, so that what is left after a crash has no holes.
                self.storage.remove(old)?;
                self.storage.sync_directory()?;
            }
            Ok(())
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "old segments can't be removed");
        }
        if matches!(self.spare, Spare::Given(_)) {
            self.take_spare();
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
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
