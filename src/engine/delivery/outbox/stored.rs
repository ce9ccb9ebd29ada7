//! What goes to the journal, and what it says of it.

use super::{Bound, DISK_RETRY, Outbox, OutboxAction, PartKey, Pending, State, Target, Written};
use crate::engine::delivery::Now;
use crate::engine::delivery::record::OutboxRecord;
use crate::journal::{Haste, NotStored, Position};

impl Outbox {
    pub(super) fn append(&mut self, record: &OutboxRecord<'_>, pending: Pending) {
        let haste = match pending {
            // If it is lost, what it tells of comes once more, and is known there.
            Pending::Settled(..) => Haste::Later,
            _ => Haste::Synced,
        };
        let urgent = !matches!(pending, Pending::Messages(..) | Pending::Moved(_) | Pending::Peers);
        let token = self.next_token;
        self.next_token += 1;
        self.pending.insert(token, pending);
        let (entry, messages) = (record.encode(), record.messages());
        self.actions.push_back(OutboxAction::Append { token, entry, messages, haste, urgent });
    }

    /// Stores, without a sync, what was settled since the last time.
    pub(super) fn store_settled(&mut self) {
        if self.settled.is_empty() || self.disk_retry.is_some() {
            return;
        }
        let settled = std::mem::take(&mut self.settled);
        let numbers = std::mem::take(&mut self.unreleased);
        let record = OutboxRecord::Settled(settled.clone());
        self.append(&record, Pending::Settled(settled, numbers));
    }

    pub(super) fn note(&mut self, record: &OutboxRecord<'_>) {
        self.actions.push_back(OutboxAction::Note(record.encode()));
    }

    /// An entry was stored, or can't be.
    pub(crate) fn handle_appended(
        &mut self,
        now: Now,
        token: u64,
        result: Result<Position, NotStored>,
    ) {
        self.now = now.time;
        if let Ok(position) = &result {
            self.newest_segment = self.newest_segment.max(position.segment);
            self.once.reach(*position);
        }
        let synced = result.is_ok()
            && self.pending.get(token).is_some_and(|it| !matches!(it, Pending::Settled(..)));
        while synced
            && self.written.front().is_some_and(|before| before.token < token)
            && let Some(Written { numbers, .. }) = self.written.pop_front()
        {
            for Bound { stream, seq } in numbers {
                self.streams[stream as usize].outstanding.remove(seq);
            }
        }
        if result.is_err() {
            // What was written before may be gone as well, whatever a later sync says.
            for Written { settled, numbers, .. } in std::mem::take(&mut self.written) {
                self.settled.extend(settled);
                self.unreleased.extend(numbers);
            }
        }
        match (self.pending.remove(token), result) {
            (None, _) => {}
            (Some(Pending::Messages(numbers, ids)), Ok(position)) => {
                ids.into_iter().for_each(|(id, number)| self.once.remember(id, number, position));
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
            (Some(Pending::Bound(keys)), Ok(_)) => {
                for key in keys {
                    if self.part(key).is_some_and(|part| part.state == State::Binding) {
                        self.make_ready(key);
                    }
                }
            }
            (Some(Pending::Bound(keys)), Err(_)) => {
                for key in keys {
                    let Some(part) = self.part(key) else { continue };
                    if part.state == State::Binding {
                        match part.redelivered {
                            true => self.leave(key),
                            false => self.unbind(key),
                        }
                        self.pause(now, key, 0, true);
                    }
                }
            }
            (Some(Pending::Dead(key, fate)), Ok(_)) => self.bury(key, *fate),
            (Some(Pending::Dead(key, fate)), Err(_)) => {
                self.dying.insert(key, *fate);
                self.timers.insert((now.time + DISK_RETRY, key));
            }
            (Some(Pending::Settled(settled, numbers)), Ok(_)) => {
                self.written.push_back(Written { token, settled, numbers });
            }
            (Some(Pending::Settled(settled, numbers)), Err(_)) => {
                // With what is settled next.
                self.settled.extend(settled);
                self.unreleased.extend(numbers);
                self.disk_retry = Some(now.time + DISK_RETRY);
            }
            (Some(Pending::Moved(number)), result) => {
                if result.is_err() {
                    self.disk_retry = Some(now.time + DISK_RETRY);
                }
                self.handle_moved(number, result.ok());
            }
            (Some(Pending::Peers), result) => {
                (self.peers_pending, self.peers_retry) = (false, Some(now.time + DISK_RETRY));
                self.peers_dirty |= result.is_err();
                if self.peers_dirty {
                    self.store_peers(false);
                }
            }
            (Some(Pending::Removal(before)), Ok(_)) => {
                self.removing = false;
                self.removed_before = before;
                self.once.forget_before(before);
                self.actions.push_back(OutboxAction::RemoveBefore(before));
            }
            (Some(Pending::Removal(_)), Err(_)) => {
                self.removing = false;
                self.disk_retry = Some(now.time + DISK_RETRY);
            }
        }
    }

    pub(super) fn handle_stored(&mut self, now: Now, number: u64, position: Position) {
        self.actions.push_back(OutboxAction::Stored(number, Ok(())));
        let Some(entry) = self.entries.get_mut(number) else { return };
        *self.live.entry(position.segment).or_default() += 1;
        entry.position = Some(position);
        for part in 0..entry.parts.len() as u32 {
            let key = PartKey { number, part };
            if self.is_unwanted(key) {
                self.settle(key);
                continue;
            }
            self.activate(now, key);
        }
    }

    /// Sets a stored message on its way, as far as it may go.
    pub(super) fn activate(&mut self, now: Now, key: PartKey) {
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

    /// Whether it is for a durable subscription that was given up meanwhile.
    pub(super) fn is_unwanted(&self, key: PartKey) -> bool {
        match self.part(key).map(|part| &self.targets[part.target as usize]) {
            Some(Target::Subscription(node, name)) => {
                !self.subscriptions.contains_key(&(*node, name.clone()))
            }
            _ => false,
        }
    }
}
