//! Queues that are served in turn, one for each owner, so that who queues much delays no other by
//! more than one item.

use std::collections::VecDeque;
use std::hash::Hash;

use super::HashMap;

#[derive(Debug)]
pub(crate) struct Turns<O, T> {
    /// The queues that are not empty.
    queues: HashMap<O, VecDeque<T>>,
    /// Their owners, in the order in which they are served.
    owners: VecDeque<O>,
}

impl<O: Copy + Eq + Hash, T> Turns<O, T> {
    pub(crate) fn new() -> Self {
        Self { queues: HashMap::default(), owners: VecDeque::new() }
    }

    pub(crate) fn push(&mut self, owner: O, item: T) {
        let queue = self.queues.entry(owner).or_default();
        if queue.is_empty() {
            self.owners.push_back(owner);
        }
        queue.push_back(item);
    }

    /// Removes and returns the first item of the owner whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let owner = self.owners.pop_front()?;
        let queue = self.queues.get_mut(&owner)?;
        let item = queue.pop_front();
        match queue.is_empty() {
            true => _ = self.queues.remove(&owner),
            false => self.owners.push_back(owner),
        }
        item
    }

    /// Removes the items for which `wanted` is false.
    pub(crate) fn retain(&mut self, wanted: impl Fn(&T) -> bool) {
        self.queues.retain(|_, queue| {
            queue.retain(&wanted);
            !queue.is_empty()
        });
        self.owners.retain(|owner| self.queues.contains_key(owner));
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.queues.values().map(VecDeque::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(turns: &mut Turns<char, u32>) -> Vec<u32> {
        std::iter::from_fn(|| turns.pop()).collect()
    }

    #[test]
    fn owners_are_served_in_turn_and_each_in_its_own_order() {
        let mut turns = Turns::new();
        (0..4).for_each(|item| turns.push('a', item));
        (10..12).for_each(|item| turns.push('b', item));
        assert_eq!(turns.pop(), Some(0));
        turns.push('c', 20);
        assert_eq!(all(&mut turns), [10, 1, 20, 11, 2, 3]);
        turns.push('b', 12);
        assert_eq!(all(&mut turns), [12]);
        assert!(turns.queues.is_empty() && turns.owners.is_empty());
    }

    #[test]
    fn an_owner_whose_items_are_removed_has_no_turn() {
        let mut turns = Turns::new();
        turns.push('a', 1);
        turns.push('b', 2);
        turns.push('b', 3);
        turns.retain(|item| *item > 2);
        turns.push('a', 4);
        assert_eq!((turns.len(), turns.owners.len()), (2, 2));
        assert_eq!(all(&mut turns), [3, 4]);
    }
}
