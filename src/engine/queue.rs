//! A queue bounded in bytes.

use std::collections::VecDeque;

/// A first-in, first-out queue bounded in bytes. An empty queue takes any item, so that an item
/// larger than the bound is not refused forever.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    items: VecDeque<(T, u64)>,
    bytes: u64,
    limit: u64,
}

impl<T> Queue<T> {
    pub(crate) fn new(limit: u64) -> Self {
        Self { items: VecDeque::new(), bytes: 0, limit }
    }

    pub(crate) fn has_room_for(&self, bytes: u64) -> bool {
        self.items.is_empty() || self.bytes + bytes <= self.limit
    }

    /// Appends an item, or returns it if there is no room.
    pub(crate) fn push(&mut self, item: T, bytes: u64) -> Result<(), T> {
        if !self.has_room_for(bytes) {
            return Err(item);
        }
        self.bytes += bytes;
        self.items.push_back((item, bytes));
        Ok(())
    }

    pub(crate) fn front(&self) -> Option<&T> {
        self.items.front().map(|(item, _)| item)
    }

    pub(crate) fn pop(&mut self) -> Option<T> {
        let (item, bytes) = self.items.pop_front()?;
        self.bytes -= bytes;
        Some(item)
    }

    /// Removes the first item for which `wanted` is true, at any position.
    pub(crate) fn take(&mut self, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.items.iter().position(|(item, _)| wanted(item))?;
        let (item, bytes) = self.items.remove(at)?;
        self.bytes -= bytes;
        Some(item)
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.bytes = 0;
        std::mem::take(&mut self.items).into_iter().map(|(item, _)| item)
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_holds_no_more_than_its_limit() {
        let mut queue = Queue::new(10);
        assert_eq!(queue.push('a', 6), Ok(()));
        assert_eq!(queue.push('b', 5), Err('b'));
        assert_eq!(queue.push('c', 4), Ok(()));
        assert_eq!(queue.bytes(), 10);
        assert_eq!(queue.take(|item| *item == 'c'), Some('c'));
        assert_eq!(queue.pop(), Some('a'));
        assert_eq!(queue.push('d', 99), Ok(()), "an empty queue takes any item");
    }
}
