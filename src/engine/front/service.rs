//! The calls of a service: a bounded number runs at once, the others are queued.
//!
//! Calls with the same ordering key run one after the other, in the order of their arrival; the
//! others run beside them.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::Arc;

use crate::engine::{HashMap, Time};

/// The decision on a call that arrives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission<C> {
    /// The call runs now.
    Start(C),
    /// The call is queued; a later [`Service::handle_finished`] returns it.
    Waits,
    /// The name of the call is in use.
    Refused(C),
}

/// The consequences of a call's end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finished<K, C, R> {
    /// The kept part of the call.
    pub(crate) kept: Option<R>,
    /// The call to run in its place.
    pub(crate) next: Option<(K, C)>,
    /// The calls that expired in the queue.
    pub(crate) expired: Vec<(K, C)>,
}

/// The calls of one service on one node. `K` names a call, `C` holds the data needed to run it, and
/// `R` the part of it that its owner keeps while it runs.
///
/// Queued calls are bounded by the credit of their links.
#[derive(Debug)]
pub(crate) struct Service<K, C, R> {
    concurrency: usize,
    /// All running and queued calls, by name.
    calls: HashMap<K, State<R>>,
    running: usize,
    /// Queued calls that run as soon as there is room.
    waiting: Queue<K, C>,
    /// For each ordering key of a running call or one in `waiting`: the calls behind that one.
    behind: HashMap<Arc<str>, Queue<K, C>>,
    /// The number of calls that were queued so far.
    queued: u64,
}

/// Queued calls in their order, by the number at which [`State::Waits`] finds each.
type Queue<K, C> = BTreeMap<u64, Waiting<K, C>>;

#[derive(Debug)]
enum State<R> {
    /// In `waiting`, or behind another call with its ordering key.
    Waits {
        number: u64,
        behind: Option<Arc<str>>,
    },
    Runs {
        order: Option<Arc<str>>,
        kept: Option<R>,
    },
}

impl<R> State<R> {
    fn running(order: Option<Arc<str>>) -> Self {
        Self::Runs { order, kept: None }
    }

    fn kept(&self) -> Option<&R> {
        match self {
            Self::Waits { .. } => None,
            Self::Runs { kept, .. } => kept.as_ref(),
        }
    }
}

#[derive(Debug)]
struct Waiting<K, C> {
    key: K,
    order: Option<Arc<str>>,
    expires: Option<Time>,
    call: C,
}

impl<K: Copy + Ord + Hash, C, R> Service<K, C, R> {
    pub(crate) fn new(concurrency: usize) -> Self {
        Self {
            concurrency: concurrency.max(1),
            calls: HashMap::default(),
            running: 0,
            waiting: BTreeMap::new(),
            behind: HashMap::default(),
            queued: 0,
        }
    }

    /// Handles a call that arrived; `order` is its ordering key.
    pub(crate) fn handle_call(
        &mut self,
        key: K,
        order: Option<&str>,
        expires: Option<Time>,
        call: C,
    ) -> Admission<C> {
        // A second call of the same name would hide the first.
        let Entry::Vacant(entry) = self.calls.entry(key) else {
            return Admission::Refused(call);
        };
        let order: Option<Arc<str>> = order.map(Arc::from);
        let before = order.as_ref().and_then(|order| self.behind.get_mut(order));
        if before.is_none() && self.running < self.concurrency {
            self.behind.extend(order.clone().map(|order| (order, BTreeMap::new())));
            entry.insert(State::running(order));
            self.running += 1;
            return Admission::Start(call);
        }
        let number = self.queued;
        self.queued += 1;
        let waiting = Waiting { key, order: order.clone(), expires, call };
        match before {
            Some(behind) => {
                entry.insert(State::Waits { number, behind: order });
                behind.insert(number, waiting);
            }
            None => {
                entry.insert(State::Waits { number, behind: None });
                self.behind.extend(order.map(|order| (order, BTreeMap::new())));
                self.waiting.insert(number, waiting);
            }
        }
        Admission::Waits
    }

