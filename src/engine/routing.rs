//! Routing: an immutable snapshot of the peers' announced patterns and services.
//!
//! The next snapshot shares all unchanged parts with this one, so the cost of a change does not
//! depend on the number of peers.

use std::sync::Arc;

use foldhash::fast::RandomState;
use imbl::{GenericHashMap, OrdMap};
use smallvec::SmallVec;

use crate::address::{Pattern, ServiceName, Topic};
use crate::engine::LinkId;
use crate::identity::NodeId;
use crate::peer::ServiceInfo;

type HashMap<K, V> = GenericHashMap<K, V, RandomState, imbl::shared_ptr::DefaultSharedPtr>;

/// Matched values, by number; most topics have few subscribers.
pub(crate) type Matches<'a, T> = SmallVec<[(u64, &'a T); 8]>;

/// Patterns in a tree of tokens. The time to match a topic depends on its own tokens, not on the
/// number of patterns. Cloning is cheap.
#[derive(Debug, Clone)]
pub(crate) struct PatternTrie<T: Clone> {
    children: Children<T>,
    /// The branch of `*`.
    any: Option<Arc<PatternTrie<T>>>,
    /// The values of patterns that end here, by number.
    here: OrdMap<u64, T>,
    /// The values of patterns that end in `>` here.
    rest: OrdMap<u64, T>,
}

impl<T: Clone> Default for PatternTrie<T> {
    fn default() -> Self {
        Self { children: Children::None, any: None, here: OrdMap::new(), rest: OrdMap::new() }
    }
}

impl<T: Clone> PatternTrie<T> {
    /// Adds a value under a number, by which it is found once if several of its patterns match.
    pub(crate) fn insert(&mut self, pattern: &Pattern, number: u64, value: T) {
        self.change(pattern.as_str().split('.'), |values| _ = values.insert(number, value.clone()));
    }

    pub(crate) fn remove(&mut self, pattern: &Pattern, number: u64) {
        self.change(pattern.as_str().split('.'), |values| _ = values.remove(&number));
    }

    fn change<'a>(
        &mut self,
        mut tokens: impl Iterator<Item = &'a str>,
        mut change: impl FnMut(&mut OrdMap<u64, T>),
    ) {
        self.change_below(&mut tokens, &mut change);
    }

    /// Recursive, since the way back up removes empty branches.
    fn change_below(
        &mut self,
        tokens: &mut dyn Iterator<Item = &str>,
        change: &mut dyn FnMut(&mut OrdMap<u64, T>),
    ) {
        match tokens.next() {
            None => change(&mut self.here),
            Some(">") => change(&mut self.rest),
            Some("*") => {
                let mut next = self.any.take().unwrap_or_default();
                Arc::make_mut(&mut next).change_below(tokens, change);
                self.any = (!next.is_empty()).then_some(next);
            }
            Some(token) => self.children.change(token, |next| next.change_below(tokens, change)),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.any.is_none()
            && self.here.is_empty()
            && self.rest.is_empty()
    }

    /// Returns the values of all patterns that match, each number once.
    pub(crate) fn matches(&self, topic: &Topic) -> Matches<'_, T> {
        let mut found = SmallVec::new();
        self.collect(topic.as_str(), &mut found);
        if found.len() > 1 {
            found.sort_unstable_by_key(|(number, _)| *number);
            found.dedup_by_key(|(number, _)| *number);
        }
        found
    }

    /// Returns all values, in no order.
    pub(crate) fn all(&self) -> Vec<&T> {
        let mut found: Vec<&T> = self.here.values().chain(self.rest.values()).collect();
        let (one, many) = self.children.all();
        let below = one.into_iter().chain(many).chain(&self.any);
        below.for_each(|next| found.extend(next.all()));
        found
    }

    fn collect<'a>(&'a self, rest: &str, found: &mut Matches<'a, T>) {
        let all =
            |values: &'a OrdMap<u64, T>| values.iter().map(|(number, value)| (*number, value));
        if !self.rest.is_empty() {
            found.extend(all(&self.rest));
        }
        let (token, rest) = match rest.split_once('.') {
            Some((token, rest)) => (token, Some(rest)),
            None => (rest, None),
        };
        let exact = self.children.get(token);
        for next in exact.into_iter().chain(self.any.as_deref()) {
            match rest {
                Some(rest) => next.collect(rest, found),
                None => found.extend(all(&next.here)),
            }
        }
    }
}

