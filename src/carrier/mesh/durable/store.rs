//! A node's store: its outbox and inbox, each with a journal, and their waiters.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use smallvec::SmallVec;

use super::Durable;
use super::loopback::Loopback;
use super::reader::Reader;
use crate::address::ServiceName;
use crate::core::{Hold, ProgressSender};
use crate::engine::delivery::{Inbox, Now, Numbered, Outbox, OutboxConfig, RecordError};
use crate::identity::{NodeId, random_u64};
use crate::journal::{
    Damage, DirectoryError, Ended, Journal, JournalError, Options, Position, Recovery, Sink, Watch,
};
use crate::message::Message;
use crate::private::{self, Others};
use crate::sync::{Mutex, Rank, lock};
use crate::wire::DeliveryId;

/// The names in a store's folder.
pub(crate) const OUTBOX: &str = "outbox";
pub(crate) const INBOX: &str = "inbox";
pub(crate) const IDENTITY: &str = "identity";

/// A folder that can't be used as a node's store.
#[derive(Debug, thiserror::Error)]
#[error("the store {path} can't be used", path = path.display())]
#[non_exhaustive]
pub struct StoreError {
    /// The folder.
    pub path: PathBuf,
    /// The reason.
    #[source]
    pub problem: StoreProblem,
}

/// The reason for which a folder can't be used as a node's store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreProblem {
    /// The folder holds no outbox.
    #[error("it holds no outbox")]
    Missing,
    /// Another process uses it.
    #[error("another process uses it")]
    InUse,
    /// The folder holds files of another program.
    #[error("it holds other files ({0}); choose an empty or a new folder")]
    Foreign(String),
    /// A newer version of this software wrote it.
    #[error("a newer version wrote it ({0}); use that version")]
    Newer(String),
    /// The system's error.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl From<JournalError> for StoreProblem {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Directory(DirectoryError::InUse) => Self::InUse,
            JournalError::Directory(DirectoryError::Foreign(file)) => Self::Foreign(file),
            JournalError::Directory(DirectoryError::Io(error)) | JournalError::Io(error) => {
                Self::Io(error)
            }
            JournalError::Version(version) => Self::Newer(format!("format {version}")),
            JournalError::Damaged => Self::Io(io::Error::other("an entry is damaged")),
        }
    }
}

/// An unreadable part of a store's file that was stored, or a missing file. The file is left as it
/// is.
///
/// A journal's `manifest` lists its other files. Without it, missing or shortened files go
/// undetected. Opening the store writes a new one, so the damage is reported once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedPart {
    /// The file, in the store's folder.
    pub file: PathBuf,
    /// The offset of the first unreadable byte.
    pub from: u64,
    /// The offset after the last unreadable byte.
    pub to: u64,
    /// The file is missing.
    pub missing: bool,
}

impl DamagedPart {
    /// Returns the damaged parts of one of a store's journals.
    pub(crate) fn all(journal: &str, recovery: &Recovery) -> Vec<Self> {
        let part = |it: &Damage| {
            let file = Path::new(journal).join(it.file.name());
            Self { file, from: it.from, to: it.to, missing: it.missing }
        };
        recovery.damaged.iter().map(part).collect()
    }
}

impl fmt::Display for DamagedPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, from, to, missing } = self;
        match missing {
            true => write!(f, "{}, which is missing", file.display()),
            false => write!(f, "{}, bytes {from} to {to}", file.display()),
        }
    }
}

/// The result of reading a store back.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreReport {
    /// The number of unprocessed messages, once for each destination.
    pub pending: u64,
    /// The number of dead letters, once for each destination.
    pub dead_letters: u64,
    /// The unreadable parts, which are lost. After a power cut, one may be part of the last write,
    /// which was never reported as stored.
    pub damaged: Vec<DamagedPart>,
    /// The maximum number of lost messages of the outbox: those stored in unreadable parts, also if
    /// they were processed already or stored again elsewhere. `None` if the number is unknown: the
    /// manifest itself is damaged, or the damaged part was written in the last seconds before a
    /// power cut, or by a version that did not count.
    pub lost: Option<u64>,
    /// The maximum number of messages that may be processed here again, since their processed
    /// records are in unreadable parts of the inbox. `None` as for `lost`.
    pub forgotten: Option<u64>,
    /// The number of bytes of torn last writes, which were never reported as stored.
    pub torn: u64,
}

