//! The inbox: the record of deliveries processed here. Pure.
//!
//! For each stream of each sender it keeps a watermark and the numbers processed above it. There is
//! no time window: a delivery is remembered until its sender reports it as settled, or until the
//! inbox is full and forgets the sender (`senders.rs`). Of each sender it also keeps the latest
//! moment of its outbox: a sender that does not know the moment is an older copy, and marks what it
//! sends as redelivered.

mod poison;
mod recover;
mod senders;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::RecordError;
use super::numbered::Numbered;
use super::ranges::Ranges;
use super::record::InboxRecord;
use crate::engine::HashMap;
use crate::identity::NodeId;
use crate::journal::{NotStored, Persist, Position};
use crate::wire::{Answer, Delivery, DeliveryId, DeliveryOutcome, Stream};

/// The number of unfinished runs at which a redelivered message is rejected: it kills its process.
const MAX_BEGUN: u32 = 10;
/// The number of unfinished runs from which on a redelivered message is run alone among such
/// suspects, so that the one that kills is told apart from those that only die with it.
const SUSPECT: u32 = 3;
/// The most ranges of processed numbers per stream; a sender has far fewer messages in flight.
const MAX_RANGES: usize = 65_536;
/// The journal bytes after which a snapshot replaces the earlier entries, unless the last snapshot
/// was longer than this: then its length. So the next snapshot is at most twice as long as the
/// last, and a full disk has space for it.
const SNAPSHOT_AFTER: u64 = 1024 * 1024;
/// The most journal bytes of an entry besides its payload: its frame, and the mark before it.
const ENTRY_COST: u64 = 48;

/// The verdict on an arriving delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The handler is to run.
    Run,
    /// The handler is to run when [`InboxAction::Begin`] is issued.
    RunLater,
    /// The handler is running, or its outcome is being stored: the answer follows.
    Wait,
    /// The handler need not run; this is the answer.
    Answer(DeliveryOutcome),
    /// The inbox has no room to remember it: it is refused.
    Full,
}

/// An action for the owner of the inbox. Actions are carried out in order.
#[derive(Debug)]
pub(crate) enum InboxAction {
    /// Append an entry to the journal, and report its outcome with the token.
    Append {
        token: u64,
        entry: Vec<u8>,
        /// The number of messages that the entry records as processed.
        messages: u32,
        persist: Persist,
    },
    /// Append a snapshot at the start of a new segment.
    AppendSnapshot {
        token: u64,
        entry: Vec<u8>,
        messages: u32,
    },
    Note(Vec<u8>),
    /// Remove the segments before this one, which are no longer needed.
    RemoveBefore(u64),
    Answer(NodeId, Answer),
    /// The handler may begin.
    Begin(NodeId, DeliveryId),
    /// A sender was forgotten to make room for another: what it sent before may be run again, as
    /// redelivered.
    Forgot {
        newcomer: NodeId,
    },
}

#[derive(Debug)]
struct Seen {
    node: NodeId,
    stream: Stream,
    number: u64,
    /// The record that opens the stream is being written, and is written; later records of the
    /// stream follow it. A failed write since then may have taken it: each is the number of failed
    /// writes before.
    opening: Option<u64>,
    opened: Option<u64>,
    /// The memory for which its sender is charged, in bytes; zero until it is recorded.
    charged: u64,
    floor: u64,
    /// The numbers whose handlers returned Ok.
    processed: Ranges,
    /// The number of begun runs of each redelivered message.
    begun: BTreeMap<u64, u32>,
    /// The deliveries not answered yet.
    open: HashMap<u64, Open>,
}

/// An accepted delivery.
#[derive(Debug)]
struct Open {
    attempt: u32,
    phase: Phase,
    /// The start of its handler was counted.
    counted: bool,
    /// It arrived once more, and that copy was dropped.
    again: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// The processed record is not yet durable.
    Storing,
    /// The processed record could not be stored, which is retried; the handler does not run again.
    Unstored,
}

#[derive(Debug)]
enum Pending {
    Opened(usize),
    Heard,
    /// A processed delivery: place, number, and true if the entry holds the stream's whole state.
    Processed(usize, u64, bool),
    Begun(usize, u64),
    Snapshot,
}

#[derive(Debug, PartialEq, Eq)]
enum SnapshotPhase {
    Stored,
    Storing,
    /// The snapshot could not be stored, which is retried.
    Unstored,
}