    /// Keeps a part of a call for as long as the call runs.
    pub(crate) fn keep(&mut self, key: K, what: R) {
        if let Some(State::Runs { kept, .. }) = self.calls.get_mut(&key) {
            *kept = Some(what);
        }
    }

    /// Returns the kept part of a running call.
    pub(crate) fn kept(&self, key: K) -> Option<&R> {
        self.calls.get(&key)?.kept()
    }

    /// Returns the kept parts of all running calls, in the order of their names.
    pub(crate) fn all_kept(&self) -> Vec<(K, &R)> {
        let kept = self.calls.iter().filter_map(|(key, state)| Some((*key, state.kept()?)));
        let mut kept: Vec<_> = kept.collect();
        kept.sort_unstable_by_key(|(key, _)| *key);
        kept
    }

    /// Handles the end of a running call.
    pub(crate) fn handle_finished(&mut self, now: Time, key: K) -> Finished<K, C, R> {
        let mut finished = Finished { kept: None, next: None, expired: Vec::new() };
        if let Some(State::Runs { order, kept }) = self.calls.remove(&key) {
            self.running -= 1;
            self.release(order);
            finished.kept = kept;
        }
        while self.running < self.concurrency
            && let Some((_, next)) = self.waiting.pop_first()
        {
            if next.expires.is_some_and(|expires| expires <= now) {
                self.calls.remove(&next.key);
                self.release(next.order);
                finished.expired.push((next.key, next.call));
                continue;
            }
            self.calls.insert(next.key, State::running(next.order));
            self.running += 1;
            finished.next = Some((next.key, next.call));
            break;
        }
        finished
    }

    /// Handles a cancellation. Returns the call if it was still queued; a running one is not
    /// stopped here.
    pub(crate) fn handle_cancel(&mut self, key: K) -> Option<C> {
        let State::Waits { number, behind } = self.calls.get(&key)? else { return None };
        let (number, behind) = (*number, behind.clone());
        self.calls.remove(&key);
        match behind {
            Some(order) => self.behind.get_mut(&order)?.remove(&number).map(|it| it.call),
            None => {
                let Waiting { order, call, .. } = self.waiting.remove(&number)?;
                self.release(order);
                Some(call)
            }
        }
    }

    /// Removes and returns the queued calls for which `wanted` is true, in the order of their names.
    pub(crate) fn take_waiting(&mut self, wanted: impl Fn(&K) -> bool) -> Vec<(K, C)> {
        let wanted = |waiting: &Waiting<K, C>| wanted(&waiting.key);
        let mut taken = Vec::new();
        for behind in self.behind.values_mut() {
            taken.extend(extract(behind, wanted));
        }
        for waiting in extract(&mut self.waiting, wanted) {
            self.release(waiting.order.clone());
            taken.push(waiting);
        }
        taken.sort_unstable_by_key(|waiting| waiting.key);
        taken.iter().for_each(|waiting| _ = self.calls.remove(&waiting.key));
        taken.into_iter().map(|waiting| (waiting.key, waiting.call)).collect()
    }

    /// Returns true if no call is running or queued.
    pub(crate) fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    /// Returns the number of running and queued calls.
    pub(crate) fn unfinished(&self) -> usize {
        self.calls.len()
    }

    /// Releases an ordering key: the call behind the one that left is next.
    fn release(&mut self, order: Option<Arc<str>>) {
        let Some(order) = order else { return };
        match self.behind.get_mut(&order).and_then(BTreeMap::pop_first) {
            Some((_, next)) => {
                let number = self.queued;
                self.queued += 1;
                self.calls.insert(next.key, State::Waits { number, behind: None });
                self.waiting.insert(number, next);
            }
            None => _ = self.behind.remove(&order),
        }
    }
}

