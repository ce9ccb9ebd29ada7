//! What was promised, held against what happened.

use std::collections::{HashMap, HashSet};

use super::node::Life;
use crate::engine::RequestOutcome;
use crate::message::MessageId;
use crate::report::DropReason;

/// What one life of a node did with its messages.
#[derive(Debug, Default)]
struct Account {
    /// Messages that were queued for a peer.
    queued: u64,
    /// Of these: dropped here or there, and counted.
    dropped: u64,
    in_doubt: u64,
    /// Replies that reached the caller.
    replies: u64,
    crashed: bool,
}

/// The record of a run.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    accounts: HashMap<Life, Account>,
    /// Messages that reached a user, by their sender.
    reached: HashMap<Life, HashSet<(MessageId, Life)>>,
    /// The last message by sender, topic and subscriber.
    last: HashMap<(Life, String, Life), MessageId>,
    open_requests: HashSet<MessageId>,
    /// Requests whose callers were told that they failed, by their sender.
    failed: HashMap<Life, HashSet<MessageId>>,
    pub(super) seen: Seen,
}

/// Proof that a run was not idle, and that its faults fired.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Seen {
    pub(super) delivered: u64,
    pub(super) replies: u64,
    pub(super) failed_requests: u64,
    pub(super) late_requests: u64,
    pub(super) ordered_calls: u64,
    pub(super) cancelled: u64,
    pub(super) dropped: u64,
    pub(super) slow_peer: u64,
    pub(super) slow_subscriber: u64,
    pub(super) in_doubt: u64,
    pub(super) cuts: u64,
    pub(super) silent_cuts: u64,
    pub(super) crashes: u64,
    pub(super) restarts: u64,
    pub(super) duplicate_links: u64,
    pub(super) replaced_links: u64,
    pub(super) silent_deaths: u64,
    /// Messages that a rule refused.
    pub(super) denied: u64,
    /// Links that ended since a rule changed.
    pub(super) distrusted_links: u64,
    /// Running calls whose caller gave up or was lost.
    pub(super) interrupted: u64,
    /// Received messages that were queued when their link was lost.
    pub(super) lost_with_link: u64,
}

impl Seen {
    pub(super) fn add(&mut self, other: &Self) {
        let Self {
            delivered,
            replies,
            failed_requests,
            late_requests,
            ordered_calls,
            cancelled,
            dropped,
            slow_peer,
            slow_subscriber,
            in_doubt,
            cuts,
            silent_cuts,
            crashes,
            restarts,
            duplicate_links,
            replaced_links,
            silent_deaths,
            denied,
            distrusted_links,
            interrupted,
            lost_with_link,
        } = other;
        self.delivered += delivered;
        self.replies += replies;
        self.failed_requests += failed_requests;
        self.late_requests += late_requests;
        self.ordered_calls += ordered_calls;
        self.cancelled += cancelled;
        self.dropped += dropped;
        self.slow_peer += slow_peer;
        self.slow_subscriber += slow_subscriber;
        self.in_doubt += in_doubt;
        self.cuts += cuts;
        self.silent_cuts += silent_cuts;
        self.crashes += crashes;
        self.restarts += restarts;
        self.duplicate_links += duplicate_links;
        self.replaced_links += replaced_links;
        self.silent_deaths += silent_deaths;
        self.denied += denied;
        self.distrusted_links += distrusted_links;
        self.interrupted += interrupted;
        self.lost_with_link += lost_with_link;
    }
}

impl Ledger {
    fn account(&mut self, life: Life) -> &mut Account {
        self.accounts.entry(life).or_default()
    }

    pub(super) fn queued(&mut self, sender: Life) {
        self.account(sender).queued += 1;
    }

    pub(super) fn dropped(&mut self, sender: Life, reason: DropReason, count: u64) {
        self.seen.dropped += count;
        // It reached its handler.
        if reason != DropReason::HandlerFailed {
            self.account(sender).dropped += count;
        }
        match reason {
            DropReason::SlowPeer => self.seen.slow_peer += count,
            DropReason::SlowSubscriber => self.seen.slow_subscriber += count,
            _ => {}
        }
    }

    pub(super) fn in_doubt(&mut self, sender: Life, count: u64) {
        self.account(sender).in_doubt += count;
        self.seen.in_doubt += count;
    }

    pub(super) fn crashed(&mut self, life: Life) {
        self.account(life).crashed = true;
    }

    /// A message reached a user of `receiver`.
    pub(super) fn reached(&mut self, sender: Life, receiver: Life, id: MessageId) {
        let fresh = self.reached.entry(sender).or_default().insert((id, receiver));
        assert!(fresh, "{id} was delivered twice to {receiver:?}");
        self.seen.delivered += 1;
    }

    pub(super) fn reached_in_order(
        &mut self,
        sender: Life,
        receiver: Life,
        topic: &str,
        id: MessageId,
    ) {
        let last = self.last.insert((sender, topic.to_owned(), receiver), id);
        assert!(last.is_none_or(|last| last < id), "{id} on {topic} came after its successor");
    }

    /// A reply of `sender` reached the caller.
    pub(super) fn replied(&mut self, sender: Life) {
        self.account(sender).replies += 1;
        self.seen.replies += 1;
    }

    pub(super) fn request_opened(&mut self, id: MessageId) {
        self.open_requests.insert(id);
    }

    pub(super) fn request_ended(&mut self, caller: Life, id: MessageId, outcome: &RequestOutcome) {
        assert!(self.open_requests.remove(&id), "request {id} ended twice");
        if !matches!(outcome, RequestOutcome::Reply(_)) {
            self.failed.entry(caller).or_default().insert(id);
        }
    }

    pub(super) fn check_the_end(&self) {
        assert!(self.open_requests.is_empty(), "requests hang: {:?}", self.open_requests);
        for (life, account) in self.accounts.iter().filter(|(_, account)| !account.crashed) {
            let reached = self.reached.get(life).map_or(0, HashSet::len) as u64;
            let known = reached + account.replies + account.dropped;
            assert!(
                known <= account.queued,
                "{life:?}: more reached or dropped ({known}) than queued: {account:?}"
            );
            // A request that never reached anybody, and whose caller knows that it failed.
            let is_known = |id: &&MessageId| {
                let reached = self.reached.get(life);
                !reached.is_some_and(|it| it.iter().any(|(other, _)| other == *id))
            };
            let failed = self.failed.get(life).into_iter().flatten().filter(is_known).count();
            assert!(
                account.queued <= known + account.in_doubt + failed as u64,
                "{life:?}: silent loss; {reached} reached of {account:?}"
            );
        }
    }

    /// The requests of a node that crashed have nobody left to wait.
    pub(super) fn forget_requests(&mut self, ids: impl Iterator<Item = MessageId>) {
        for id in ids {
            self.open_requests.remove(&id);
        }
    }
}
