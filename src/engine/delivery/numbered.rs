//! A map with ascending numeric keys, stored densely.

use std::cell::Cell;
use std::collections::BTreeMap;

const CHUNK: u64 = 64;
/// The most emptied chunks kept for reuse, so that entries by the thousand need no new memory.
const MOST_SPARE: usize = 64;

/// A map whose keys are ascending numbers. Neighbours share a chunk, so that a million entries take
/// little more memory than their values. A chunk keeps all of its memory until it is empty.
#[derive(Debug)]
pub(crate) struct Numbered<T> {
    /// The places of the chunks, by chunk number.
    places: BTreeMap<u64, usize>,
    chunks: Vec<Chunk<T>>,
    /// The places without a chunk.
    free: Vec<usize>,
    /// The memory of emptied chunks, for reuse.
    spare: Vec<Slots<T>>,
    /// The number and place of the chunk used last, which is most often the next one used.
    last: Cell<Option<(u64, usize)>>,
    /// A lower bound of the keys.
    floor: Cell<u64>,
    len: usize,
}

type Slots<T> = Box<[Option<T>]>;

#[derive(Debug)]
struct Chunk<T> {
    taken: usize,
    slots: Slots<T>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self {
            places: BTreeMap::new(),
            chunks: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            last: Cell::new(None),
            floor: Cell::new(0),
            len: 0,
        }
    }
}

impl<T> Numbered<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn get(&self, number: u64) -> Option<&T> {
        self.chunks[self.place(number)?].slots[(number % CHUNK) as usize].as_ref()
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let place = self.place(number)?;
        self.chunks[place].slots[(number % CHUNK) as usize].as_mut()
    }

    pub(crate) fn insert(&mut self, number: u64, value: T) -> Option<T> {
        self.slot(number).replace(value)
    }

    pub(crate) fn get_or_insert_default(&mut self, number: u64) -> &mut T
    where
        T: Default,
    {
        self.slot(number).get_or_insert_default()
    }

    /// Returns the place of the number's chunk.
    fn place(&self, number: u64) -> Option<usize> {
        let chunk = number / CHUNK;
        match self.last.get() {
            Some((last, place)) if last == chunk => Some(place),
            _ => {
                let place = *self.places.get(&chunk)?;
                self.last.set(Some((chunk, place)));
                Some(place)
            }
        }
    }

    /// Returns the slot of a number, which the caller fills.
    fn slot(&mut self, number: u64) -> &mut Option<T> {
        let place = self.place(number).unwrap_or_else(|| self.begin_chunk(number / CHUNK));
        self.floor.set(self.floor.get().min(number));
        let chunk = &mut self.chunks[place];
        let slot = &mut chunk.slots[(number % CHUNK) as usize];
        let new = usize::from(slot.is_none());
        chunk.taken += new;
        self.len += new;
        slot
    }

    fn begin_chunk(&mut self, chunk: u64) -> usize {
        let empty = || std::iter::repeat_with(|| None).take(CHUNK as usize).collect();
        let slots = self.spare.pop().unwrap_or_else(empty);
        let place = self.free.pop().unwrap_or(self.chunks.len());
        match self.chunks.get_mut(place) {
            Some(free) => free.slots = slots,
            None => self.chunks.push(Chunk { taken: 0, slots }),
        }
        self.places.insert(chunk, place);
        place
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<T> {
        let place = self.place(number)?;
        let chunk = &mut self.chunks[place];
        let value = chunk.slots[(number % CHUNK) as usize].take()?;
        self.len -= 1;
        chunk.taken -= 1;
        if chunk.taken == 0 {
            let slots = std::mem::take(&mut chunk.slots);
            if self.spare.len() < MOST_SPARE {
                self.spare.push(slots);
            }
            self.free.push(place);
            self.places.remove(&(number / CHUNK));
            self.last.set(None);
        }
        Some(value)
    }

    /// Returns the lowest key.
    pub(crate) fn first(&self) -> Option<u64> {
        if self.get(self.floor.get()).is_none() {
            self.floor.set(self.iter().next().map_or(u64::MAX, |(number, _)| number));
        }
        Some(self.floor.get()).filter(|_| !self.is_empty())
    }

    /// Returns the entries from `first` to `last`, in ascending order.
    pub(crate) fn range(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, &T)> {
        let places = self.places.range(first / CHUNK..=last / CHUNK);
        let all = places.flat_map(|(chunk, place)| {
            let slots = self.chunks[*place].slots.iter().enumerate();
            slots.filter_map(move |(at, slot)| Some((chunk * CHUNK + at as u64, slot.as_ref()?)))
        });
        all.filter(move |(number, _)| (first..=last).contains(number))
    }

    /// Returns all entries, in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.places.iter().flat_map(|(chunk, place)| {
            let slots = self.chunks[*place].slots.iter().enumerate();
            slots.filter_map(move |(at, slot)| Some((chunk * CHUNK + at as u64, slot.as_ref()?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_map_in_order_and_forgets_what_is_empty() {
        let mut map = Numbered::default();
        for number in [200, 3, 64, 63] {
            assert_eq!(map.insert(number, number * 2), None);
        }
        assert_eq!(map.insert(3, 7), Some(6));
        assert_eq!(map.iter().map(|(number, _)| number).collect::<Vec<_>>(), [3, 63, 64, 200]);
        assert_eq!((map.len(), map.first(), map.get(3), map.get(4)), (4, Some(3), Some(&7), None));
        for (first, last, numbers) in [(4, 64, vec![63, 64]), (0, 999, vec![3, 63, 64, 200])] {
            let found: Vec<u64> = map.range(first, last).map(|(number, _)| number).collect();
            assert_eq!(found, numbers);
        }
        for number in [3, 200, 63, 64] {
            assert!(map.remove(number).is_some());
        }
        assert!(map.is_empty() && map.places.is_empty() && map.remove(3).is_none());
        assert_eq!((map.first(), map.insert(70, 1), map.insert(66, 2)), (None, None, None));
        assert_eq!((map.first(), map.remove(66), map.first()), (Some(66), Some(2), Some(70)));
        assert_eq!(map.chunks.len(), 3, "chunks are reused");
    }
}
