//! A set of mostly consecutive numbers.

use std::collections::BTreeMap;

/// A set of numbers, stored as ranges: a single watermark if there are no gaps.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// The ranges: the last number of each, by its first.
    ranges: BTreeMap<u64, u64>,
}

impl Ranges {
    pub(crate) fn contains(&self, number: u64) -> bool {
        // Most numbers are beyond the last range.
        self.ranges.last_key_value().is_some_and(|(_, last)| number <= *last)
            && self.ranges.range(..=number).next_back().is_some_and(|(_, last)| number <= *last)
    }

    /// Returns true if adding the number would create no new range.
    pub(crate) fn touches(&self, number: u64) -> bool {
        self.contains(number.saturating_sub(1)) || self.contains(number.saturating_add(1))
    }

    /// Adds a number; returns true if it is new.
    pub(crate) fn insert(&mut self, number: u64) -> bool {
        // The common case: the last range grows.
        if let Some(mut last) = self.ranges.last_entry()
            && last.get().checked_add(1) == Some(number)
        {
            last.insert(number);
            return true;
        }
        if self.contains(number) {
            return false;
        }
        self.insert_range(number, number);
        true
    }

    /// Adds the numbers from `first` to `last`.
    pub(crate) fn insert_range(&mut self, mut first: u64, mut last: u64) {
        // Overlapping and adjacent ranges are merged.
        while let Some((start, end)) = self.ranges.range(..=last.saturating_add(1)).next_back()
            && end.saturating_add(1) >= first
        {
            (first, last) = (first.min(*start), last.max(*end));
            let start = *start;
            self.ranges.remove(&start);
        }
        self.ranges.insert(first, last);
    }

    /// Removes the numbers below `floor`.
    pub(crate) fn remove_below(&mut self, floor: u64) {
        while let Some(entry) = self.ranges.first_entry()
            && *entry.key() < floor
        {
            let last = entry.remove();
            if last >= floor {
                self.ranges.insert(floor, last);
            }
        }
    }

    /// Returns the intersection of two sets, as ranges in ascending order.
    pub(crate) fn overlaps(&self, other: &Self) -> impl Iterator<Item = (u64, u64)> {
        let (mut ours, mut theirs) = (self.ranges.iter(), other.ranges.iter());
        // The common case: the sets are disjoint.
        let apart = |low: &Self, high: &Self| match (
            low.ranges.last_key_value(),
            high.ranges.first_key_value(),
        ) {
            (Some((_, last)), Some((first, _))) => last < first,
            _ => true,
        };
        let (mut our, mut their) = match apart(self, other) || apart(other, self) {
            true => (None, None),
            false => (ours.next(), theirs.next()),
        };
        std::iter::from_fn(move || {
            while let (Some((first, last)), Some((other_first, other_last))) = (our, their) {
                let both = (*first.max(other_first), *last.min(other_last));
                match last < other_last {
                    true => our = ours.next(),
                    false => their = theirs.next(),
                }
                if both.0 <= both.1 {
                    return Some(both);
                }
            }
            None
        })
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (u64, u64)> {
        self.ranges.iter().map(|(first, last)| (*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn what_has_no_holes_is_one_range() {
        let mut ranges = Ranges::default();
        for number in [3, 1, 5, 2, 4] {
            assert!(ranges.insert(number));
        }
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(1, 5)]);
        assert!(!ranges.insert(3));
        ranges.remove_below(4);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(4, 5)]);
    }

    #[test]
    fn a_range_swallows_what_it_overlaps() {
        let mut ranges = Ranges::default();
        for (first, last) in [(1, 3), (10, 12), (5, 5), (20, 30), (4, 11)] {
            ranges.insert_range(first, last);
        }
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(1, 12), (20, 30)]);
    }

    proptest! {
        #[test]
        fn what_two_have_in_common_is_in_both(
            one in proptest::collection::btree_set(0u64..60, 0..40),
            other in proptest::collection::btree_set(0u64..60, 0..40),
        ) {
            let ranges = |set: &BTreeSet<u64>| {
                let mut ranges = Ranges::default();
                set.iter().for_each(|number| _ = ranges.insert(*number));
                ranges
            };
            let (a, b) = (ranges(&one), ranges(&other));
            let both: Vec<u64> = a.overlaps(&b).flat_map(|(first, last)| first..=last).collect();
            prop_assert_eq!(both, one.intersection(&other).copied().collect::<Vec<_>>());
        }

        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((0u64..40, any::<bool>()), 0..200)) {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for (number, insert) in steps {
                if insert {
                    prop_assert_eq!(ranges.insert(number), set.insert(number));
                } else {
                    ranges.remove_below(number / 2);
                    set = set.split_off(&(number / 2));
                }
            }
            for number in 0..41 {
                prop_assert_eq!(ranges.contains(number), set.contains(&number));
            }
            let spans: Vec<_> = ranges.iter().collect();
            prop_assert!(spans.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
        }
    }
}
