//! What a journal tells of the outbox that it belongs to.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::{Bound, Entry, Outbox, Part, PartKey, Rare, State};
use crate::engine::delivery::record::{MessageRecord, OutboxRecord, PeerRecord};
use crate::engine::delivery::{Binding, Now, RecordError};
use crate::journal::Position;
use crate::wire::BASE_COST;

impl Outbox {
    /// Takes in an entry of the journal, in their order.
    ///
    /// # Errors
    /// [`RecordError`] if this version can't read it.
    pub(crate) fn recover(&mut self, position: Position, entry: &[u8]) -> Result<(), RecordError> {
        self.newest_segment = self.newest_segment.max(position.segment);
        match OutboxRecord::decode(entry)? {
            OutboxRecord::Messages(messages) => {
                for message in messages {
                    self.recover_message(position, &message)?;
                }
            }
            OutboxRecord::Bound(bound) => {
                for (number, part, binding) in bound {
                    let key = PartKey { number, part };
                    let binding = binding.map(|binding| binding.binding()).transpose()?;
                    self.unbind(key);
                    if let Some(binding) = binding {
                        self.rebind(key, &binding);
                    }
                }
            }
            OutboxRecord::Settled(settled) => {
                for (number, part) in settled {
                    let key = PartKey { number, part };
                    if matches!(self.part(key).map(|part| &part.state), Some(State::Dead(_))) {
                        self.revive(key);
                    }
                    if self.part(key).is_some_and(|part| part.state != State::Settled) {
                        self.end_part(key, State::Settled);
                    }
                }
            }
            OutboxRecord::Failed(number, part, failures) => {
                if let Some(part) = self.part_mut(PartKey { number, part }) {
                    (part.failures, part.redelivered) = (failures, true);
                }
            }
            OutboxRecord::Dead(number, part, Some(fate)) => {
                let key = PartKey { number, part };
                if self.part(key).is_some_and(|part| part.state == State::Storing) {
                    self.end_part(key, State::Dead(Box::new(fate)));
                }
            }
            OutboxRecord::Dead(number, part, None) => self.revive(PartKey { number, part }),
            OutboxRecord::Peers(peers) => {
                for peer in peers {
                    self.recover_peer(&peer)?;
                }
            }
        }
        self.actions.clear();
        Ok(())
    }

    fn recover_message(
        &mut self,
        position: Position,
        record: &MessageRecord,
    ) -> Result<(), RecordError> {
        let number = record.number;
        self.next_number = self.next_number.max(number + 1);
        let order: Option<Arc<str>> = record.order.as_deref().map(Arc::from);
        let mut parts: SmallVec<[Part; 1]> = SmallVec::new();
        let mut bindings = Vec::new();
        for part in &record.parts {
            let target = part.target.target()?;
            bindings.push(part.binding.as_ref().map(|binding| binding.binding()).transpose()?);
            let target = self.target_number(target);
            let state = State::Storing;
            let (bound, failures, attempts, redelivered) = (None, 0, 0, false);
            self.open += 1;
            parts.push(Part { target, bound, state, failures, attempts, redelivered });
        }
        let (expires_at, not_before) = (record.expires_at, record.not_before);
        let rare = Rare { expires_at, not_before, order: order.clone() };
        let rare = (rare != Rare::default()).then(|| Box::new(rare));
        let size = BASE_COST as u32 + record.frozen.0.len() as u32;
        let lanes: Vec<u32> = parts.iter().map(|part| part.target).collect();
        let entry = Entry { position: Some(position), cached: None, rare, parts, size };
        self.bytes += u64::from(size);
        *self.live.entry(position.segment).or_default() += 1;
        self.entries.insert(number, entry);
        for (part, (binding, target)) in bindings.into_iter().zip(lanes).enumerate() {
            let key = PartKey { number, part: part as u32 };
            if let Some(binding) = binding {
                self.rebind(key, &binding);
            }
            if let Some(order) = &order {
                self.lanes.entry((target, order.clone())).or_default().push_back(key);
            }
        }
        Ok(())
    }

    /// Binds a message as an earlier life did.
    fn rebind(&mut self, key: PartKey, binding: &Binding) {
        if self.part(key).is_none() {
            return;
        }
        let number = self.stream_number(binding.node, binding.stream.clone());
        let stream = &mut self.streams[number as usize];
        stream.next = stream.next.max(binding.seq + 1);
        stream.outstanding.insert(binding.seq, key);
        self.peers.entry(binding.node).or_default().bound += 1;
        if let Some(part) = self.part_mut(key) {
            part.bound = Some(Bound { stream: number, seq: binding.seq });
            // That it was sent is written nowhere.
            part.redelivered = true;
        }
    }

    fn revive(&mut self, key: PartKey) {
        if let Some(part) = self.part_mut(key)
            && matches!(part.state, State::Dead(_))
        {
            (part.state, part.failures) = (State::Storing, 0);
            self.dead -= 1;
            self.open += 1;
        }
    }

    fn recover_peer(&mut self, record: &PeerRecord) -> Result<(), RecordError> {
        let node = record.node.0;
        for (name, pattern) in record.subscriptions()? {
            self.subscriptions.insert((node, name), pattern);
        }
        if node != self.config.me {
            self.peers.entry(node).or_default().known_inbox = Some(record.inbox);
        }
        Ok(())
    }

    /// The journal has been read: what is in it goes on its way.
    pub(crate) fn handle_recovered(&mut self, now: Now) {
        let mut keys = Vec::new();
        for (number, entry) in self.entries.iter() {
            for (at, part) in entry.parts.iter().enumerate() {
                if part.state == State::Storing {
                    let expires_at = entry.rare.as_ref().and_then(|rare| rare.expires_at);
                    keys.push((PartKey { number, part: at as u32 }, expires_at));
                }
            }
        }
        for (key, expires_at) in keys {
            self.wall.extend(expires_at.map(|at| (at, key)));
            self.activate(now, key);
        }
        self.peers.values_mut().for_each(|peer| peer.down_since = now.time);
    }

    /// The bytes of a message, from the journal's entry that it is in; `frozen` as it was stored.
    pub(crate) fn frozen(entry: &[u8], number: u64) -> Result<Option<Bytes>, RecordError> {
        let OutboxRecord::Messages(messages) = OutboxRecord::decode(entry)? else {
            return Ok(None);
        };
        let found = messages.into_iter().find(|message| message.number == number);
        Ok(found.map(|message| message.frozen.0))
    }
}
