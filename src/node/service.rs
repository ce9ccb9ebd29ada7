//! Services as their user offers and withdraws them.

use std::sync::Arc;

use super::handler::Handler;
use super::service_runner::ServiceRunner;
use super::shared::Shared;
use crate::address::{AddressError, ServiceName};
use crate::broker::Unsupported;
use crate::opaque::opaque;

/// How many calls a service runs at once, unless it says so itself.
pub(crate) const DEFAULT_CONCURRENCY: u32 = 64;

/// A service name that can't be offered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The name can't be parsed.
    #[error(transparent)]
    Name(#[from] AddressError),
    /// This node offers it already.
    #[error("this node serves {0} already")]
    AlreadyServed(ServiceName),
    /// A durable subscription needs a store: [`Config::outbox`](crate::Config::outbox).
    #[error("the node has no store: name a folder for its outbox")]
    NoStore,
    /// A durable subscription over a broker needs a node that keeps its identity:
    /// [`Config::identity`](crate::Config::identity).
    #[error("the node draws a new identity at each start: name a file for it")]
    NoIdentity,
    /// A broker can't do that.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// A service that is about to be offered. [`Serve::start`] does it.
#[must_use = "a service is offered when it is started"]
pub struct Serve {
    pub(crate) shared: Arc<Shared>,
    pub(crate) name: Result<ServiceName, AddressError>,
    pub(crate) handler: Arc<Handler>,
    pub(crate) concurrency: u32,
}

opaque!(Serve, |it| name: it.name, concurrency: it.concurrency);

impl Serve {
    /// How many calls run at once: 64 by default, 1 at the least. Others wait, as far as the
    /// credit of their senders goes.
    pub fn concurrency(mut self, calls: u32) -> Self {
        self.concurrency = calls.max(1);
        self
    }

    /// Offers the service and announces it to the mesh.
    ///
    /// # Errors
    /// [`ServeError`] if the name can't be parsed or is served here already.
    pub fn start(self) -> Result<Service, ServeError> {
        let name = self.name?;
        if self.shared.is_stopping() {
            return Err(ServeError::ShutDown);
        }
        let cell = Arc::new(ServiceRunner::new(name.clone(), self.concurrency, self.handler));
        if !self.shared.add_service(&cell) {
            return Err(ServeError::AlreadyServed(name));
        }
        Ok(Service { cell, shared: self.shared })
    }
}

/// A service that this node offers. Dropping it withdraws the service; what runs is finished.
#[must_use = "dropping a service withdraws it"]
pub struct Service {
    cell: Arc<ServiceRunner>,
    shared: Arc<Shared>,
}

opaque!(Service, |it| name: it.name());

impl Service {
    /// The name under which it is offered.
    pub fn name(&self) -> &ServiceName {
        &self.cell.name
    }

    /// How many calls run now.
    pub fn running(&self) -> usize {
        self.cell.running()
    }

    /// Withdraws the service and waits until the calls that it has taken are done: for a
    /// rolling deploy. Calls that arrive meanwhile are turned down with `no_service`.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the service withdrawn.
    pub async fn drain(self) {
        self.shared.withdraw(&self.cell.name);
        self.cell.drain().await;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.withdraw(&self.cell.name);
        self.shared.remove_service(&self.cell.name);
    }
}