/// The branches of a trie by their tokens. Most nodes have none or one; a map for each would let a
/// peer with long patterns take gigabytes.
#[derive(Debug, Clone)]
enum Children<T: Clone> {
    None,
    One(Arc<str>, Arc<PatternTrie<T>>),
    Many(HashMap<Arc<str>, Arc<PatternTrie<T>>>),
}

impl<T: Clone> Children<T> {
    fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    fn get(&self, token: &str) -> Option<&PatternTrie<T>> {
        match self {
            Self::One(own, next) if **own == *token => Some(next),
            Self::None | Self::One(..) => None,
            Self::Many(map) => map.get(token).map(|next| &**next),
        }
    }

    fn all(&self) -> (Option<&Arc<PatternTrie<T>>>, impl Iterator<Item = &Arc<PatternTrie<T>>>) {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(_, next) => (Some(next), None),
            Self::Many(map) => (None, Some(map)),
        };
        (one, many.into_iter().flat_map(|map| map.values()))
    }

    /// Changes the branch of a token. A missing branch is created, an empty one removed.
    fn change(&mut self, token: &str, change: impl FnOnce(&mut PatternTrie<T>)) {
        let mut next = match self {
            Self::One(own, next) if **own == *token => std::mem::take(next),
            Self::None | Self::One(..) => Arc::default(),
            Self::Many(map) => map.remove(token).unwrap_or_default(),
        };
        change(Arc::make_mut(&mut next));
        let kept = (!next.is_empty()).then(|| (Arc::from(token), next));
        *self = match (std::mem::replace(self, Self::None), kept) {
            (Self::Many(mut map), kept) => {
                map.extend(kept);
                match map.len() {
                    0 => Self::None,
                    1 => map
                        .into_iter()
                        .next()
                        .map_or(Self::None, |(own, next)| Self::One(own, next)),
                    _ => Self::Many(map),
                }
            }
            (Self::One(own, other), Some(kept)) if *own != *token => {
                Self::Many([(own, other), kept].into_iter().collect())
            }
            (Self::One(own, other), None) if *own != *token => Self::One(own, other),
            (Self::None | Self::One(..), Some((own, next))) => Self::One(own, next),
            (Self::None | Self::One(..), None) => Self::None,
        };
    }
}

/// A node that serves a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance<L = LinkId> {
    pub(crate) link: L,
    pub(crate) peer: NodeId,
    pub(crate) concurrency: u32,
}

/// A change in a peer's announcements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RouteChange {
    Up,
    Down,
    Subscribed(Pattern),
    Unsubscribed(Pattern),
    Serving(ServiceInfo),
    Withdrawn(ServiceName),
}

/// The peers' patterns and services. `L` is the owner's handle of a link.
///
/// A link's patterns and services are entered and removed bit by bit, since a peer may have
/// thousands of them. They count from the moment the link is up until it is down.
#[derive(Debug, Clone)]
pub(crate) struct Routing<L: Clone = LinkId> {
    /// By the numbers of the links.
    topics: PatternTrie<L>,
    services: HashMap<ServiceName, OrdMap<(NodeId, LinkId), Instance<L>>>,
    /// The links that are up.
    links: HashMap<LinkId, L>,
    peers: HashMap<NodeId, LinkId>,
}

impl<L: Clone> Default for Routing<L> {
    fn default() -> Self {
        Self {
            topics: PatternTrie::default(),
            services: HashMap::default(),
            links: HashMap::default(),
            peers: HashMap::default(),
        }
    }
}

