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
use crate::identity::NodeId;
use crate::peer::{PeerInfo, Unreachable};

/// The instance that takes a call.
pub(crate) enum Choice {
    Found(Arc<dyn Way>),
    /// Nobody yet. `otherwise` takes the call when the grace is over.
    Later {
        otherwise: Option<Arc<dyn Way>>,
    },
    /// Nobody, and waiting is of no use.
    Nobody,
}

/// A condition on the other nodes that a user waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// So many nodes subscribe to a topic, this one included.
    Subscribers(Topic, usize),
    /// So many durable subscriptions to a topic are known.
    Consumers(Topic, usize),
    /// So many nodes serve a name, this one included.
    Instances(ServiceName, usize),
    /// So many peers are up.
    Peers(usize),
}

/// The reason for which a condition was not met.
#[derive(Debug)]
pub(crate) enum NotMet {
    TimedOut,
    Unsupported(Unsupported),
}

/// What a node wants for as long as it lives, whatever becomes of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    Subscribe(Pattern),
    Serve(ServiceName, u32),
    Consume(ServiceName, Pattern, u32),
}

/// How a wish ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WishEnd {
    /// A durable subscription may come back: what is for it is kept.
    Pause,
    /// It ends for good.
    Forget,
}

/// The reason for which a carrier can't keep messages or have durable subscriptions.
#[derive(Debug)]
pub(crate) enum CannotKeep {
    /// The node has no store.
    NoStore,
    /// The node draws a new identity at each start.
    NoIdentity,
    Unsupported(Unsupported),
}

/// Carries a node's messages.
pub(crate) trait Carrier: Send + Sync {
    /// # Errors
    /// [`Unsupported`] if it lacks that ability.
    fn require(&self, capability: Capability) -> Result<(), Unsupported>;

    /// # Errors
    /// [`CannotKeep`] if guaranteed messages can't be stored.
    fn check_store(&self) -> Result<(), CannotKeep>;

    /// # Errors
    /// [`CannotKeep`] if this node can't have durable subscriptions.
    fn check_consumer(&self) -> Result<(), CannotKeep>;

    /// Begins to fulfil a wish.
    fn wish(&self, wish: Wish);

    /// Ends a wish.
    fn end_wish(&self, wish: Wish, end: WishEnd);

    /// Passes the ways on which an event of that topic goes to `each`. Returns true if this
    /// node's own subscriptions are not among those that they reach.
    fn subscribers(&self, topic: &Topic, each: &mut dyn FnMut(&Arc<dyn Way>)) -> bool;

    /// Chooses the instance that takes a call.
    fn choose(&self, recipient: &Recipient, key: Option<&str>) -> Choice;

    /// Stores guaranteed messages, together.
    fn store(&self, messages: SmallVec<[NewGuaranteed; 1]>) -> Result<Submission, OutboxError>;

    /// Waits until a condition is met.
    fn wait<'a>(
        &'a self,
        condition: Condition,
        within: Duration,
    ) -> BoxFuture<'a, Result<(), NotMet>>;

    fn peers(&self) -> Vec<PeerInfo>;

    fn unreachable(&self) -> Vec<Unreachable>;

    /// The bytes that wait for a peer.
    fn queued_bytes(&self, peer: &NodeId) -> u64;

    /// Makes no more connections.
    fn stop_linking(&self);

    /// Waits until the other side has confirmed all that it was sent.
    fn settle(&self) -> BoxFuture<'_, ()>;

    /// Says goodbye and closes; returns the number of guaranteed messages that are left.
    fn close(&self, deadline: Instant) -> BoxFuture<'_, u64>;

    /// Closes without a goodbye.
    fn abandon(&self);
}
