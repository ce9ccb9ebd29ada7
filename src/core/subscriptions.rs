//! The local subscriptions: a bounded queue each, and a snapshot to match topics against.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use arc_swap::{ArcSwap, Guard};

use super::Hold;
use crate::address::{Pattern, Topic};
use crate::engine::{EventBatch, EventSink, Lost, Overflow, PatternTrie, SubscriptionQueue};
use crate::sync::{Mutex, Rank, lock};

/// A subscription, between the tasks that receive events and its user.
pub(crate) struct Subscriber {
    number: u64,
    pattern: Pattern,
    overflow: Overflow,
    state: Mutex<State>,
}

struct State {
    queue: SubscriptionQueue<Hold>,
    waker: Option<Waker>,
}

impl Subscriber {
    pub(crate) fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Polls for the next batch; `None` once the queue is closed and empty.
    pub(crate) fn poll(&self, context: &Context<'_>) -> Poll<Option<EventBatch<Hold>>> {
        let mut state = lock(&self.state);
        match state.queue.pop() {
            Some(batch) => Poll::Ready(Some(batch)),
            None if state.queue.is_closed() => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Closes the queue to new messages, and wakes the user.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.queue.close();
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Drops the queued messages, outside the lock.
    pub(crate) fn clear(&self) {
        while let Some(unread) = { lock(&self.state).queue.pop() } {
            drop(unread);
        }
    }
}

impl EventSink<Hold> for &Arc<Subscriber> {
    fn overflow(&self) -> Overflow {
        self.overflow
    }

    fn push(&self, batch: EventBatch<Hold>) -> Vec<Lost<Hold>> {
        let mut state = lock(&self.state);
        let lost = state.queue.push(batch);
        let waker = state.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
        lost
    }
}

/// All subscriptions of a node. The snapshot is replaced when a subscription comes or goes.
pub(crate) struct Subscriptions {
    snapshot: ArcSwap<Snapshot>,
    /// The last number; locked while the snapshot changes.
    change: Mutex<u64>,
}

impl Default for Subscriptions {
    fn default() -> Self {
        Self { snapshot: ArcSwap::default(), change: Mutex::new(Rank::Subscribing, 0) }
    }
}

#[derive(Clone, Default)]
pub(crate) struct Snapshot(PatternTrie<Arc<Subscriber>>);

impl Snapshot {
    pub(crate) fn matching(&self, topic: &Topic) -> smallvec::SmallVec<[&Arc<Subscriber>; 4]> {
        self.0.matches(topic).into_iter().map(|(_, subscriber)| subscriber).collect()
    }

    pub(crate) fn has_match(&self, topic: &Topic) -> bool {
        !self.0.is_empty() && !self.0.matches(topic).is_empty()
    }
}

impl Subscriptions {
    pub(crate) fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    pub(crate) fn add(&self, pattern: &Pattern, overflow: Overflow, limit: u64) -> Arc<Subscriber> {
        let mut last = lock(&self.change);
        *last += 1;
        let queue = SubscriptionQueue::new(overflow, limit);
        let state = Mutex::new(Rank::Table, State { queue, waker: None });
        let subscriber =
            Arc::new(Subscriber { number: *last, pattern: pattern.clone(), overflow, state });
        let mut next = Snapshot::clone(&self.snapshot.load());
        next.0.insert(pattern, *last, subscriber.clone());
        self.snapshot.store(Arc::new(next));
        subscriber
    }

    pub(crate) fn remove(&self, subscriber: &Subscriber) {
        let _change = lock(&self.change);
        let mut next = Snapshot::clone(&self.snapshot.load());
        next.0.remove(&subscriber.pattern, subscriber.number);
        self.snapshot.store(Arc::new(next));
    }

    /// Closes all subscriptions. Their queued messages can still be read.
    pub(crate) fn close_all(&self) {
        self.snapshot.load().0.all().into_iter().for_each(|subscriber| subscriber.close());
    }
}
