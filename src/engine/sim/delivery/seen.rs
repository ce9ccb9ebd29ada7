//! Proof that a run was not idle, and that its faults fired.

use std::collections::BTreeMap;

const ALL: [&str; 36] = [
    "messages stored",
    "messages that could not be stored",
    "messages processed",
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
    "crashes",
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
    "cuts",
    "clock jumps",
    "transactions",
    "transactions that a crash left nothing of",
    "messages submitted again",
    "inboxes lost",
    "outboxes put back",
];

/// How often each of them was seen.
#[derive(Debug, Default)]
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

    /// # Panics
    /// If one of them was never seen.
    pub(super) fn check(&self) {
        assert!(self.0.keys().all(|what| ALL.contains(what)), "{self:?}");
        for what in ALL {
            assert!(self.0.get(what).is_some_and(|count| *count > 0), "no {what} in the whole run");
        }
    }
}
