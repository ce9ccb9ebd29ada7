//! The senders that the inbox remembers, and their share of its memory.
//!
//! A sender takes a place when a message of it is processed here, and pays for what is kept of it.
//! When the inbox is full, it forgets the sender that was unheard for the longest: first among those
//! that never came back, so that ids drawn for one message each make room for each other.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Inbox, InboxAction, Pending, Seen};
use crate::engine::delivery::record::{InboxRecord, NodeBytes};
use crate::identity::NodeId;
use crate::journal::Persist;
use crate::wire::Moment;

/// The most bytes of memory that the inbox takes, and that one sender takes of it.
const MAX_BYTES: u64 = if cfg!(test) { 12 * 1024 * 1024 } else { 32 * 1024 * 1024 };
const MAX_SENDER_BYTES: u64 = 4 * 1024 * 1024;
/// The most streams of a sender: one for each epoch of its outbox with unsettled deliveries, and one
/// for each durable subscription.
pub(super) const MAX_STREAMS: usize = 1024;
/// The ranges of a stream from which on each further one is weighed against its sender's share.
const MANY_RANGES: usize = 128;
/// The memory of a sender, a stream, and a range of numbers or a begun delivery, in bytes.
const SENDER_COST: u64 = 256;
const STREAM_COST: u64 = 512;
const RANGE_COST: u64 = 32;
/// The most senders that are looked at to find one to forget. In the first half of the looks, those
/// of which messages were processed since their last turn get another.
const MOST_LOOKS: u32 = 16;

#[derive(Debug, Default)]
pub(super) struct Sender {
    /// The places of its streams, by epoch.
    streams: BTreeMap<u64, BTreeSet<usize>>,
    count: usize,
    /// The moment of its outbox that it announced over the current link.
    announced: Option<Moment>,
    /// The latest moment from which a message was accepted: it may be processed any time now.
    accepted: Option<Moment>,
    /// The latest moment from which a message was processed, and the writes after whose last failure
    /// that was recorded.
    heard: Option<(Moment, u64)>,
    bytes: u64,
    /// The sender came back after an absence.
    returned: bool,
    /// The sender's turn to be forgotten; `None` while nothing is recorded of it.
    turn: Option<u64>,
    /// A message of it was processed since its last turn.
    used: bool,
}

/// All senders, in the order in which they are forgotten.
#[derive(Debug, Default)]
pub(super) struct Senders {
    all: crate::engine::HashMap<NodeId, Sender>,
    order: BTreeSet<(bool, u64, NodeId)>,
    next_turn: u64,
    bytes: u64,
    /// Senders were forgotten for want of room.
    pub(super) has_forgotten: bool,
}

impl Seen {
    fn cost(&self) -> u64 {
        STREAM_COST + RANGE_COST * (self.processed.iter().len() + self.begun.len()) as u64
    }

    /// Returns true if its sender is charged too much or too little.
    pub(super) fn is_mischarged(&self) -> bool {
        self.charged != self.cost()
    }
}

impl Senders {
    /// Returns the senders of which something is recorded, those to be forgotten first at first.
    pub(super) fn recorded(&self) -> impl Iterator<Item = (&NodeId, Option<Moment>, bool)> {
        self.order.iter().filter_map(|(_, _, node)| {
            let sender = self.all.get(node)?;
            Some((node, sender.heard.map(|(moment, _)| moment), sender.returned))
        })
    }

    /// Returns true if a sender may leave another gap between the processed numbers of a stream.
    pub(super) fn has_room_for_gap(&self, seen: &Seen) -> bool {
        seen.processed.iter().len() < MANY_RANGES
            || self.all.get(&seen.node).is_none_or(|it| it.bytes < MAX_SENDER_BYTES)
    }

    /// Takes the sender's turn anew, behind all others.
    fn take_turn(&mut self, node: NodeId) {
        let Some(sender) = self.all.get_mut(&node) else { return };
        match sender.turn {
            Some(turn) => _ = self.order.remove(&(sender.returned, turn, node)),
            None => {
                sender.bytes += SENDER_COST;
                self.bytes += SENDER_COST;
            }
        }
        sender.turn = Some(self.next_turn);
        self.order.insert((sender.returned, self.next_turn, node));
        self.next_turn += 1;
    }

    fn note_return(&mut self, node: NodeId) {
        let Some(sender) = self.all.get_mut(&node) else { return };
        if let Some(turn) = sender.turn {
            self.order.remove(&(sender.returned, turn, node));
            sender.returned = true;
            self.order.insert((true, turn, node));
            self.take_turn(node);
        }
    }