#[derive(Debug)]
pub(crate) struct Inbox {
    epoch: u64,
    streams: BTreeMap<usize, Seen>,
    next_place: usize,
    places: HashMap<(NodeId, Stream), usize>,
    /// The places of the streams, by their numbers in the journal.
    numbers: HashMap<u64, usize>,
    senders: senders::Senders,
    next_number: u64,
    /// The number of failed writes. Each may have taken earlier unsynced entries with it, even if a
    /// later sync succeeds.
    failures: u64,
    pending: Numbered<Pending>,
    /// Deliveries to be run later, in order of arrival, and whether each may begin; by node.
    later: HashMap<NodeId, VecDeque<(DeliveryId, bool)>>,
    /// Suspects queued behind the running one.
    suspects: VecDeque<(usize, u64)>,
    suspect: Option<(usize, u64)>,
    /// The deliveries in [`Phase::Unstored`].
    unstored: BTreeSet<(usize, u64)>,
    next_token: u64,
    snapshot_after: u64,
    since_snapshot: u64,
    /// The length of the last snapshot.
    snapshot_size: u64,
    snapshot: SnapshotPhase,
    actions: VecDeque<InboxAction>,
}

impl Inbox {
    /// Creates an empty inbox. `epoch` is random, and fixed for the lifetime of the journal.
    pub(crate) fn new(epoch: u64) -> Self {
        Self {
            epoch,
            streams: BTreeMap::new(),
            next_place: 0,
            places: HashMap::default(),
            numbers: HashMap::default(),
            senders: senders::Senders::default(),
            failures: 0,
            // Not a number of an earlier process, whose records may follow ours if the disk failed.
            next_number: epoch & 0xffff_ffff,
            pending: Numbered::default(),
            later: HashMap::default(),
            suspects: VecDeque::new(),
            suspect: None,
            unstored: BTreeSet::new(),
            next_token: 1,
            snapshot_after: SNAPSHOT_AFTER,
            since_snapshot: 0,
            snapshot_size: 0,
            snapshot: SnapshotPhase::Stored,
            actions: VecDeque::new(),
        }
    }

