//! Recovery of an outbox from its journal.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::once::Group;
use super::{Bound, DeliveryKey, Entry, OutboundDelivery, Outbox, Rare, State};
use crate::address::ServiceName;
use crate::engine::delivery::record::{
    KeptRecord, MessageRecord, OutboxRecord, PartRecord, PeerRecord, Raw, StateRecord,
};
use crate::engine::delivery::{Binding, DeadLetterReason, Now, RecordError, Target};
use crate::identity::NodeId;
use crate::journal::Position;
use crate::message::BASE_COST;

/// A message of an outbox and one of its destinations, for inspection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) number: u64,
    pub(crate) part: u32,
    pub(crate) target: Target,
    pub(crate) node: Option<NodeId>,
    pub(crate) failures: u32,
    pub(crate) expires_at: Option<u64>,
    pub(crate) not_before: Option<u64>,
    pub(crate) size: u32,
    pub(crate) position: Option<Position>,
    pub(crate) dead: Option<DeadLetterReason>,
}

impl Outbox {
    /// Applies a journal entry. Entries must be passed in their order.
    ///
    /// # Errors
    /// [`RecordError`] if this version can't read it.
    pub(crate) fn recover(&mut self, position: Position, entry: &[u8]) -> Result<(), RecordError> {
        self.segments.reach(position);
        let here = position.segment;
        match OutboxRecord::decode(entry)? {
            OutboxRecord::Messages(messages) => {
                for message in messages {
                    self.recover_message(position, &message)?;
                }
            }
            OutboxRecord::Once(messages, ids) => {
                for message in messages {
                    self.recover_message(position, &message)?;
                }
                self.remember_ids(here, ids);
            }
            OutboxRecord::Bound(bound) => {
                self.segments.tell(here, bound.iter().map(|(number, ..)| *number));
                for (number, part, binding) in bound {
                    let key = DeliveryKey { number, part };
                    match binding {
                        // The record that unbound it before may be missing.
                        Some(binding) => self.rebind(key, &binding.binding()),
                        None => self.unbind(key),
                    }
                }
            }
            OutboxRecord::Left(left) => {
                self.segments.tell(here, left.iter().map(|(number, _)| *number));
                for (number, part) in left {
                    self.leave(DeliveryKey { number, part });
                }
            }
            OutboxRecord::Freed(freed) => {
                self.segments.tell(here, freed.iter().map(|(number, _)| *number));
                for (number, part) in freed {
                    let key = DeliveryKey { number, part };
                    self.unbind(key);
                    if let Some(part) = self.part_mut(key) {
                        part.redelivered = false;
                    }
                }
            }
            OutboxRecord::Settled(settled) => {
                self.segments.tell(here, settled.iter().map(|(number, _)| *number));
                for (number, part) in settled {
                    self.recover_settled(DeliveryKey { number, part });
                }
            }
            OutboxRecord::Failed(number, part, failures) => {
                self.segments.tell(here, [number].into_iter());
                if let Some(part) = self.part_mut(DeliveryKey { number, part }) {
                    (part.failures, part.redelivered) = (failures, true);
                }
            }
            OutboxRecord::Dead(number, part, Some(reason)) => {
                self.segments.tell(here, [number].into_iter());
                let key = DeliveryKey { number, part };
                if self.part(key).is_some_and(|part| part.state == State::Storing) {
                    self.end_part(key, State::Dead(Box::new(reason)));
                }
            }
            OutboxRecord::Dead(number, part, None) => {
                self.segments.tell(here, [number].into_iter());
                self.revive_for_good(DeliveryKey { number, part });
            }
            OutboxRecord::Peers(peers) => self.recover_peers(here, &peers)?,
            OutboxRecord::Kept(kept) => self.recover_kept(here, &kept)?,
            OutboxRecord::Met(peers) => {
                self.peers_in.insert(here);
                peers.iter().try_for_each(|peer| self.recover_peer(peer))?;
            }
            OutboxRecord::History(history) => self.history.recover(here, &history),
            OutboxRecord::ClosedLife(epoch) => self.history.begin(epoch),
        }
        // The last life ends before the entry that begins another.
        self.history.reach(position);
        // The settled records are on the disk.
        for Bound { stream, seq } in std::mem::take(&mut self.unreleased) {
            self.streams[stream as usize].outstanding.remove(seq);
        }
        self.settled.clear();
        self.actions.clear();
        Ok(())
    }