    /// Removes a sender of which nothing is known any more.
    fn drop_if_idle(&mut self, node: &NodeId) {
        let Some(sender) = self.all.get(node) else { return };
        if sender.count > 0 || sender.heard.is_some() {
            return;
        }
        if let Some(turn) = sender.turn {
            self.order.remove(&(sender.returned, turn, *node));
            self.bytes -= sender.bytes;
        }
        match sender.announced {
            None => _ = self.all.remove(node),
            announced => _ = self.all.insert(*node, Sender { announced, ..Sender::default() }),
        }
    }
}

impl Inbox {
    // Streams come and go.

    /// Adds a stream to its sender.
    pub(super) fn enter_sender(&mut self, node: NodeId, epoch: u64, place: usize) {
        let sender = self.senders.all.entry(node).or_default();
        sender.streams.entry(epoch).or_default().insert(place);
        sender.count += 1;
    }

    /// Removes a stream, with all that is known of it.
    pub(super) fn drop_stream(&mut self, place: usize) -> Option<u64> {
        let seen = self.streams.remove(&place)?;
        if let Some(sender) = self.senders.all.get_mut(&seen.node) {
            if let Some(places) = sender.streams.get_mut(&seen.stream.epoch) {
                places.remove(&place);
                if places.is_empty() {
                    sender.streams.remove(&seen.stream.epoch);
                }
            }
            sender.count -= 1;
            sender.bytes -= seen.charged;
            self.senders.bytes -= seen.charged;
        }
        self.senders.drop_if_idle(&seen.node);
        self.numbers.remove(&seen.number);
        self.places.remove(&(seen.node, seen.stream));
        Some(seen.number)
    }

    /// Removes a stream of which nothing was recorded, and of which nothing is on its way.
    pub(super) fn drop_if_unused(&mut self, place: usize) {
        let is_unused = |seen: &Seen| {
            seen.charged == 0
                && seen.open.is_empty()
                && seen.begun.is_empty()
                && seen.processed.iter().len() == 0
        };
        if self.streams.get(&place).is_some_and(is_unused) {
            self.drop_stream(place);
        }
    }

    /// Charges a recorded stream for the memory that it takes by now.
    pub(super) fn charge(&mut self, place: usize) {
        let Some(seen) = self.streams.get_mut(&place) else { return };
        let cost = seen.cost();
        if seen.charged == cost {
            return;
        }
        let (node, before) = (seen.node, std::mem::replace(&mut seen.charged, cost));
        if let Some(sender) = self.senders.all.get_mut(&node) {
            sender.bytes = sender.bytes + cost - before;
            self.senders.bytes = self.senders.bytes + cost - before;
            if sender.turn.is_none() {
                self.senders.take_turn(node);
            }
        }
        if cost > before {
            self.make_room(node, 0);
        }
    }

    // What fits.

    /// Returns true if another stream of that sender may be remembered; may forget other senders.
    pub(super) fn has_room_for(&mut self, from: NodeId) -> bool {
        let cost = STREAM_COST + RANGE_COST;
        let own = self.senders.all.get(&from);
        if own.is_some_and(|it| it.count >= MAX_STREAMS || it.bytes + cost > MAX_SENDER_BYTES) {
            return false;
        }
        let new = if own.is_none_or(|it| it.turn.is_none()) { SENDER_COST } else { 0 };
        self.make_room(from, cost + new)
    }

    /// Forgets senders other than `newcomer` until that many bytes are free.
    fn make_room(&mut self, newcomer: NodeId, bytes: u64) -> bool {
        let mut looks = 0;
        while self.senders.bytes + bytes > MAX_BYTES {
            let Some((returned, turn, node)) = self.senders.order.first().copied() else { break };
            looks += 1;
            if looks > MOST_LOOKS {
                return false;
            }
            let Some(sender) = self.senders.all.get_mut(&node) else { break };
            let is_used = std::mem::take(&mut sender.used) && looks <= MOST_LOOKS / 2;
            let mut places = sender.streams.values().flatten();
            let is_open = |place: &usize| self.streams.get(place).is_some_and(Seen::is_busy);
            if is_used || node == newcomer || places.any(is_open) {
                self.senders.order.remove(&(returned, turn, node));
                self.senders.take_turn(node);
                continue;
            }
            self.evict(node);
            self.note(&InboxRecord::Evicted(NodeBytes(node)));
            self.actions.push_back(InboxAction::Forgot { newcomer });
        }
        self.senders.bytes + bytes <= MAX_BYTES
    }

