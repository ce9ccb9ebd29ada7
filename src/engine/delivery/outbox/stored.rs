//! Appends to the journal, and their outcomes.

use super::once::Group;
use super::{Bound, DISK_RETRY, DeliveryKey, Outbox, OutboxAction, Pending, State, Written};
use crate::engine::delivery::Now;
use crate::engine::delivery::record::OutboxRecord;
use crate::journal::{Level, Need, NotStored, Persist, Position};
use crate::message::MessageId;

impl Outbox {
    pub(super) fn append(&mut self, record: &OutboxRecord<'_>, pending: Pending) {
        self.append_encoded(record.encode(), pending);
    }

    pub(super) fn append_encoded(&mut self, entry: Vec<u8>, pending: Pending) {
        let persist = match pending {
            // If the record is lost, the messages are sent again, and the receiver recognises them.
            Pending::Settled(..) => Persist::Lazy,
            Pending::Noted(_) => Persist::Flush,
            Pending::History(ref waiting) if waiting.is_empty() => Persist::Flush,
            _ => Persist::Sync,
        };
        let need = match pending {
            Pending::Messages(..) | Pending::Peers(_) => Need::None,
            Pending::History(ref waiting) if waiting.is_empty() => Need::None,
            Pending::Moved(_) | Pending::Begun | Pending::Kept(_) => Need::Removal,
            Pending::Bound(_) if self.is_at_an_end => Need::Sending,
            _ if self.is_at_an_end => Need::Emergency,
            _ => Need::Urgent,
        };
        let messages = match &pending {
            Pending::Messages(numbers, _) => numbers.len() as u32,
            Pending::Moved(_) => 1,
            _ => 0,
        };
        let token = self.token_for(pending);
        self.actions.push_back(OutboxAction::Append { token, entry, messages, persist, need });
    }

    /// Appends an entry at the start of a new segment.
    pub(super) fn append_first(&mut self, record: &OutboxRecord<'_>, pending: Pending) {
        let (token, entry) = (self.token_for(pending), record.encode());
        self.actions.push_back(OutboxAction::AppendFirst { token, entry });
    }

