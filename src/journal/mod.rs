//! A write-ahead log: what was appended survives a crash once it is stored.
//!
//! Segments of a directory are written one after the other, and never twice at the same place:
//! after a crash, a failed write or a failed sync the journal goes on in a new segment, which
//! names where what counts of the one before it ends. One thread writes; all that has gathered
//! meanwhile is one write and one sync, and nothing waits for more to gather.
//!
//! What is damaged is reported and left as it is; nothing that was written is ever truncated.
//!
//! A manifest beside the segments says which there are, and how far each was stored: whatever of
//! that is missing, or can't be read, is damage. After a power cut it may be a little behind for the
//! segment that was written last: what is damaged there, of the last seconds before, may look like
//! a torn write.
//!
//! Some room is kept for when the disk is full, for what has to be written before segments can be
//! removed.

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
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::identity::random_u64;
use crate::opaque::opaque;
use queue::{Append, Queue, Removal};
use recovery::recover;
use storage::{Directory, Storage};
use writer::Writer;

/// When what is appended counts as stored.
///
/// That a message is settled is written with what is written next, or a second later, and is not
/// synced for itself: after a crash the message may be sent once more, and its receiver knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Durability {
    /// When it is on the disk: it survives a crash of the process and of the machine.
    #[default]
    Sync,
    /// When the system has it; it is on the disk so much later at the most. A crash of the
    /// process loses nothing, one of the machine what came since.
    Interval(Duration),
    /// When the system has it, which writes it when it likes.
    OsBuffer,
}

/// How a journal is kept.
#[derive(Debug, Clone)]
pub struct Options {
    pub durability: Durability,
    /// A segment that is longer than this is the last with that content, in bytes.
    pub segment_size: u64,
    /// What is wanted of a segment may be written once more, so that the segment can go: when room
    /// is scarce, as much is kept as that takes.
    pub cleaned: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { durability: Durability::Sync, segment_size: 64 * 1024 * 1024, cleaned: false }
    }
}

impl Options {
    /// The same for a journal in that folder whose segments are cleaned: many of them fit its disk.
    pub(crate) fn cleaned(&self, folder: &Path) -> Self {
        let longest = self.segment_size;
        let fitting = |disk: storage::FileSystem| room::fitting_segment(disk.size, longest);
        let segment_size = storage::disk(folder).map_or(longest, fitting);
        Self { segment_size, cleaned: true, ..self.clone() }
    }
}

/// Where an entry lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    pub segment: u64,
    pub offset: u64,
    pub length: u32,
}

/// Something that was read back.
pub struct Entry<'a> {
    pub position: Position,
    pub payload: &'a [u8],
}

opaque!(Entry<'_>, |it| position: it.position);

/// A file of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalFile {
    Segment(u64),
    /// The list of segments. Without it nobody knows whether segments are missing, or their ends.
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

/// A part of a file that can't be read, though it was stored, or may have been: what lies behind
/// it can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    pub file: JournalFile,
    pub from: u64,
    pub to: u64,
    /// The file is not there.
    pub missing: bool,
}

impl Damage {
    fn part(segment: u64, from: u64, to: u64) -> Self {
        Self { file: JournalFile::Segment(segment), from, to, missing: false }
    }
}

/// What reading a journal back found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    pub segments: u64,
    pub entries: u64,
    pub damaged: Vec<Damage>,
    /// How many messages were stored in what is damaged, by the number that was given with each
    /// entry. `None` if that is not known: the manifest is damaged itself, or doesn't tell of what
    /// is damaged, or a segment is of version 1. After a power cut there may have been some more
    /// at the end of the segment that was written last.
    pub lost: Option<u64>,
    /// Bytes of a last write that a crash tore. They had not been stored.
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

/// Corrects the checksums of what may be a segment.
#[cfg(fuzzing)]
pub fn correct_checksums(bytes: &mut [u8]) {
    segment::correct(bytes);
}

/// A journal that can't be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("it is of format {0}; this version knows up to {known}", known = segment::VERSION)]
    Version(u32),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the entry is damaged")]
    Damaged,
}

/// An entry was not stored.
#[derive(Debug, Clone, thiserror::Error)]
#[error("it can't be stored: {reason}")]
pub struct NotStored {
    pub(crate) reason: Arc<io::Error>,
    /// It was written, and the disk failed before it was safe: it may still be there when the
    /// journal is opened again.
    pub(crate) may_turn_up: bool,
}

impl NotStored {
    /// Nobody will tell.
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

/// Is told of appended entries, by the numbers that they were given, once they are stored or can't
/// be. The thread that writes runs it, for all of a write at once.
pub type Sink = Box<dyn FnMut(Ended<'_>) + Send>;

/// Where an entry was stored, or why it was not.
pub type Stored = Result<Position, NotStored>;

/// What became of entries, by their numbers.
pub type Ended<'a> = std::vec::Drain<'a, (u64, Stored)>;

/// When an entry counts as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Persist {
    /// When it is synced.
    Sync,
    /// When the system has it.
    Flush,
    /// The same, and that may be with what is written next, or a second later.
    Lazy,
}

/// What may be written when the disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// It is refused.
    None,
    /// It may have the room that is kept, but for the last part.
    Urgent,
    /// It may have that too, but for a little: no segment can go before.
    Emergency,
    /// It may have all of it: it is for a segment to go.
    Removal,
}

