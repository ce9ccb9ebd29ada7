//! Subscriptions: a bounded queue between a link's reader and a user's stream.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use futures_core::Stream;

use super::event_batch::EventBatch;
use super::peer_link::Credit;
use super::shared::Shared;
use crate::address::{Pattern, Topic};
use crate::engine::{Matches, PatternTrie};
use crate::message::Message;
use crate::opaque::opaque;
use crate::report::DropReason;
use crate::sync::{Guard, Mutex, Rank, lock};

/// What a subscription loses when its messages are not taken in time. The sender counts each loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overflow {
    /// The newest: what comes when the queue is full. Counted as
    /// [`SlowSubscriber`](DropReason::SlowSubscriber).
    #[default]
    DropNewest,
    /// The oldest: what has waited longest makes room. Counted as
    /// [`SlowSubscriber`](DropReason::SlowSubscriber).
    DropOldest,
    /// All but the latest of each topic: a message takes the place of the unread one before it,
    /// full or not. Counted as [`Superseded`](DropReason::Superseded). Topics beyond what the
    /// queue holds lose their newest.
    KeepLatest,
    /// Nothing: what is unread holds the credit of its link, until its senders wait or drop.
    ///
    /// A subscription that never reads then stops **all** events from its peers to this node,
    /// not only its own. What it holds is bounded by [`Config::window`] for each peer; what this
    /// node publishes to itself is bounded by [`Config::subscription_queue`] and loses the
    /// newest.
    ///
    /// [`Config::window`]: crate::Config::window
    /// [`Config::subscription_queue`]: crate::Config::subscription_queue
    HoldBack,
}

/// Messages that an inbox did not keep, and the credit of those among which they came.
pub(crate) struct Lost {
    pub(crate) credit: Option<Arc<Credit>>,
    pub(crate) reason: DropReason,
    pub(crate) count: u64,
    /// They had been queued before.
    pub(crate) earlier: bool,
}

/// The queue of one subscription.
pub(crate) struct Inbox {
    pattern: Pattern,
    overflow: Overflow,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    runs: VecDeque<EventBatch>,
    bytes: u64,
    waker: Option<Waker>,
    closed: bool,
}

impl Inbox {
    fn new(pattern: Pattern, overflow: Overflow, limit: u64) -> Self {
        Self { pattern, overflow, limit, state: Mutex::new(Rank::Table, State::default()) }
    }

    fn lock(&self) -> Guard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Whether it wants messages one by one.
    pub(crate) fn splits_runs(&self) -> bool {
        self.overflow == Overflow::KeepLatest
    }

