//! The inbox: which deliveries were processed here, pure.
//!
//! For each stream of each sender it keeps a watermark and what is processed above it. There is
//! no window of time: a delivery is known until its sender says that it is settled.

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

/// A redelivered message whose handler was begun so often, and never ended, kills its process.
const MAX_BEGUN: u32 = 10;
/// From so often on it runs alone among its like, so that the one that kills is told from those
/// that only die with it.
const SUSPECT: u32 = 3;
/// So many streams of one sender are remembered: one for each life of its outbox that is not settled,
/// and each durable subscription.
const MAX_STREAMS: usize = 4096;
/// So many senders are remembered; a member of the mesh can have as many ids as it likes.
const MAX_SENDERS: usize = 4096;
/// The most gaps in what is processed of one; a sender has far fewer messages on their way.
const MAX_RANGES: usize = 65_536;
/// After so many bytes a snapshot takes the place of what is in the journal, or after as many as
/// the last one had: so the next is at most twice as long, and there is room for it on a full disk.
const SNAPSHOT_AFTER: u64 = 1024 * 1024;
/// What an entry takes in the journal besides its bytes, at the most: its frame, and the mark
/// before it.
const ENTRY_COST: u64 = 48;

/// What becomes of a delivery that arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Run its handler.
    Run,
    /// Run its handler when [`InboxAction::Begin`] says so.
    RunLater,
    /// Its handler runs, or its end is being stored: the answer comes when that is done.
    Wait,
    /// It needn't run.
    Answer(DeliveryOutcome),
}

/// What the owner of the inbox is to do, in this order.
#[derive(Debug)]
pub(crate) enum InboxAction {
    /// Append an entry to the journal, and tell of its end by the number.
    Append {
        token: u64,
        entry: Vec<u8>,
        /// How many messages it says to be processed.
        messages: u32,
        persist: Persist,
    },
    /// The same for all that is known, as the first entry of a segment.
    AppendSnapshot {
        token: u64,
        entry: Vec<u8>,
        messages: u32,
    },
    Note(Vec<u8>),
    /// The segments before that one are no longer wanted.
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
    /// That it was opened has been written; what is said of it later comes behind that.
    opened: bool,
    floor: u64,
    /// Its handler returned Ok.
    processed: Ranges,
    /// How often the handlers of redelivered messages were begun.
    begun: BTreeMap<u64, u32>,
    /// What was not answered yet.
    open: HashMap<u64, Open>,
}

/// A delivery that was let in.
#[derive(Debug)]
struct Open {
    attempt: u32,
    phase: Phase,
    /// That its handler begins was counted.
    counted: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// That it is processed is being stored.
    Storing,
    /// That could not be stored. It is processed all the same; storing is tried again.
    Unstored,
}

#[derive(Debug)]
enum Pending {
    Opened(usize),
    /// Also whether all that is known of its stream is in the entry.
    Processed(usize, u64, bool),
    Begun(usize, u64),
    Snapshot,
}

#[derive(Debug, PartialEq, Eq)]
enum SnapshotPhase {
    Stored,
    Storing,
    /// It could not be stored, which is tried again.
    Unstored,
}

#[derive(Debug)]
pub(crate) struct Inbox {
    epoch: u64,
    streams: BTreeMap<usize, Seen>,
    next_place: usize,
    places: HashMap<(NodeId, Stream), usize>,
    /// How many streams of each sender there are.
    senders: HashMap<NodeId, usize>,
    next_number: u64,
    pending: Numbered<Pending>,
    /// What runs later, in the order in which it came from a node; and whether it may.
    later: HashMap<NodeId, VecDeque<(DeliveryId, bool)>>,
    /// Suspects that wait for the one that runs.
    suspects: VecDeque<(usize, u64)>,
    suspect: Option<(usize, u64)>,
    /// What is in that phase.
    unstored: BTreeSet<(usize, u64)>,
    next_token: u64,
    snapshot_after: u64,
    since_snapshot: u64,
    /// How long the last one was.
    snapshot_size: u64,
    snapshot: SnapshotPhase,
    actions: VecDeque<InboxAction>,
}

impl Inbox {
    /// An empty inbox; `epoch` is drawn for it, and stays for as long as its journal does.
    pub(crate) fn new(epoch: u64) -> Self {
        Self {
            epoch,
            streams: BTreeMap::new(),
            next_place: 0,
            places: HashMap::default(),
            senders: HashMap::default(),
            // Never one of an earlier life, whose records may be behind ours if the disk failed.
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

    /// An inbox that takes snapshots more often.
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

    /// A delivery arrived.
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
            // The lowest that its sender has is always taken, or the gaps would never close.
            if seq > seen.floor && !seen.processed.touches(seq) {
                return Verdict::Answer(DeliveryOutcome::Refused);
            }
            if seq < seen.floor {
                seen.processed.remove_below(seen.floor);
            }
        }
        // Below the floor it was settled once, and nobody knows how: its sender's outbox is an
        // older copy.
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

    /// Whether another stream of that sender may be remembered.
    fn has_room_for(&self, from: &NodeId) -> bool {
        match self.senders.get(from) {
            Some(streams) => *streams < MAX_STREAMS,
            None => self.senders.len() < MAX_SENDERS,
        }
    }

    /// A handler ended.
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
        // It ended: it does not kill its process.
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
        // That the stream was opened may have failed to be written.
        let whole = !seen.opened;
        let record = match whole {
            true => InboxRecord::Opened(seen.record()),
            false => InboxRecord::Processed(seen.number, seq),
        };
        self.append(&record, Pending::Processed(place, seq, whole), Persist::Sync);
    }

    /// A delivery that was to run never will: its link ended while it waited.
    pub(crate) fn handle_unqueued(&mut self, from: NodeId, id: &DeliveryId) {
        if let Some((place, seen)) = self.seen(from, &id.stream)
            && seen.open.get(&id.seq).is_some_and(|open| open.phase == Phase::Running)
        {
            // Its handler never began, so it did not kill its process either.
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

    /// An entry was stored, or can't be.
    pub(crate) fn handle_appended(&mut self, token: u64, result: Result<Position, NotStored>) {
        if result.is_err() {
            // What was written before may be gone as well, whatever a later sync says.
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
                    // What it goes on from may be gone.
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
            // If it can't be written, it is not counted.
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

    /// Whether the disk refused something that is to be tried again.
    pub(crate) fn has_unstored(&self) -> bool {
        !self.unstored.is_empty() || self.snapshot == SnapshotPhase::Unstored
    }

    /// Tries again what the disk refused. To be called a second later.
    pub(crate) fn handle_timeout(&mut self) {
        if self.snapshot == SnapshotPhase::Unstored {
            self.take_snapshot();
        }
        for (place, seq) in std::mem::take(&mut self.unstored) {
            self.store_processed(place, seq);
        }
    }

    /// A sender said which epochs it still has messages of.
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

    /// Forgets streams; returns their numbers.
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

    /// Whether nothing waits for the journal.
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