/// Removes the items for which `wanted` is true; most often there are none.
fn extract<T>(queue: &mut BTreeMap<u64, T>, wanted: impl Fn(&T) -> bool) -> Vec<T> {
    let numbers: Vec<u64> =
        queue.iter().filter(|(_, it)| wanted(it)).map(|(number, _)| *number).collect();
    numbers.iter().filter_map(|number| queue.remove(number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Returns the next call, and the expired ones.
    fn finish(
        service: &mut Service<u32, char, ()>,
        now: Time,
        key: u32,
    ) -> (Option<char>, Vec<char>) {
        let Finished { next, expired, .. } = service.handle_finished(now, key);
        (next.map(|it| it.1), expired.into_iter().map(|it| it.1).collect())
    }

    fn at(ms: u64) -> Time {
        Time::after_start(Duration::from_millis(ms))
    }

    #[test]
    fn no_more_calls_run_than_the_limit_and_the_rest_wait_in_order() {
        let mut service = Service::new(2);
        assert_eq!(service.handle_call(1, None, None, 'a'), Admission::Start('a'));
        assert_eq!(service.handle_call(2, None, None, 'b'), Admission::Start('b'));
        assert_eq!(service.handle_call(3, None, Some(at(5)), 'c'), Admission::Waits);
        assert_eq!(service.handle_call(4, None, None, 'd'), Admission::Waits);
        assert_eq!(service.handle_call(5, None, None, 'e'), Admission::Waits);
        assert_eq!(service.handle_cancel(4), Some('d'));
        assert_eq!(service.handle_cancel(1), None, "it runs already");
        assert_eq!(finish(&mut service, at(5), 1), (Some('e'), vec!['c']));
        assert_eq!(service.handle_call(5, None, None, 'f'), Admission::Refused('f'), "it runs");
        assert!(!service.is_idle());
        finish(&mut service, at(6), 2);
        finish(&mut service, at(6), 5);
        assert!(service.is_idle());
    }

    #[test]
    fn calls_of_one_ordering_key_run_one_after_the_other_and_hold_up_no_others() {
        let mut service = Service::new(2);
        let call = |service: &mut Service<_, _, ()>, key, order, name| {
            service.handle_call(key, order, None, name)
        };
        assert_eq!(call(&mut service, 1, Some("x"), 'a'), Admission::Start('a'));
        assert_eq!(call(&mut service, 2, Some("x"), 'b'), Admission::Waits);
        assert_eq!(call(&mut service, 3, Some("x"), 'c'), Admission::Waits);
        assert_eq!(call(&mut service, 4, Some("y"), 'd'), Admission::Start('d'));
        assert_eq!(call(&mut service, 5, None, 'e'), Admission::Waits);
        assert_eq!(service.unfinished(), 5);
        // The one without a key came to the head of the queue first.
        assert_eq!(finish(&mut service, at(1), 1), (Some('e'), vec![]));
        assert_eq!(finish(&mut service, at(1), 5), (Some('b'), vec![]));
        assert_eq!(call(&mut service, 6, Some("x"), 'f'), Admission::Waits);
        assert_eq!(service.handle_cancel(3), Some('c'), "it waited behind another");
        assert_eq!(finish(&mut service, at(1), 4), (None, vec![]), "b runs, f is behind it");
        assert_eq!(finish(&mut service, at(1), 2), (Some('f'), vec![]));
        assert_eq!(finish(&mut service, at(1), 6), (None, vec![]));
        assert!(service.is_idle() && service.behind.is_empty());
        assert_eq!(call(&mut service, 7, Some("x"), 'g'), Admission::Start('g'));
    }

    #[test]
    fn what_is_behind_a_call_that_leaves_the_queue_comes_up() {
        let mut service = Service::new(1);
        service.handle_call(1, None, None, 'a');
        service.handle_call(2, Some("x"), Some(at(5)), 'b');
        service.handle_call(3, Some("x"), None, 'c');
        service.handle_call(4, Some("x"), None, 'd');
        service.handle_call(5, Some("y"), None, 'e');
        assert_eq!(service.take_waiting(|key| *key == 3 || *key == 5), [(3, 'c'), (5, 'e')]);
        assert_eq!(finish(&mut service, at(6), 1), (Some('d'), vec!['b']), "b expired");
        assert_eq!(finish(&mut service, at(6), 4), (None, vec![]));
        assert!(service.is_idle() && service.behind.is_empty());
    }
}
