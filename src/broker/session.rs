//! One connection to a broker, whatever its kind.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

#[cfg(feature = "nats")]
use super::nats;
#[cfg(feature = "rabbitmq")]
use super::rabbitmq;
use super::{BrokerKind, BrokerUrl, Command, Incoming, Me, embedded};

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

pub(crate) enum Session {
    Embedded(embedded::Session),
    #[cfg(feature = "nats")]
    Nats(Box<nats::Session>),
    #[cfg(feature = "rabbitmq")]
    RabbitMq(Box<rabbitmq::Session>),
}

macro_rules! each {
    ($self:expr, $session:ident => $act:expr) => {
        match $self {
            Session::Embedded($session) => $act,
            #[cfg(feature = "nats")]
            Session::Nats($session) => $act,
            #[cfg(feature = "rabbitmq")]
            Session::RabbitMq($session) => $act,
        }
    };
}

impl Session {
    pub(crate) async fn connect(
        url: &BrokerUrl,
        me: &Me,
        incoming: &Arc<dyn Incoming>,
    ) -> Result<Self, ConnectError> {
        match url.kind() {
            BrokerKind::Embedded => {
                embedded::Session::connect(url, me, incoming).await.map(Self::Embedded)
            }
            #[cfg(feature = "nats")]
            BrokerKind::Nats => {
                nats::Session::connect(url, me, incoming).await.map(Box::new).map(Self::Nats)
            }
            #[cfg(feature = "rabbitmq")]
            BrokerKind::RabbitMq => rabbitmq::Session::connect(url, me, incoming)
                .await
                .map(Box::new)
                .map(Self::RabbitMq),
            #[cfg(not(all(feature = "nats", feature = "rabbitmq")))]
            kind => Err(ConnectError::for_good(format!("{kind} is not built in"))),
        }
    }

    /// What the broker calls itself.
    pub(crate) fn title(&self) -> String {
        each!(self, session => session.title())
    }

    /// Does one thing; the next is asked for when it is done. What it promised is kept: a
    /// subscription is in place then.
    pub(crate) async fn perform(&self, command: Command) -> Result<(), Failed> {
        each!(self, session => session.perform(command).await)
    }

    /// Performs at once, from whatever task asks, a command that waits for nothing; gives it back
    /// if that can't be done now.
    pub(crate) fn perform_now(&self, command: Command) -> Option<Command> {
        match self {
            #[cfg(feature = "nats")]
            Self::Nats(session) => session.perform_now(command),
            _ => Some(command),
        }
    }

    /// Waits until the connection is lost.
    pub(crate) async fn lost(&self) -> Lost {
        each!(self, session => session.lost().await)
    }

    /// Sends what is left and closes the connection.
    pub(crate) async fn close(&self) {
        each!(self, session => session.close().await);
    }
}