    /// Sets a shorter interval between snapshots.
    #[cfg(test)]
    pub(crate) fn with_snapshots_after(self, snapshot_after: u64) -> Self {
        Self { snapshot_after, ..self }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    fn open_stream(&mut self, node: NodeId, stream: &Stream, number: u64) -> usize {
        let place = self.next_place;
        self.next_place += 1;
        let seen = Seen {
            node,
            stream: stream.clone(),
            number,
            opening: None,
            opened: None,
            charged: 0,
            floor: 0,
            processed: Ranges::default(),
            begun: BTreeMap::new(),
            open: HashMap::default(),
        };
        self.streams.insert(place, seen);
        self.places.insert((node, stream.clone()), place);
        self.numbers.insert(number, place);
        self.enter_sender(node, stream.epoch, place);
        place
    }

    /// Handles an arriving delivery. `is_served` returns true if this node has a handler for it: what
    /// has none takes no place here, and leaves no trace.
    pub(crate) fn handle_delivery(
        &mut self,
        from: NodeId,
        delivery: &mut Delivery,
        is_served: impl FnOnce() -> bool,
    ) -> Verdict {
        let DeliveryId { stream, seq } = &delivery.id;
        let seq = *seq;
        let place = match self.places.get(&(from, stream.clone())).copied() {
            Some(place) => place,
            None if !is_served() => return Verdict::Answer(DeliveryOutcome::Refused),
            None if !self.has_room_for(from) => return Verdict::Full,
            None => {
                let number = self.next_number;
                self.next_number += 1;
                let place = self.open_stream(from, stream, number);
                return self.admit(place, from, delivery);
            }
        };
        let seen = self.streams.get_mut(&place).expect("what is in `places` is there");
        if let Some(open) = seen.open.get_mut(&seq) {
            (open.attempt, open.again) = (delivery.attempt, true);
            return Verdict::Wait;
        }
        if delivery.floor > seen.floor {
            seen.floor = delivery.floor;
            seen.processed.remove_below(delivery.floor);
            if !seen.begun.is_empty() {
                seen.begun = seen.begun.split_off(&delivery.floor);
            }
        }
        if seen.processed.contains(seq) {
            return Verdict::Answer(DeliveryOutcome::Processed);
        }
        let is_long =
            seen.processed.iter().len() >= MAX_RANGES || !self.senders.has_room_for_gap(seen);
        if is_long {
            // The sender's lowest number is always accepted, or the gaps would never close.
            if seq > seen.floor && !seen.processed.touches(seq) {
                return Verdict::Full;
            }
            if seq < seen.floor {
                seen.processed.remove_below(seen.floor);
            }
        }
        // Below the floor, the delivery was settled once with an unknown outcome: the sender's
        // outbox is an older copy.
        delivery.redelivered |= seq < seen.floor;
        if delivery.redelivered && !is_served() {
            return Verdict::Answer(DeliveryOutcome::Refused);
        }
        self.admit(place, from, delivery)
    }

    /// Admits a delivery that is neither known nor running.
    fn admit(&mut self, place: usize, from: NodeId, delivery: &Delivery) -> Verdict {
        self.accept(&from);
        let Some(seen) = self.streams.get_mut(&place) else { return Verdict::Full };
        let (attempt, phase, seq) = (delivery.attempt, Phase::Running, delivery.id.seq);
        if !delivery.redelivered {
            seen.open.insert(seq, Open { attempt, phase, counted: false, again: false });
            let Some(later) = self.later.get_mut(&from) else { return Verdict::Run };
            later.push_back((delivery.id.clone(), true));
            return Verdict::RunLater;
        }
        let begun = seen.begun.get(&seq).copied().unwrap_or_default();
        if begun >= MAX_BEGUN {
            let text = format!("its handler was begun {begun} times and never ended");
            return Verdict::Answer(DeliveryOutcome::Rejected(text));
        }
        seen.open.insert(seq, Open { attempt, phase, counted: false, again: false });
        if begun >= SUSPECT {
            self.suspects.push_back((place, seq));
            self.next_suspect();
        } else {
            self.later.entry(from).or_default().push_back((delivery.id.clone(), false));
            self.count_begun(place, seq);
        }
        Verdict::RunLater
    }

    /// Handles the end of a handler.
    pub(crate) fn handle_ended(&mut self, from: NodeId, id: &DeliveryId, outcome: DeliveryOutcome) {
        let Some((place, seen)) = self.seen(from, &id.stream) else { return };
        let Some(open) = seen.open.get_mut(&id.seq).filter(|open| open.phase == Phase::Running)
        else {
            return;
        };
        if outcome == DeliveryOutcome::Processed {
            self.store_processed(place, id.seq);
            return self.end_suspect(place, id.seq);
        }
        let attempt = open.attempt;
        seen.open.remove(&id.seq);
        // The handler ended: it does not kill its process.
        if seen.begun.remove(&id.seq).is_some() {
            let record = InboxRecord::Begun(seen.number, id.seq, 0);
            self.note(&record);
        }
        self.end_suspect(place, id.seq);
        let answer = Answer { id: id.clone(), attempt, outcome };
        self.actions.push_back(InboxAction::Answer(from, answer));
        self.drop_if_unused(place);
    }

    fn seen(&mut self, from: NodeId, stream: &Stream) -> Option<(usize, &mut Seen)> {
        let place = *self.places.get(&(from, stream.clone()))?;
        Some((place, self.streams.get_mut(&place)?))
    }

    fn store_processed(&mut self, place: usize, seq: u64) {
        let Some(seen) = self.streams.get_mut(&place) else { return };
        if let Some(open) = seen.open.get_mut(&seq) {
            open.phase = Phase::Storing;
        }
        seen.begun.remove(&seq);
        let node = seen.node;
        self.hear(node);
        let failures = self.failures;
        let Some(seen) = self.streams.get_mut(&place) else { return };
        let whole = seen.opening != Some(failures) && seen.opened != Some(failures);
        let record = match whole {
            true => {
                seen.opening = Some(failures);
                InboxRecord::Opened(seen.record())
            }
            false => InboxRecord::Processed(seen.number, seq),
        };
        self.append(&record, Pending::Processed(place, seq, whole), Persist::Sync);
    }

    /// Handles a delivery whose link ended before its handler began: it won't run. A copy that came
    /// over another link meanwhile is refused, so that it comes again.
    pub(crate) fn handle_unqueued(&mut self, from: NodeId, id: &DeliveryId) {
        let Some((place, seen)) = self.seen(from, &id.stream) else { return };
        if seen.open.get(&id.seq).is_none_or(|open| open.phase != Phase::Running) {
            return;
        }
        let Some(open) = seen.open.remove(&id.seq) else { return };
        // The handler never began, so it did not kill its process either.
        if open.counted {
            let begun = seen.begun.get(&id.seq).copied().unwrap_or_default();
            let before = begun.saturating_sub(1);
            match before {
                0 => _ = seen.begun.remove(&id.seq),
                _ => _ = seen.begun.insert(id.seq, before),
            }
            let record = InboxRecord::Begun(seen.number, id.seq, before);
            self.note(&record);
        }
        self.end_suspect(place, id.seq);
        if open.again {
            let outcome = DeliveryOutcome::Refused;
            let answer = Answer { id: id.clone(), attempt: open.attempt, outcome };
            self.actions.push_back(InboxAction::Answer(from, answer));
        }
        self.drop_if_unused(place);
    }

    /// Handles the outcome of an append.
    pub(crate) fn handle_appended(&mut self, token: u64, result: Result<Position, NotStored>) {
        if result.is_err() {
            self.failures += 1;
        }
        self.snapshot_if_due();
        match self.pending.remove(token) {
            None | Some(Pending::Heard) => {}
            Some(Pending::Opened(place)) => {
                if let Some(seen) = self.streams.get_mut(&place) {
                    seen.opened = result.is_ok().then_some(self.failures);
                }
            }
            Some(Pending::Processed(place, seq, whole)) => {
                let Some(seen) = self.streams.get_mut(&place) else { return };
                if result.is_ok() && !whole && seen.opened != Some(self.failures) {
                    // The entry that opens the stream may be lost.
                    return self.store_processed(place, seq);
                }
                if whole && result.is_ok() {
                    seen.opened = Some(self.failures);
                }
                let Some(open) = seen.open.get_mut(&seq) else { return };
                if result.is_err() {
                    open.phase = Phase::Unstored;
                    self.unstored.insert((place, seq));
                    return;
                }
                let attempt = open.attempt;
                seen.open.remove(&seq);
                seen.processed.insert(seq);
                let id = DeliveryId { stream: seen.stream.clone(), seq };
                let answer = Answer { id, attempt, outcome: DeliveryOutcome::Processed };
                self.actions.push_back(InboxAction::Answer(seen.node, answer));
                if seen.is_mischarged() {
                    self.charge(place);
                }
            }
            // The run begins even if the count could not be written.
            Some(Pending::Begun(place, seq)) => {
                let Some(seen) = self.streams.get(&place) else { return };
                let (node, stream) = (seen.node, seen.stream.clone());
                let id = DeliveryId { stream, seq };
                match self.suspect == Some((place, seq)) {
                    true => self.actions.push_back(InboxAction::Begin(node, id)),
                    false => self.begin(node, &id),
                }
            }
            Some(Pending::Snapshot) => {
                let Ok(position) = result else {
                    self.snapshot = SnapshotPhase::Unstored;
                    return;
                };
                self.snapshot = SnapshotPhase::Stored;
                self.actions.push_back(InboxAction::RemoveBefore(position.segment));
            }
        }
    }

    /// Returns true if an append that the disk refused is to be retried.
    pub(crate) fn has_unstored(&self) -> bool {
        !self.unstored.is_empty() || self.snapshot == SnapshotPhase::Unstored
    }

    /// Retries the appends that the disk refused. The owner calls this a second later.
    pub(crate) fn handle_timeout(&mut self) {
        if self.snapshot == SnapshotPhase::Unstored {
            self.take_snapshot();
        }
        for (place, seq) in std::mem::take(&mut self.unstored) {
            self.store_processed(place, seq);
        }
    }

    /// Returns true if no append is pending.
    pub(crate) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    fn append(&mut self, record: &InboxRecord, pending: Pending, persist: Persist) {
        let messages = u32::from(matches!(pending, Pending::Processed(..)));
        let token = self.token_for(pending);
        let entry = record.encode();
        self.since_snapshot += ENTRY_COST + entry.len() as u64;
        self.actions.push_back(InboxAction::Append { token, entry, messages, persist });
    }

    fn token_for(&mut self, pending: Pending) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.pending.insert(token, pending);
        token
    }

    fn note(&mut self, record: &InboxRecord) {
        let entry = record.encode();
        self.since_snapshot += ENTRY_COST + entry.len() as u64;
        self.actions.push_back(InboxAction::Note(entry));
    }

    pub(crate) fn poll_action(&mut self) -> Option<InboxAction> {
        self.actions.pop_front()
    }
}
