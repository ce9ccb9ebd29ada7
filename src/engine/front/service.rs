//! The calls of a service: a bounded number runs at once, the others are queued.
//!
//! Calls with the same ordering key run one after the other, in the order of their arrival; the
//! others run beside them. Queued calls run in turns of their paths: a peer with many of them does
//! not delay those of others.

use std::collections::VecDeque;
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
    queued: HashMap<Path, HashMap<K, Waiting<C>>>,
    /// The number of all queued calls.
    queue_len: usize,
    /// The tickets of queued calls that run as soon as there is room.
    waiting: Turns<Path, Ticket<K>>,
    /// For each ordering key of a running call or one in `waiting`: the calls behind that one.
    behind: HashMap<Arc<str>, VecDeque<Ticket<K>>>,
    tickets: u64,
    /// The number of tickets in the queues whose calls were cancelled.
    void: usize,
}

#[derive(Debug)]
struct Running<R> {
    order: Option<Arc<str>>,
    kept: Option<R>,
}

#[derive(Debug)]
struct Waiting<C> {
    number: u64,
    /// The call is in `waiting`, not behind another.
    is_next: bool,
    order: Option<Arc<str>>,
    expires: Option<Time>,
    call: C,
}

/// The place of a call in a queue. It is void once the call was cancelled, so that a cancellation
/// takes no search.
#[derive(Debug, Clone, Copy)]
struct Ticket<K> {
    key: K,
    path: Path,
    number: u64,
}