/// The receivers of reports on one message.
type Waiters = SmallVec<[ProgressSender; 1]>;

/// A message, and its hold.
pub(super) type Parked = (Box<Message>, Hold);

pub(crate) struct Store {
    pub(super) outbox: Mutex<Outbox>,
    pub(super) inbox: Mutex<Inbox>,
    /// The journals; `None` once they are closed.
    journals: RwLock<Option<Journals>>,
    pub(super) reader: Reader,
    /// Locked for reading while an entry is read, and for writing to close.
    reads: RwLock<()>,
    pub(super) waiters: Mutex<Numbered<Waiters>>,
    /// Durable subscriptions that this node ended. Locked while peers are notified.
    pub(super) ended: Mutex<BTreeSet<ServiceName>>,
    /// Redelivered messages, until the starts of their handlers are written.
    pub(super) parked: Mutex<HashMap<(NodeId, DeliveryId), Parked>>,
    pub(super) loopback: Mutex<Loopback>,
    node: Arc<OnceLock<Weak<Durable>>>,
    pub(super) report: StoreReport,
}

/// The fields are dropped in order. The outbox is last: its folder is locked, and a program that
/// reads the store opens it first.
pub(super) struct Journals {
    pub(super) inbox: Journal,
    pub(super) outbox: Journal,
}

impl Store {
    /// Opens a store, or creates one. Blocks while it reads the files.
    pub(crate) fn open(
        path: &Path,
        options: &Options,
        config: OutboxConfig,
        now: Now,
    ) -> Result<Self, StoreError> {
        let failed = |problem: StoreProblem| StoreError { path: path.to_owned(), problem };
        // Opening writes, so neither journal is opened if the other can't be.
        for journal in [OUTBOX, INBOX] {
            Journal::check(&path.join(journal)).map_err(|error| failed(error.into()))?;
        }
        let node = Arc::new(OnceLock::new());
        let folder = path.join(OUTBOX);
        let cleaned = options.cleaned(&folder);
        let segment_size = cleaned.segment_size;
        let mut outbox = Outbox::new(OutboxConfig { segment_size, ..config });
        let mut unreadable = None;
        let take = |entry: crate::journal::Entry<'_>| {
            keep_first(&mut unreadable, outbox.recover(entry.position, entry.payload));
        };
        let sink = sink(&node, Durable::handle_outbox_stored);
        let (outbox_journal, recovery) =
            Journal::open_watched(&folder, &cleaned, sink, watch(&node), take)
                .map_err(|error| failed(error.into()))?;
        let segments = outbox_journal.segments().map_err(|error| failed(error.into()))?;
        let mut inbox = Inbox::new(random_u64());
        let take = |entry: crate::journal::Entry<'_>| {
            keep_first(&mut unreadable, inbox.recover(entry.payload));
        };
        let sink = self::sink(&node, Durable::handle_inbox_stored);
        let (inbox_journal, inbox_recovery) =
            Journal::open_with(&path.join(INBOX), options, sink, take)
                .map_err(|error| failed(error.into()))?;
        if let Some(error) = unreadable {
            return Err(failed(StoreProblem::Newer(error.to_string())));
        }
        outbox.handle_segments(&segments);
        outbox.handle_room(now, outbox_journal.room());
        outbox.handle_recovered(now);
        inbox.handle_recovered();
        let mut damaged = DamagedPart::all(OUTBOX, &recovery);
        damaged.extend(DamagedPart::all(INBOX, &inbox_recovery));
        let report = StoreReport {
            pending: outbox.pending(),
            dead_letters: outbox.dead_letters(),
            damaged,
            lost: recovery.lost,
            forgotten: inbox_recovery.lost,
            torn: recovery.torn + inbox_recovery.torn,
        };
        if report.torn > 0 {
            tracing::warn!(path = %path.display(), bytes = report.torn, "the last write to the store was torn: it is ignored");
        }
        for part in &report.damaged {
            tracing::error!(path = %path.display(), %part, "a part of the store can't be read: its contents are lost");
        }
        if !report.damaged.is_empty() {
            let (lost, forgotten) = (at_the_most(report.lost), at_the_most(report.forgotten));
            tracing::error!(path = %path.display(), lost, forgotten, "at most this many messages are lost, or may be processed again");
        }
        Ok(Self {
            outbox: Mutex::new(Rank::Outbox, outbox),
            inbox: Mutex::new(Rank::Inbox, inbox),
            journals: RwLock::new(Some(Journals { outbox: outbox_journal, inbox: inbox_journal })),
            reader: Reader::default(),
            reads: RwLock::default(),
            waiters: Mutex::new(Rank::Table, Numbered::default()),
            ended: Mutex::new(Rank::EndedConsumers, BTreeSet::new()),
            parked: Mutex::new(Rank::Table, HashMap::new()),
            loopback: Mutex::new(Rank::Table, Loopback::default()),
            node,
            report,
        })
    }

    /// Sets the owner of the store, which the journals notify from now on.
    pub(super) fn belongs_to(&self, node: &Arc<Durable>) {
        let _first = self.node.set(Arc::downgrade(node));
    }

    pub(super) fn with_journals(&self, act: impl FnOnce(&Journals)) {
        let journals = self.journals.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(journals) = &*journals {
            act(journals);
        }
    }

    /// Reads an entry of the outbox's journal; `None` if it can't be read.
    pub(super) fn entry(&self, position: Position) -> Option<Vec<u8>> {
        let _open = self.reads.read().unwrap_or_else(PoisonError::into_inner);
        let mut reader = None;
        self.with_journals(|it| reader = Some(it.outbox.reader()));
        reader?.read(position).ok()
    }

    /// Writes the queued entries and closes the files.
    pub(super) fn close(&self) {
        // Waits for running reads first, without holding any other lock.
        let _no_reads = self.reads.write().unwrap_or_else(PoisonError::into_inner);
        // Not between two actions of the outbox or inbox: the second may store what a user was
        // already notified of by the first.
        let deciding = (lock(&self.outbox), lock(&self.inbox));
        let mut journals = self.journals.write().unwrap_or_else(PoisonError::into_inner);
        let taken = journals.take();
        // The journals' sinks may still append.
        drop((journals, deciding));
        drop(taken);
        *lock(&self.waiters) = Numbered::default();
    }
}

