//! Services: offering and withdrawing them.

use std::sync::Arc;

use super::Inner;
use crate::address::{AddressError, ServiceName};
use crate::carrier::{CannotKeep, Unsupported, Wish, WishEnd};
use crate::core::{Handler, RUNTIME_ENDED_TEXT, ServiceRunner, Stopped};
use crate::engine::delivery::MAX_SUBSCRIPTIONS;
use crate::engine::{MAX_ANNOUNCED, ServiceNumber, TooMany};
use crate::opaque::opaque;

/// The default number of calls that a service runs at once.
pub(crate) const DEFAULT_CONCURRENCY: u32 = 64;

/// The error of offering a service or starting a durable subscription.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The name can't be parsed.
    #[error(transparent)]
    Name(#[from] AddressError),
    /// This node already offers the name.
    #[error("this node serves {0} already")]
    AlreadyServed(ServiceName),
    /// A durable subscription needs a store: [`Config::outbox`](crate::Config::outbox).
    #[error("the node has no store; set a folder for its outbox")]
    NoStore,
    /// A durable subscription over a broker needs a node with a permanent identity:
    /// [`Config::identity`](crate::Config::identity).
    #[error("the node has a new identity at each start; set a file for its identity")]
    NoIdentity,
    /// The broker does not support it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Peers accept no more patterns and services of one node.
    #[error(
        "this node has {MAX_ANNOUNCED} patterns and services, and its peers accept no more of one \
         node; end some of them"
    )]
    TooMany,
    /// Publishers remember no more durable subscriptions of one node.
    #[error(
        "this node has {MAX_SUBSCRIPTIONS} durable subscriptions, and publishers remember no more \
         of one node; end some, or use fewer patterns with wildcards"
    )]
    TooManyDurable,
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}

impl From<Stopped> for ServeError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::ShutDown => Self::ShutDown,
            Stopped::RuntimeEnded => Self::RuntimeEnded,
        }
    }
}

impl From<CannotKeep> for ServeError {
    fn from(lack: CannotKeep) -> Self {
        match lack {
            CannotKeep::NoStore => Self::NoStore,
            CannotKeep::NoIdentity => Self::NoIdentity,
            CannotKeep::Unsupported(lack) => Self::Unsupported(lack),
        }
    }
}

/// A service to be offered by [`Serve::start`].
#[must_use = "a service is offered when it is started"]
pub struct Serve {
    node: Arc<Inner>,
    name: Result<ServiceName, AddressError>,
    handler: Arc<Handler>,
    concurrency: u32,
}

opaque!(Serve, |it| name: it.name, concurrency: it.concurrency);

impl Serve {
    pub(super) fn new(
        node: &Arc<Inner>,
        name: Result<ServiceName, AddressError>,
        handler: Arc<Handler>,
    ) -> Self {
        Self { node: node.clone(), name, handler, concurrency: DEFAULT_CONCURRENCY }
    }

    /// Sets the number of calls that run at once: 64 by default, at least 1. Others are queued, up
    /// to the credit of their senders.
    pub fn concurrency(mut self, calls: u32) -> Self {
        self.concurrency = calls.max(1);
        self
    }

    /// Offers the service and announces it to the mesh.
    ///
    /// # Errors
    /// [`ServeError`] if the name can't be parsed, or is already served here, or if the node has
    /// 10,000 patterns and services already.
    pub fn start(self) -> Result<Service, ServeError> {
        let (node, name) = (self.node, self.name?);
        node.core.check_running()?;
        let runner = Arc::new(ServiceRunner::new(name.clone(), self.handler));
        let served =
            node.core.with_front(|front, _| front.serve(&name, self.concurrency, runner.clone()));
        let Some(number) = served else { return Err(ServeError::AlreadyServed(name)) };
        if let Err(TooMany) = node.carrier.wish(Wish::Serve(name, self.concurrency)) {
            node.core.with_front(|front, _| front.withdraw(number));
            return Err(ServeError::TooMany);
        }
        node.core.routes.notify();
        Ok(Service { runner, number, concurrency: self.concurrency, node })
    }
}

/// A service that this node offers. Dropping it withdraws the service; admitted calls are finished.
#[must_use = "dropping a service withdraws it"]
pub struct Service {
    runner: Arc<ServiceRunner>,
    number: ServiceNumber,
    concurrency: u32,
    node: Arc<Inner>,
}

opaque!(Service, |it| name: it.name());

impl Service {
    /// The service's name.
    pub fn name(&self) -> &ServiceName {
        &self.runner.name
    }

    /// The number of running calls.
    pub fn running(&self) -> usize {
        self.node.core.look(|front| front.running(self.number))
    }

    /// Withdraws the service, and waits until its admitted calls are finished: for a rolling
    /// deploy. Calls that arrive meanwhile are refused with `no_service`.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the service withdrawn.
    pub async fn drain(self) {
        self.withdraw();
        self.runner.wait_until_idle(&self.node.core, self.number).await;
    }

    fn withdraw(&self) {
        if self.node.core.with_front(|front, _| front.withdraw(self.number)) {
            let wish = Wish::Serve(self.runner.name.clone(), self.concurrency);
            self.node.carrier.end_wish(wish, WishEnd::Forget);
            self.node.core.routes.notify();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.withdraw();
    }
}