    fn token_for(&mut self, pending: Pending) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.pending.insert(token, pending);
        token
    }

    /// Writes, without a sync, the destinations settled since the last call.
    pub(super) fn store_settled(&mut self) {
        if self.settled.is_empty() || self.disk_retry.is_some() {
            return;
        }
        let settled = std::mem::take(&mut self.settled);
        let numbers = std::mem::take(&mut self.unreleased);
        let record = OutboxRecord::Settled(settled.clone());
        self.append(&record, Pending::Settled(settled, numbers));
    }

    /// Writes a record about messages, without a sync.
    pub(super) fn note(
        &mut self,
        record: &OutboxRecord<'_>,
        messages: impl IntoIterator<Item = u64>,
    ) {
        self.append(record, Pending::Noted(messages.into_iter().collect()));
    }

    /// Handles the outcome of an append.
    pub(crate) fn handle_appended(
        &mut self,
        now: Now,
        token: u64,
        result: Result<Position, NotStored>,
    ) {
        self.now = now.time;
        if let Ok(position) = &result {
            let last = self.segments.newest;
            if self.segments.reach(*position) {
                self.segments.suspect(last, position.segment);
                // The previous segment may be worth cleaning.
                self.clean_due = true;
            }
        }
        let synced = result.is_ok()
            && self.pending.get(token).is_some_and(|it| {
                !matches!(it, Pending::Settled(..) | Pending::Noted(_) | Pending::History(_))
            });
        while synced
            && self.written.front().is_some_and(|before| before.token < token)
            && let Some(Written { numbers, .. }) = self.written.pop_front()
        {
            for Bound { stream, seq } in numbers {
                self.streams[stream as usize].outstanding.remove(seq);
            }
        }
        if result.is_err() {
            self.doubt_written();
        }
        match (self.pending.remove(token), result) {
            (None, _) => {}
            (Some(Pending::Messages(numbers, ids)), Ok(position)) => {
                self.remember_ids(position.segment, ids);
                for number in numbers {
                    self.handle_stored(now, number, position);
                }
            }
            (Some(Pending::Messages(numbers, ids)), Err(error)) => {
                ids.iter().for_each(|(id, _)| self.once.forget(id));
                for number in numbers {
                    self.discard(number);
                    self.actions.push_back(OutboxAction::Stored(number, Err(error.clone())));
                }
            }
            (Some(Pending::History(waiting)), Ok(position)) => {
                self.history.segment = Some(position.segment);
                if !waiting.is_empty() {
                    self.history.reach(position);
                    self.handle_doubts_stored(waiting);
                }
            }
            (Some(Pending::History(waiting)), Err(_)) => {
                self.history.retry = (!waiting.is_empty()).then_some(now.time + DISK_RETRY);
            }
            (Some(Pending::Bound(keys)), Ok(position)) => {
                self.history.reach(position);
                self.segments.tell(position.segment, keys.iter().map(|key| key.number));
                for key in keys {
                    self.bindings_copied.remove(&key);
                    if self.part(key).is_some_and(|part| part.state == State::Binding) {
                        self.make_ready(key);
                    }
                }
            }
            (Some(Pending::Bound(keys)), Err(error)) => {
                for key in keys {
                    let is_recorded = self.bindings_copied.remove(&key) || error.may_turn_up;
                    let Some(part) = self.part(key) else { continue };
                    if part.state == State::Binding {
                        match part.redelivered {
                            true => self.leave(key),
                            false if is_recorded => self.free(key),
                            // Records of refusals would take the last space of a full disk.
                            false => self.unbind(key),
                        }
                        self.pause(now, key, 0, true);
                    }
                }
            }
            (Some(Pending::Dead(key)), Ok(position)) => {
                self.segments.tell(position.segment, [key.number].into_iter());
                self.finish_dead_letter(key);
            }
            (Some(Pending::Dead(key)), Err(_)) => {
                self.timers.insert((now.time + DISK_RETRY, key));
            }
            (Some(Pending::Noted(messages)), result) => {
                if let Ok(position) = result {
                    self.segments.tell(position.segment, messages.into_iter());
                }
            }
            (Some(Pending::Settled(settled, numbers)), Ok(position)) => {
                self.segments.tell(position.segment, settled.iter().map(|(number, _)| *number));
                self.written.push_back(Written { token, settled, numbers });
            }
            (Some(Pending::Settled(settled, numbers)), Err(_)) => {
                // The next record of settled destinations includes these.
                self.settled.extend(settled);
                self.unreleased.extend(numbers);
                self.disk_retry = Some(now.time + DISK_RETRY);
            }
            (Some(Pending::Moved(number)), result) => {
                if result.is_err() {
                    self.clean_later(now);
                }
                self.handle_moved(number, result.ok());
            }
            (Some(Pending::Peers(nodes)), result) => {
                (self.peers_pending, self.peers_retry) = (false, Some(now.time + DISK_RETRY));
                match result {
                    Ok(position) => _ = self.peers_in.insert(position.segment),
                    Err(_) => self.peers_dirty.extend(nodes),
                }
                if !self.peers_dirty.is_empty() {
                    self.store_peers();
                }
            }
            (Some(Pending::Begun), result) => {
                if result.is_err() {
                    self.clean_later(now);
                }
                self.handle_begun(result.is_ok());
            }
            (Some(Pending::Kept(keeping)), Ok(position)) => self.handle_kept(position, *keeping),
            (Some(Pending::Kept(_)), Err(_)) => {
                self.is_at_an_end = self.room.level == Level::Full;
                self.clean_later(now);
                self.give_up_cleaning();
            }
        }
    }

    /// Repeats unsynced settled records, which may be lost even if a later sync succeeds.
    pub(super) fn doubt_written(&mut self) {
        for Written { settled, numbers, .. } in std::mem::take(&mut self.written) {
            self.settled.extend(settled);
            self.unreleased.extend(numbers);
        }
    }

    /// Remembers the ids of messages stored once, which a segment records.
    pub(super) fn remember_ids(&mut self, segment: u64, ids: Vec<(MessageId, u64)>) {
        if ids.is_empty() {
            return;
        }
        let before = self.segments.get(segment).map_or(0, |it| it.size);
        let since = self.segments.written.saturating_sub(before) as i64;
        self.once.remember(segment, Group { since, ids });
    }

    pub(super) fn handle_stored(&mut self, now: Now, number: u64, position: Position) {
        self.actions.push_back(OutboxAction::Stored(number, Ok(())));
        let Some(entry) = self.entries.get_mut(number) else {
            return self.segments.store(position.segment, number);
        };
        entry.position = Some(position);
        self.segments.enter(position.segment, number, entry.size);
        for part in 0..entry.parts.len() as u32 {
            let key = DeliveryKey { number, part };
            if self.is_unwanted(key) {
                self.settle(key);
                continue;
            }
            self.activate(now, key);
        }
    }

    /// Advances a stored message through its states as far as possible.
    pub(super) fn activate(&mut self, now: Now, key: DeliveryKey) {
        let Some(entry) = self.entries.get(key.number) else { return };
        let rare = entry.rare.as_deref();
        let (expires_at, not_before) =
            rare.map_or((None, None), |rare| (rare.expires_at, rare.not_before));
        self.wall.extend(expires_at.map(|at| (at, key)));
        match not_before.filter(|at| *at > now.unix_ms) {
            Some(at) => {
                self.wall.insert((at, key));
                self.set_state(key, State::Scheduled);
            }
            None if self.is_behind(key) => self.set_state(key, State::Blocked),
            None => self.release(key),
        }
    }
}
