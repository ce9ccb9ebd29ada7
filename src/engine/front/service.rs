//! The calls of a service: a bounded number runs at once, the others are queued.
//!
//! Calls with the same ordering key run one after the other, in the order of their arrival; the
//! others run beside them. Queued calls run in turns of their paths: a peer with many of them does
//! not delay those of others.

use std::collections::{BTreeMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

use crate::engine::turns::Turns;
use crate::engine::{HashMap, Path, Time};

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
    running: HashMap<K, Running<R>>,
    /// The queued calls by path, so that a lost one takes no search; no path is without one.
    queued: HashMap<Path, BTreeMap<K, Waiting<C>>>,
    /// The number of all queued calls.
    queue_len: usize,
    /// The queued calls of lost paths, which never run.
    lost: VecDeque<(Path, BTreeMap<K, Waiting<C>>)>,
    /// The queued calls that run as soon as there is room.
    waiting: Turns<Path, K>,
    /// For each ordering key of a running call or one in `waiting`: the calls behind that one, in
    /// their order.
    behind: HashMap<Arc<str>, BTreeMap<u64, (Path, K)>>,
    last_number: u64,
}

#[derive(Debug)]
struct Running<R> {
    order: Option<Arc<str>>,
    kept: Option<R>,
}

#[derive(Debug)]
struct Waiting<C> {
    /// The call's place in the queue.
    number: u64,
    /// The call is in `waiting`, not behind another.
    is_next: bool,
    order: Option<Arc<str>>,
    expires: Option<Time>,
    call: C,
}

impl<K: Copy + Ord + Hash, C, R> Service<K, C, R> {
    pub(crate) fn new(concurrency: usize) -> Self {
        Self {
            concurrency: concurrency.max(1),
            running: HashMap::default(),
            queued: HashMap::default(),
            queue_len: 0,
            lost: VecDeque::new(),
            waiting: Turns::new(),
            behind: HashMap::default(),
            last_number: 0,
        }
    }

    /// Handles a call that arrived over a path; `order` is its ordering key.
    pub(crate) fn handle_call(
        &mut self,
        key: K,
        path: Path,
        order: Option<&str>,
        expires: Option<Time>,
        call: C,
    ) -> Admission<C> {
        // A second call of the same name would hide the first.
        if self.running.contains_key(&key) || self.is_queued(path, &key) {
            return Admission::Refused(call);
        }
        let order: Option<Arc<str>> = order.map(Arc::from);
        let before = order.as_ref().and_then(|order| self.behind.get_mut(order));
        if before.is_none() && self.running.len() < self.concurrency {
            self.behind.extend(order.clone().map(|order| (order, BTreeMap::new())));
            self.running.insert(key, Running { order, kept: None });
            return Admission::Start(call);
        }
        self.last_number += 1;
        let (number, is_next) = (self.last_number, before.is_none());
        match before {
            Some(behind) => _ = behind.insert(number, (path, key)),
            None => {
                self.behind.extend(order.clone().map(|order| (order, BTreeMap::new())));
                self.waiting.push(path, number, key);
            }
        }
        let waiting = Waiting { number, is_next, order, expires, call };
        self.queued.entry(path).or_default().insert(key, waiting);
        self.queue_len += 1;
        Admission::Waits
    }

    /// Keeps a part of a call for as long as the call runs.
    pub(crate) fn keep(&mut self, key: K, what: R) {
        if let Some(running) = self.running.get_mut(&key) {
            running.kept = Some(what);
        }
    }

    /// Returns the kept part of a running call.
    pub(crate) fn kept(&self, key: K) -> Option<&R> {
        self.running.get(&key)?.kept.as_ref()
    }

    /// Returns the kept parts of all running calls, in the order of their names.
    pub(crate) fn all_kept(&self) -> Vec<(K, &R)> {
        let kept = self.running.iter().filter_map(|(key, run)| Some((*key, run.kept.as_ref()?)));
        let mut kept: Vec<_> = kept.collect();
        kept.sort_unstable_by_key(|(key, _)| *key);
        kept
    }

    /// Handles the end of a running call.
    pub(crate) fn handle_finished(&mut self, now: Time, key: K) -> Finished<K, C, R> {
        let mut finished = Finished { kept: None, next: None, expired: Vec::new() };
        if let Some(Running { order, kept }) = self.running.remove(&key) {
            self.release(order);
            finished.kept = kept;
        }
        while self.running.len() < self.concurrency
            && let Some((path, key)) = self.waiting.pop()
        {
            let Some(next) = self.unqueue(path, &key) else { continue };
            if next.expires.is_some_and(|expires| expires <= now) {
                self.release(next.order);
                finished.expired.push((key, next.call));
                continue;
            }
            self.running.insert(key, Running { order: next.order, kept: None });
            finished.next = Some((key, next.call));
            break;
        }
        finished
    }

