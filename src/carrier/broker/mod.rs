//! The broker carrier: every message goes by a connection to a broker.
//!
//! ```text
//!  Core ── messages, wishes ──▶ BrokerClient ──▶ dyn Session ═══ broker ═══ sessions of other nodes
//!   ▲                              │ connects again, restores the wishes
//!   └──── BrokerCarrier ◀── Incoming ┘
//! ```
//!
//! A session is one connection to one kind of broker: [`embedded`], [`nats`], [`rabbitmq`]. Each
//! file maps the words of this crate to the broker's own at its head; [`adapter`] lists the kinds,
//! and what each lacks.

mod adapter;
mod ask;
mod carrier;
mod client;
mod embedded;
mod hub;
mod kind;
#[cfg(feature = "nats")]
mod nats;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
mod session;
mod unpack;
mod url;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;

pub(crate) use carrier::{BrokerCarrier, BrokerHandle, RefusedByBroker};
pub use hub::{BrokerReport, EmbeddedBroker, EmbeddedBrokerError};
pub use kind::BrokerKind;
pub use url::{BrokerUrl, BrokerUrlError};

use crate::address::{Destination, MeshName, Pattern, Recipient, ServiceName, Topic};
use crate::engine::delivery::RetryPolicy;
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::wire::{DeliveryOutcome, Parcel};
use client::State;

/// Who a session speaks for.
#[derive(Debug, Clone)]
pub(crate) struct Me {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) mesh: MeshName,
    /// A file of certificates that the broker's own is checked against, besides the system's.
    pub(crate) ca: Option<PathBuf>,
    /// How long the handler of a guaranteed message may take.
    pub(crate) lease: Duration,
    /// The retries of a message that is handled here.
    pub(crate) retry: RetryPolicy,
}

/// A message for the broker.
#[derive(Debug, Clone)]
pub(crate) enum Outgoing {
    /// An event.
    Publish(Topic, Parcel),
    /// A call or a request, with its id, by which it is reported if nobody takes it, and its time
    /// to live.
    Call(Recipient, MessageId, Option<Duration>, Parcel),
    /// A reply to that node.
    Reply(NodeId, Parcel),
    /// For every node of the mesh.
    Broadcast(Parcel),
}

impl Outgoing {
    fn len(&self) -> usize {
        match self {
            Self::Publish(_, parcel)
            | Self::Call(_, _, _, parcel)
            | Self::Reply(_, parcel)
            | Self::Broadcast(parcel) => parcel.len(),
        }
    }

    /// Returns true if its end with a session is a loss to be counted.
    fn counts(&self) -> bool {
        !matches!(self, Self::Broadcast(_))
    }
}

/// A message that the broker is to keep until it is processed.
#[derive(Debug)]
pub(crate) struct Guaranteed {
    pub(crate) id: MessageId,
    pub(crate) to: Destination,
    pub(crate) parcel: Parcel,
    pub(crate) expires_at: Option<u64>,
    /// Told once the broker has confirmed it.
    pub(crate) stored: oneshot::Sender<Result<(), StoreFailure>>,
}

/// Why a broker did not keep a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoreFailure {
    /// The connection was lost before the broker confirmed: it may have it.
    Lost,
    /// The broker said no.
    Refused(String),
}

/// How a message came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Via {
    /// On a topic, for all local subscriptions that match, or for those with this very pattern.
    Topic(Topic, Option<Pattern>),
    Service(ServiceName),
    /// To this node.
    Inbox,
    /// To every node of the mesh.
    All,
}

/// Word to a broker about a message that it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ack {
    /// Its attempt ended.
    Ended(DeliveryOutcome),
    /// It is not to be handled before so much time has passed.
    Later(Duration),
}

/// A message that the broker keeps until it is acknowledged. Dropping the sender has it delivered
/// again.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The durable subscription that it is for; `None` for a service.
    pub(crate) subscription: Option<ServiceName>,
    /// From 1.
    pub(crate) attempt: u32,
    pub(crate) redelivered: bool,
    pub(crate) ack: oneshot::Sender<Ack>,
}

/// What sessions bring to a node.
pub(crate) trait Incoming: Send + Sync {
    /// A message; one without a head comes from another program. Dropping the ticket of a call acknowledges it.
    fn handle_message(&self, via: Via, parcel: Parcel, ticket: Option<oneshot::Sender<()>>);
    fn handle_kept(&self, via: Via, parcel: Parcel, kept: Kept);
    /// Nobody takes that call.
    fn handle_unrouted(&self, id: MessageId);
    /// Whether the broker can be talked to has changed.
    fn handle_state(&self, state: &State);
    /// Messages of this node were dropped on their way.
    fn handle_dropped(&self, reason: DropReason, count: u64);
}

/// The use that a broker makes of a message that it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AckAction {
    Forget,
    /// Keep it as a dead letter, for that reason.
    DeadLetter(String),
    /// Deliver it again after that time.
    Again(Duration),
}

impl AckAction {
    /// Follows from the word about an attempt; `None` is an attempt that was given up.
    pub(crate) fn after(ack: Option<Ack>, attempt: u32, retry: &RetryPolicy) -> Self {
        match ack {
            Some(Ack::Later(wait)) => Self::Again(wait),
            Some(Ack::Ended(DeliveryOutcome::Processed)) => Self::Forget,
            Some(Ack::Ended(DeliveryOutcome::Failed(reason))) if attempt >= retry.max_attempts => {
                Self::DeadLetter(reason)
            }
            Some(Ack::Ended(DeliveryOutcome::Rejected(reason))) => Self::DeadLetter(reason),
            Some(Ack::Ended(DeliveryOutcome::Expired)) => Self::DeadLetter("it expired".into()),
            Some(Ack::Ended(
                DeliveryOutcome::Failed(_) | DeliveryOutcome::Refused | DeliveryOutcome::NoInbox,
            ))
            | None => Self::Again(retry.pause(attempt.saturating_sub(1))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_retried_ever_later_and_become_dead_letters_in_the_end() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(1));
        let retry = RetryPolicy { max_attempts: 3, first, longest };
        let failed = |attempt| {
            let ack = Ack::Ended(DeliveryOutcome::Failed("no".into()));
            AckAction::after(Some(ack), attempt, &retry)
        };
        assert_eq!(failed(1), AckAction::Again(first));
        assert_eq!(failed(2), AckAction::Again(2 * first));
        assert_eq!(failed(3), AckAction::DeadLetter("no".into()));
        assert_eq!(AckAction::after(None, u32::MAX, &retry), AckAction::Again(longest));
    }
}