    /// Forgets a sender.
    pub(super) fn evict(&mut self, node: NodeId) {
        self.senders.has_forgotten = true;
        let Some(sender) = self.senders.all.get_mut(&node) else { return };
        (sender.heard, sender.accepted) = (None, None);
        let places: Vec<usize> = sender.streams.values().flatten().copied().collect();
        for place in places {
            self.drop_stream(place);
        }
        self.senders.drop_if_idle(&node);
    }

    /// Notes that a message of a sender is accepted, at the moment that the sender announced.
    pub(super) fn accept(&mut self, from: &NodeId) {
        if let Some(sender) = self.senders.all.get_mut(from)
            && sender.announced.is_some()
        {
            sender.accepted = sender.announced;
        }
    }

    // What senders announce.

    /// Handles a sender's announcement of the epochs of which it still has messages, and of the
    /// moment that its outbox has reached. Only from the second announcement over a link on is the
    /// sender known to have received the moment that was heard before.
    pub(crate) fn handle_epochs(&mut self, from: NodeId, epochs: &[u64], now: Option<Moment>) {
        let Some(sender) = self.senders.all.get_mut(&from) else {
            if now.is_some() {
                self.senders.all.entry(from).or_default().announced = now;
            }
            return;
        };
        if std::mem::replace(&mut sender.announced, now).is_none() {
            self.senders.note_return(from);
            if now.is_some() {
                return;
            }
        }
        let told: HashSet<u64> = epochs.iter().copied().collect();
        let Some(sender) = self.senders.all.get(&from) else { return };
        let gone = sender.streams.iter().filter(|(epoch, _)| !told.contains(epoch));
        let places: Vec<usize> = gone.flat_map(|(_, places)| places).copied().collect();
        let mut numbers = Vec::new();
        for place in places {
            if self.streams.get(&place).is_some_and(|seen| seen.open.is_empty()) {
                numbers.extend(self.drop_stream(place));
            }
        }
        if !numbers.is_empty() {
            // An older copy of the outbox knows the moment before, and has messages of these streams.
            self.accept(&from);
            self.hear(from);
            self.note(&InboxRecord::Forgotten(numbers));
            self.snapshot_if_due();
        }
    }

    /// Handles the end of the link to a sender.
    pub(crate) fn handle_link_down(&mut self, from: NodeId) {
        if let Some(sender) = self.senders.all.get_mut(&from) {
            sender.announced = None;
            self.senders.drop_if_idle(&from);
        }
    }

    /// Returns the latest moment of a peer's outbox from which a message was processed here.
    pub(crate) fn heard(&self, peer: &NodeId) -> Option<Moment> {
        let sender = self.senders.all.get(peer);
        let heard = || sender.and_then(|it| it.heard).map(|(moment, _)| moment);
        let forgotten = || self.senders.has_forgotten.then_some(Moment::FORGOTTEN);
        sender.and_then(|it| it.accepted).or_else(heard).or_else(forgotten)
    }

    /// Records the moment of a sender's outbox from which a message is processed, before the record
    /// of that message.
    pub(super) fn hear(&mut self, node: NodeId) {
        let Some(sender) = self.senders.all.get_mut(&node) else { return };
        sender.used |= sender.turn.is_some();
        let Some(now) = sender.accepted.filter(|now| sender.heard != Some((*now, self.failures)))
        else {
            return;
        };
        sender.heard = Some((now, self.failures));
        let is_new = sender.turn.is_none();
        if is_new {
            self.senders.take_turn(node);
        }
        self.append(
            &InboxRecord::Heard(NodeBytes(node), now.into()),
            Pending::Heard,
            Persist::Flush,
        );
    }

    /// Restores a recorded sender.
    pub(super) fn recover_sender(&mut self, node: NodeId, heard: Option<Moment>, returned: bool) {
        let sender = self.senders.all.entry(node).or_default();
        if let Some(moment) = heard {
            sender.heard = Some((moment, self.failures));
        }
        if sender.turn.is_none() {
            self.senders.take_turn(node);
        }
        if returned {
            self.senders.note_return(node);
        }
    }
}

#[cfg(test)]
impl Inbox {
    pub(super) fn bytes(&self) -> u64 {
        self.senders.bytes
    }

    pub(super) fn count_senders(&self) -> usize {
        self.senders.all.len()
    }
}
