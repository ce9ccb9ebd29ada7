//! Order: messages with one key go one after the other.

use std::sync::Arc;

use super::{Outbox, PartKey, State};

impl Outbox {
    pub(super) fn lane(&self, key: PartKey) -> Option<(u32, Arc<str>)> {
        // Most have no key.
        let order = self.order(key.number)?;
        Some((self.part(key)?.target, order.clone()))
    }

    /// Whether another with its key is before it.
    pub(super) fn is_behind(&self, key: PartKey) -> bool {
        let first = self.lane(key).and_then(|lane| self.lanes.get(&lane)?.front());
        first.is_some_and(|first| *first != key)
    }

    /// Takes its place among those with its key, which is that of its number.
    pub(super) fn enter_lane(&mut self, key: PartKey) {
        let Some(lane) = self.lane(key) else { return };
        let lane = self.lanes.entry(lane).or_default();
        if let Err(place) = lane.binary_search(&key) {
            lane.insert(place, key);
        }
    }

    /// Leaves its lane; the next there goes on.
    pub(super) fn leave_lane(&mut self, key: PartKey) {
        let Some(lane) = self.lane(key) else { return };
        let Some(queue) = self.lanes.get_mut(&lane) else { return };
        let was_first = queue.front() == Some(&key);
        if let Ok(place) = queue.binary_search(&key) {
            queue.remove(place);
        }
        let next = queue.front().copied();
        if next.is_none() {
            self.lanes.remove(&lane);
        }
        if was_first
            && let Some(next) = next
            && self.part(next).is_some_and(|part| part.state == State::Blocked)
        {
            self.release(next);
        }
    }
}
