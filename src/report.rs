//! What became of what was sent: reasons, reports and counters.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::identity::NodeId;

/// Why a message was dropped. Every drop is counted under one of these at its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// The queue for the peer is full: it takes messages more slowly than they are sent.
    SlowPeer,
    /// The link ended while the message was still queued here.
    LinkLost,
    /// The body is longer than that peer takes.
    TooLarge,
    /// A subscription's queue was full at the receiver.
    SlowSubscriber,
    /// A later message of its topic took its place before it was read
    /// ([`Overflow::KeepLatest`](crate::Overflow::KeepLatest)).
    Superseded,
    /// No subscription was left when the message arrived.
    NoSubscriber,
    /// Nobody served the name any more when the message arrived.
    NoService,
    /// The receiver's rules don't let this node do that.
    NotAllowed,
    /// Its time to live ran out before it could be handled.
    Expired,
    /// Its sender took it back.
    Cancelled,
    /// Its handler failed, and nobody waited for a reply.
    HandlerFailed,
    /// A reply that nobody waited for any more.
    Late,
    /// The receiver's inbox remembers as much as it may, and not what came from this sender. A
    /// guaranteed message is tried again.
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

    /// The name as it stands in reports and on the wire.
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

/// What a publish did, at the time it returned. It counts nodes, not subscriptions; the
/// publishing node itself is one of them if it subscribes.
///
/// `Queued` is the promise: the message is on its way, and what is lost later is counted in
/// [`Counters`] and told as an event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublishReport {
    /// For how many nodes the message was queued.
    pub queued: usize,
    /// For which nodes it was dropped, and why.
    pub dropped: Vec<(NodeId, DropReason)>,
}

impl PublishReport {
    /// Whether nobody subscribes to the topic.
    pub fn is_unheard(&self) -> bool {
        self.queued == 0 && self.dropped.is_empty()
    }
}

/// All that a node has sent, received and dropped since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Counters {
    /// Calls of `publish` that were accepted.
    pub published: u64,
    /// Messages queued for peers: events once for each node, one-way messages, requests,
    /// replies.
    pub queued: u64,
    /// Messages received from peers.
    pub received: u64,
    /// Messages handed to local subscriptions, once for each subscription.
    pub delivered: u64,
    /// Calls that local handlers ended, with or without success.
    pub handled: u64,
    /// Requests sent, to peers or to this node itself.
    pub requests: u64,
    /// Messages of ours that were dropped, here or at the receiver, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Messages that had been sent when their link was lost, and of which nobody can say
    /// whether they were handled.
    pub in_doubt: u64,
    /// Messages of others that this node dropped after receipt, by reason; their senders count
    /// them as dropped.
    pub dropped_for_others: BTreeMap<DropReason, u64>,
    /// Ordering keys whose messages went to another instance of their service than before.
    pub moved_keys: u64,
    /// Guaranteed messages that were stored here.
    pub stored: u64,
    /// Guaranteed messages of ours that all their destinations have processed.
    pub settled: u64,
    /// Guaranteed messages of ours that became dead letters.
    pub dead_lettered: u64,
    /// Guaranteed messages of others that came again after they had been processed, and were not
    /// processed again.
    pub duplicates: u64,
    /// Links that were up at some time.
    pub links: u64,
    /// Connections that were refused or cut by the front door, by reason; and, as
    /// `too_many_subscribers`, peers that the outbox doesn't remember.
    pub refused: BTreeMap<String, u64>,
}

impl Counters {
    /// All messages of ours that were dropped.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().fold(0, |total, count| total.saturating_add(*count))
    }
}
