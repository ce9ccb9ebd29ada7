//! Access to the outbox of a stopped node: to inspect it, and to replay or purge dead letters.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::address::{Pattern, ServiceName};
use crate::carrier::mesh::store::{self, DamagedPart, StoreError, StoreProblem};
use crate::engine::delivery::{
    Contents, DeadLetterReason, DeliveryKey, Inbox, Outbox, OutboxConfig, RetryPolicy, Target,
};
use crate::identity::{Identity, IdentityError, NodeId, random_u64};
use crate::journal::{Entry, Journal, JournalError, Options, Position, Reader, Recovery};
use crate::message::Header;
use crate::opaque::opaque;
use crate::private;
use crate::wire::{Envelope, decode_stored};

/// A message in an outbox, for one of its destinations.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredMessage {
    /// Its number in this outbox.
    pub number: u64,
    /// The index of its destination, from 0.
    pub part: u32,
    /// The destination.
    pub target: Target,
    /// The node that it was assigned to, if any.
    pub node: Option<NodeId>,
    /// The number of times its handler failed.
    pub failures: u32,
    /// The time of its expiry, if any.
    pub expires_at: Option<SystemTime>,
    /// The time until which it is held back, if any.
    pub not_before: Option<SystemTime>,
    /// The space it occupies, in bytes.
    pub size: u32,
    /// The reason, if it is a dead letter.
    pub dead: Option<DeadLetterReason>,
    position: Option<Position>,
}

impl From<Contents> for StoredMessage {
    fn from(contents: Contents) -> Self {
        let time = |unix_ms: u64| UNIX_EPOCH + Duration::from_millis(unix_ms);
        Self {
            number: contents.number,
            part: contents.part,
            target: contents.target,
            node: contents.node,
            failures: contents.failures,
            expires_at: contents.expires_at.map(time),
            not_before: contents.not_before.map(time),
            size: contents.size,
            dead: contents.dead,
            position: contents.position,
        }
    }
}

/// The state of an inbox: the record of the messages that its node has processed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InboxReport {
    /// The number of entries.
    pub entries: u64,
    /// The unreadable parts. The messages recorded there may be processed once more.
    pub damaged: Vec<DamagedPart>,
    /// The maximum number of such messages; `None` if unknown, as of [`ClosedOutbox::lost`].
    pub forgotten: Option<u64>,
    /// Bytes at the end of a write that a crash tore, as of [`ClosedOutbox::torn`].
    pub torn: u64,
}

/// The outbox of a node that isn't running.
///
/// Its methods block the thread while they read, write and sync the disk. Within a runtime, call
/// them in `spawn_blocking`.
///
/// ```no_run
/// let mut outbox = peerbus::ClosedOutbox::open("shop.store")?;
/// let dead: Vec<_> = outbox.messages().filter(|message| message.dead.is_some()).collect();
/// for message in dead {
///     outbox.replay(&message)?;
/// }
/// # Ok::<(), peerbus::StoreError>(())
/// ```
pub struct ClosedOutbox {
    path: PathBuf,
    me: NodeId,
    outbox: Outbox,
    journal: Access,
    damaged: Vec<DamagedPart>,
    lost: Option<u64>,
    torn: u64,
    identity: Option<IdentityError>,
    /// A change was stored, and before it that this process made it.
    is_changed: bool,
}

opaque!(ClosedOutbox, |it| path: it.path);

enum Access {
    Write(Journal),
    Read(Reader),
}

