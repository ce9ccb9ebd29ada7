//! One connection to a broker, whatever its kind.

use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::{Guaranteed, Outgoing};
use crate::address::{Pattern, ServiceName};

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConnectError {
    pub(crate) text: String,
    /// Trying again won't help: the credentials are wrong, say.
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

/// A connection that was lost, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost(pub(crate) String);

/// How long a broker may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// Tells of the end of a connection, once it is known why.
#[derive(Clone)]
pub(super) struct Ending(watch::Sender<Option<String>>);

impl Ending {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    pub(super) fn tell(&self, why: impl std::fmt::Display) {
        self.0.send_replace(Some(why.to_string()));
    }

    /// Waits for it.
    pub(super) async fn lost(&self) -> Lost {
        let mut told = self.0.subscribe();
        let why = told.wait_for(Option::is_some).await;
        Lost(why.ok().and_then(|why| why.clone()).unwrap_or_else(|| "it ended".into()))
    }
}

/// What a session could not do.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The connection is gone.
    Lost(Lost),
    /// The broker refuses this one thing: an operator has to look.
    Refused(String),
}

impl Failed {
    pub(super) fn lost(error: impl std::fmt::Display) -> Self {
        Self::Lost(Lost(error.to_string()))
    }
}

/// One connection to a broker, whatever its kind.
///
/// What is promised is kept once a future ends: a subscription is in place then.
pub(crate) trait Session: Send + Sync {
    /// The broker's name and version, as it states them.
    fn title(&self) -> String;

    /// Sends a message at once, from whatever task calls, if that needs no waiting. Gives it back
    /// otherwise.
    fn try_send(&self, message: Outgoing) -> Option<Outgoing> {
        Some(message)
    }

    fn send(&self, message: Outgoing) -> Performed<'_>;

    fn subscribe(&self, pattern: Pattern) -> Performed<'_>;

    fn unsubscribe(&self, pattern: Pattern) -> Performed<'_>;

    fn serve(&self, name: ServiceName, concurrency: u32) -> Performed<'_>;

    fn withdraw(&self, name: ServiceName) -> Performed<'_>;

    /// The part for guaranteed messages, if the broker keeps any.
    fn durable(&self) -> Option<&dyn DurableSession> {
        None
    }

    /// Waits until the connection is lost.
    fn lost(&self) -> BoxFuture<'_, Lost>;

    /// Sends what is left and closes the connection.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// A session with a broker that keeps messages.
pub(crate) trait DurableSession: Send + Sync {
    /// Stores a message. Its [`Guaranteed::stored`] is told when it is confirmed.
    fn store(&self, message: Guaranteed) -> Performed<'_>;

    /// Takes the messages of a durable subscription.
    fn consume(&self, name: ServiceName, pattern: Pattern, concurrency: u32) -> Performed<'_>;

    /// Takes no more of them; they are kept.
    fn pause(&self, name: ServiceName) -> Performed<'_>;

    /// Ends the durable subscription for good.
    fn forget(&self, name: ServiceName) -> Performed<'_>;
}

/// One thing that a session does.
pub(crate) type Performed<'a> = BoxFuture<'a, Result<(), Failed>>;