    /// Applies the kept records of removed segments.
    fn recover_kept(&mut self, here: u64, kept: &KeptRecord<'_>) -> Result<(), RecordError> {
        let ids = kept.ids.iter().flat_map(|group| &group.ids).map(|(_, number)| *number);
        let next = ids.map(|number| number.saturating_add(1)).max().unwrap_or_default();
        self.next_number = self.next_number.max(kept.next).max(next);
        for (first, last) in kept.settled.iter().filter(|(first, last)| first <= last) {
            let there: Vec<u64> =
                self.entries.range(*first, *last).map(|(number, _)| number).collect();
            there.into_iter().for_each(|number| self.discard(number));
            self.segments.tell_range(here, *first, *last);
        }
        for state in &kept.states {
            self.segments.tell(here, [state.0].into_iter());
            self.recover_state(kept, state)?;
        }
        for group in &kept.ids {
            let since = self.segments.written as i64 - group.age.min(i64::MAX as u64) as i64;
            self.once.remember(here, Group { since, ids: group.ids()? });
        }
        if let Some(history) = &kept.history {
            self.history.recover(here, history);
        }
        kept.peers.as_ref().map_or(Ok(()), |peers| self.recover_peers(here, peers))
    }

    fn recover_state(
        &mut self,
        kept: &KeptRecord<'_>,
        StateRecord(number, expires, states): &StateRecord,
    ) -> Result<(), RecordError> {
        // The message itself may be gone, or replaced by another with its number.
        let Some(entry) = self.entries.get(*number) else { return Ok(()) };
        let Some(position) = entry.position.filter(|_| entry.parts.len() == states.len()) else {
            return Ok(());
        };
        let parts = entry.parts.iter().zip(states).map(|(part, state)| {
            let former = state.former.iter().map(|former| kept.binding(*former));
            Ok(PartRecord {
                target: (&self.targets[part.target as usize]).into(),
                binding: state.binding.map(|binding| kept.binding(binding)).transpose()?,
                failures: state.failures,
                redelivered: state.redelivered,
                settled: state.settled,
                dead: state.dead.clone(),
                former: former.collect::<Result<_, _>>()?,
            })
        });
        let parts = parts.collect::<Result<_, RecordError>>()?;
        let rare = entry.rare.as_deref();
        let record = MessageRecord {
            number: *number,
            parts,
            expires_at: rare.and_then(|rare| rare.expires_at).filter(|_| *expires),
            not_before: rare.and_then(|rare| rare.not_before),
            order: self.order(*number).map(|order| order.to_string()),
            encoded: Raw(Default::default()),
        };
        let size = entry.size;
        self.recover_as(position, size, &record)
    }

    fn recover_peers(&mut self, here: u64, peers: &[PeerRecord]) -> Result<(), RecordError> {
        self.peers_in = BTreeSet::from([here]);
        let before: Vec<_> =
            self.subscriptions.iter().map(|(node, name, _)| (node, name.clone())).collect();
        self.subscriptions.clear();
        peers.iter().try_for_each(|peer| self.recover_peer(peer))?;
        self.recover_ended(before);
        Ok(())
    }

    fn recover_message(
        &mut self,
        position: Position,
        record: &MessageRecord<'_>,
    ) -> Result<(), RecordError> {
        self.next_number = self.next_number.max(record.number + 1);
        let destinations = BASE_COST as u32 * record.parts.len().max(1) as u32;
        self.recover_as(position, destinations + record.encoded.0.len() as u32, record)
    }

