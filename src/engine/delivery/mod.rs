//! Guaranteed delivery: the sender's outbox and the receiver's inbox.
//!
//! ```text
//!   sender's outbox                                       receiver's inbox
//!  submit ─▶ journal, synced ─▶ Stored                      (its own journal)
//!            │ bound to a node, numbered in its stream
//!            └──── message (stream, seq, attempt) ─────────▶ known? else handler
//!  settled ◀──────── answer (stream, seq, attempt) ◀──────── Ok: journal, synced
//!  tried again with backoff ◀─ failed                        error: nothing stored
//!  dead letter ◀─ rejected, expired, failed too often
//! ```
//!
//! A message is numbered anew for each node that it is bound to; the pair of stream and number
//! names that delivery for good, however often it is sent.

mod inbox;
mod numbered;
mod outbox;
mod ranges;
mod record;

pub(crate) use inbox::{Inbox, InboxAction, Verdict};
pub(crate) use numbered::Numbered;
pub(crate) use outbox::{
    Contents, DeliveryKey, Full, NewMessage, NewMessages, Outbox, OutboxAction, OutboxConfig,
    OutboxEvent, Source, Submitted,
};
pub(crate) use record::RecordError;
#[cfg(fuzzing)]
pub(crate) use record::check as check_record;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address::ServiceName;
use crate::engine::Time;
use crate::identity::NodeId;
use crate::wire::Stream;

/// How often a guaranteed message is tried, and how long it is left alone in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RetryPolicy {
    /// So many failures of its handler make a message a dead letter.
    pub(crate) max_attempts: u32,
    /// The pause after the first attempt, at the most. It doubles with each.
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
    /// How long a message is left alone, at the most, that has been tried so often before.
    pub(crate) fn pause(&self, times_before: u32) -> Duration {
        self.first.saturating_mul(1 << times_before.min(31)).min(self.longest)
    }
}

/// Now, by the clock that never jumps and by the one on the wall, which only expiry and schedules
/// go by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) time: Time,
    /// In ms since 1970.
    pub(crate) unix_ms: u64,
}

/// Where a guaranteed message has to go.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Target {
    /// To one of the nodes that serve the name.
    Service(ServiceName),
    /// To one node.
    Node(NodeId),
    /// To the durable subscription of that name, of that node.
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

/// The node that a message was given to, and its number there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) node: NodeId,
    pub(crate) stream: Stream,
    pub(crate) seq: u64,
}

/// Why a message is a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DeadLetterReason {
    /// It expired before it was processed.
    #[error("it expired{}", if *.maybe_processed { "; a handler may have had it" } else { "" })]
    Expired {
        /// Whether it was sent, so that a handler may have had it.
        maybe_processed: bool,
    },
    /// Its handler failed too often.
    #[error("its handler failed {failures} times, the last time with: {text}")]
    Failed {
        /// How often.
        failures: u32,
        /// What the handler said the last time.
        text: String,
    },
    /// Its handler rejected it for good, or the receiver's rules don't allow it.
    #[error("it was rejected: {text}")]
    Rejected {
        /// What the handler said.
        text: String,
    },
    /// It is longer than its receiver takes.
    #[error("it is longer than its receiver takes")]
    TooLarge,
    /// What is stored of it can't be read any more: its body is lost.
    #[error("what is stored of it can't be read")]
    Unreadable,
}
