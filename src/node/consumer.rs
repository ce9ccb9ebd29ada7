//! Durable subscriptions: events that are delivered until they are processed.

use std::sync::{Arc, Weak};

use super::handler::Handler;
use super::service::ServeError;
use super::service_runner::ServiceRunner;
use super::shared::Shared;
use crate::address::{AddressError, Pattern, ServiceName};
use crate::broker::BrokerKind;
use crate::opaque::opaque;
use crate::sync::lock;

/// A durable subscription that is about to begin. [`Consume::start`] does it.
#[must_use = "a durable subscription begins when it is started"]
pub struct Consume {
    pub(super) shared: Arc<Shared>,
    pub(super) name: Result<ServiceName, AddressError>,
    pub(super) pattern: Result<Pattern, AddressError>,
    pub(super) handler: Arc<Handler>,
    pub(super) concurrency: u32,
}

opaque!(Consume, |it| name: it.name, pattern: it.pattern);

impl Consume {
    /// How many handlers run at once: 64 by default, 1 at the least. 1 keeps the order in which
    /// a publisher first sent; messages with a key come in their order anyway.
    pub fn concurrency(mut self, handlers: u32) -> Self {
        self.concurrency = handlers.max(1);
        self
    }

    /// Begins to take messages.
    ///
    /// # Errors
    /// [`ServeError`] if the name or the pattern can't be parsed, the name is used here already,
    /// or the node has no store.
    pub fn start(self) -> Result<Consumer, ServeError> {
        let (name, pattern) = (self.name?, self.pattern?);
        match self.shared.broker() {
            Some(broker) if broker.client.kind() == BrokerKind::Embedded => {
                return Err(broker.lacks("durable subscriptions").into());
            }
            Some(_) if self.shared.config.identity.is_none() => return Err(ServeError::NoIdentity),
            None if self.shared.store.is_none() => return Err(ServeError::NoStore),
            Some(_) | None => {}
        }
        if self.shared.is_stopping() {
            return Err(ServeError::ShutDown);
        }
        let cell = Arc::new(ServiceRunner::new(name.clone(), self.concurrency, self.handler));
        if !self.shared.add_consumer(&cell, pattern.clone()) {
            return Err(ServeError::AlreadyServed(name));
        }
        Ok(Consumer { cell, pattern, shared: self.shared })
    }
}

/// A durable subscription that takes messages. Dropping it only stops that: its publishers keep
/// what is for it, and what is published meanwhile, until it is started again.
#[must_use = "dropping it stops the durable subscription"]
pub struct Consumer {
    cell: Arc<ServiceRunner>,
    pattern: Pattern,
    shared: Arc<Shared>,
}

opaque!(Consumer, |it| name: it.name(), pattern: it.pattern());

impl Consumer {
    /// Its name.
    pub fn name(&self) -> &ServiceName {
        &self.cell.name
    }

    /// The pattern of its topics.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Stops taking messages, and waits until those that run are done.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the subscription stopped.
    pub async fn drain(self) {
        self.shared.remove_consumer(&self.cell);
        self.cell.drain().await;
    }

    /// Ends the subscription for good: its publishers forget it, and what they keep for it.
    /// Waits until the handlers that run are done.
    ///
    /// Those that are linked are told now, those that link while this node lives when they do;
    /// any other keeps what is for it, until [`Node::forget_subscription`] or `peerbus outbox
    /// forget` is told to it.
    ///
    /// [`Node::forget_subscription`]: crate::Node::forget_subscription
    ///
    /// # Cancel safety
    /// Dropping the future leaves the subscription ended.
    pub async fn unsubscribe(self) {
        if let Some(store) = &self.shared.store {
            lock(&store.ended).insert(self.cell.name.clone());
        }
        let (shared, name) = (self.shared.clone(), self.cell.name.clone());
        self.drain().await;
        if let Some(broker) = shared.broker() {
            broker.client.forget(&name);
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shared.remove_consumer(&self.cell);
    }
}

impl Shared {
    fn add_consumer(self: &Arc<Self>, cell: &Arc<ServiceRunner>, pattern: Pattern) -> bool {
        let mut consumers = lock(&self.consumers);
        if consumers.contains_key(&cell.name) {
            return false;
        }
        consumers.insert(cell.name.clone(), (pattern.clone(), cell.clone()));
        drop(consumers);
        self.add_handler(cell);
        if let Some(broker) = self.broker() {
            broker.client.consume(&cell.name, &pattern, cell.concurrency);
        }
        if let Some(store) = &self.store {
            lock(&store.ended).remove(&cell.name);
        }
        self.announce_consumers();
        true
    }

    /// Removes it, and not another that has its name by now.
    fn remove_consumer(self: &Arc<Self>, cell: &Arc<ServiceRunner>) {
        let mut consumers = lock(&self.consumers);
        let own = consumers.get(&cell.name).is_some_and(|(_, there)| Arc::ptr_eq(there, cell));
        if own {
            consumers.remove(&cell.name);
        }
        drop(consumers);
        if own {
            if let Some(broker) = self.broker() {
                broker.client.pause(&cell.name);
            }
            self.announce_consumers();
            cell.turn_down(self);
        }
    }

    pub(super) fn consumer(&self, name: &ServiceName) -> Option<(Pattern, Arc<ServiceRunner>)> {
        lock(&self.consumers).get(name).cloned()
    }

    pub(super) fn consumed(&self) -> Vec<(ServiceName, Pattern)> {
        let consumers = lock(&self.consumers);
        consumers.iter().map(|(name, (pattern, _))| (name.clone(), pattern.clone())).collect()
    }

    pub(super) fn add_handler(&self, cell: &Arc<ServiceRunner>) {
        let mut handlers = lock(&self.handlers);
        handlers.retain(|handler| handler.strong_count() > 0);
        handlers.push(Arc::downgrade(cell));
    }

    /// All that handles calls here: services and durable subscriptions, and those of them that
    /// take no more but have handlers that run.
    pub(super) fn handling(&self) -> Vec<Arc<ServiceRunner>> {
        lock(&self.handlers).iter().filter_map(Weak::upgrade).collect()
    }
}
