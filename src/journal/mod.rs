//! A write-ahead log: an appended entry survives a crash once it is stored.
//!
//! The segments of a directory are written one after the other, and no place is ever written twice.
//! After a crash, a failed write or a failed sync, the journal continues in a new segment, whose
//! header names the valid end of the previous segment. A single thread writes. All entries that
//! queue up meanwhile form one write and one sync; nothing is delayed to gather more.
//!
//! Damage is reported and left in place; written data is never truncated.
//!
//! A manifest beside the segments lists them and the synced length of each: a segment, or a part of
//! one, that is listed but missing or unreadable is damage. After a power cut the manifest may lag
//! slightly for the last segment: damage there, in data of the last seconds before, may look like a
//! torn write.
//!
//! A spare file reserves disk space for when the disk is full, for the entries that must be written
//! before segments can be removed.

#[cfg(test)]
pub(crate) mod crashing;
#[cfg(test)]
mod damage_tests;
mod manifest;
mod manifest_writer;
mod queue;
mod recovery;
mod room;
mod segment;
#[cfg(test)]
pub(crate) mod stepped;
mod storage;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use room::{DiskNews, Level, Room, Watch};
pub use storage::DirectoryError;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::identity::random_u64;
use crate::opaque::opaque;
use queue::{Append, Queue, Removal};
use recovery::recover;
use storage::{Directory, Storage};
use writer::Writer;

/// The point at which an appended entry counts as stored.
///
/// The record that a message is settled is written with the next entries, or a second later, and is
/// not synced by itself: after a crash the message may be sent once more, and its receiver
/// recognises the duplicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Durability {
    /// After a sync: the entry survives a crash of the process and of the machine.
    #[default]
    Sync,
    /// After the write; a sync follows at most this long after. A crash of the process loses
    /// nothing; a crash of the machine loses what was written since the last sync.
    Interval(Duration),
    /// After the write; the operating system decides when to sync.
    OsBuffer,
}

/// Options of a journal.
#[derive(Debug, Clone)]
pub struct Options {
    pub durability: Durability,
    /// The length in bytes at which a segment is closed and the next one begun.
    pub segment_size: u64,
    /// Live entries may be rewritten so that their segment can be removed: when space is scarce,
    /// enough is reserved for that.
    pub cleaned: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { durability: Durability::Sync, segment_size: 64 * 1024 * 1024, cleaned: false }
    }
}

impl Options {
    /// Adapts the options to a cleaned journal in `folder`, so that many segments fit its disk.
    pub(crate) fn cleaned(&self, folder: &Path) -> Self {
        let longest = self.segment_size;
        let fitting = |disk: storage::FileSystem| room::fitting_segment(disk.size, longest);
        let segment_size = storage::disk(folder).map_or(longest, fitting);
        Self { segment_size, cleaned: true, ..self.clone() }
    }
}

/// The position of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    pub segment: u64,
    pub offset: u64,
    pub length: u32,
}

/// An entry read back from the journal.
pub struct Entry<'a> {
    pub position: Position,
    pub payload: &'a [u8],
}

opaque!(Entry<'_>, |it| position: it.position);

/// A file of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalFile {
    Segment(u64),
    /// The list of segments. Without it, missing segments and lost ends go undetected.
    Manifest,
}

impl JournalFile {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Segment(number) => storage::file_name(number),
            Self::Manifest => storage::MANIFEST.into(),
        }
    }
}

/// An unreadable part of a file that was stored, or may have been. The data after it is readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    pub file: JournalFile,
    pub from: u64,
    pub to: u64,
    /// The file is missing.
    pub missing: bool,
}

impl Damage {
    fn part(segment: u64, from: u64, to: u64) -> Self {
        Self { file: JournalFile::Segment(segment), from, to, missing: false }
    }
}

/// The outcome of reading a journal back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    pub segments: u64,
    pub entries: u64,
    pub damaged: Vec<Damage>,
    /// The number of messages in the damaged parts, counted by the number given with each entry.
    /// `None` if unknown: the manifest itself is damaged, or does not cover the damaged part, or a
    /// segment is of version 1. After a power cut, messages at the end of the last segment may be
    /// missing from the count.
    pub lost: Option<u64>,
    /// The number of bytes of the last write, torn by a crash. They had not counted as stored.
    pub torn: u64,
}

impl Default for Recovery {
    fn default() -> Self {
        Self { segments: 0, entries: 0, damaged: Vec::new(), lost: Some(0), torn: 0 }
    }
}

impl Recovery {
    fn lose(&mut self, messages: Option<u64>) {
        self.lost = self.lost.zip(messages).map(|(lost, more)| lost.saturating_add(more));
    }
}

/// Corrects the checksums of bytes that may be a segment.
#[cfg(fuzzing)]
pub fn correct_checksums(bytes: &mut [u8]) {
    segment::correct(bytes);
}

/// The error of opening or reading a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(
        "the journal has format {0}, but this version reads up to {known}: use a newer version",
        known = segment::VERSION
    )]
    Version(u32),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the entry is damaged")]
    Damaged,
}

