//! Counters shared by many tasks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::ServiceName;
use crate::identity::NodeId;
use crate::peer::Address;
use crate::report::{Counters, DropReason};
use crate::sync::{Guard, Mutex, lock};
use crate::trust::Action;

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

/// Facts that no event has reported yet, in groups. What others cause is bounded.
#[derive(Default)]
pub(crate) struct Unreported {
    pub(crate) dropped: BTreeMap<(NodeId, DropReason), u64>,
    /// The number of keys of a service that moved from one node to another.
    pub(crate) moved: BTreeMap<(ServiceName, NodeId, NodeId), u64>,
    pub(crate) refused: BTreeMap<(Option<IpAddr>, Refused), (Option<Address>, u64)>,
    pub(crate) denied: BTreeMap<(NodeId, Action, String), u64>,
    /// Senders that a full inbox forgot, and messages that it refused; and the last newcomer.
    pub(crate) inbox_full: Option<(NodeId, u64, u64)>,
}

/// The refusal of a connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Refused {
    pub(crate) reason: String,
    /// Any stranger can cause it, so it is logged only when a fault is investigated.
    pub(crate) by_door: bool,
}

/// The most groups of refusals, and of denials; further ones share one.
const MOST_GROUPS: usize = 16;

impl Unreported {
    fn is_empty(&self) -> bool {
        self.dropped.is_empty()
            && self.moved.is_empty()
            && self.inbox_full.is_none()
            && !self.has_refusals()
    }

    pub(crate) fn has_refusals(&self) -> bool {
        !self.refused.is_empty() || !self.denied.is_empty()
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

    /// Counts a refused connection. Returns true if nothing else is unreported.
    pub(crate) fn refusal(&self, address: Option<Address>, refused: Refused) -> bool {
        let ip = match &address {
            Some(Address::Tcp(address)) => Some(address.ip()),
            _ => None,
        };
        let mut rare = self.rare();
        let first = rare.unreported.is_empty();
        let groups = &mut rare.unreported.refused;
        let (mut key, mut address) = ((ip, refused), address);
        if groups.len() >= MOST_GROUPS && !groups.contains_key(&key) {
            let reason = "further refusals, for several reasons".into();
            (key, address) = ((None, Refused { reason, by_door: true }), None);
        }
        groups.entry(key).or_insert((address, 0)).1 += 1;
        first
    }

    /// Counts an action that a peer denies to this node. Returns true if nothing else is unreported.
    pub(crate) fn denial(&self, peer: NodeId, action: Action, name: String) -> bool {
        let mut rare = self.rare();
        let first = rare.unreported.is_empty();
        let groups = &mut rare.unreported.denied;
        let mut key = (peer, action, name);
        if groups.len() >= MOST_GROUPS && !groups.contains_key(&key) {
            key.2 = "further names".into();
        }
        *groups.entry(key).or_default() += 1;
        first
    }

    /// Takes what is unreported: drops and moved keys, and `all` for the rest.
    pub(crate) fn take_unreported(&self, all: bool) -> Unreported {
        let unreported = &mut self.rare().unreported;
        match all {
            true => std::mem::take(unreported),
            false => Unreported {
                dropped: std::mem::take(&mut unreported.dropped),
                moved: std::mem::take(&mut unreported.moved),
                inbox_full: unreported.inbox_full.take(),
                ..Unreported::default()
            },
        }
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