/// Formats a number of messages for people.
fn at_the_most(messages: Option<u64>) -> String {
    messages.map_or("unknown".into(), |messages| messages.to_string())
}

fn keep_first(kept: &mut Option<RecordError>, result: Result<(), RecordError>) {
    if let Err(error) = result {
        kept.get_or_insert(error);
    }
}

/// Creates a sink that notifies a node of the stored entries of a journal.
fn sink(node: &Arc<OnceLock<Weak<Durable>>>, tell: fn(&Arc<Durable>, Ended<'_>)) -> Sink {
    let node = node.clone();
    Box::new(move |stored| {
        if let Some(durable) = node.get().and_then(Weak::upgrade) {
            let _runtime = durable.core.runtime.enter();
            tell(&durable, stored);
        }
    })
}

/// Creates a callback that notifies a node of news of its outbox's disk.
fn watch(node: &Arc<OnceLock<Weak<Durable>>>) -> Watch {
    let node = node.clone();
    Box::new(move |news| {
        if let Some(durable) = node.get().and_then(Weak::upgrade) {
            let _runtime = durable.core.runtime.enter();
            durable.handle_outbox_disk(news);
        }
    })
}

/// Refuses a folder with files of another program, and one that others can change; creates a
/// missing one.
pub(crate) fn prepare(path: &Path) -> Result<(), StoreError> {
    let failed = |problem: StoreProblem| StoreError { path: path.to_owned(), problem };
    private::create_folder(path, Others::MayRead).map_err(|error| failed(error.into()))?;
    let entries = fs::read_dir(path).map_err(|error| failed(error.into()))?;
    let names = entries.map(|entry| Ok(entry?.file_name()));
    let names: Vec<_> = names.collect::<io::Result<_>>().map_err(|error| failed(error.into()))?;
    let ours = names.iter().any(|name| name == OUTBOX || name == IDENTITY);
    match names.first() {
        Some(other) if !ours => {
            Err(failed(StoreProblem::Foreign(other.to_string_lossy().into_owned())))
        }
        _ => Ok(()),
    }
}