impl<K: Copy + Ord + Hash, C, R> Service<K, C, R> {
    pub(crate) fn new(concurrency: usize) -> Self {
        Self {
            concurrency: concurrency.max(1),
            running: HashMap::default(),
            queued: HashMap::default(),
            queue_len: 0,
            waiting: Turns::new(),
            behind: HashMap::default(),
            tickets: 0,
            void: 0,
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
            self.behind.extend(order.clone().map(|order| (order, VecDeque::new())));
            self.running.insert(key, Running { order, kept: None });
            return Admission::Start(call);
        }
        self.tickets += 1;
        let (number, is_next) = (self.tickets, before.is_none());
        let ticket = Ticket { key, path, number };
        match before {
            Some(behind) => behind.push_back(ticket),
            None => {
                self.behind.extend(order.clone().map(|order| (order, VecDeque::new())));
                self.waiting.push(path, ticket);
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
            && let Some(ticket) = self.waiting.pop()
        {
            let Some(next) = self.redeem(ticket) else { continue };
            if next.expires.is_some_and(|expires| expires <= now) {
                self.release(next.order);
                finished.expired.push((ticket.key, next.call));
                continue;
            }
            self.running.insert(ticket.key, Running { order: next.order, kept: None });
            finished.next = Some((ticket.key, next.call));
            break;
        }
        finished
    }

    /// Handles a cancellation. Returns the call if it was still queued; a running one is not
    /// stopped here.
    pub(crate) fn handle_cancel(&mut self, path: Path, key: K) -> Option<C> {
        let waiting = self.unqueue(path, &key)?;
        self.void += 1;
        Some(self.leave(waiting))
    }

    /// Removes and returns the queued calls of a path, in the order of their names.
    pub(crate) fn handle_path_lost(&mut self, path: Path) -> Vec<(K, C)> {
        let mut lost: Vec<_> = self.queued.remove(&path).into_iter().flatten().collect();
        lost.sort_unstable_by_key(|(key, _)| *key);
        self.queue_len -= lost.len();
        self.void += lost.len();
        lost.into_iter().map(|(key, waiting)| (key, self.leave(waiting))).collect()
    }

    /// Removes and returns all queued calls, in the order of their names.
    pub(crate) fn take_queued(&mut self) -> Vec<(K, C)> {
        let paths: Vec<Path> = self.queued.keys().copied().collect();
        let mut taken: Vec<_> =
            paths.into_iter().flat_map(|path| self.handle_path_lost(path)).collect();
        taken.sort_unstable_by_key(|(key, _)| *key);
        taken
    }

    /// Returns true if no call is running or queued.
    pub(crate) fn is_idle(&self) -> bool {
        self.unfinished() == 0
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

    /// Takes the call of a ticket, unless it was cancelled.
    fn redeem(&mut self, ticket: Ticket<K>) -> Option<Waiting<C>> {
        if !is_valid(&self.queued, &ticket) {
            self.void -= 1;
            return None;
        }
        self.unqueue(ticket.path, &ticket.key)
    }

    /// Handles the departure of a call from the queue; its ticket is void already.
    fn leave(&mut self, waiting: Waiting<C>) -> C {
        if waiting.is_next {
            self.release(waiting.order);
        }
        if self.void > self.unfinished() + MOST_VOID {
            self.drop_void_tickets();
        }
        waiting.call
    }

    /// Releases an ordering key: the call behind the one that left is next.
    fn release(&mut self, order: Option<Arc<str>>) {
        let Some(order) = order else { return };
        while let Some(ticket) = self.behind.get_mut(&order).and_then(VecDeque::pop_front) {
            let waiting = self.queued.get_mut(&ticket.path);
            match waiting.and_then(|calls| calls.get_mut(&ticket.key)) {
                Some(waiting) if waiting.number == ticket.number => {
                    waiting.is_next = true;
                    return self.waiting.push(ticket.path, ticket);
                }
                _ => self.void -= 1,
            }
        }
        self.behind.remove(&order);
    }

    fn drop_void_tickets(&mut self) {
        let Self { queued, waiting, behind, void, .. } = self;
        waiting.retain(|ticket| is_valid(queued, ticket));
        behind.values_mut().for_each(|queue| queue.retain(|ticket| is_valid(queued, ticket)));
        *void = 0;
    }
}

/// The void tickets that may outnumber the calls before they are searched for.
const MOST_VOID: usize = 64;

fn is_valid<K: Hash + Eq, C>(
    queued: &HashMap<Path, HashMap<K, Waiting<C>>>,
    ticket: &Ticket<K>,
) -> bool {
    let waiting = queued.get(&ticket.path).and_then(|calls| calls.get(&ticket.key));
    waiting.is_some_and(|it| it.number == ticket.number)
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
        assert_eq!(service.handle_path_lost(lost), [(3, 'c'), (5, 'e')]);
        assert_eq!((service.unfinished(), service.queued.len()), (3, 1));
        assert_eq!(finish(&mut service, at(6), 1), (Some('d'), vec!['b']), "b expired");
        assert_eq!(finish(&mut service, at(6), 4), (None, vec![]));
        assert!(service.is_idle() && service.behind.is_empty());
    }

    #[test]
    fn calls_that_are_cancelled_at_once_leave_no_tickets_behind() {
        let mut service = Service::new(1);
        service.handle_call(0, PATH, Some("x"), None, 'a');
        for _ in 0..1000 {
            for order in [None, Some("x"), Some("y")] {
                assert_eq!(service.handle_call(7, PATH, order, None, 'b'), Admission::Waits);
                assert_eq!(service.handle_cancel(PATH, 7), Some('b'));
            }
        }
        let behind: usize = service.behind.values().map(VecDeque::len).sum();
        assert!(service.waiting.len() + behind <= MOST_VOID + 2, "{}", service.void);
        service.handle_call(7, PATH, Some("x"), None, 'c');
        assert_eq!(finish(&mut service, at(1), 0), (Some('c'), vec![]), "its own ticket counts");
        finish(&mut service, at(1), 7);
        assert!(service.is_idle() && service.behind.is_empty());
        assert_eq!((service.waiting.len(), service.void, service.queued.len()), (0, 0, 0));
        service.handle_call(1, PATH, None, None, 'a');
        (2..5).for_each(|key| _ = service.handle_call(key, PATH, None, None, 'b'));
        assert_eq!(service.take_queued(), [(2, 'b'), (3, 'b'), (4, 'b')]);
        assert_eq!((service.unfinished(), service.queue_len), (1, 0));
    }
}
