//! The history of the outbox: the lives of its journal, by which an older copy of it is recognised.
//!
//! ```text
//!   receiver: "the last of you that I heard was epoch 3, at 5:700"
//!   sender:   opened as 1, 2, 3 (up to 5:900), 4   knows the moment, nothing to do
//!             opened as 1, 2, 5                    an older copy: what it has may be processed
//!             opened as 1, 2, 3 (up to 5:400), 6   the same, copied while it ran
//! ```
//!
//! A receiver can have heard of the journal only up to an entry that was synced, and that no later
//! life can lack. A sender that lacks it doubts all messages it has by then: it sends them to that
//! receiver as redelivered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Outbox, OutboxAction, OutboxEvent, Pending};
use crate::engine::Time;
use crate::engine::delivery::record::{HistoryRecord, NodeBytes, OutboxRecord};
use crate::identity::NodeId;
use crate::journal::Position;
use crate::wire::{Control, Moment};

/// The most earlier lives remembered. A receiver that heard an even earlier one last is doubted.
const MAX_LIVES: usize = 128;
/// The most receivers that are doubted separately.
const MAX_DOUBTED: usize = 256;

#[derive(Debug, Default)]
pub(super) struct History {
    /// The ends of earlier lives, in order.
    lives: VecDeque<Moment>,
    /// The epoch of the last life.
    last: Option<u64>,
    /// The end of the journal, as far as receivers are told: segment, and offset.
    reached: (u64, u64),
    /// The number below which messages may have been processed, by receiver.
    doubted: BTreeMap<NodeId, u64>,
    /// The same for all receivers.
    doubted_by_all: u64,
    /// The peers to which nothing is sent before the doubts about them are stored: without these, the
    /// next life would know the moment that they hear of this one.
    unstored: BTreeSet<NodeId>,
    /// The time at which doubts that could not be stored are stored again.
    pub(super) retry: Option<Time>,
    /// The segment with the latest record of all this.
    pub(super) segment: Option<u64>,
}

impl History {
    /// Notes an entry of the journal.
    pub(super) fn reach(&mut self, position: Position) {
        let end = position.offset + u64::from(position.length);
        self.reached = self.reached.max((position.segment, end));
    }

    pub(super) fn reached(&self) -> (u64, u64) {
        self.reached
    }

    /// Returns true if a message may have been processed at a node by another copy of the outbox.
    pub(super) fn doubts(&self, node: &NodeId, number: u64) -> bool {
        number < self.doubted_by_all
            || !self.doubted.is_empty()
                && self.doubted.get(node).is_some_and(|below| number < *below)
    }

    pub(super) fn recover(&mut self, segment: u64, record: &HistoryRecord) {
        self.segment = Some(segment);
        self.last = Some(record.epoch);
        self.lives = record.lives.iter().map(|life| (*life).into()).collect();
        self.doubted =
            record.doubted.iter().map(|(NodeBytes(node), below)| (*node, *below)).collect();
        self.doubted_by_all = record.doubted_by_all;
    }

    /// Begins a life: the last one ended with the last entry.
    pub(super) fn begin(&mut self, epoch: u64) {
        if let Some(last) = self.last.replace(epoch) {
            let (segment, offset) = self.reached;
            self.lives.push_back(Moment { epoch: last, segment, offset });
        }
        let surplus = self.lives.len().saturating_sub(MAX_LIVES);
        self.lives.drain(..surplus);
    }

    /// Returns the number of values to write.
    pub(super) fn len(&self) -> usize {
        self.lives.len() + self.doubted.len()
    }

    fn knows(&self, epoch: u64, heard: Moment) -> bool {
        let is_reached =
            |life: &Moment| (heard.segment, heard.offset) <= (life.segment, life.offset);
        heard.epoch == epoch
            || self.lives.iter().any(|life| life.epoch == heard.epoch && is_reached(life))
    }
}

impl Outbox {
    fn moment(&self) -> Moment {
        let (segment, offset) = self.history.reached;
        Moment { epoch: self.config.epoch, segment, offset }
    }

    pub(super) fn history_record(&self) -> HistoryRecord {
        let History { lives, doubted, doubted_by_all, .. } = &self.history;
        HistoryRecord {
            epoch: self.config.epoch,
            lives: lives.iter().map(|life| (*life).into()).collect(),
            doubted: doubted.iter().map(|(node, below)| (NodeBytes(*node), *below)).collect(),
            doubted_by_all: *doubted_by_all,
        }
    }

    pub(super) fn store_history(&mut self) {
        let record = OutboxRecord::History(self.history_record());
        let waiting = self.history.unstored.iter().copied().collect();
        self.append(&record, Pending::History(waiting));
    }

    /// Returns true if doubts about a peer are not stored yet.
    pub(super) fn has_unstored_doubts(&self, node: &NodeId) -> bool {
        self.history.unstored.contains(node)
    }

    /// Sends to peers whose doubts are stored now.
    pub(super) fn handle_doubts_stored(&mut self, nodes: Vec<NodeId>) {
        for node in nodes {
            if !self.history.unstored.remove(&node) {
                continue;
            }
            if let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.up) {
                let is_announced = peer.told_inbox.is_some();
                peer.inbox = peer.told_inbox;
                self.dirty.insert(node);
                self.waiting_dirty = true;
                if is_announced {
                    self.announce_epochs(node);
                }
                self.resume(node, |_| true);
            }
        }
    }

    /// Begins this life of the outbox, once the journal is read.
    pub(super) fn begin_life(&mut self) {
        self.history.begin(self.config.epoch);
        self.store_history();
    }

    /// Returns the entry that precedes the changes of an outbox that does not run. Without it, they
    /// would seem to be what receivers heard of.
    pub(crate) fn begin_closed_life(&self) -> Vec<u8> {
        OutboxRecord::ClosedLife(self.config.epoch).encode()
    }

    /// Announces the epochs of unsettled deliveries to a node, and the present moment: first when a link
    /// is up, and again once the moment that the node heard last is known, and doubts are stored.
    pub(super) fn announce_epochs(&mut self, node: NodeId) {
        let mut epochs = vec![self.config.epoch];
        let streams = self.streams_of.get(&node).into_iter().flatten();
        let streams = streams.map(|number| &self.streams[*number as usize]);
        let open = streams.filter(|stream| !stream.outstanding.is_empty());
        let mut others: Vec<u64> = open.map(|stream| stream.stream.epoch).collect();
        others.sort_unstable();
        others.dedup();
        epochs.extend(others.into_iter().filter(|epoch| *epoch != self.config.epoch));
        let control = Control::Epochs(epochs, Some(self.moment()));
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.told = Some(self.history.reached);
        }
        self.actions.push_back(OutboxAction::Send(node, control));
    }

    /// Handles the latest moment of this outbox of which a node processed a message.
    pub(super) fn handle_heard(&mut self, node: NodeId, heard: Moment) {
        if self.history.knows(self.config.epoch, heard) {
            return;
        }
        let below = self.next_number;
        self.actions.push_back(OutboxAction::Report(OutboxEvent::IsOlder(node)));
        let Some(first) = self.entries.first() else { return };
        let doubted = &mut self.history.doubted;
        doubted.retain(|_, below| *below > first);
        match doubted.len() < MAX_DOUBTED {
            true => _ = doubted.insert(node, below),
            false => {
                doubted.clear();
                self.history.doubted_by_all = below;
            }
        }
        self.history.unstored.insert(node);
        self.store_history();
    }
}