    /// Restores a stored message in the state of the record.
    fn recover_as(
        &mut self,
        position: Position,
        size: u32,
        record: &MessageRecord<'_>,
    ) -> Result<(), RecordError> {
        let number = record.number;
        if self.entries.get(number).is_some() {
            // The message was moved here; the record holds its state at that time.
            self.discard(number);
        }
        let order: Option<Arc<str>> = record.order.as_deref().map(Arc::from);
        let mut parts: SmallVec<[OutboundDelivery; 1]> = SmallVec::new();
        for (at, part) in (0u32..).zip(&record.parts) {
            let to = part.target.target()?;
            let target = self.target_number(&to);
            if matches!(to, Target::Subscription(..)) {
                self.kept_for.entry(target).or_default().insert(number, at);
            }
            let state = State::Storing;
            let (bound, failures, attempts) = (None, part.failures, 0);
            let redelivered = part.redelivered;
            self.open += 1;
            parts.push(OutboundDelivery { target, bound, state, failures, attempts, redelivered });
        }
        let (expires_at, not_before) = (record.expires_at, record.not_before);
        let rare = Rare { expires_at, not_before, order };
        let rare = (rare != Rare::default()).then(|| Box::new(rare));
        let entry = Entry { position: Some(position), cached: None, rare, parts, size };
        self.bytes += u64::from(size);
        self.segments.enter(position.segment, number, size);
        self.entries.insert(number, entry);
        for (at, part) in (0u32..).zip(&record.parts) {
            let key = DeliveryKey { number, part: at };
            for former in &part.former {
                self.rebind(key, &former.binding());
                self.leave(key);
            }
            if let Some(binding) = &part.binding {
                self.rebind(key, &binding.binding());
            }
            // A moved message comes later in the journal than in its key's order.
            self.enter_key_queue(key);
            match part {
                PartRecord { settled: true, .. } => self.end_part(key, State::Settled),
                PartRecord { dead: Some(reason), .. } => {
                    self.end_part(key, State::Dead(Box::new(reason.clone())));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Restores a binding, and unbinds the message from its previous node.
    fn rebind(&mut self, key: DeliveryKey, binding: &Binding) {
        self.leave(key);
        let stream = self.stream_number(binding.node, binding.stream.clone());
        let bound = Bound { stream, seq: binding.seq };
        let Some(part) = self.part_mut(key) else { return };
        part.bound = Some(bound);
        // The journal does not record whether it was sent.
        part.redelivered = true;
        let number = &mut self.streams[stream as usize];
        number.next = number.next.max(binding.seq + 1);
        number.outstanding.insert(binding.seq, key);
        self.peers.entry(binding.node).or_default().bound += 1;
        self.note_absence(binding.node);
        // A message has one number at a node; the record that gave up another may be missing.
        let former = self.take_former(key, binding.node).filter(|former| *former != bound);
        former.into_iter().for_each(|given_up| self.release_number(given_up));
    }

    pub(super) fn recover_settled(&mut self, key: DeliveryKey) {
        self.revive(key);
        if self.part(key).is_some_and(|part| part.state != State::Settled) {
            self.end_part(key, State::Settled);
        }
    }

    pub(super) fn revive(&mut self, key: DeliveryKey) {
        if let Some(part) = self.part_mut(key)
            && matches!(part.state, State::Dead(_))
        {
            (part.state, part.failures) = (State::Storing, 0);
            self.dead -= 1;
            self.open += 1;
            self.enter_key_queue(key);
        }
    }

    /// Revives a dead letter to be sent again. Its message no longer expires: its expiry may have
    /// passed, and it would become a dead letter at once.
    pub(super) fn revive_for_good(&mut self, key: DeliveryKey) {
        self.revive(key);
        if let Some(rare) = self.entries.get_mut(key.number).and_then(|entry| entry.rare.as_mut()) {
            rare.expires_at = None;
        }
    }

    fn recover_peer(&mut self, record: &PeerRecord) -> Result<(), RecordError> {
        let node = record.node.0;
        let before: Vec<_> =
            self.subscriptions.of(&node).map(|(name, _)| (node, name.clone())).collect();
        self.subscriptions.forget(node);
        for (name, pattern) in record.subscriptions()? {
            let proven = !record.unproven.iter().any(|it| it == name.as_str());
            self.subscriptions.insert(node, &name, &pattern, 0, proven);
        }
        if node != self.config.me {
            self.subscriptions.set_gone(node, true);
            let peer = self.peers.entry(node).or_default();
            self.peers_known += usize::from(peer.known_inbox.is_none());
            (peer.known_inbox, peer.seen_at) = (Some(record.inbox), record.seen_at);
        }
        self.recover_ended(before);
        Ok(())
    }

    /// Has the messages dropped of subscriptions that a record no longer names. A process that ended
    /// in the midst of that dropped some of them.
    fn recover_ended(&mut self, before: Vec<(NodeId, ServiceName)>) {
        for (node, name) in before {
            if self.subscriptions.get(&node, &name).is_none() {
                let target = self.target_number(&Target::Subscription(node, name));
                self.dropping.push_back((target, self.next_number));
            }
        }
    }

    /// Sets the existing segments and their lengths in bytes, once the journal is read.
    pub(crate) fn handle_segments(&mut self, segments: &[(u64, u64)]) {
        self.segments.found(segments);
        self.clean_due = true;
    }

    /// Completes the recovery: the recovered messages are dispatched.
    pub(crate) fn handle_recovered(&mut self, now: Now) {
        self.now = now.time;
        self.begin_life();
        self.drop_messages();
        let parts = self.entries.iter().flat_map(|(number, entry)| {
            let parts = (0u32..).zip(&entry.parts);
            let stored = parts.filter(|(_, part)| part.state == State::Storing);
            stored.map(move |(part, _)| DeliveryKey { number, part })
        });
        let keys: Vec<DeliveryKey> = parts.collect();
        keys.into_iter().for_each(|key| self.activate(now, key));
        let nodes: Vec<NodeId> = self.peers.keys().copied().collect();
        for node in nodes {
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.down_since = now.time;
                if peer.seen_at == 0 {
                    peer.seen_at = now.unix_ms;
                }
            }
            self.note_absence(node);
        }
        self.lapse_at = self.config.lapse_after.map(|_| now.time + self.config.gone_after);
    }

    /// Returns the contents of the outbox, in the order in which they were stored.
    pub(crate) fn contents(&self) -> impl Iterator<Item = Contents> {
        self.entries.iter().flat_map(move |(number, entry)| {
            let parts = entry.parts.iter().enumerate();
            let parts = parts.filter(|(_, part)| part.state != State::Settled);
            parts.map(move |(at, part)| Contents {
                number,
                part: at as u32,
                target: self.targets[part.target as usize].clone(),
                node: part.bound.map(|bound| self.streams[bound.stream as usize].node),
                failures: part.failures,
                expires_at: entry.rare.as_ref().and_then(|rare| rare.expires_at),
                not_before: entry.rare.as_ref().and_then(|rare| rare.not_before),
                size: entry.size,
                position: entry.position,
                dead: match &part.state {
                    State::Dead(reason) => Some(DeadLetterReason::clone(reason)),
                    _ => None,
                },
            })
        })
    }

    /// Returns the encoded bytes of a message, as stored, from its journal entry.
    pub(crate) fn stored_message(entry: &[u8], number: u64) -> Result<Option<Bytes>, RecordError> {
        let mut all = Self::stored_messages(entry)?.into_iter();
        Ok(all.find(|(other, _)| *other == number).map(|(_, encoded)| encoded))
    }

    /// Returns the encoded bytes of all messages in an entry, by their numbers.
    pub(crate) fn stored_messages(entry: &[u8]) -> Result<Vec<(u64, Bytes)>, RecordError> {
        let messages = match OutboxRecord::decode(entry)? {
            OutboxRecord::Messages(messages) | OutboxRecord::Once(messages, _) => messages,
            _ => return Ok(Vec::new()),
        };
        let encoded = |message: MessageRecord<'_>| {
            (message.number, Bytes::from(message.encoded.0.into_owned()))
        };
        Ok(messages.into_iter().map(encoded).collect())
    }

    /// Returns an entry of n messages, as a transaction stores them.
    #[cfg(test)]
    pub(crate) fn example_transaction(messages: u64) -> (Position, Vec<u8>) {
        let message = |number: u64| MessageRecord {
            number,
            parts: SmallVec::new(),
            expires_at: None,
            not_before: None,
            order: None,
            encoded: Raw(number.to_string().into_bytes().into()),
        };
        let entry = OutboxRecord::Messages((1..=messages).map(message).collect()).encode();
        (Position { segment: 1, offset: 48, length: entry.len() as u32 }, entry)
    }
}
