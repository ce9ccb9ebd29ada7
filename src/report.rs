//! The outcome of sends: reasons, reports and counters.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::identity::NodeId;

/// The reason for which a message was dropped. Its sender counts every drop under its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// The queue for the peer is full: the peer reads more slowly than this node sends.
    SlowPeer,
    /// The link ended while the message was still queued here.
    LinkLost,
    /// The body is longer than the peer accepts.
    TooLarge,
    /// A subscription's queue was full at the receiver.
    SlowSubscriber,
    /// A later message of its topic replaced it before it was read
    /// ([`Overflow::KeepLatest`](crate::Overflow::KeepLatest)).
    Superseded,
    /// No subscription was left when the message arrived.
    NoSubscriber,
    /// No node served the name any more when the message arrived.
    NoService,
    /// The receiver's rules don't allow it.
    NotAllowed,
    /// Its time to live ran out before it was handled.
    Expired,
    /// Its sender cancelled it.
    Cancelled,
    /// Its handler failed, and no reply was wanted.
    HandlerFailed,
    /// The reply came after its request had ended.
    Late,
    /// The receiver's inbox has no room to remember the message: it is full, or the sender has its
    /// share. A guaranteed message is retried.
    InboxFull,
    /// The receiver gave a reason that this version doesn't know.
    Other,
}

impl DropReason {
    const ALL: [Self; 14] = [
        Self::SlowPeer,
        Self::LinkLost,
        Self::TooLarge,
        Self::SlowSubscriber,
        Self::Superseded,
        Self::NoSubscriber,
        Self::NoService,
        Self::NotAllowed,
        Self::Expired,
        Self::Cancelled,
        Self::HandlerFailed,
        Self::Late,
        Self::InboxFull,
        Self::Other,
    ];

    /// The name used in reports and on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SlowPeer => "slow_peer",
            Self::LinkLost => "link_lost",
            Self::TooLarge => "too_large",
            Self::SlowSubscriber => "slow_subscriber",
            Self::Superseded => "superseded",
            Self::NoSubscriber => "no_subscriber",
            Self::NoService => "no_service",
            Self::NotAllowed => "not_allowed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::HandlerFailed => "handler_failed",
            Self::Late => "late",
            Self::InboxFull => "inbox_full",
            Self::Other => "other",
        }
    }

    pub(crate) fn from_wire(text: &str) -> Self {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text).unwrap_or(Self::Other)
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The outcome of a publish, at the time it returned. It counts nodes, not subscriptions; the
/// publishing node itself is one of them if it subscribes.
///
/// The promise is `Queued`: the message is on its way, and later losses are counted in [`Counters`]
/// and reported as events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublishReport {
    /// The number of nodes for which the message was queued.
    pub queued: usize,
    /// The nodes for which it was dropped, and the reasons.
    pub dropped: Vec<(NodeId, DropReason)>,
}

impl PublishReport {
    /// Returns true if no node subscribes to the topic.
    pub fn is_unheard(&self) -> bool {
        self.queued == 0 && self.dropped.is_empty()
    }
}

/// The messages that a node has sent, received and dropped since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Counters {
    /// Accepted calls of `publish`.
    pub published: u64,
    /// Messages queued for peers: events once for each node, one-way messages, requests,
    /// replies.
    pub queued: u64,
    /// Messages received from peers.
    pub received: u64,
    /// Messages delivered to local subscriptions, once for each subscription.
    pub delivered: u64,
    /// Calls that local handlers finished, successfully or not.
    pub handled: u64,
    /// Requests sent to peers or to this node itself.
    pub requests: u64,
    /// Messages from this node that were dropped, here or at the receiver, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Messages in flight when their link was lost: it is unknown if they were handled.
    pub in_doubt: u64,
    /// Messages from peers that this node dropped after receipt, by reason; their senders count
    /// them as dropped.
    pub dropped_for_others: BTreeMap<DropReason, u64>,
    /// Ordering keys whose messages moved to another instance of their service.
    pub moved_keys: u64,
    /// Senders of guaranteed messages that the full inbox forgot: their duplicates may run again,
    /// with [`is_redelivered`](crate::Message::is_redelivered).
    pub forgotten_senders: u64,
    /// Guaranteed messages stored here.
    pub stored: u64,
    /// Guaranteed messages from this node that all their destinations have processed.
    pub settled: u64,
    /// Guaranteed messages from this node that became dead letters.
    pub dead_lettered: u64,
    /// Duplicates of guaranteed messages from peers that were processed before; they were not
    /// processed again.
    pub duplicates: u64,
    /// Links that have been up.
    pub links: u64,
    /// Connections that the front door refused or cut, by reason; and, as `too_many_subscribers`,
    /// peers that the outbox doesn't remember, and as `lapsed_subscriptions`, durable subscriptions
    /// that it ended.
    pub refused: BTreeMap<String, u64>,
}

impl Counters {
    /// The number of messages from this node that were dropped.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().fold(0, |total, count| total.saturating_add(*count))
    }
}