    /// Queues messages; what is lost by it.
    pub(crate) fn push(&self, run: EventBatch) -> Vec<Lost> {
        let mut state = self.lock();
        let mut lost = Vec::new();
        if state.closed {
            let count = run.totals().messages;
            let reason = DropReason::NoSubscriber;
            lost.push(Lost { credit: run.credit, reason, count, earlier: false });
            return lost;
        }
        match self.overflow {
            Overflow::HoldBack if run.credit.is_some() => state.append(run),
            Overflow::HoldBack | Overflow::DropNewest => {
                lost.extend(state.append_within(run, self.limit));
            }
            Overflow::DropOldest => {
                let bytes = run.totals().bytes;
                while state.bytes + bytes > self.limit
                    && let Some(oldest) = state.drop_oldest()
                {
                    lost.push(oldest);
                }
                lost.extend(state.append_within(run, self.limit));
            }
            Overflow::KeepLatest => {
                if let Some(old) = state.supersede(&run) {
                    lost.push(old);
                }
                lost.extend(state.append_within(run, self.limit));
            }
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        lost
    }

    /// The next run, or `None` when the queue is closed and empty.
    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<EventBatch>> {
        let mut state = self.lock();
        match state.pop() {
            Some(run) => Poll::Ready(Some(run)),
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

impl State {
    fn append(&mut self, run: EventBatch) {
        self.bytes += run.totals().bytes;
        self.runs.push_back(run);
    }

    /// Appends what there is room for. An empty queue takes any one message.
    fn append_within(&mut self, mut run: EventBatch, limit: u64) -> Option<Lost> {
        let fits = |run: &EventBatch| {
            let totals = run.totals();
            self.bytes + totals.bytes <= limit || self.runs.is_empty() && totals.messages == 1
        };
        let mut count = 0;
        while !run.is_empty() && !fits(&run) {
            run.drop_last();
            count += 1;
        }
        let credit = run.credit.clone();
        if !run.is_empty() {
            self.append(run);
        }
        let reason = DropReason::SlowSubscriber;
        (count > 0).then_some(Lost { credit, reason, count, earlier: false })
    }

    fn pop(&mut self) -> Option<EventBatch> {
        let run = self.runs.pop_front()?;
        self.bytes -= run.totals().bytes;
        Some(run)
    }

    fn drop_oldest(&mut self) -> Option<Lost> {
        let run = self.runs.front_mut()?;
        let credit = run.credit.clone();
        self.bytes -= run.take()?.cost();
        if run.is_empty() {
            self.runs.pop_front();
        }
        Some(Lost { credit, reason: DropReason::SlowSubscriber, count: 1, earlier: true })
    }

    /// Takes out the unread message on the same topic.
    fn supersede(&mut self, by: &EventBatch) -> Option<Lost> {
        let place = self.runs.iter().position(|run| run.topic() == by.topic())?;
        let old = self.runs.remove(place)?;
        self.bytes -= old.totals().bytes;
        let (count, credit) = (old.totals().messages, old.credit);
        Some(Lost { credit, reason: DropReason::Superseded, count, earlier: true })
    }
}

/// The local subscriptions, as a snapshot that is replaced when one comes or goes.
#[derive(Clone, Default)]
pub(crate) struct Inboxes {
    trie: PatternTrie<Arc<Inbox>>,
    next: u64,
}

impl Inboxes {
    pub(crate) fn add(
        &mut self,
        pattern: &Pattern,
        overflow: Overflow,
        limit: u64,
    ) -> (u64, Arc<Inbox>) {
        self.next += 1;
        let inbox = Arc::new(Inbox::new(pattern.clone(), overflow, limit));
        self.trie.insert(pattern, self.next, inbox.clone());
        (self.next, inbox)
    }

    pub(crate) fn remove(&mut self, pattern: &Pattern, number: u64) {
        self.trie.remove(pattern, number);
    }

    pub(crate) fn matching(&self, topic: &Topic) -> Matches<'_, Arc<Inbox>> {
        self.trie.matches(topic)
    }

    pub(crate) fn has_match(&self, topic: &Topic) -> bool {
        !self.trie.is_empty() && !self.trie.matches(topic).is_empty()
    }

    pub(crate) fn all(&self) -> Vec<&Arc<Inbox>> {
        self.trie.all()
    }
}

/// The messages on a pattern's topics, as a [`Stream`] that ends when the node shuts down.
///
/// From one sender, messages of one topic come in the order in which they were published, over
/// one link. What it doesn't take in time waits up to [`Config::subscription_queue`]; then its
/// [`Overflow`] says what is lost. The sender counts that, and nobody else is held up.
///
/// Dropping it ends the subscription.
///
/// [`Config::subscription_queue`]: crate::Config::subscription_queue
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    inbox: Arc<Inbox>,
    /// What was taken from the inbox together and is handed out one by one.
    current: Option<EventBatch>,
    number: u64,
    shared: Arc<Shared>,
}

opaque!(Subscription, |it| pattern: it.pattern());

impl Subscription {
    pub(crate) fn new(shared: &Arc<Shared>, number: u64, inbox: Arc<Inbox>) -> Self {
        Self { inbox, current: None, number, shared: shared.clone() }
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
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        loop {
            if let Some(message) = self.current.as_mut().and_then(EventBatch::take) {
                return Poll::Ready(Some(message));
            }
            match self.inbox.poll(context) {
                Poll::Ready(Some(run)) => self.current = Some(run),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        self.poll(context)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.unsubscribe(self.number, &self.inbox.pattern);
        self.inbox.close();
        while let Some(unread) = { self.inbox.lock().pop() } {
            drop(unread);
        }
    }
}
