//! The inbox: the record of deliveries processed here. Pure.
//!
//! For each stream of each sender it keeps a watermark and the numbers processed above it. There is
//! no time window: a delivery is remembered until its sender reports it as settled.

mod poison;
mod recover;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

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
/// The most streams remembered per sender: one for each epoch of its outbox with unsettled
/// deliveries, and one for each durable subscription.
const MAX_STREAMS: usize = 4096;
/// The most senders remembered; a member of the mesh can create any number of ids.
const MAX_SENDERS: usize = 4096;
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
}

#[derive(Debug)]
struct Seen {
    node: NodeId,
    stream: Stream,
    number: u64,
    /// The record that opens the stream is written; later records of the stream follow it.
    opened: bool,
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
    /// The number of streams of each sender.
    senders: HashMap<NodeId, usize>,
    next_number: u64,
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
            senders: HashMap::default(),
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
            opened: false,
            floor: 0,
            processed: Ranges::default(),
            begun: BTreeMap::new(),
            open: HashMap::default(),
        };
        self.streams.insert(place, seen);
        self.places.insert((node, stream.clone()), place);
        *self.senders.entry(node).or_default() += 1;
        place
    }

    /// Handles an arriving delivery.
    pub(crate) fn handle_delivery(&mut self, from: NodeId, delivery: &mut Delivery) -> Verdict {
        let DeliveryId { stream, seq } = &delivery.id;
        let seq = *seq;
        let place = match self.places.get(&(from, stream.clone())) {
            Some(place) => *place,
            None if !self.has_room_for(&from) => return Verdict::Answer(DeliveryOutcome::Refused),
            None => {
                let number = self.next_number;
                self.next_number += 1;
                let place = self.open_stream(from, stream, number);
                let opened = self.streams.get(&place).map(Seen::record);
                let opened = InboxRecord::Opened(opened.expect("it was opened just now"));
                self.append(&opened, Pending::Opened(place), Persist::Flush);
                place
            }
        };
        let seen = self.streams.get_mut(&place).expect("what is in `places` is there");
        if let Some(open) = seen.open.get_mut(&seq) {
            open.attempt = delivery.attempt;
            return Verdict::Wait;
        }
        if delivery.floor > seen.floor {
            seen.floor = delivery.floor;
            seen.processed.remove_below(delivery.floor);
            seen.begun.retain(|seq, _| *seq >= delivery.floor);
        }
        if seen.processed.contains(seq) {
            return Verdict::Answer(DeliveryOutcome::Processed);
        }
        if seen.processed.iter().len() >= MAX_RANGES {
            // The sender's lowest number is always accepted, or the gaps would never close.
            if seq > seen.floor && !seen.processed.touches(seq) {
                return Verdict::Answer(DeliveryOutcome::Refused);
            }
            if seq < seen.floor {
                seen.processed.remove_below(seen.floor);
            }
        }
        // Below the floor, the delivery was settled once with an unknown outcome: the sender's
        // outbox is an older copy.
        delivery.redelivered |= seq < seen.floor;
        let (attempt, phase) = (delivery.attempt, Phase::Running);
        if !delivery.redelivered {
            seen.open.insert(seq, Open { attempt, phase, counted: false });
            let Some(later) = self.later.get_mut(&from) else { return Verdict::Run };
            later.push_back((delivery.id.clone(), true));
            return Verdict::RunLater;
        }
        let begun = seen.begun.get(&seq).copied().unwrap_or_default();
        if begun >= MAX_BEGUN {
            let text = format!("its handler was begun {begun} times and never ended");
            return Verdict::Answer(DeliveryOutcome::Rejected(text));
        }
        seen.open.insert(seq, Open { attempt, phase, counted: false });
        if begun >= SUSPECT {
            self.suspects.push_back((place, seq));
            self.next_suspect();
        } else {
            self.later.entry(from).or_default().push_back((delivery.id.clone(), false));
            self.count_begun(place, seq);
        }
        Verdict::RunLater
    }

    /// Returns true if another stream of that sender may be remembered.
    fn has_room_for(&self, from: &NodeId) -> bool {
        match self.senders.get(from) {
            Some(streams) => *streams < MAX_STREAMS,
            None => self.senders.len() < MAX_SENDERS,
        }
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
        // The record that opens the stream may not have been written.
        let whole = !seen.opened;
        let record = match whole {
            true => InboxRecord::Opened(seen.record()),
            false => InboxRecord::Processed(seen.number, seq),
        };
        self.append(&record, Pending::Processed(place, seq, whole), Persist::Sync);
    }

    /// Handles a delivery whose link ended before its handler began: it won't run.
    pub(crate) fn handle_unqueued(&mut self, from: NodeId, id: &DeliveryId) {
        if let Some((place, seen)) = self.seen(from, &id.stream)
            && seen.open.get(&id.seq).is_some_and(|open| open.phase == Phase::Running)
        {
            // The handler never began, so it did not kill its process either.
            if seen.open.remove(&id.seq).is_some_and(|open| open.counted) {
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
        }
    }

    /// Handles the outcome of an append.
    pub(crate) fn handle_appended(&mut self, token: u64, result: Result<Position, NotStored>) {
        if result.is_err() {
            // Earlier unsynced entries may be lost too, even if a later sync succeeds.
            self.streams.values_mut().for_each(|seen| seen.opened = false);
        }
        self.snapshot_if_due();
        match self.pending.remove(token) {
            None => {}
            Some(Pending::Opened(place)) => {
                if let Some(seen) = self.streams.get_mut(&place) {
                    seen.opened = result.is_ok();
                }
            }
            Some(Pending::Processed(place, seq, whole)) => {
                let Some(seen) = self.streams.get_mut(&place) else { return };
                if result.is_ok() && !whole && !seen.opened {
                    // The entry that opens the stream may be lost.
                    return self.store_processed(place, seq);
                }
                seen.opened |= whole && result.is_ok();
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

    /// Handles a sender's announcement of the epochs of which it still has messages.
    pub(crate) fn handle_epochs(&mut self, from: NodeId, epochs: &[u64]) {
        let epochs: HashSet<u64> = epochs.iter().copied().collect();
        let numbers = self.forget(|seen| {
            seen.node == from && !epochs.contains(&seen.stream.epoch) && seen.open.is_empty()
        });
        if !numbers.is_empty() {
            self.note(&InboxRecord::Forgotten(numbers));
            self.snapshot_if_due();
        }
    }

    /// Removes streams; returns their numbers.
    fn forget(&mut self, gone: impl Fn(&Seen) -> bool) -> Vec<u64> {
        let gone = self.streams.iter().filter(|(_, seen)| gone(seen));
        let places: Vec<usize> = gone.map(|(place, _)| *place).collect();
        let mut numbers = Vec::new();
        for place in places {
            if let Some(seen) = self.streams.remove(&place) {
                if let Some(streams) = self.senders.get_mut(&seen.node) {
                    *streams -= 1;
                    if *streams == 0 {
                        self.senders.remove(&seen.node);
                    }
                }
                self.places.remove(&(seen.node, seen.stream));
                numbers.push(seen.number);
            }
        }
        numbers
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
