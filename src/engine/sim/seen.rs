//! Proof that a run was not idle, and that its faults fired.

use std::collections::BTreeMap;

const ALL: [&str; 72] = [
    // Links, and those who are at their ends.
    "cuts",
    "silent cuts",
    "deaths noticed by silence",
    "duplicate links",
    "links replaced by a new incarnation's",
    "links that ended since a rule changed",
    "crashes",
    "restarts",
    "shutdowns",
    "shutdowns with nothing left to wait for",
    "shutdowns that ran out of time",
    "handlers that a shutdown ended",
    "clock jumps",
    // Events, calls and requests.
    "deliveries",
    "replies",
    "calls with an ordering key",
    "requests that failed with their link",
    "requests past their deadline",
    "forged replies",
    "calls taken back",
    "calls that expired in the queue",
    "calls that nothing served any more",
    "drops",
    "drops for a slow peer",
    "drops for a slow subscriber",
    "messages in doubt",
    "messages that a rule refused",
    "running calls that were interrupted",
    "queued calls that were lost with their link",
    // Guaranteed messages.
    "messages stored",
    "messages that could not be stored",
    "messages processed",
    "messages of a node to itself",
    "guaranteed messages that a rule refused",
    "guaranteed messages that expired in the queue",
    "guaranteed messages that were queued when their link was lost",
    "guaranteed messages that found their link full",
    "inboxes that a rule kept subscriptions of",
    "subscriptions that a rule ended",
    "guaranteed messages that a rule kept from a peer",
    "rejections",
    "dead letters by failure",
    "dead letters by expiry",
    "dead letters that may have been processed",
    "redeliveries",
    "suppressed duplicates",
    "dead letters replayed",
    "dead letters removed",
    "refusals",
    "messages taken from a node that had processed them",
    "messages that kill their process",
    "transactions",
    "transactions that a crash left nothing of",
    "messages submitted again",
    // Disks.
    "power cuts",
    "files cut short with the power",
    "sectors lost with the power",
    "sectors torn with the power",
    "journals with a torn tail",
    "journals with holes",
    "failed writes",
    "messages moved to another segment",
    "segments removed",
    "segments begun to clean the newest",
    "disks that were full",
    "outboxes full of what is not processed",
    "messages gone for good",
    "snapshots of inboxes that live",
    "inboxes lost",
    "outboxes put back",
    "inboxes put back",
    "messages processed again after a restore",
];

/// How often each of them was seen.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Seen(BTreeMap<&'static str, u64>);

impl Seen {
    pub(super) fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    pub(super) fn when(&mut self, what: &'static str, happened: bool) {
        self.add(what, u64::from(happened));
    }

    pub(super) fn extend(&mut self, other: Self) {
        other.0.into_iter().for_each(|(what, count)| self.add(what, count));
    }

    pub(super) fn count(&self, what: &'static str) -> u64 {
        assert!(ALL.contains(&what), "{what} is none of them");
        self.0.get(what).copied().unwrap_or_default()
    }

    /// # Panics
    /// If one of them was never seen.
    pub(super) fn check(&self) {
        let missing: Vec<_> = ALL.iter().filter(|what| self.count(what) == 0).collect();
        assert!(missing.is_empty(), "not once in the whole run: {missing:?}");
        assert!(self.0.keys().all(|what| ALL.contains(what)), "{self:?}");
    }
}
