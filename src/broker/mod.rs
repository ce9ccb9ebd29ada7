//! Broker mode: the same API, with every message carried by a broker.
//!
//! ```text
//!  Node ── commands ──▶ BrokerClient ──▶ Session ═══ broker ═══ sessions of other nodes
//!   ▲                  │ connects again, restores what the node wants
//!   └──── Incoming ◀───┘
//! ```
//!
//! A room is what a node has in place of a mesh. Its session is one connection to one kind of
//! broker: [`embedded`], [`nats`], [`rabbitmq`]. Each file says how it maps the words of this
//! crate to the broker's own.

mod client;
mod embedded;
mod hub;
#[cfg(feature = "nats")]
mod nats;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
mod session;
mod url;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;

pub(crate) use client::{BrokerClient, Pace, State};
pub use hub::{BrokerReport, EmbeddedBroker, EmbeddedBrokerError};
pub use url::{BrokerKind, BrokerUrl, BrokerUrlError};

use crate::address::{Destination, MeshName, Pattern, Recipient, ServiceName, Topic};
use crate::engine::delivery::RetryPolicy;
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::wire::Parcel;

/// Something that this API promises and a broker has no means for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{broker} has no {what}")]
#[non_exhaustive]
pub struct Unsupported {
    /// Which broker.
    pub broker: BrokerKind,
    /// What it has not, in words.
    pub what: &'static str,
}

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
    /// How often one is tried that is handled here.
    pub(crate) retry: RetryPolicy,
}

/// What a node asks of its session.
#[derive(Debug)]
pub(crate) enum Command {
    Publish(Topic, Parcel),
    /// A call or a request, with its id, by which it is told if nobody takes it, and how long it
    /// is worth handling.
    Call(Recipient, MessageId, Option<Duration>, Parcel),
    /// A reply to that node.
    Reply(NodeId, Parcel),
    /// For every node of the mesh.
    Tell(Parcel),
    Subscribe(Pattern),
    Unsubscribe(Pattern),
    Serve(ServiceName, u32),
    Withdraw(ServiceName),
    /// A durable subscription.
    Consume(ServiceName, Pattern, u32),
    /// It takes no more for now.
    Pause(ServiceName),
    /// It ends for good.
    Forget(ServiceName),
    Store(Box<Guaranteed>),
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

/// What became of a message that a broker keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BrokerAck {
    /// Its handler returned Ok.
    Processed,
    /// Its handler failed: try again later.
    Failed(String),
    /// Its handler will never take it.
    Rejected(String),
    /// Its time ran out before.
    Expired,
    /// It is not served here now.
    Refused,
    /// It is not to be handled before so much time has passed.
    Later(Duration),
}

/// A message that the broker keeps until it is told what became of it. Dropping the sender tells
/// it that nothing did.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The durable subscription that it is for; `None` for a service.
    pub(crate) subscription: Option<ServiceName>,
    /// From 1.
    pub(crate) attempt: u32,
    pub(crate) redelivered: bool,
    pub(crate) outcome: oneshot::Sender<BrokerAck>,
}

/// Held while a call that came from a broker is handled; its drop tells the broker.
pub(crate) type Ticket = oneshot::Sender<BrokerAck>;

/// What sessions bring to a node.
pub(crate) trait Incoming: Send + Sync {
    /// A message; one without a head comes from another program.
    fn handle_message(&self, via: Via, parcel: Parcel, ticket: Option<Ticket>);
    fn handle_kept(&self, via: Via, parcel: Parcel, kept: Kept);
    /// Nobody takes that call.
    fn handle_unrouted(&self, id: MessageId);
    /// Whether the broker can be talked to has changed.
    fn handle_state(&self, state: &State);
    /// Messages of this node were dropped on their way.
    fn handle_dropped(&self, reason: DropReason, count: u64);
}

/// What a broker is to do with a message that it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Forget,
    /// Keep it as a dead letter, for that reason.
    DeadLetter(String),
    /// Deliver it again after that time.
    Again(Duration),
}

impl BrokerAck {
    /// What follows from the outcome of an attempt; `None` is one that nobody tells.
    pub(crate) fn end(outcome: Option<Self>, attempt: u32, retry: &RetryPolicy) -> End {
        match outcome {
            Some(Self::Processed) => End::Forget,
            Some(Self::Failed(reason)) if attempt >= retry.max_attempts => End::DeadLetter(reason),
            Some(Self::Rejected(reason)) => End::DeadLetter(reason),
            Some(Self::Expired) => End::DeadLetter("it expired".into()),
            Some(Self::Later(wait)) => End::Again(wait),
            Some(Self::Failed(_) | Self::Refused) | None => {
                End::Again(retry.pause(attempt.saturating_sub(1)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_left_alone_ever_longer_and_buried_in_the_end() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(1));
        let retry = RetryPolicy { max_attempts: 3, first, longest };
        let failed =
            |attempt| BrokerAck::end(Some(BrokerAck::Failed("no".into())), attempt, &retry);
        assert_eq!(failed(1), End::Again(first));
        assert_eq!(failed(2), End::Again(2 * first));
        assert_eq!(failed(3), End::DeadLetter("no".into()));
        assert_eq!(BrokerAck::end(None, u32::MAX, &retry), End::Again(longest));
    }
}