    /// Handles a cancellation. Returns the call if it was still queued; a running one is not
    /// stopped here.
    pub(crate) fn handle_cancel(&mut self, path: Path, key: K) -> Option<C> {
        let waiting = self.unqueue(path, &key)?;
        Some(self.leave(path, waiting))
    }

    /// Handles the loss of a path: its queued calls never run. [`Service::take_lost`] returns them.
    /// Returns false if there are none.
    pub(crate) fn handle_path_lost(&mut self, path: Path) -> bool {
        let Some(lost) = self.queued.remove(&path) else { return false };
        self.queue_len -= lost.len();
        self.waiting.remove_all(path);
        self.lost.push_back((path, lost));
        true
    }

    /// Removes and returns the next call of a lost path, in the order of their names.
    pub(crate) fn take_lost(&mut self) -> Option<(K, C)> {
        loop {
            let (path, lost) = self.lost.front_mut()?;
            let path = *path;
            match lost.pop_first() {
                Some((key, waiting)) => return Some((key, self.leave(path, waiting))),
                None => _ = self.lost.pop_front(),
            }
        }
    }

    /// Removes and returns all queued calls, in the order of their names.
    pub(crate) fn take_queued(&mut self) -> Vec<(K, C)> {
        let of_path = |(path, calls): (Path, BTreeMap<K, _>)| {
            calls.into_iter().map(move |(key, waiting)| (path, key, waiting))
        };
        let mut taken: Vec<_> = self.queued.drain().flat_map(of_path).collect();
        taken.sort_unstable_by_key(|(_, key, _)| *key);
        self.queue_len = 0;
        taken.into_iter().map(|(path, key, waiting)| (key, self.leave(path, waiting))).collect()
    }

