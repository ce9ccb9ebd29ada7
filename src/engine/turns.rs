//! Queues that are served in turn, one for each owner, so that who queues much delays no other by
//! more than one item.

use std::collections::BTreeMap;
use std::hash::Hash;

use super::HashMap;

/// Items by number, in the turns of their owners. An item is removed without a search, and so are
/// all items of an owner.
#[derive(Debug)]
pub(crate) struct Turns<O, T> {
    /// The queues that are not empty.
    queues: HashMap<O, Queue<T>>,
    /// Their owners, in the order in which they are served.
    owners: BTreeMap<u64, O>,
    last_turn: u64,
}

#[derive(Debug)]
struct Queue<T> {
    items: BTreeMap<u64, T>,
    /// The number of its owner's turn.
    turn: u64,
}

impl<O: Copy + Eq + Hash, T> Turns<O, T> {
    pub(crate) fn new() -> Self {
        Self { queues: HashMap::default(), owners: BTreeMap::new(), last_turn: 0 }
    }

    /// Adds an item to its owner's queue. The numbers are the order within a queue.
    pub(crate) fn push(&mut self, owner: O, number: u64, item: T) {
        let Self { queues, owners, last_turn } = self;
        let queue = queues.entry(owner).or_insert_with(|| {
            *last_turn += 1;
            owners.insert(*last_turn, owner);
            Queue { items: BTreeMap::new(), turn: *last_turn }
        });
        queue.items.insert(number, item);
    }

    /// Removes and returns the first item of the owner whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<(O, T)> {
        let (_, owner) = self.owners.pop_first()?;
        let queue = self.queues.get_mut(&owner)?;
        let (_, item) = queue.items.pop_first()?;
        if queue.items.is_empty() {
            self.queues.remove(&owner);
        } else {
            self.last_turn += 1;
            queue.turn = self.last_turn;
            self.owners.insert(self.last_turn, owner);
        }
        Some((owner, item))
    }

    /// Removes an item, if it is there.
    pub(crate) fn remove(&mut self, owner: O, number: u64) {
        let Some(queue) = self.queues.get_mut(&owner) else { return };
        queue.items.remove(&number);
        if queue.items.is_empty() {
            self.remove_all(owner);
        }
    }

    /// Removes all items of an owner.
    pub(crate) fn remove_all(&mut self, owner: O) {
        if let Some(queue) = self.queues.remove(&owner) {
            self.owners.remove(&queue.turn);
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.owners.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(turns: &mut Turns<char, u64>, owner: char, numbers: std::ops::Range<u64>) {
        numbers.for_each(|number| turns.push(owner, number, number));
    }

    fn all(turns: &mut Turns<char, u64>) -> Vec<u64> {
        std::iter::from_fn(|| turns.pop()).map(|(_, item)| item).collect()
    }

    #[test]
    fn owners_are_served_in_turn_and_each_in_its_own_order() {
        let mut turns = Turns::new();
        push(&mut turns, 'a', 0..4);
        push(&mut turns, 'b', 10..12);
        assert_eq!(turns.pop(), Some(('a', 0)));
        push(&mut turns, 'c', 20..21);
        assert_eq!(all(&mut turns), [10, 1, 20, 11, 2, 3]);
        push(&mut turns, 'b', 12..13);
        assert_eq!(all(&mut turns), [12]);
        assert!(turns.is_empty());
    }

    #[test]
    fn an_owner_whose_items_are_removed_has_no_turn() {
        let mut turns = Turns::new();
        push(&mut turns, 'a', 1..2);
        push(&mut turns, 'b', 2..4);
        push(&mut turns, 'c', 5..9);
        turns.remove('a', 1);
        turns.remove('b', 2);
        turns.remove_all('c');
        turns.remove('c', 5);
        push(&mut turns, 'a', 4..5);
        assert_eq!(all(&mut turns), [3, 4]);
        assert!(turns.is_empty());
    }
}
