//! Guaranteed delivery: the sender's outbox and the receiver's inbox.
//!
//! ```text
//!   sender's outbox                                       receiver's inbox
//!  submit ─▶ journal, synced ─▶ Stored                      (its own journal)
//!            │ bound to a node, numbered in its stream
//!            └──── message (stream, seq, attempt) ─────────▶ known? else handler
//!  settled ◀──────── answer (stream, seq, attempt) ◀──────── Ok: journal, synced
//!  retried with backoff ◀── failed                           error: nothing stored
//!  dead letter ◀─ rejected, expired, failed too often
//! ```
//!
//! A message gets a new sequence number for each node that it is bound to; the pair of stream and
//! number identifies that delivery permanently, over all attempts.

mod inbox;
mod numbered;
mod outbox;
mod ranges;
mod record;

pub(crate) use inbox::{Inbox, InboxAction, Verdict};
pub(crate) use numbered::Numbered;
pub(crate) use outbox::{
    Contents, DeliveryKey, Full, MAX_SUBSCRIPTIONS, NewMessage, NewMessages, Outbox, OutboxAction,
    OutboxConfig, OutboxEvent, Source, Submitted,
};
pub(crate) use record::RecordError;
#[cfg(fuzzing)]
pub(crate) use record::check as check_record;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address::ServiceName;
use crate::engine::Time;
use crate::identity::NodeId;
use crate::text::Line;
use crate::wire::Stream;

/// The retries of guaranteed messages: their number, and the backoff between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RetryPolicy {
    /// The number of handler failures that make a message a dead letter.
    pub(crate) max_attempts: u32,
    /// The longest backoff after the first attempt. It doubles with each.
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        let (first, longest) = (Duration::from_millis(200), Duration::from_secs(60));
        Self { max_attempts: 10, first, longest }
    }
}

impl RetryPolicy {
    /// Returns the longest backoff after that many earlier attempts.
    pub(crate) fn pause(&self, times_before: u32) -> Duration {
        self.first.saturating_mul(1 << times_before.min(31)).min(self.longest)
    }
}

/// The current time, by the monotonic clock and by the wall clock. Only expiry and schedules use
/// the wall clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) time: Time,
    /// In ms since the Unix epoch.
    pub(crate) unix_ms: u64,
}

/// The destination of a guaranteed message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Target {
    /// One of the nodes that serve the name.
    Service(ServiceName),
    /// One node.
    Node(NodeId),
    /// The durable subscription of that name, at that node.
    Subscription(NodeId, ServiceName),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(name) => name.fmt(f),
            Self::Node(node) => write!(f, "node {}", node.short()),
            Self::Subscription(node, name) => write!(f, "{name} of {}", node.short()),
        }
    }
}

/// The node that a message is bound to, and the delivery's stream and number there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) node: NodeId,
    pub(crate) stream: Stream,
    pub(crate) seq: u64,
}

/// The reason for which an outbox ended a durable subscription that its node did not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Lapse {
    /// The node was away for longer than
    /// [`Config::forget_subscribers_after`](crate::Config::forget_subscribers_after).
    #[error("its node was away for too long")]
    Absent,
    /// The rules no longer allow it, or the node's key is no longer trusted.
    #[error("it is no longer allowed")]
    NotAllowed,
    /// The outbox has too many subscriptions, and this one never took a message. Reported only if
    /// messages were kept for it; all are counted in
    /// [`Counters::refused`](crate::Counters::refused) as `lapsed_subscriptions`.
    #[error("there are too many, and it never took a message")]
    NoRoom,
}

/// The reason for which a message is a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DeadLetterReason {
    /// The message expired before it was processed.
    #[error(
        "expired before it was processed{}",
        if *.maybe_processed { "; a handler may have received it" } else { "" }
    )]
    Expired {
        /// True if the message was sent, so that a handler may have received it.
        maybe_processed: bool,
    },
    /// The handler failed too often.
    #[error("the handler failed {failures} times; the last error: {}", Line(text))]
    Failed {
        /// The number of failures.
        failures: u32,
        /// The handler's last error.
        text: String,
    },
    /// The handler rejected the message permanently, or the receiver's rules forbid it.
    #[error("rejected: {}", Line(text))]
    Rejected {
        /// The reason given by the receiver.
        text: String,
    },
    /// This node's rules no longer let the receiver have the message.
    #[error("this node's rules no longer let its receiver have it")]
    NotAllowed,
    /// The message is larger than its receiver accepts.
    #[error("larger than its receiver accepts")]
    TooLarge,
    /// The stored message is no longer readable: its body is lost.
    #[error("the stored message can't be read")]
    Unreadable,
}
