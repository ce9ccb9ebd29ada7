//! Subscriptions: a bounded queue between a link's reader and a user's stream.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use futures_core::Stream;

use super::cell::Credit;
use super::shared::Shared;
use crate::address::{Pattern, Topic};
use crate::engine::{PatternTrie, Queue};
use crate::message::Message;
use crate::sync::lock;

/// A message in a queue, and the credit that it holds until it is taken.
struct Delivery {
    message: Message,
    _credit: Option<Arc<Credit>>,
}

/// The queue of one subscription.
pub(crate) struct Inbox {
    pattern: Pattern,
    state: Mutex<State>,
}

struct State {
    queue: Queue<Delivery>,
    waker: Option<Waker>,
    closed: bool,
}

impl Inbox {
    fn new(pattern: Pattern, limit: u64) -> Self {
        let state = State { queue: Queue::new(limit), waker: None, closed: false };
        Self { pattern, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Queues a message; false if there is no room.
    pub(crate) fn push(&self, message: &Message, cost: u64, credit: Option<Arc<Credit>>) -> bool {
        let mut state = self.lock();
        if state.closed || !state.queue.has_room_for(cost) {
            return false;
        }
        let mut message = message.clone();
        message.unpin();
        let pushed = state.queue.push(Delivery { message, _credit: credit }, cost).is_ok();
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        pushed
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        let mut state = self.lock();
        let next = state.queue.pop();
        match next {
            Some(delivery) => {
                drop(state);
                // Its credit goes back here, outside of the lock.
                Poll::Ready(Some(delivery.message))
            }
            None if state.closed => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The local subscriptions, as a snapshot that is replaced when one comes or goes.
#[derive(Clone, Default)]
pub(crate) struct Inboxes {
    trie: PatternTrie<u64>,
    by_number: HashMap<u64, Arc<Inbox>>,
    next: u64,
}

impl Inboxes {
    pub(crate) fn add(&mut self, pattern: &Pattern, limit: u64) -> (u64, Arc<Inbox>) {
        self.next += 1;
        let inbox = Arc::new(Inbox::new(pattern.clone(), limit));
        self.by_number.insert(self.next, inbox.clone());
        self.trie.insert(pattern, self.next);
        (self.next, inbox)
    }

    pub(crate) fn remove(&mut self, number: u64) {
        self.by_number.remove(&number);
        self.trie = PatternTrie::default();
        for (number, inbox) in &self.by_number {
            self.trie.insert(&inbox.pattern, *number);
        }
    }

    pub(crate) fn matching(&self, topic: &Topic) -> Vec<&Arc<Inbox>> {
        if self.by_number.is_empty() {
            return Vec::new();
        }
        self.trie.matches(topic).iter().filter_map(|number| self.by_number.get(number)).collect()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Inbox>> {
        self.by_number.values()
    }
}

/// The messages on a pattern's topics, as a [`Stream`] that ends when the node shuts down.
///
/// From one sender, messages of one topic come in the order in which they were published, over
/// one link. What it doesn't take in time waits up to [`Config::subscription_queue`]; then new
/// messages are dropped and counted at their sender, and nobody else is held up.
///
/// Dropping it ends the subscription.
///
/// [`Config::subscription_queue`]: crate::Config::subscription_queue
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    inbox: Arc<Inbox>,
    number: u64,
    shared: Arc<Shared>,
}

impl Subscription {
    pub(crate) fn new(shared: &Arc<Shared>, number: u64, inbox: Arc<Inbox>) -> Self {
        Self { inbox, number, shared: shared.clone() }
    }

    /// The pattern that was asked for.
    pub fn pattern(&self) -> &Pattern {
        &self.inbox.pattern
    }

    /// The next message; `None` when the node has shut down and the queue is empty.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn recv(&mut self) -> Option<Message> {
        std::future::poll_fn(|context| self.inbox.poll(context)).await
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        self.inbox.poll(context)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.unsubscribe(self.number, &self.inbox.pattern);
        self.inbox.close();
        while let Some(unread) = { self.inbox.lock().queue.pop() } {
            drop(unread);
        }
    }
}
