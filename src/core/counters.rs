//! Counters shared by many tasks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::ServiceName;
use crate::identity::NodeId;
use crate::report::{Counters, DropReason};
use crate::sync::{Guard, Mutex, lock};

#[derive(Default)]
pub(crate) struct LiveCounters {
    pub(crate) published: AtomicU64,
    pub(crate) queued: AtomicU64,
    pub(crate) received: AtomicU64,
    pub(crate) delivered: AtomicU64,
    pub(crate) handled: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) in_doubt: AtomicU64,
    pub(crate) links: AtomicU64,
    pub(crate) stored: AtomicU64,
    pub(crate) settled: AtomicU64,
    pub(crate) dead_lettered: AtomicU64,
    pub(crate) duplicates: AtomicU64,
    rare: Mutex<Rare>,
}

#[derive(Default)]
struct Rare {
    dropped: BTreeMap<DropReason, u64>,
    dropped_for_others: BTreeMap<DropReason, u64>,
    refused: BTreeMap<String, u64>,
    moved_keys: u64,
    forgotten_senders: u64,
    unreported: Unreported,
}

/// Drops and moved keys that no event has reported yet.
#[derive(Default)]
pub(crate) struct Unreported {
    pub(crate) dropped: BTreeMap<(NodeId, DropReason), u64>,
    /// The number of keys of a service that moved from one node to another.
    pub(crate) moved: BTreeMap<(ServiceName, NodeId, NodeId), u64>,
    /// Senders that a full inbox forgot, and messages that it refused; and the last newcomer.
    pub(crate) inbox_full: Option<(NodeId, u64, u64)>,
}

impl Unreported {
    fn is_empty(&self) -> bool {
        self.dropped.is_empty() && self.moved.is_empty() && self.inbox_full.is_none()
    }
}

pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl LiveCounters {
    fn rare(&self) -> Guard<'_, Rare> {
        lock(&self.rare)
    }

    /// Counts dropped messages of this node for `peer`. Returns true if nothing else is unreported.
    pub(crate) fn dropped(&self, peer: NodeId, reason: DropReason, count: u64) -> bool {
        if count == 0 {
            return false;
        }
        let mut rare = self.rare();
        let dropped = rare.dropped.entry(reason).or_default();
        *dropped = dropped.saturating_add(count);
        let first = rare.unreported.is_empty();
        let unreported = rare.unreported.dropped.entry((peer, reason)).or_default();
        *unreported = unreported.saturating_add(count);
        first
    }

    /// Counts a key that moved to another instance. Returns true if nothing else is unreported.
    pub(crate) fn moved(&self, service: &ServiceName, from: NodeId, to: NodeId) -> bool {
        let mut rare = self.rare();
        rare.moved_keys += 1;
        let first = rare.unreported.is_empty();
        *rare.unreported.moved.entry((service.clone(), from, to)).or_default() += 1;
        first
    }

    /// Counts senders that the full inbox forgot for `newcomer`, and messages of it that it refused.
    /// Returns true if nothing else is unreported.
    pub(crate) fn inbox_full(&self, newcomer: NodeId, forgotten: u64, refused: u64) -> bool {
        let mut rare = self.rare();
        rare.forgotten_senders += forgotten;
        *rare.dropped_for_others.entry(DropReason::InboxFull).or_default() += refused;
        let first = rare.unreported.is_empty();
        let full = rare.unreported.inbox_full.get_or_insert((newcomer, 0, 0));
        *full = (newcomer, full.1 + forgotten, full.2 + refused);
        first
    }

    pub(crate) fn take_unreported(&self) -> Unreported {
        std::mem::take(&mut self.rare().unreported)
    }

    pub(crate) fn dropped_for_others(&self, reason: DropReason, count: u64) {
        *self.rare().dropped_for_others.entry(reason).or_default() += count;
    }

    /// Counts messages that arrived for a subscription, and those that it lost, earlier ones too.
    pub(crate) fn delivered(&self, came: u64, lost: u64) {
        // Wraps around and back if more were lost than arrived.
        add(&self.delivered, came.wrapping_sub(lost));
    }

    pub(crate) fn refused(&self, reason: &str) {
        *self.rare().refused.entry(reason.to_owned()).or_default() += 1;
    }

    pub(crate) fn snapshot(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let rare = self.rare();
        Counters {
            published: get(&self.published),
            queued: get(&self.queued),
            received: get(&self.received),
            delivered: get(&self.delivered),
            handled: get(&self.handled),
            requests: get(&self.requests),
            dropped: rare.dropped.clone(),
            in_doubt: get(&self.in_doubt),
            dropped_for_others: rare.dropped_for_others.clone(),
            links: get(&self.links),
            stored: get(&self.stored),
            settled: get(&self.settled),
            dead_lettered: get(&self.dead_lettered),
            duplicates: get(&self.duplicates),
            refused: rare.refused.clone(),
            moved_keys: rare.moved_keys,
            forgotten_senders: rare.forgotten_senders,
        }
    }
}
