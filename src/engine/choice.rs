//! Competing consumers: the choice among the instances of a service.
//!
//! Without an ordering key the least loaded instance takes a message. With a key the choice is by
//! rendezvous hashing (Thaler and Ravishankar, *Using Name-Based Mappings to Increase Hit Rates*,
//! 1998): each instance has a score for each key, and the highest takes the message. All senders
//! make the same choice without coordination, and when an instance comes or goes, only its own keys
//! move.

use std::collections::HashMap;

use crate::address::ServiceName;
use crate::identity::NodeId;

/// An instance of a service that could take a message.
pub(crate) trait Candidate {
    fn node(&self) -> NodeId;
    /// The number of this sender's unfinished calls to it, and its concurrency.
    fn load(&self) -> (u64, u32);
}

/// Chooses the instance that takes a message: for calls, guaranteed messages and the simulator.
/// Equally loaded instances take turns, by `turn`.
pub(crate) fn choose<'a, C: Candidate>(
    candidates: &'a [C],
    key: Option<&str>,
    turn: usize,
) -> Option<&'a C> {
    match (candidates, key) {
        ([only], _) => Some(only),
        (all, Some(key)) => preferred(all, key),
        (all, None) => least_loaded(all, turn, C::load),
    }
}

/// Returns the candidate that takes the messages of a key.
fn preferred<'a, C: Candidate>(candidates: &'a [C], key: &str) -> Option<&'a C> {
    let key = fnv_1a(FNV_START, key.as_bytes());
    candidates.iter().max_by_key(|candidate| {
        let id = candidate.node();
        let (first, _) = id.as_bytes().split_first_chunk().expect("ids have 32 bytes");
        (mix(key ^ u64::from_be_bytes(*first)), id)
    })
}

/// Returns the least loaded candidate: the one with the fewest unfinished calls in proportion to
/// its announced concurrency. Ties go round with `turn`.
fn least_loaded<T>(candidates: &[T], turn: usize, load: impl Fn(&T) -> (u64, u32)) -> Option<&T> {
    let len = candidates.len();
    (0..len)
        .map(|offset| &candidates[(turn + offset) % len])
        // a/b < c/d if a·d < c·b; `min_by` keeps the first of equals, which is `turn`'s.
        .min_by(|a, b| {
            let ((a, a_of), (b, b_of)) = (load(a), load(b));
            (a * u64::from(b_of)).cmp(&(b * u64::from(a_of)))
        })
}

/// The number of keys in one generation of [`Affinity`].
const GENERATION: usize = 16 * 1024;

/// The instances that took the messages of recent keys, to detect moves.
#[derive(Debug, Default)]
pub(crate) struct Affinity {
    recent: HashMap<u64, NodeId>,
    /// The previous generation, dropped when `recent` is full.
    older: HashMap<u64, NodeId>,
}

impl Affinity {
    /// Records the instance that takes a key's message. Returns the previous instance, if it was
    /// another one. Keys that are unused for long are forgotten.
    pub(crate) fn note(&mut self, service: &ServiceName, key: &str, now: NodeId) -> Option<NodeId> {
        let service = fnv_1a(FNV_START, service.as_str().as_bytes());
        let number = mix(fnv_1a(mix(service), key.as_bytes()));
        let before = match self.recent.get_mut(&number) {
            Some(known) => Some(std::mem::replace(known, now)),
            None => {
                if self.recent.len() >= GENERATION {
                    self.older = std::mem::take(&mut self.recent);
                }
                self.recent.insert(number, now);
                self.older.remove(&number)
            }
        };
        before.filter(|before| *before != now)
    }
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// The FNV-1a hash (Fowler, Noll and Vo), the same in all versions of a node.
fn fnv_1a(start: u64, bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(start, step)
}

/// The last step of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Candidate for NodeId {
        fn node(&self) -> NodeId {
            *self
        }

        fn load(&self) -> (u64, u32) {
            (0, 1)
        }
    }

    fn instances(count: u8) -> Vec<NodeId> {
        (0..count).map(|n| NodeId::from_bytes([n.wrapping_mul(37); 32])).collect()
    }

    fn taker(instances: &[NodeId], key: usize) -> NodeId {
        *choose(instances, Some(&format!("customer-{key}")), 0).unwrap()
    }

    #[test]
    fn keys_are_shared_out_evenly() {
        let instances = instances(8);
        let mut taken = HashMap::<NodeId, usize>::new();
        (0..8000).for_each(|key| *taken.entry(taker(&instances, key)).or_default() += 1);
        assert_eq!(taken.len(), 8);
        assert!(taken.values().all(|count| (850..1150).contains(count)), "{taken:?}");
    }

    #[test]
    fn only_the_keys_of_the_one_that_comes_or_goes_move() {
        let all = instances(8);
        let (gone, fewer) = all.split_first().unwrap();
        for key in 0..1000 {
            let (with, without) = (taker(&all, key), taker(fewer, key));
            assert!(with == without || with == *gone, "key {key} moved for nothing");
        }
    }

    #[test]
    fn a_move_is_told_once_and_old_keys_are_forgotten() {
        let (a, b) = (NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32]));
        let (stock, other) = ("stock".parse().unwrap(), "other".parse().unwrap());
        let mut affinity = Affinity::default();
        assert_eq!(affinity.note(&stock, "k", a), None);
        assert_eq!(affinity.note(&other, "k", b), None, "another service's key");
        assert_eq!(affinity.note(&stock, "k", b), Some(a));
        assert_eq!(affinity.note(&stock, "k", b), None);
        for n in 0..GENERATION {
            affinity.note(&stock, &format!("{n}"), a);
        }
        assert_eq!(affinity.note(&stock, "k", a), Some(b), "it is in the previous generation");
        for n in 0..3 * GENERATION {
            affinity.note(&stock, &format!("{n}"), a);
        }
        assert_eq!(affinity.note(&stock, "k", b), None, "the key is forgotten");
        assert!(affinity.recent.len() + affinity.older.len() <= 2 * GENERATION);
    }

    #[test]
    fn the_least_loaded_instance_is_chosen_and_ties_go_round() {
        let loads = [(4, 4), (1, 2), (3, 4)];
        assert_eq!(least_loaded(&loads, 0, |load| *load), Some(&(1, 2)));
        let even = [(0, 1), (0, 1), (0, 8)];
        for turn in 0..3 {
            let chosen = least_loaded(&even, turn, |load| *load).unwrap();
            assert!(std::ptr::eq(chosen, &even[turn]));
        }
        assert_eq!(least_loaded(&[] as &[(u64, u32)], 7, |load| *load), None);
    }
}
