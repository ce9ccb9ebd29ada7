//! Sessions: one connection to a broker of any kind.

use std::time::Duration;

use futures_util::future::{BoxFuture, TryFutureExt};
use tokio::sync::watch;

use super::{Guaranteed, Outgoing};
use crate::address::{Pattern, ServiceName};

/// The error of connecting to a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConnectError {
    pub(crate) text: String,
    /// A retry is of no use, for example with wrong credentials.
    pub(crate) for_good: bool,
}

impl ConnectError {
    pub(crate) fn passing(error: impl std::fmt::Display) -> Self {
        Self { text: error.to_string(), for_good: false }
    }

    pub(crate) fn for_good(error: impl std::fmt::Display) -> Self {
        Self { text: error.to_string(), for_good: true }
    }
}

/// The future of a session that is being connected.
pub(super) type Connecting<'a> = BoxFuture<'a, Result<Box<dyn Session>, ConnectError>>;

/// Boxes a session that is being connected, so that all kinds have the same type.
pub(super) fn boxed<'a, S: Session + 'static>(
    connecting: impl Future<Output = Result<S, ConnectError>> + Send + 'a,
) -> Connecting<'a> {
    Box::pin(connecting.map_ok(|session| Box::new(session) as Box<dyn Session>))
}

/// Reads the CA certificates for a broker, which others must not be able to change.
#[cfg(any(feature = "nats", feature = "rabbitmq"))]
pub(super) fn certificates(path: &std::path::Path) -> Result<String, ConnectError> {
    let failed = |error| ConnectError::for_good(format!("{}: {error}", path.display()));
    crate::private::read(path, crate::private::Others::MayRead).map_err(failed)
}

/// Runs a future of a broker's client without its log lines: while it connects, it logs the
/// credentials.
#[cfg(any(feature = "nats", feature = "rabbitmq"))]
pub(super) fn unlogged<F: Future>(future: F) -> tracing::instrument::WithDispatch<F> {
    tracing::instrument::WithSubscriber::with_subscriber(
        future,
        tracing::subscriber::NoSubscriber::default(),
    )
}

/// The reason for which a connection was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost(pub(crate) String);

/// The time limit of a broker's answer.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// The end of a connection, reported with its reason.
#[derive(Clone)]
pub(super) struct Ending(watch::Sender<Option<String>>);

impl Ending {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    pub(super) fn tell(&self, why: impl std::fmt::Display) {
        self.0.send_replace(Some(why.to_string()));
    }

    /// Waits for the end of the connection.
    pub(super) async fn lost(&self) -> Lost {
        let mut told = self.0.subscribe();
        let why = told.wait_for(Option::is_some).await;
        Lost(why.ok().and_then(|why| why.clone()).unwrap_or_else(|| "the connection ended".into()))
    }
}

/// The error of a session's operation.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The connection was lost.
    Lost(Lost),
    /// The broker refuses this operation: an operator must intervene.
    Refused(String),
}

impl Failed {
    pub(super) fn lost(error: impl std::fmt::Display) -> Self {
        Self::Lost(Lost(error.to_string()))
    }
}

/// One connection to a broker of any kind.
///
/// An operation is in effect when its future completes: a subscription is in place then.
pub(crate) trait Session: Send + Sync {
    /// Returns the broker's name and, if it states that, its version.
    fn title(&self) -> String;

    /// Sends a message at once, from the calling task, if that needs no waiting. Returns the message
    /// otherwise.
    fn try_send(&self, message: Outgoing) -> Option<Outgoing> {
        Some(message)
    }

    fn send(&self, message: Outgoing) -> Performed<'_>;

    fn subscribe(&self, pattern: Pattern) -> Performed<'_>;

    fn unsubscribe(&self, pattern: Pattern) -> Performed<'_>;

    fn serve(&self, name: ServiceName, concurrency: u32) -> Performed<'_>;

    fn withdraw(&self, name: ServiceName) -> Performed<'_>;

    /// Returns the part for guaranteed messages, if the broker keeps any.
    fn durable(&self) -> Option<&dyn DurableSession> {
        None
    }

    /// Waits until the connection is lost.
    fn lost(&self) -> BoxFuture<'_, Lost>;

    /// Sends the remaining messages and closes the connection.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// A session with a broker that keeps messages.
pub(crate) trait DurableSession: Send + Sync {
    /// Stores a message. Its [`Guaranteed::stored`] is notified when the broker has confirmed it.
    fn store(&self, message: Guaranteed) -> Performed<'_>;

    /// Starts to take the messages of a durable subscription.
    fn consume(&self, name: ServiceName, pattern: Pattern, concurrency: u32) -> Performed<'_>;

    /// Stops taking those messages; the broker keeps them.
    fn pause(&self, name: ServiceName) -> Performed<'_>;

    /// Ends the durable subscription permanently.
    fn forget(&self, name: ServiceName) -> Performed<'_>;
}

/// The future of a session's operation.
pub(crate) type Performed<'a> = BoxFuture<'a, Result<(), Failed>>;
