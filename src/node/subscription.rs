//! Subscriptions, as their user holds them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;

use super::Inner;
use crate::address::Pattern;
use crate::core::{Hold, Subscriber};
use crate::engine::EventBatch;
use crate::message::Message;
use crate::opaque::opaque;

/// The messages on a pattern's topics, as a [`Stream`] that ends when the node shuts down.
///
/// Over one link, messages of one sender and topic arrive in the order in which they were
/// published. Messages that are not taken in time are queued, up to [`Config::subscription_queue`];
/// beyond that the [`Overflow`] policy decides which are lost, and their sender counts them. No
/// other subscription is delayed, except by [`Overflow::HoldBack`].
///
/// Dropping it ends the subscription.
///
/// [`Config::subscription_queue`]: crate::Config::subscription_queue
/// [`Overflow`]: crate::Overflow
/// [`Overflow::HoldBack`]: crate::Overflow::HoldBack
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    subscriber: Arc<Subscriber>,
    /// The batch whose messages are being returned.
    current: Option<EventBatch<Hold>>,
    node: Arc<Inner>,
}

opaque!(Subscription, |it| pattern: it.pattern());

impl Subscription {
    pub(crate) fn new(node: &Arc<Inner>, subscriber: Arc<Subscriber>) -> Self {
        Self { subscriber, current: None, node: node.clone() }
    }

    /// The subscription's pattern.
    pub fn pattern(&self) -> &Pattern {
        self.subscriber.pattern()
    }

    /// Receives the next message; `None` when the node has shut down and the queue is empty.
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
            match self.subscriber.poll(context) {
                Poll::Ready(Some(batch)) => self.current = Some(batch),
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
        self.node.unsubscribe(&self.subscriber);
        self.subscriber.close();
        self.subscriber.clear();
    }
}
