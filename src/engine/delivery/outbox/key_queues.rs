//! Ordering: messages with the same key are sent one after the other.

use std::sync::Arc;

use super::{DeliveryKey, Outbox, State};

impl Outbox {
    pub(super) fn key_queue(&self, key: DeliveryKey) -> Option<(u32, Arc<str>)> {
        // Most messages have no key.
        let order = self.order(key.number)?;
        Some((self.part(key)?.target, order.clone()))
    }

    /// Returns true if another message with its key precedes it.
    pub(super) fn is_behind(&self, key: DeliveryKey) -> bool {
        let first =
            self.key_queue(key).and_then(|key_queue| self.key_queues.get(&key_queue)?.front());
        first.is_some_and(|first| *first != key)
    }

    /// Inserts a message into its key's queue, in the order of the numbers.
    pub(super) fn enter_key_queue(&mut self, key: DeliveryKey) {
        let Some(key_queue) = self.key_queue(key) else { return };
        let key_queue = self.key_queues.entry(key_queue).or_default();
        if let Err(place) = key_queue.binary_search(&key) {
            key_queue.insert(place, key);
        }
    }

    /// Removes a message from its key's queue; releases the next one.
    pub(super) fn leave_key_queue(&mut self, key: DeliveryKey) {
        let Some(key_queue) = self.key_queue(key) else { return };
        let Some(queue) = self.key_queues.get_mut(&key_queue) else { return };
        let was_first = queue.front() == Some(&key);
        if let Ok(place) = queue.binary_search(&key) {
            queue.remove(place);
        }
        let next = queue.front().copied();
        if next.is_none() {
            self.key_queues.remove(&key_queue);
        }
        if was_first
            && let Some(next) = next
            && self.part(next).is_some_and(|part| part.state == State::Blocked)
        {
            self.release(next);
        }
    }
}