/// Who is told that an entry is stored.
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
    /// The segment that it writes first.
    first: u64,
    writer: Option<JoinHandle<()>>,
}

opaque!(Journal, |_it|);

impl Journal {
    /// Opens the journal of a directory, or begins one; what is in it is handed to `take`, in
    /// the order in which it was appended.
    pub fn open(
        path: &Path,
        options: &Options,
        take: impl FnMut(Entry<'_>),
    ) -> Result<(Self, Recovery), JournalError> {
        Self::open_with(path, options, Box::new(|_| {}), take)
    }

    /// Whether this version can open the journal of a directory, if there is one there. Nothing is
    /// written.
    pub(crate) fn check(path: &Path) -> Result<(), JournalError> {
        match path.is_dir() {
            true => recovery::check_versions(&Directory::look_at(path)),
            false => Ok(()),
        }
    }

    /// Reads the journal of a directory that nobody has open; what is in it is handed to `take`.
    /// Nothing is written.
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

    /// The same, and `watch` is told of the disk from then on.
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

    /// How much room there was when it was opened.
    pub(crate) fn room(&self) -> Room {
        self.room
    }

    /// The segments that are there, and how long each is, in bytes; the last is the one that is
    /// written first.
    pub(crate) fn segments(&self) -> io::Result<Vec<(u64, u64)>> {
        lengths(&*self.storage, self.first)
    }

    /// Appends entries, all or none of which survive a crash before they are stored. Awaiting it
    /// tells when they are, and where; it happens even if nobody waits.
    pub fn append(&self, payload: &[u8]) -> impl Future<Output = Stored> + use<> {
        let (waiter, wait) = oneshot::channel();
        self.queue.append(payload, Append::new(Done::Waiter(waiter)));
        async move { wait.await.unwrap_or_else(|_| Err(NotStored::closed())) }
    }

    /// Appends an entry, also with the last room of the disk, and waits until it is stored, on a
    /// thread that may wait.
    pub(crate) fn append_blocking(&self, payload: &[u8]) -> Stored {
        let (waiter, wait) = oneshot::channel();
        let append = Append { need: Need::Removal, ..Append::new(Done::Waiter(waiter)) };
        self.queue.append(payload, append);
        wait.blocking_recv().unwrap_or_else(|_| Err(NotStored::closed()))
    }

    /// Appends an entry that stores so many messages; the sink is told its number when it is
    /// stored.
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

    /// Appends an urgent entry as the first of a segment, so that all that is before it can be
    /// removed. Room is kept for the next one of its kind: it may be twice as long, if no more
    /// than the length of this one comes between them.
    pub(crate) fn append_first_for_sink(&self, number: u64, payload: &[u8], messages: u32) {
        let need = Need::Removal;
        let append = Append { need, first: true, messages, ..Append::new(Done::Sink(number)) };
        self.queue.append(payload, append);
    }

    /// Appends an entry that is not worth a sync: it survives a crash of the process, and one of
    /// the machine if a later one is synced.
    pub(crate) fn note(&self, payload: &[u8]) {
        self.queue.append(payload, Append { persist: Persist::Flush, ..Append::new(Done::Nobody) });
    }

    /// Reads an entry that was stored.
    pub fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        self.reader().read(position)
    }

    /// Reads entries apart from the journal.
    pub(crate) fn reader(&self) -> Reader {
        Reader { storage: self.storage.clone(), salt: self.salt }
    }

    /// Removes the segments before that one, whose entries are no longer wanted; never the one
    /// that is being written. What is said of their entries in later ones outlasts them.
    pub fn remove_before(&self, segment: u64) {
        self.queue.remove(Removal::Before(segment));
    }

    /// Removes segments whose entries are no longer wanted, any of them but the one that is being
    /// written. What is said of their entries in later ones outlasts them.
    pub fn remove(&self, segments: Vec<u64>) {
        self.queue.remove(Removal::These(segments));
    }
}

/// Reads the entries of a journal. Nobody else can open its directory as long as this lives.
pub(crate) struct Reader {
    storage: Arc<dyn Storage>,
    salt: u64,
}

impl Reader {
    /// Reads an entry that was stored.
    pub(crate) fn read(&self, position: Position) -> Result<Vec<u8>, JournalError> {
        read_entry(&*self.storage, self.salt, position)
    }
}

/// Hands out what is in a journal, and begins a segment behind it; also its salt.
fn begin(
    storage: &Arc<dyn Storage>,
    options: &Options,
    sink: Sink,
    take: impl FnMut(Entry<'_>),
) -> Result<(Writer, u64, Recovery), JournalError> {
    let (recovery, resume) = recover(&**storage, take)?;
    // What is handed out now must not be gone after the next crash.
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

/// Ends the queue, also when the thread that writes panics.
struct End(Arc<Queue>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue.close();
        // The sink may hold what holds this, and be the last to let go of it.
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
        {
            let _panicked = writer.join();
        }
    }
}
