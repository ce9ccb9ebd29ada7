//! Durable subscriptions: events that are delivered until they are processed.

use std::sync::Arc;

use super::Inner;
use super::service::{DEFAULT_CONCURRENCY, ServeError};
use crate::address::{AddressError, Pattern, ServiceName};
use crate::carrier::{Wish, WishEnd};
use crate::core::{Handler, ServiceRunner};
use crate::engine::{ServiceNumber, TooMany};
use crate::opaque::opaque;

/// A durable subscription to be started by [`Consume::start`].
#[must_use = "a durable subscription begins when it is started"]
pub struct Consume {
    node: Arc<Inner>,
    name: Result<ServiceName, AddressError>,
    pattern: Result<Pattern, AddressError>,
    handler: Arc<Handler>,
    concurrency: u32,
}

opaque!(Consume, |it| name: it.name, pattern: it.pattern);

impl Consume {
    pub(super) fn new(
        node: &Arc<Inner>,
        name: Result<ServiceName, AddressError>,
        pattern: Result<Pattern, AddressError>,
        handler: Arc<Handler>,
    ) -> Self {
        Self { node: node.clone(), name, pattern, handler, concurrency: DEFAULT_CONCURRENCY }
    }

    /// Sets the number of handlers that run at once: 64 by default, at least 1. With 1, messages
    /// are handled in the order in which a publisher first sent them; messages with a key are
    /// always handled in order.
    pub fn concurrency(mut self, handlers: u32) -> Self {
        self.concurrency = handlers.max(1);
        self
    }

    /// Starts the durable subscription.
    ///
    /// # Errors
    /// [`ServeError`] if the name or the pattern can't be parsed, if the name is already used here,
    /// if the node has no store, or if it has 256 durable subscriptions already.
    pub fn start(self) -> Result<Consumer, ServeError> {
        let (node, name, pattern) = (self.node, self.name?, self.pattern?);
        node.carrier.check_consumer()?;
        node.core.check_running()?;
        let runner = Arc::new(ServiceRunner::new(name.clone(), self.handler));
        let number = node.core.with_front(|front, _| {
            front.consume(&name, &pattern, self.concurrency, runner.clone())
        });
        let Some(number) = number else { return Err(ServeError::AlreadyServed(name)) };
        let wish = Wish::Consume(name, pattern.clone(), self.concurrency);
        if let Err(TooMany) = node.carrier.wish(wish) {
            node.core.with_front(|front, _| front.withdraw(number));
            return Err(ServeError::TooManyDurable);
        }
        Ok(Consumer { runner, number, pattern, concurrency: self.concurrency, node })
    }
}

/// A running durable subscription. Dropping it only stops it: its publishers keep its messages, and
/// those published meanwhile, until it is started again.
#[must_use = "dropping it stops the durable subscription"]
pub struct Consumer {
    runner: Arc<ServiceRunner>,
    number: ServiceNumber,
    pattern: Pattern,
    concurrency: u32,
    node: Arc<Inner>,
}

opaque!(Consumer, |it| name: it.name(), pattern: it.pattern());

impl Consumer {
    /// The durable subscription's name.
    pub fn name(&self) -> &ServiceName {
        &self.runner.name
    }

    /// The pattern of its topics.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Stops taking messages, and waits until the running handlers have ended.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the subscription stopped.
    pub async fn drain(self) {
        self.stop(WishEnd::Pause);
        self.runner.wait_until_idle(&self.node.core, self.number).await;
    }

    /// Ends the subscription permanently: its publishers forget it, with its queued messages. Waits
    /// until the running handlers have ended.
    ///
    /// Linked peers are notified now, others when they link during this node's life. The rest keep
    /// the messages until [`Node::forget_subscription`] or `peerbus outbox forget` is called there.
    ///
    /// [`Node::forget_subscription`]: crate::Node::forget_subscription
    ///
    /// # Cancel safety
    /// Dropping the future leaves the subscription ended.
    pub async fn unsubscribe(self) {
        self.stop(WishEnd::Forget);
        self.runner.wait_until_idle(&self.node.core, self.number).await;
    }

    fn stop(&self, end: WishEnd) {
        let core = &self.node.core;
        if core.with_front(|front, _| front.withdraw(self.number)) {
            let name = self.runner.name.clone();
            let wish = Wish::Consume(name, self.pattern.clone(), self.concurrency);
            self.node.carrier.end_wish(wish, end);
            core.with_front(|front, _| front.refuse_queued(self.number));
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.stop(WishEnd::Pause);
    }
}