    /// Returns true if no call is running, queued or lost.
    pub(crate) fn is_idle(&self) -> bool {
        self.unfinished() == 0 && self.lost.is_empty()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// Returns the number of running and queued calls.
    pub(crate) fn unfinished(&self) -> usize {
        self.running.len() + self.queue_len
    }

    fn is_queued(&self, path: Path, key: &K) -> bool {
        self.queued.get(&path).is_some_and(|calls| calls.contains_key(key))
    }

    fn unqueue(&mut self, path: Path, key: &K) -> Option<Waiting<C>> {
        let calls = self.queued.get_mut(&path)?;
        let waiting = calls.remove(key)?;
        if calls.is_empty() {
            self.queued.remove(&path);
        }
        self.queue_len -= 1;
        Some(waiting)
    }

    /// Handles the departure of a call that is no longer in `queued`.
    fn leave(&mut self, path: Path, waiting: Waiting<C>) -> C {
        let Waiting { number, is_next, order, call, .. } = waiting;
        if is_next {
            self.waiting.remove(path, number);
            self.release(order);
        } else if let Some(behind) = order.and_then(|order| self.behind.get_mut(&order)) {
            behind.remove(&number);
        }
        call
    }

    /// Releases an ordering key: the call behind the one that left is next. Lost calls have no turn.
    fn release(&mut self, order: Option<Arc<str>>) {
        let Some(order) = order else { return };
        let behind = self.behind.get_mut(&order).into_iter();
        for (_, (path, key)) in behind.flat_map(|it| std::iter::from_fn(|| it.pop_first())) {
            let queued = self.queued.get_mut(&path);
            if let Some(waiting) = queued.and_then(|calls| calls.get_mut(&key)) {
                self.last_number += 1;
                (waiting.number, waiting.is_next) = (self.last_number, true);
                return self.waiting.push(path, waiting.number, key);
            }
        }
        self.behind.remove(&order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::LinkId;
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

    const PATH: Path = Path::Link(LinkId(1));

    fn at(ms: u64) -> Time {
        Time::after_start(Duration::from_millis(ms))
    }

    #[test]
    fn no_more_calls_run_than_the_limit_and_the_rest_wait_in_order() {
        let mut service = Service::new(2);
        assert_eq!(service.handle_call(1, PATH, None, None, 'a'), Admission::Start('a'));
        assert_eq!(service.handle_call(2, PATH, None, None, 'b'), Admission::Start('b'));
        assert_eq!(service.handle_call(3, PATH, None, Some(at(5)), 'c'), Admission::Waits);
        assert_eq!(service.handle_call(4, PATH, None, None, 'd'), Admission::Waits);
        assert_eq!(service.handle_call(5, PATH, None, None, 'e'), Admission::Waits);
        assert_eq!(service.handle_cancel(PATH, 4), Some('d'));
        assert_eq!(service.handle_cancel(PATH, 1), None, "it runs already");
        assert_eq!(finish(&mut service, at(5), 1), (Some('e'), vec!['c']));
        assert_eq!(
            service.handle_call(5, PATH, None, None, 'f'),
            Admission::Refused('f'),
            "it runs"
        );
        assert!(!service.is_idle());
        finish(&mut service, at(6), 2);
        finish(&mut service, at(6), 5);
        assert!(service.is_idle());
    }

    #[test]
    fn calls_of_one_ordering_key_run_one_after_the_other_and_hold_up_no_others() {
        let mut service = Service::new(2);
        let call = |service: &mut Service<_, _, ()>, key, order, name| {
            service.handle_call(key, PATH, order, None, name)
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
        assert_eq!(service.handle_cancel(PATH, 3), Some('c'), "it waited behind another");
        assert_eq!(finish(&mut service, at(1), 4), (None, vec![]), "b runs, f is behind it");
        assert_eq!(finish(&mut service, at(1), 2), (Some('f'), vec![]));
        assert_eq!(finish(&mut service, at(1), 6), (None, vec![]));
        assert!(service.is_idle() && service.behind.is_empty());
        assert_eq!(call(&mut service, 7, Some("x"), 'g'), Admission::Start('g'));
    }

    #[test]
    fn a_peer_with_many_calls_delays_those_of_others_by_one_turn() {
        let mut service = Service::new(1);
        service.handle_call(0, PATH, None, None, 'a');
        for key in 1..1000 {
            // Some of them come up from behind a call with their key.
            let order = (key % 2 == 0).then_some("x");
            assert_eq!(service.handle_call(key, PATH, order, None, 'b'), Admission::Waits);
        }
        let other = Path::Link(LinkId(2));
        service.handle_call(1000, other, None, None, 'c');
        service.handle_call(1001, other, Some("x"), None, 'd');
        assert_eq!(finish(&mut service, at(1), 0), (Some('b'), vec![]));
        assert_eq!(finish(&mut service, at(1), 1), (Some('c'), vec![]));
    }

    #[test]
    fn what_is_behind_a_call_that_leaves_the_queue_comes_up() {
        let mut service = Service::new(1);
        service.handle_call(1, PATH, None, None, 'a');
        service.handle_call(2, PATH, Some("x"), Some(at(5)), 'b');
        let lost = Path::Link(LinkId(2));
        service.handle_call(3, lost, Some("x"), None, 'c');
        service.handle_call(4, PATH, Some("x"), None, 'd');
        service.handle_call(5, lost, Some("y"), None, 'e');
        assert!(service.handle_path_lost(lost));
        assert_eq!((service.unfinished(), service.queued.len()), (3, 1));
        assert_eq!([service.take_lost(), service.take_lost()], [Some((3, 'c')), Some((5, 'e'))]);
        assert_eq!(service.take_lost(), None);
        assert_eq!(finish(&mut service, at(6), 1), (Some('d'), vec!['b']), "b expired");
        assert_eq!(finish(&mut service, at(6), 4), (None, vec![]));
        assert!(service.is_idle() && service.behind.is_empty());
    }

    #[test]
    fn calls_that_are_cancelled_at_once_leave_nothing_behind() {
        let mut service = Service::new(1);
        service.handle_call(0, PATH, Some("x"), None, 'a');
        for _ in 0..1000 {
            for order in [None, Some("x"), Some("y")] {
                assert_eq!(service.handle_call(7, PATH, order, None, 'b'), Admission::Waits);
                assert_eq!(service.handle_cancel(PATH, 7), Some('b'));
            }
        }
        assert!(service.waiting.is_empty() && service.behind.values().all(BTreeMap::is_empty));
        service.handle_call(7, PATH, Some("x"), None, 'c');
        assert_eq!(finish(&mut service, at(1), 0), (Some('c'), vec![]), "its own ticket counts");
        finish(&mut service, at(1), 7);
        assert!(service.is_idle() && service.behind.is_empty());
        assert!(service.waiting.is_empty() && service.queued.is_empty());
        service.handle_call(1, PATH, None, None, 'a');
        (2..5).for_each(|key| _ = service.handle_call(key, PATH, None, None, 'b'));
        assert_eq!(service.take_queued(), [(2, 'b'), (3, 'b'), (4, 'b')]);
        assert_eq!((service.unfinished(), service.queue_len), (1, 0));
    }
}
