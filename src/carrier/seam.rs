//! The seam between a node and the carrier of its messages.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::capability::{Capability, Unsupported};
use super::guaranteed::{NewGuaranteed, OutboxError, Submission};
use crate::address::{Pattern, Recipient, ServiceName, Topic};
use crate::core::Way;
use crate::engine::TooMany;
use crate::identity::NodeId;
use crate::peer::{PeerInfo, Unreachable};

/// The choice of an instance for a call.
pub(crate) enum Choice {
    Found(Arc<dyn Way>),
    /// No instance yet. `otherwise` takes the call when the grace period is over.
    Later {
        otherwise: Option<Arc<dyn Way>>,
    },
    /// No instance, and waiting is of no use.
    Nobody,
}

/// A condition on the mesh for which a user waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// At least n nodes subscribe to a topic, this one included.
    Subscribers(Topic, usize),
    /// At least n durable subscriptions to a topic are known.
    Consumers(Topic, usize),
    /// At least n durable subscriptions to a topic accept messages now.
    PresentConsumers(Topic, usize),
    /// At least n nodes serve a name, this one included.
    Instances(ServiceName, usize),
    /// At least n peers are up.
    Peers(usize),
}

/// The reason for which a condition was not met.
#[derive(Debug)]
pub(crate) enum NotMet {
    TimedOut,
    Unsupported(Unsupported),
}

/// A standing wish of a node, which outlives any connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    Subscribe(Pattern),
    Serve(ServiceName, u32),
    Consume(ServiceName, Pattern, u32),
}

/// The end of a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WishEnd {
    /// A durable subscription may come back: its messages are kept.
    Pause,
    /// The wish ends permanently.
    Forget,
}

/// The reason for which a carrier can't keep messages or have durable subscriptions.
#[derive(Debug)]
pub(crate) enum CannotKeep {
    /// The node has no store.
    NoStore,
    /// The node has a new identity at each start.
    NoIdentity,
    Unsupported(Unsupported),
}

/// A carrier of a node's messages.
pub(crate) trait Carrier: Send + Sync {
    /// Checks that the carrier has an ability.
    ///
    /// # Errors
    /// [`Unsupported`] if it lacks that ability.
    fn require(&self, capability: Capability) -> Result<(), Unsupported>;

    /// Checks that guaranteed messages can be stored.
    ///
    /// # Errors
    /// [`CannotKeep`] if they can't.
    fn check_store(&self) -> Result<(), CannotKeep>;

    /// Checks that this node can have durable subscriptions.
    ///
    /// # Errors
    /// [`CannotKeep`] if it can't.
    fn check_consumer(&self) -> Result<(), CannotKeep>;

    /// Begins to fulfil a wish.
    ///
    /// # Errors
    /// [`TooMany`] if the other side accepts no more of that kind.
    fn wish(&self, wish: Wish) -> Result<(), TooMany>;

    /// Ends a wish.
    fn end_wish(&self, wish: Wish, end: WishEnd);

    /// Passes each way on which an event of that topic is sent to `each`. Returns true if none of
    /// the ways reaches this node's own subscriptions.
    fn subscribers(&self, topic: &Topic, each: &mut dyn FnMut(&Arc<dyn Way>)) -> bool;

    /// Chooses the instance that takes a call.
    fn choose(&self, recipient: &Recipient, key: Option<&str>) -> Choice;

    /// Stores guaranteed messages, all of them or none.
    fn store(&self, messages: SmallVec<[NewGuaranteed; 1]>) -> Result<Submission, OutboxError>;

    /// Waits until a condition is met.
    fn wait<'a>(
        &'a self,
        condition: Condition,
        within: Duration,
    ) -> BoxFuture<'a, Result<(), NotMet>>;

    fn peers(&self) -> Vec<PeerInfo>;

    fn unreachable(&self) -> Vec<Unreachable>;

    /// Returns the number of bytes queued for a peer.
    fn queued_bytes(&self, peer: &NodeId) -> u64;

    /// Makes no more connections.
    fn stop_linking(&self);

    /// Waits until the other side has confirmed all sent messages.
    fn settle(&self) -> BoxFuture<'_, ()>;

    /// Says goodbye and closes. Returns the number of unprocessed guaranteed messages.
    fn close(&self, deadline: Instant) -> BoxFuture<'_, u64>;

    /// Closes without a goodbye.
    fn abandon(&self);
}