/// The error of an entry that was not stored.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the entry can't be stored: {reason}")]
pub struct NotStored {
    pub(crate) reason: Arc<io::Error>,
    /// The entry was written, but the disk failed before the sync: it may be present when the
    /// journal is opened again.
    pub(crate) may_turn_up: bool,
}

impl NotStored {
    /// The writer thread has ended: the outcome is unknown.
    fn closed() -> Self {
        Self { reason: Arc::new(io::Error::other("the journal is closed")), may_turn_up: true }
    }
}

#[cfg(test)]
impl From<&str> for NotStored {
    fn from(reason: &str) -> Self {
        Self { reason: Arc::new(io::Error::other(reason)), may_turn_up: false }
    }
}

/// A callback that receives the outcomes of appended entries, by their numbers. The writer thread
/// calls it once for all entries of a write.
pub type Sink = Box<dyn FnMut(Ended<'_>) + Send>;

/// The position at which an entry was stored, or the error.
pub type Stored = Result<Position, NotStored>;

/// The outcomes of entries, by their numbers.
pub type Ended<'a> = std::vec::Drain<'a, (u64, Stored)>;

/// The point at which an entry counts as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Persist {
    /// When its [`Durability`] is reached: by default, after a sync.
    Sync,
    /// After the write, without a sync.
    Flush,
    /// After the write, which may be delayed until the next write, or for a second.
    Lazy,
}

/// The priority of an entry when the disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// The entry is refused.
    None,
    /// The entry may use the reserved space, except its last part.
    Urgent,
    /// The entry may use half of the last part too: without it, no message may be sent any more.
    Sending,
    /// The entry may use most of the last part too: otherwise no segment can be removed.
    Emergency,
    /// The entry may use all reserved space: it lets a segment be removed.
    Removal,
}

/// The receiver of an entry's outcome.
enum Done {
    Nobody,
    Waiter(oneshot::Sender<Stored>),
    Sink(u64),
}

/// An open journal.
pub struct Journal {
    storage: Arc<dyn Storage>,
    salt: u64,
    queue: Arc<Queue>,
    room: Room,
    /// The first segment that it writes.
    first: u64,
    writer: Option<JoinHandle<()>>,
}

opaque!(Journal, |_it|);

impl Journal {
    /// Opens the journal of a directory, or creates one. Its entries are passed to `take` in the
    /// order of their appends.
    pub fn open(
        path: &Path,
        options: &Options,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        Self::open_with(path, options, Box::new(|_| {}), take)
    }

    /// Checks that this version can open the journal of a directory, if one exists. Writes nothing.
    pub(crate) fn check(path: &Path) -> Result<(), JournalError> {
        match path.is_dir() {
            true => recovery::check_versions(&Directory::look_at(path)),
            false => Ok(()),
        }
    }

    /// Reads the journal of a directory that no process has open; its entries are passed to `take`.
    /// Writes nothing.
    pub(crate) fn look_at(
        path: &Path,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Reader, Recovery), JournalError> {
        let storage = Directory::open_to_read(path)?;
        let (recovery, resume) = recover(&storage, take)?;
        let (storage, salt) = (Arc::new(storage), resume.salt.unwrap_or_default());
        Ok((Reader { storage, salt }, recovery))
    }

    /// [`Journal::open`] with a sink for [`Journal::append_for_sink`].
    pub(crate) fn open_with(
        path: &Path,
        options: &Options,
        sink: Sink,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        Self::open_on(Arc::new(Directory::open(path)?), options, sink, take)
    }

    /// [`Journal::open_with`], with a `watch` that is notified of the disk's state from then on.
    pub(crate) fn open_watched(
        path: &Path,
        options: &Options,
        sink: Sink,
        watch: Watch,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        Self::open_watched_on(Arc::new(Directory::open(path)?), options, sink, watch, take)
    }

    fn open_on(
        storage: Arc<dyn Storage>,
        options: &Options,
        sink: Sink,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        Self::open_watched_on(storage, options, sink, Box::new(|_| {}), take)
    }

    fn open_watched_on(
        storage: Arc<dyn Storage>,
        options: &Options,
        sink: Sink,
        watch: Watch,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        let (mut writer, salt, recovery) = begin(&storage, options, sink, take)?;
        writer.watch = watch;
        let (room, first) = (writer.room(), writer.number());
        let queue = Arc::new(Queue::default());
        let thread = std::thread::Builder::new().name("peerbus-journal".into());
        let ends = End(queue.clone());
        let writer = thread.spawn(move || writer.run(&ends.0))?;
        Ok((Self { storage, salt, queue, room, first, writer: Some(writer) }, recovery))
    }

    /// The disk space at the time of opening.
    pub(crate) fn room(&self) -> Room {
        self.room
    }

    /// The existing segments and their lengths in bytes; the last is the first to be written.
    pub(crate) fn segments(&self) -> io::Result<Vec<(u64, u64)>> {
        lengths(&*self.storage, self.first)
    }