impl<L: Clone> Routing<L> {
    /// Applies a change of the peer at the other end of `link`. `way` returns the handle of the
    /// link while it exists.
    pub(crate) fn apply(
        &mut self,
        peer: NodeId,
        link: LinkId,
        way: impl FnOnce() -> Option<L>,
        change: RouteChange,
    ) {
        match change {
            RouteChange::Up => {
                if let Some(way) = way() {
                    self.links.insert(link, way);
                    self.peers.insert(peer, link);
                }
            }
            RouteChange::Down => {
                self.links.remove(&link);
                if self.peers.get(&peer) == Some(&link) {
                    self.peers.remove(&peer);
                }
            }
            RouteChange::Subscribed(pattern) => {
                if let Some(way) = way() {
                    self.topics.insert(&pattern, link.0, way);
                }
            }
            RouteChange::Unsubscribed(pattern) => self.topics.remove(&pattern, link.0),
            RouteChange::Serving(ServiceInfo { name, concurrency }) => {
                if let Some(way) = way() {
                    let instance = Instance { link: way, peer, concurrency };
                    self.services.entry(name).or_default().insert((peer, link), instance);
                }
            }
            RouteChange::Withdrawn(name) => {
                let Some(instances) = self.services.get_mut(&name) else { return };
                instances.remove(&(peer, link));
                if instances.is_empty() {
                    self.services.remove(&name);
                }
            }
        }
    }

    /// Returns the links to the nodes that subscribe to `topic`, each once.
    pub(crate) fn subscribers(&self, topic: &Topic) -> Matches<'_, L> {
        let mut found = self.topics.matches(topic);
        found.retain(|(number, _)| self.links.contains_key(&LinkId(*number)));
        found
    }

    /// Returns the nodes that serve `name`, in the order of their ids.
    pub(crate) fn instances(&self, name: &ServiceName) -> impl Iterator<Item = &Instance<L>> {
        let all = self.services.get(name).into_iter().flatten();
        all.filter(|((_, link), _)| self.links.contains_key(link)).map(|(_, instance)| instance)
    }

    /// Returns the instance of `name` at `peer`, if it serves that.
    pub(crate) fn instance(&self, name: &ServiceName, peer: &NodeId) -> Option<&Instance<L>> {
        self.services.get(name)?.get(&(*peer, *self.peers.get(peer)?))
    }

    pub(crate) fn link(&self, peer: &NodeId) -> Option<&L> {
        self.links.get(self.peers.get(peer)?)
    }

    pub(crate) fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Returns true if nothing of any link is left.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.topics.is_empty() && self.services.is_empty() && self.peers.is_empty()
    }
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
                trie.insert(pattern, number as u64, ());
            }
            let numbers = |trie: &PatternTrie<()>| -> Vec<u64> {
                trie.matches(&topic).into_iter().map(|(number, _)| number).collect()
            };
            let matching = |number: &u64| patterns[*number as usize].matches(&topic);
            let all: Vec<u64> = (0..patterns.len() as u64).filter(matching).collect();
            prop_assert_eq!(&numbers(&trie), &all);
            let before = trie.clone();
            for (number, pattern) in patterns.iter().enumerate().filter(|(n, _)| n % 2 == 0) {
                trie.remove(pattern, number as u64);
            }
            let odd: Vec<u64> = all.iter().copied().filter(|number| number % 2 == 1).collect();
            prop_assert_eq!(numbers(&trie), odd);
            prop_assert_eq!(numbers(&before), all, "the snapshot before is as it was");
            for (number, pattern) in patterns.iter().enumerate() {
                trie.remove(pattern, number as u64);
            }
            prop_assert!(trie.is_empty(), "nothing is left behind");
        }
    }

    #[test]
    fn a_new_link_of_a_peer_counts_once_it_is_up_and_outlives_the_old_one() {
        let (peer, old, new) = (NodeId::from_bytes([1; 32]), LinkId(1), LinkId(2));
        let name: ServiceName = "stock".parse().unwrap();
        let serving = || RouteChange::Serving(ServiceInfo { name: name.clone(), concurrency: 1 });
        let mut routing = Routing::default();
        let mut apply = |link: LinkId, change| routing.apply(peer, link, || Some(link), change);
        apply(old, serving());
        apply(old, RouteChange::Up);
        apply(new, serving());
        let serving_links = |routing: &Routing| -> Vec<LinkId> {
            routing.instances(&name).map(|instance| instance.link).collect()
        };
        assert_eq!(serving_links(&routing), [old]);
        for change in [(old, RouteChange::Down), (new, RouteChange::Up)] {
            routing.apply(peer, change.0, || Some(change.0), change.1);
        }
        routing.apply(peer, old, || None, RouteChange::Withdrawn(name.clone()));
        assert_eq!(serving_links(&routing), [new]);
        assert_eq!(routing.instance(&name, &peer).map(|instance| instance.link), Some(new));
    }
}
