//! The queue of entries to write. Entries gather while the writer thread is busy.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Done, Need, Persist};
use crate::sync::lock_unranked as lock;

/// The memory kept from one batch to the next, in bytes.
const MOST_KEPT: usize = 4 * 1024 * 1024;

/// A queued entry.
pub(super) struct Append {
    /// The payload's start and length in the bytes of its [`Batch`], which sets both.
    pub(super) start: usize,
    pub(super) length: u32,
    pub(super) persist: Persist,
    pub(super) need: Need,
    /// The entry begins a segment.
    pub(super) first: bool,
    /// The number of messages that the entry holds.
    pub(super) messages: u32,
    pub(super) done: Done,
}

impl Append {
    /// An entry that holds no message, is synced at once, is urgent and does not begin a segment.
    /// `done` receives the outcome.
    pub(super) fn new(done: Done) -> Self {
        let (persist, need, first) = (Persist::Sync, Need::Urgent, false);
        Self { start: 0, length: 0, persist, need, first, messages: 0, done }
    }

    /// The payload, from the bytes of the entry's batch.
    pub(super) fn payload<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.start..][..self.length as usize]
    }
}

/// Queued entries and removals, in order. The payloads are contiguous in memory that is reused.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) appends: Vec<Append>,
    /// Removals, each with the number of appends that precede it.
    pub(super) removals: Vec<(usize, Removal)>,
}

/// Segments whose entries are no longer needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Removal {
    /// All segments before this one.
    Before(u64),
    These(Vec<u64>),
}

impl Removal {
    pub(super) fn takes(&self, segment: u64) -> bool {
        match self {
            Self::Before(first_kept) => segment < *first_kept,
            Self::These(segments) => segments.contains(&segment),
        }
    }
}

impl Batch {
    /// # Panics
    /// If the payload is 4 GiB or longer.
    pub(super) fn push(&mut self, payload: &[u8], append: Append) {
        let length = u32::try_from(payload.len()).expect("an entry is shorter than 4 GiB");
        self.appends.push(Append { start: self.bytes.len(), length, ..append });
        self.bytes.extend_from_slice(payload);
    }

    fn is_empty(&self) -> bool {
        self.appends.is_empty() && self.removals.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(MOST_KEPT);
        self.appends.clear();
        self.appends.shrink_to(MOST_KEPT / size_of::<Append>());
        self.removals.clear();
    }
}

/// The outcome of [`Queue::take`].
pub(super) enum Taken {
    Batch,
    /// The timeout elapsed.
    Nothing,
    /// The queue is closed and empty.
    Closed,
}

#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    batch: Batch,
    waits: Waits,
    /// The writer thread ends once it has written the queued batch.
    closed: bool,
    /// The writer thread has ended: nothing is queued any more.
    ended: bool,
}

/// The wait state of the writer thread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Waits {
    #[default]
    No,
    ForAWhile,
    ForEver,
}

impl Queue {
    pub(super) fn append(&self, payload: &[u8], append: Append) {
        let hurries = append.persist != Persist::Lazy;
        self.add(hurries, |batch| batch.push(payload, append));
    }

    pub(super) fn remove(&self, removal: Removal) {
        self.add(true, |batch| batch.removals.push((batch.appends.len(), removal)));
    }

    fn add(&self, hurries: bool, add: impl FnOnce(&mut Batch)) {
        let mut state = lock(&self.state);
        if state.ended {
            return;
        }
        add(&mut state.batch);
        let wakes = match state.waits {
            Waits::No => false,
            Waits::ForAWhile => hurries,
            Waits::ForEver => true,
        };
        if wakes {
            state.waits = Waits::No;
        }
        drop(state);
        if wakes {
            self.more.notify_one();
        }
    }

    /// Ends the writer thread once it has written the queued batch.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.more.notify_one();
    }

    /// Swaps the queued batch for an empty one; waits for a non-empty batch, up to `at_most`.
    pub(super) fn take(&self, empty: &mut Batch, at_most: Option<Duration>) -> Taken {
        let mut state = lock(&self.state);
        let is_idle = |state: &mut State| state.batch.is_empty() && !state.closed;
        if is_idle(&mut state) {
            state.waits = at_most.map_or(Waits::ForEver, |_| Waits::ForAWhile);
            state = match at_most {
                None => {
                    self.more.wait_while(state, is_idle).unwrap_or_else(PoisonError::into_inner)
                }
                Some(pause) => {
                    let waited = self.more.wait_timeout_while(state, pause, is_idle);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.waits = Waits::No;
        }
        match (state.batch.is_empty(), state.closed) {
            (false, _) => {
                std::mem::swap(&mut state.batch, empty);
                Taken::Batch
            }
            (true, true) => Taken::Closed,
            (true, false) => Taken::Nothing,
        }
    }

    /// Marks the writer thread as ended, perhaps by a panic: waiters of queued entries get an
    /// error. (The sink does not: it ended with the thread.)
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        state.ended = true;
        let left = std::mem::take(&mut state.batch);
        drop(state);
        drop(left);
    }
}