    /// Appends an entry; a crash before it is stored leaves all or nothing of it. The future
    /// completes with its position once it is stored; dropping the future does not cancel the
    /// append.
    pub fn append(&self, payload: &[u8]) -> impl Future<Output = Stored> + use<> {
        let (waiter, wait) = oneshot::channel();
        self.queue.append(payload, Append::new(Done::Waiter(waiter)));
        async move { wait.await.unwrap_or_else(|_| Err(NotStored::closed())) }
    }

    /// Appends an entry, with the last disk space if need be, and blocks the thread until it is
    /// stored.
    pub(crate) fn append_blocking(&self, payload: &[u8]) -> Stored {
        let (waiter, wait) = oneshot::channel();
        let append = Append { need: Need::Removal, ..Append::new(Done::Waiter(waiter)) };
        self.queue.append(payload, append);
        block_on(wait).unwrap_or_else(|_| Err(NotStored::closed()))
    }

    /// Appends an entry that holds `messages` messages; once it is stored, its number and position
    /// are passed to the sink.
    pub(crate) fn append_for_sink(
        &self,
        number: u64,
        payload: &[u8],
        messages: u32,
        persist: Persist,
        need: Need,
    ) {
        let append = Append { persist, need, messages, ..Append::new(Done::Sink(number)) };
        self.queue.append(payload, append);
    }

    /// Appends an urgent entry at the start of a new segment, so that all segments before it can be
    /// removed. Space is reserved for the next entry of this kind: it may be twice as long,
    /// provided that no more than this entry's length is appended in between.
    pub(crate) fn append_first_for_sink(&self, number: u64, payload: &[u8], messages: u32) {
        let need = Need::Removal;
        let append = Append { need, first: true, messages, ..Append::new(Done::Sink(number)) };
        self.queue.append(payload, append);
    }

    /// Appends an entry without a sync: it survives a crash of the process, and a crash of the
    /// machine if a later entry is synced.
    pub(crate) fn note(&self, payload: &[u8]) {
        self.queue.append(payload, Append { persist: Persist::Flush, ..Append::new(Done::Nobody) });
    }

    /// Reads a stored entry.
    pub fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        self.reader().read(position)
    }

    /// Returns a reader of stored entries.
    pub(crate) fn reader(&self) -> Reader {
        Reader { storage: self.storage.clone(), salt: self.salt }
    }

    /// Removes the segments before `segment`, whose entries are no longer needed; never the current
    /// segment. Records about their entries in later segments are synced before the removal.
    pub fn remove_before(&self, segment: u64) {
        self.queue.remove(Removal::Before(segment));
    }

    /// Removes segments whose entries are no longer needed; any but the current segment. Records
    /// about their entries in later segments are synced before the removal.
    pub fn remove(&self, segments: Vec<u64>) {
        self.queue.remove(Removal::These(segments));
    }
}

/// Blocks the thread until a future completes, also within a runtime, whose own `block_on` panics
/// there.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// A reader of a journal's entries. The directory stays locked for other processes while it exists.
pub(crate) struct Reader {
    storage: Arc<dyn Storage>,
    salt: u64,
}

impl Reader {
    /// Reads a stored entry.
    pub(crate) fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        read_entry(&*self.storage, self.salt, position)
    }
}

/// Reads a journal and begins a new segment after it. Also returns the journal's salt.
fn begin(
    storage: &Arc<dyn Storage>,
    options: &Options,
    sink: Sink,
    take: impl FnMut(Entry<'_>),
) -> Result<(Writer, u64, Recovery), JournalError> {
    let (recovery, resume) = recover(&**storage, take)?;
    // Recovered entries must survive the next crash.
    for segment in storage.segments()? {
        storage.sync(segment)?;
    }
    let salt = resume.salt.unwrap_or_else(random_u64);
    let writer = Writer::begin(storage.clone(), options, sink, salt, resume)?;
    Ok((writer, salt, recovery))
}

fn lengths(storage: &dyn Storage, current: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut lengths = Vec::new();
    for segment in storage.segments()?.into_iter().filter(|segment| *segment < current) {
        lengths.push((segment, storage.length(segment)?));
    }
    lengths.push((current, 0));
    Ok(lengths)
}

fn read_entry(
    storage: &dyn Storage,
    salt: u64,
    position: Position,
) -> Result<Vec<u8>, JournalError> {
    let number = position.segment;
    let header = segment::Header { version: 0, salt, number, previous: 0, previous_end: 0 };
    let mut bytes = vec![0; segment::record_size(u64::from(position.length)) as usize];
    let read = storage.read(position.segment, position.offset, &mut bytes)?;
    let bytes = bytes.get(..read).filter(|bytes| bytes.len() >= segment::FRAME as usize);
    let bytes = bytes.ok_or(JournalError::Damaged)?;
    let frame = header.decode_frame(position.offset, bytes).ok_or(JournalError::Damaged)?;
    Ok(frame.payload(bytes).ok_or(JournalError::Damaged)?.to_vec())
}

/// Ends the queue on drop, also when the writer thread panics.
struct End(Arc<Queue>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue.close();
        // The sink may hold the last reference to the journal, which the writer thread then drops.
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
        {
            let _panicked = writer.join();
        }
    }
}
