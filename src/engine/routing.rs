//! Who gets what: an immutable snapshot of what the peers announced.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::address::{Pattern, ServiceName, Topic};
use crate::engine::LinkId;
use crate::identity::NodeId;

/// What matched; most topics have few subscribers.
type Matches<T> = SmallVec<[T; 8]>;

/// Patterns in a tree of tokens, so that a topic is matched in the time that its own tokens
/// take, however many patterns there are.
#[derive(Debug, Clone)]
pub(crate) struct PatternTrie<T> {
    children: HashMap<Box<str>, PatternTrie<T>, RandomState>,
    /// What `*` leads to.
    any: Option<Box<PatternTrie<T>>>,
    /// Patterns that end here.
    here: Vec<T>,
    /// Patterns that end in `>` here.
    rest: Vec<T>,
}

impl<T> Default for PatternTrie<T> {
    fn default() -> Self {
        Self { children: HashMap::default(), any: None, here: Vec::new(), rest: Vec::new() }
    }
}

impl<T: Clone + Ord> PatternTrie<T> {
    pub(crate) fn insert(&mut self, pattern: &Pattern, value: T) {
        let mut node = self;
        for token in pattern.as_str().split('.') {
            node = match token {
                ">" => return node.rest.push(value),
                "*" => node.any.get_or_insert_default(),
                token => node.children.entry(token.into()).or_default(),
            };
        }
        node.here.push(value);
    }

    /// The values of all patterns that match, each value once.
    pub(crate) fn matches(&self, topic: &Topic) -> Matches<T> {
        let mut found = SmallVec::new();
        self.collect(topic.as_str(), &mut found);
        if found.len() > 1 {
            found.sort_unstable();
            found.dedup();
        }
        found
    }

    fn collect(&self, rest: &str, found: &mut Matches<T>) {
        found.extend(self.rest.iter().cloned());
        let (token, rest) = match rest.split_once('.') {
            Some((token, rest)) => (token, Some(rest)),
            None => (rest, None),
        };
        let exact = if self.children.is_empty() { None } else { self.children.get(token) };
        for next in exact.into_iter().chain(self.any.as_deref()) {
            match rest {
                Some(rest) => next.collect(rest, found),
                None => found.extend(next.here.iter().cloned()),
            }
        }
    }
}

/// A node that serves a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance<L = LinkId> {
    pub(crate) link: L,
    pub(crate) peer: NodeId,
    pub(crate) concurrency: u32,
}

/// What the peers want and serve. `L` is how the owner of the snapshot reaches a link.
#[derive(Debug)]
pub(crate) struct Routing<L = LinkId> {
    /// Values are places in `links`.
    topics: PatternTrie<u32>,
    services: HashMap<ServiceName, Vec<Instance<L>>>,
    links: Vec<(NodeId, L)>,
    nodes: HashMap<NodeId, u32>,
}

impl<L> Default for Routing<L> {
    fn default() -> Self {
        Self {
            topics: PatternTrie::default(),
            services: HashMap::new(),
            links: Vec::new(),
            nodes: HashMap::new(),
        }
    }
}

impl<L: Clone> Routing<L> {
    pub(crate) fn add_peer<'a>(
        &mut self,
        peer: NodeId,
        link: L,
        patterns: impl Iterator<Item = &'a Pattern>,
        services: impl Iterator<Item = (&'a ServiceName, u32)>,
    ) {
        let place = u32::try_from(self.links.len()).expect("peers are fewer than 2^32");
        self.links.push((peer, link.clone()));
        self.nodes.insert(peer, place);
        for pattern in patterns {
            self.topics.insert(pattern, place);
        }
        for (name, concurrency) in services {
            let instance = Instance { link: link.clone(), peer, concurrency };
            self.services.entry(name.clone()).or_default().push(instance);
        }
    }

    /// The same snapshot with links of another kind; a peer whose link is gone is left out of
    /// what is looked up.
    pub(crate) fn bind<M: Clone>(
        &self,
        mut find: impl FnMut(&L) -> Option<M>,
    ) -> Routing<Option<M>> {
        let links = self.links.iter().map(|(peer, link)| (*peer, find(link))).collect();
        let services = self
            .services
            .iter()
            .map(|(name, instances)| {
                let bound = instances.iter().map(|instance| Instance {
                    link: find(&instance.link),
                    peer: instance.peer,
                    concurrency: instance.concurrency,
                });
                (name.clone(), bound.collect())
            })
            .collect();
        Routing { topics: self.topics.clone(), services, links, nodes: self.nodes.clone() }
    }

    /// The nodes that subscribe to `topic`, each once.
    pub(crate) fn subscribers<'a>(
        &'a self,
        topic: &Topic,
    ) -> impl ExactSizeIterator<Item = &'a (NodeId, L)> + use<'a, L> {
        self.topics.matches(topic).into_iter().map(|place| &self.links[place as usize])
    }

    /// The nodes that serve `name`.
    pub(crate) fn instances(&self, name: &ServiceName) -> &[Instance<L>] {
        self.services.get(name).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn link(&self, peer: &NodeId) -> Option<&L> {
        self.nodes.get(peer).map(|place| &self.links[*place as usize].1)
    }

    pub(crate) fn peers(&self) -> usize {
        self.links.len()
    }
}

/// The least loaded of several competing consumers: the fewest unfinished calls for the
/// concurrency that it announced. Ties go round with `turn`.
pub(crate) fn least_loaded<T>(
    candidates: &[T],
    turn: usize,
    load: impl Fn(&T) -> (u64, u32),
) -> Option<&T> {
    let len = candidates.len();
    (0..len)
        .map(|offset| &candidates[(turn + offset) % len])
        // a/b < c/d as a·d < c·b; `min_by` keeps the first of equals, which is `turn`'s.
        .min_by(|a, b| {
            let ((a, a_of), (b, b_of)) = (load(a), load(b));
            (a * u64::from(b_of)).cmp(&(b * u64::from(a_of)))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["a", "b", "c"]).prop_map(String::from)
    }

    fn pattern() -> impl Strategy<Value = Pattern> {
        let token = prop_oneof![4 => token(), 1 => Just("*".to_string())];
        (prop::collection::vec(token, 1..5), any::<bool>()).prop_map(|(mut tokens, open)| {
            if open {
                *tokens.last_mut().unwrap() = ">".into();
            }
            tokens.join(".").parse().unwrap()
        })
    }

    proptest! {
        #[test]
        fn the_trie_agrees_with_matching_one_by_one(
            patterns in prop::collection::vec(pattern(), 0..12),
            tokens in prop::collection::vec(token(), 1..5),
        ) {
            let topic: Topic = tokens.join(".").parse().unwrap();
            let mut trie = PatternTrie::default();
            for (number, pattern) in patterns.iter().enumerate() {
                trie.insert(pattern, number);
            }
            let want: Vec<usize> =
                (0..patterns.len()).filter(|n| patterns[*n].matches(&topic)).collect();
            prop_assert_eq!(trie.matches(&topic).into_vec(), want);
        }
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
