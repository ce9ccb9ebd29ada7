//! A map from growing numbers, dense in memory.

use std::collections::BTreeMap;

const CHUNK: u64 = 64;

/// A map whose keys are numbers that grow: neighbours share memory, and a million entries take
/// little more than their values do. What is left of an old chunk keeps all of it.
#[derive(Debug)]
pub(crate) struct Numbered<T> {
    chunks: BTreeMap<u64, Chunk<T>>,
    len: usize,
    /// The chunk that was emptied last, to be used again.
    spare: Option<Chunk<T>>,
}

#[derive(Debug)]
struct Chunk<T> {
    taken: usize,
    slots: Box<[Option<T>]>,
}

impl<T> Default for Chunk<T> {
    fn default() -> Self {
        Self { taken: 0, slots: std::iter::repeat_with(|| None).take(CHUNK as usize).collect() }
    }
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { chunks: BTreeMap::new(), len: 0, spare: None }
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
        self.chunks.get(&(number / CHUNK))?.slots[(number % CHUNK) as usize].as_ref()
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        self.chunks.get_mut(&(number / CHUNK))?.slots[(number % CHUNK) as usize].as_mut()
    }

    pub(crate) fn insert(&mut self, number: u64, value: T) -> Option<T> {
        self.fill(number, |slot| slot.replace(value))
    }

    pub(crate) fn get_or_insert_default(&mut self, number: u64) -> &mut T
    where
        T: Default,
    {
        self.fill(number, |slot| slot.get_or_insert_default())
    }

    fn fill<'a, R>(&'a mut self, number: u64, fill: impl FnOnce(&'a mut Option<T>) -> R) -> R {
        let Self { chunks, spare, len } = self;
        let chunk = chunks.entry(number / CHUNK);
        let chunk = chunk.or_insert_with(|| spare.take().unwrap_or_default());
        let slot = &mut chunk.slots[(number % CHUNK) as usize];
        let new = usize::from(slot.is_none());
        chunk.taken += new;
        *len += new;
        fill(slot)
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<T> {
        let chunk = self.chunks.get_mut(&(number / CHUNK))?;
        let value = chunk.slots[(number % CHUNK) as usize].take()?;
        self.len -= 1;
        chunk.taken -= 1;
        if chunk.taken == 0 {
            self.spare = self.chunks.remove(&(number / CHUNK));
        }
        Some(value)
    }

    /// The lowest number.
    pub(crate) fn first(&self) -> Option<u64> {
        self.iter().next().map(|(number, _)| number)
    }

    /// All, by number.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.chunks.iter().flat_map(|(chunk, Chunk { slots, .. })| {
            let slots = slots.iter().enumerate();
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
        for number in [3, 200, 63, 64] {
            assert!(map.remove(number).is_some());
        }
        assert!(map.is_empty() && map.chunks.is_empty() && map.remove(3).is_none());
    }
}
