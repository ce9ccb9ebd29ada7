//! A service: how many calls run at once, which wait.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;

use crate::engine::Time;

/// What becomes of a call that arrives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission<C> {
    /// Run it now.
    Start(C),
    /// It waits; a later [`Service::handle_finished`] hands it out.
    Waits,
    /// The service takes no more.
    Refused(C),
}

/// The calls of one service on one node. `K` names a call, `C` is what it takes to run it.
///
/// What waits is bounded by the credit of the links that it came over.
#[derive(Debug)]
pub(crate) struct Service<K, C> {
    concurrency: usize,
    running: HashSet<K>,
    /// What waits, by name.
    queued: HashSet<K>,
    waiting: VecDeque<Waiting<K, C>>,
    draining: bool,
}

#[derive(Debug)]
struct Waiting<K, C> {
    key: K,
    expires: Option<Time>,
    call: C,
}

impl<K: Copy + Eq + Hash, C> Service<K, C> {
    pub(crate) fn new(concurrency: usize) -> Self {
        let concurrency = concurrency.max(1);
        Self {
            concurrency,
            running: HashSet::new(),
            queued: HashSet::new(),
            waiting: VecDeque::new(),
            draining: false,
        }
    }

    pub(crate) fn handle_call(&mut self, key: K, expires: Option<Time>, call: C) -> Admission<C> {
        // A name that is in use already would hide the one behind it.
        if self.draining || self.running.contains(&key) || self.queued.contains(&key) {
            return Admission::Refused(call);
        }
        if self.running.len() < self.concurrency {
            self.running.insert(key);
            return Admission::Start(call);
        }
        self.queued.insert(key);
        self.waiting.push_back(Waiting { key, expires, call });
        Admission::Waits
    }

    /// A running call ended. Returns what to run in its place, and what expired while waiting.
    pub(crate) fn handle_finished(&mut self, now: Time, key: K) -> (Option<C>, Vec<C>) {
        self.running.remove(&key);
        let mut expired = Vec::new();
        while self.running.len() < self.concurrency
            && let Some(next) = self.waiting.pop_front()
        {
            self.queued.remove(&next.key);
            if next.expires.is_some_and(|expires| expires <= now) {
                expired.push(next.call);
                continue;
            }
            self.running.insert(next.key);
            return (Some(next.call), expired);
        }
        (None, expired)
    }

    /// The caller gave up. Returns the call if it was still waiting; one that runs is not ours
    /// to stop.
    pub(crate) fn handle_cancel(&mut self, key: K) -> Option<C> {
        self.queued.remove(&key);
        let at = self.waiting.iter().position(|waiting| waiting.key == key)?;
        self.waiting.remove(at).map(|waiting| waiting.call)
    }

    /// Takes out what waits for a link that is gone.
    pub(crate) fn take_waiting(&mut self, wanted: impl Fn(&K) -> bool) -> Vec<C> {
        let (gone, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|waiting| wanted(&waiting.key));
        self.waiting = kept;
        gone.iter().for_each(|waiting| _ = self.queued.remove(&waiting.key));
        gone.into_iter().map(|waiting| waiting.call).collect()
    }

    /// Takes no more; what waits and runs is finished.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether nothing runs or waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// What runs and waits.
    pub(crate) fn unfinished(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(ms: u64) -> Time {
        Time::after_start(Duration::from_millis(ms))
    }

    #[test]
    fn no_more_calls_run_than_the_limit_and_the_rest_wait_in_order() {
        let mut service = Service::new(2);
        assert_eq!(service.handle_call(1, None, 'a'), Admission::Start('a'));
        assert_eq!(service.handle_call(2, None, 'b'), Admission::Start('b'));
        assert_eq!(service.handle_call(3, Some(at(5)), 'c'), Admission::Waits);
        assert_eq!(service.handle_call(4, None, 'd'), Admission::Waits);
        assert_eq!(service.handle_call(5, None, 'e'), Admission::Waits);
        assert_eq!(service.handle_cancel(4), Some('d'));
        assert_eq!(service.handle_cancel(1), None, "it runs already");
        assert_eq!(service.handle_finished(at(5), 1), (Some('e'), vec!['c']));
        service.drain();
        assert_eq!(service.handle_call(6, None, 'f'), Admission::Refused('f'));
        assert!(!service.is_idle());
        service.handle_finished(at(6), 2);
        service.handle_finished(at(6), 5);
        assert!(service.is_idle());
    }
}
