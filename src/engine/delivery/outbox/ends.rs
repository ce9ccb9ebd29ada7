//! Ends of messages: processed, dead letter, or discarded without a trace.

use super::{DeliveryKey, OutboundDelivery, Outbox, OutboxAction, OutboxEvent, Pending, State};
use crate::engine::delivery::record::OutboxRecord;
use crate::engine::delivery::{DeadLetterReason, Target};

impl Outbox {
    /// Marks a destination as having processed its message.
    pub(super) fn settle(&mut self, key: DeliveryKey) {
        self.end_part(key, State::Settled);
        self.settled.push((key.number, key.part));
    }

    /// Stores the dead letter record; the message is a dead letter once that is durable.
    pub(super) fn dead_letter(&mut self, key: DeliveryKey, reason: DeadLetterReason) {
        self.stop(key);
        self.set_state(key, State::DeadLettering(Box::new(reason.clone())));
        self.store_dead_letter(key, reason);
    }

    pub(super) fn store_dead_letter(&mut self, key: DeliveryKey, reason: DeadLetterReason) {
        let record = OutboxRecord::Dead(key.number, key.part, Some(reason));
        self.append(&record, Pending::Dead(key));
    }

    pub(super) fn finish_dead_letter(&mut self, key: DeliveryKey) {
        let Some(State::DeadLettering(reason)) = self.part(key).map(|part| &part.state) else {
            return;
        };
        let reason = DeadLetterReason::clone(reason);
        let event = OutboxEvent::DeadLetter { number: key.number, reason: reason.clone() };
        self.actions.push_back(OutboxAction::Report(event));
        self.end_part(key, State::Dead(Box::new(reason)));
    }

    pub(super) fn end_part(&mut self, key: DeliveryKey, state: State) {
        self.stop(key);
        for bound in self.take_numbers(key) {
            match state {
                // The receiver must remember the number until the message can't be sent again.
                State::Settled => self.unreleased.push(bound),
                _ => self.release_number(bound),
            }
        }
        if !(self.config.hold_keys && matches!(state, State::Dead(_))) {
            self.leave_key_queue(key);
        }
        if let Some(rare) = self.entries.get(key.number).and_then(|entry| entry.rare.as_ref()) {
            for at in [rare.expires_at, rare.not_before].into_iter().flatten() {
                self.wall.remove(&(at, key));
            }
        }
        if state == State::Settled {
            self.no_longer_keep(key);
        }
        self.open -= 1;
        self.dead += u64::from(matches!(state, State::Dead(_)));
        self.set_state(key, state);
        let Some(entry) = self.entries.get(key.number) else { return };
        let ended = |part: &OutboundDelivery| matches!(part.state, State::Settled | State::Dead(_));
        if !entry.parts.iter().all(ended) {
            return;
        }
        let dead = entry.parts.iter().find_map(|part| match &part.state {
            State::Dead(reason) => Some(DeadLetterReason::clone(reason)),
            _ => None,
        });
        match dead {
            Some(reason) => {
                self.actions.push_back(OutboxAction::Done(key.number, Err(reason)));
                self.uncache(key.number);
            }
            None => {
                self.actions.push_back(OutboxAction::Done(key.number, Ok(())));
                self.forget(key.number);
            }
        }
    }

    /// Removes a message from those kept for its durable subscription.
    fn no_longer_keep(&mut self, key: DeliveryKey) {
        if let Some(part) = self.part(key)
            && matches!(self.targets[part.target as usize], Target::Subscription(..))
        {
            let target = part.target;
            if let Some(kept) = self.kept_for.get_mut(&target) {
                kept.remove(key.number);
            }
        }
    }

    pub(super) fn uncache(&mut self, number: u64) {
        if let Some(entry) = self.entries.get_mut(number)
            && entry.position.is_some()
            && entry.cached.take().is_some()
        {
            self.cached_bytes -= u64::from(entry.size);
        }
    }

    /// Removes a message without a trace.
    pub(super) fn discard(&mut self, number: u64) {
        let parts = self.entries.get(number).map_or(0, |entry| entry.parts.len() as u32);
        for part in 0..parts {
            let key = DeliveryKey { number, part };
            self.take_numbers(key).for_each(|bound| self.release_number(bound));
            self.leave_key_queue(key);
            self.no_longer_keep(key);
            match self.part(key).map(|part| &part.state) {
                Some(State::Settled) | None => {}
                Some(State::Dead(_)) => self.dead -= 1,
                Some(_) => self.open -= 1,
            }
        }
        self.forget(number);
    }

    pub(super) fn forget(&mut self, number: u64) {
        let Some(entry) = self.entries.remove(number) else { return };
        self.unreadable.remove(&number);
        self.bytes -= u64::from(entry.size);
        if entry.cached.is_some() {
            self.cached_bytes -= u64::from(entry.size);
        }
        if let Some(position) = entry.position {
            self.leave_segment(position, entry.size);
        }
    }
}
