//! The broker carrier: every message is sent over one connection to a broker.
//!
//! ```text
//!  Core ── messages, wishes ──▶ BrokerClient ──▶ dyn Session ═══ broker ══ sessions of other nodes
//!   ▲                              │ reconnects, restores the wishes
//!   └──── BrokerCarrier ◀── Incoming ┘
//! ```
//!
//! A session is one connection to one kind of broker: [`embedded`], [`nats`], [`rabbitmq`]. The
//! head of each file maps this crate's terms to the broker's. [`adapter`] lists the kinds, and what
//! each lacks.

mod adapter;
mod ask;
mod carrier;
mod client;
mod credentials;
mod embedded;
mod handle;
mod hub;
mod kind;
#[cfg(feature = "nats")]
mod nats;
mod outlet;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
mod server;
mod session;
mod unpack;
mod url;
mod way;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;

pub(crate) use carrier::{BrokerCarrier, RefusedByBroker};
pub use credentials::{Credentials, CredentialsError};
pub(crate) use handle::BrokerHandle;
pub use kind::BrokerKind;
pub use server::{BrokerReport, EmbeddedBroker, EmbeddedBrokerError};
pub use url::{BrokerUrl, BrokerUrlError};

use crate::address::{Destination, MeshName, Pattern, Recipient, ServiceName, Topic};
use crate::engine::delivery::RetryPolicy;
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::wire::{DeliveryOutcome, Parcel};
use client::State;

/// The node of a session, and the settings that sessions need.
#[derive(Debug, Clone)]
pub(crate) struct Me {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) mesh: MeshName,
    pub(crate) max_body: usize,
    /// A file of CA certificates for the broker's certificate, besides the system's.
    pub(crate) ca: Option<PathBuf>,
    /// The time limit of the handler of a guaranteed message.
    pub(crate) lease: Duration,
    /// The retries of messages handled here.
    pub(crate) retry: RetryPolicy,
}

/// A message to be sent to the broker.
#[derive(Debug, Clone)]
pub(crate) enum Outgoing {
    /// An event.
    Publish(Topic, Parcel),
    /// A call or a request, with its time to live, and its id, by which it is reported if it has
    /// no receiver.
    Call(Recipient, MessageId, Option<Duration>, Parcel),
    /// A reply to a node.
    Reply(NodeId, Parcel),
    /// A message to every node of the mesh.
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

    /// Returns true if its loss is counted.
    fn counts(&self) -> bool {
        !matches!(self, Self::Broadcast(_))
    }
}

/// A message for the broker to keep until it is processed.
#[derive(Debug)]
pub(crate) struct Guaranteed {
    pub(crate) id: MessageId,
    pub(crate) to: Destination,
    pub(crate) parcel: Parcel,
    pub(crate) expires_at: Option<u64>,
    /// Notified when the broker has confirmed or refused the message.
    pub(crate) stored: oneshot::Sender<Result<(), StoreFailure>>,
}

/// The reason for which a message was not stored by the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoreFailure {
    /// The connection was lost before the broker confirmed; the broker may have the message.
    Lost,
    /// The broker refused the message.
    Refused(String),
}

/// The channel over which a message arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Via {
    /// A topic: for all matching local subscriptions, or only for those with this pattern.
    Topic(Topic, Option<Pattern>),
    Service(ServiceName),
    /// The inbox of this node.
    Inbox,
    /// The channel to every node of the mesh.
    All,
}

/// An acknowledgement of a message that the broker keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ack {
    /// The attempt ended.
    Ended(DeliveryOutcome),
    /// The message is not to be handled before this time has passed.
    Later(Duration),
}

/// A message that the broker keeps until it is acknowledged. Dropping `ack` has it delivered again.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The durable subscription to which it is delivered; `None` for a service or a node.
    pub(crate) subscription: Option<ServiceName>,
    /// The number of the attempt, from 1.
    pub(crate) attempt: u32,
    pub(crate) redelivered: bool,
    pub(crate) ack: oneshot::Sender<Ack>,
}

/// The receiver of a session's messages and reports.
pub(crate) trait Incoming: Send + Sync {
    /// Handles a message; one without a head is from another program. Dropping the ticket of a call
    /// acknowledges it.
    fn handle_message(&self, via: Via, parcel: Parcel, ticket: Option<oneshot::Sender<()>>);
    /// Handles a message that the broker keeps.
    fn handle_kept(&self, via: Via, parcel: Parcel, kept: Kept);
    /// Handles a call without a receiver.
    fn handle_unrouted(&self, id: MessageId);
    /// Handles a change of the connection's state.
    fn handle_state(&self, state: &State);
    /// Handles the drop of messages of this node on their way.
    fn handle_dropped(&self, reason: DropReason, count: u64);
}

/// The broker's action on a message that it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AckAction {
    Forget,
    /// Keep the message as a dead letter, for that reason.
    DeadLetter(String),
    /// Deliver the message again after that time.
    Again(Duration),
}

impl AckAction {
    /// Decides the action after an attempt. `None` stands for a missing acknowledgement.
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

/// For the fuzzer: the messages of two clients to the embedded broker.
#[cfg(fuzzing)]
pub(crate) fn check_hub(bytes: &[u8]) {
    struct Nowhere;
    impl crate::link::Link for Nowhere {
        fn send(&self, _: Vec<bytes::Bytes>) {}
        fn close(&self) {}
    }
    let (mut hub, mut rest) = (hub::Hub::default(), bytes);
    let mut take = |most: usize| {
        let (len, after) = rest.split_first()?;
        let (taken, after) = after.split_at(usize::from(*len).min(most).min(after.len()));
        rest = after;
        Some(taken)
    };
    let now = std::time::Instant::now();
    let clients = [0, 1]
        .map(|_| hub.handle_connected(now, outlet::Outlet::new(std::sync::Arc::new(Nowhere))));
    while let Some(head) = take(2) {
        let [client, count] = [0, 1].map(|place| head.get(place).copied().unwrap_or_default());
        let frames: Vec<_> =
            (0..count % 8).map_while(|_| take(255).map(bytes::Bytes::copy_from_slice)).collect();
        hub.handle(clients[usize::from(client % 2)], &frames);
    }
    hub.handle_tick(now + Duration::from_secs(60));
    clients.into_iter().for_each(|client| hub.handle_closed(client));
    assert!(hub.is_empty(), "nothing is left of clients that went");
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