impl ClosedOutbox {
    /// Opens the outbox of a store's folder ([`Config::outbox`](crate::Config::outbox)), which must
    /// exist.
    ///
    /// # Errors
    /// [`StoreError`] if a process uses the outbox, or it does not exist.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_with(dir.as_ref(), |folder, take| {
            let (journal, recovery) =
                Journal::open(folder, &Options::default().cleaned(folder), take)?;
            Ok((Access::Write(journal), recovery))
        })
    }

    /// Opens the outbox for reading only. Nothing is written, so it may lie on a read-only medium.
    /// Meanwhile no node can open it, but other readers can. [`replay`](Self::replay),
    /// [`purge`](Self::purge), [`reassign`](Self::reassign) and [`forget`](Self::forget) fail.
    ///
    /// # Errors
    /// [`StoreError`] if a process uses the outbox, or it does not exist.
    pub fn look(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_with(dir.as_ref(), |folder, take| {
            let (reader, recovery) = Journal::look_at(folder, take)?;
            Ok((Access::Read(reader), recovery))
        })
    }

    fn open_with(
        path: &Path,
        open: impl FnOnce(&Path, &mut dyn FnMut(Entry<'_>)) -> Result<(Access, Recovery), JournalError>,
    ) -> Result<Self, StoreError> {
        let failed = |problem| StoreError { path: path.to_owned(), problem };
        let folder = path.join(store::OUTBOX);
        if !folder.is_dir() {
            return Err(failed(StoreProblem::Missing));
        }
        let (identity, problem) = match Identity::load(&path.join(store::IDENTITY)) {
            Ok(identity) => (Some(identity), None),
            // The node may keep it elsewhere, or be another user's.
            Err(error) if error.is_missing() || !private::is_ours(path) => (None, None),
            Err(error) => (None, Some(error)),
        };
        let me = identity.map_or(NodeId::from_bytes([0; 32]), |identity| identity.node_id());
        let mut outbox = Outbox::new(OutboxConfig {
            me,
            epoch: random_u64(),
            seed: 1,
            max_bytes: u64::MAX,
            max_messages: u64::MAX,
            window_bytes: 0,
            retry: RetryPolicy::default(),
            hold_keys: true,
            segment_size: u64::MAX,
            reassign_after: None,
            gone_after: Duration::MAX,
            lapse_after: None,
        });
        let mut unreadable = None;
        let mut take = |entry: Entry<'_>| {
            if let Err(error) = outbox.recover(entry.position, entry.payload) {
                unreadable.get_or_insert(error);
            }
        };
        let (journal, recovery) = open(&folder, &mut take).map_err(|error| failed(error.into()))?;
        if let Some(error) = unreadable {
            return Err(failed(StoreProblem::Newer(error.to_string())));
        }
        let damaged = DamagedPart::all(store::OUTBOX, &recovery);
        let (path, lost, torn) = (path.to_owned(), recovery.lost, recovery.torn);
        Ok(Self {
            path,
            me,
            outbox,
            journal,
            damaged,
            lost,
            torn,
            identity: problem,
            is_changed: false,
        })
    }

    /// The error of the identity file in the store, if that exists but can't be used: the node
    /// can't start with it.
    pub fn identity_problem(&self) -> Option<&IdentityError> {
        self.identity.as_ref()
    }

    /// The unreadable parts.
    pub fn damaged(&self) -> &[DamagedPart] {
        &self.damaged
    }

    /// The maximum number of messages lost in the unreadable parts: the number stored there,
    /// including those that were processed already or stored once more elsewhere. `None` if it is
    /// unknown: the manifest itself is damaged, or the damaged part was written in the last seconds
    /// before a power cut, or by a version that didn't count.
    pub fn lost(&self) -> Option<u64> {
        self.lost
    }

    /// Bytes of the last write that a crash tore before the messages were reported as stored. They
    /// are reported until the outbox is opened for writing.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Reads the inbox of the same store, and changes nothing; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError`] if the inbox can't be read, or a newer version wrote it.
    pub fn check_inbox(&self) -> Result<Option<InboxReport>, StoreError> {
        let failed = |problem| StoreError { path: self.path.clone(), problem };
        let folder = self.path.join(store::INBOX);
        if !folder.is_dir() {
            return Ok(None);
        }
        // Any process opens the outbox before the inbox, and the outbox is locked.
        let (mut inbox, mut unreadable) = (Inbox::new(random_u64()), None);
        let take = |entry: Entry<'_>| {
            if let Err(error) = inbox.recover(entry.payload) {
                unreadable.get_or_insert(error);
            }
        };
        let looked = Journal::look_at(&folder, take);
        let (_, recovery) = looked.map_err(|error| failed(error.into()))?;
        if let Some(error) = unreadable {
            return Err(failed(StoreProblem::Newer(error.to_string())));
        }
        let damaged = DamagedPart::all(store::INBOX, &recovery);
        let Recovery { entries, lost: forgotten, torn, .. } = recovery;
        Ok(Some(InboxReport { entries, damaged, forgotten, torn }))
    }

    /// The messages in the outbox, in the order in which they were stored.
    pub fn messages(&self) -> impl Iterator<Item = StoredMessage> {
        self.outbox.contents().map(Into::into)
    }

    /// Reads a message: its header and its body.
    ///
    /// # Errors
    /// [`StoreError`] if the message can't be read.
    pub fn read(&self, message: &StoredMessage) -> Result<(Header, Bytes), StoreError> {
        let unreadable = || self.failed("the message can't be read");
        let position = message.position.ok_or_else(unreadable)?;
        let entry = match &self.journal {
            Access::Write(journal) => journal.read(position),
            Access::Read(reader) => reader.read(position),
        };
        let entry = entry.map_err(|_| unreadable())?;
        let encoded = Outbox::stored_message(&entry, message.number).ok().flatten();
        let encoded = encoded.ok_or_else(unreadable)?;
        let Envelope { header, mut payload } =
            decode_stored(&encoded, &self.me).map_err(|_| unreadable())?;
        Ok((header, payload.take_body()))
    }

    /// Retries a dead letter, from the node's next start on. Its message no longer expires.
    /// Returns false if the message is not a dead letter.
    ///
    /// # Errors
    /// [`StoreError`] if the change can't be stored.
    pub fn replay(&mut self, message: &StoredMessage) -> Result<bool, StoreError> {
        let entry = self.outbox.replay(key(message));
        self.store(entry)
    }

    /// Removes a message for good. Returns false if it is not in the outbox.
    ///
    /// # Errors
    /// [`StoreError`] if the change can't be stored.
    pub fn purge(&mut self, message: &StoredMessage) -> Result<bool, StoreError> {
        let entry = self.outbox.purge(key(message));
        self.store(entry)
    }

    /// Takes a message from the node that it was assigned to, which may have processed it, and
    /// assigns it to another instance of its service, or to the first one available. Returns false
    /// if that is impossible: a message to a node or a durable subscription can't be reassigned.
    ///
    /// # Errors
    /// [`StoreError`] if the change can't be stored.
    pub fn reassign(
        &mut self,
        message: &StoredMessage,
        to: Option<NodeId>,
    ) -> Result<bool, StoreError> {
        let entry = self.outbox.reassign_to(key(message), to);
        self.store(entry)
    }

    /// The durable subscriptions that the outbox knows: the node, name and pattern of each.
    pub fn subscriptions(&self) -> impl Iterator<Item = (NodeId, &ServiceName, &Pattern)> {
        self.outbox.subscriptions()
    }

    /// Forgets a durable subscription of a node that is gone for good, and drops the messages kept
    /// for it. Returns their number, or `None` if there is no such subscription.
    ///
    /// # Errors
    /// [`StoreError`] if the change can't be stored.
    pub fn forget(&mut self, node: &NodeId, name: &ServiceName) -> Result<Option<u64>, StoreError> {
        let Some(forgotten) = self.outbox.unsubscribe(*node, name) else { return Ok(None) };
        for entry in forgotten.entries {
            self.store(Some(entry))?;
        }
        Ok(Some(forgotten.messages))
    }

    fn store(&mut self, entry: Option<Vec<u8>>) -> Result<bool, StoreError> {
        let Some(entry) = entry else { return Ok(false) };
        let Access::Write(journal) = &self.journal else {
            return Err(self.failed("it was opened for reading only"));
        };
        let first = (!self.is_changed).then(|| self.outbox.begin_closed_life());
        for entry in first.iter().chain([&entry]) {
            journal.append_blocking(entry).map_err(|error| self.failed(&error.to_string()))?;
        }
        self.is_changed = true;
        Ok(true)
    }

    fn failed(&self, text: &str) -> StoreError {
        let problem = StoreProblem::Io(std::io::Error::other(text.to_owned()));
        StoreError { path: self.path.clone(), problem }
    }
}

fn key(message: &StoredMessage) -> DeliveryKey {
    DeliveryKey { number: message.number, part: message.part }
}
