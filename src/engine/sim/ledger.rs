//! The ledger of a run: what was promised of events, calls and requests, held against what
//! happened.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::node::Life;
use super::promises::Promises;
use super::seen::Seen;
use super::settings::Settings;
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
#[derive(Debug)]
pub(super) struct Ledger {
    accounts: BTreeMap<Life, Account>,
    /// Messages that reached a user, by their sender.
    reached: HashMap<Life, HashSet<(MessageId, Life)>>,
    /// The last message by sender, topic and subscriber.
    last: HashMap<(Life, String, Life), MessageId>,
    /// The node that each open request went to, by caller and message.
    open_requests: BTreeMap<(Life, MessageId), Life>,
    /// Requests whose callers were told that they failed, by their sender.
    failed: HashMap<Life, HashSet<MessageId>>,
    /// The same of guaranteed messages.
    pub(super) promises: Promises,
    pub(super) seen: Seen,
}

impl Ledger {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            accounts: BTreeMap::new(),
            reached: HashMap::new(),
            last: HashMap::new(),
            open_requests: BTreeMap::new(),
            failed: HashMap::new(),
            promises: Promises::new(settings),
            seen: Seen::default(),
        }
    }

    /// Returns the counts of all that the run saw.
    pub(super) fn into_seen(self) -> Seen {
        let Self { mut seen, promises, .. } = self;
        seen.extend(promises.seen);
        seen
    }

    fn account(&mut self, life: Life) -> &mut Account {
        self.accounts.entry(life).or_default()
    }

    pub(super) fn queued(&mut self, sender: Life) {
        self.account(sender).queued += 1;
    }

    pub(super) fn dropped(&mut self, sender: Life, reason: DropReason, count: u64) {
        self.seen.add("drops", count);
        // It reached its handler.
        if reason != DropReason::HandlerFailed {
            self.account(sender).dropped += count;
        }
        match reason {
            DropReason::SlowPeer => self.seen.add("drops for a slow peer", count),
            DropReason::SlowSubscriber => self.seen.add("drops for a slow subscriber", count),
            _ => {}
        }
    }

    pub(super) fn in_doubt(&mut self, sender: Life, count: u64) {
        self.account(sender).in_doubt += count;
        self.seen.add("messages in doubt", count);
    }

    pub(super) fn crashed(&mut self, life: Life) {
        self.account(life).crashed = true;
        // Nobody is left to wait.
        self.open_requests.retain(|(caller, _), _| *caller != life);
    }

    /// A node has shut down: all its requests have ended.
    pub(super) fn shut_down(&self, life: Life) {
        let open = self.open_requests.keys().find(|(caller, _)| *caller == life);
        assert!(open.is_none(), "a request outlives its node: {open:?}");
    }

    /// A message reached a user of `receiver`.
    pub(super) fn reached(&mut self, sender: Life, receiver: Life, id: MessageId) {
        let fresh = self.reached.entry(sender).or_default().insert((id, receiver));
        assert!(fresh, "{id} was delivered twice to {receiver:?}");
        self.seen.add("deliveries", 1);
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
        self.seen.add("replies", 1);
    }

    pub(super) fn request_opened(&mut self, caller: Life, id: MessageId, asked: Life) {
        self.open_requests.insert((caller, id), asked);
    }

    /// Some request that is neither by nor to a node, and its caller.
    pub(super) fn any_request(&self, not_of: Life, number: u64) -> Option<(Life, MessageId)> {
        let others = self
            .open_requests
            .iter()
            .filter(|((caller, _), asked)| caller.node != not_of.node && asked.node != not_of.node);
        let others: Vec<_> = others.map(|(key, _)| *key).collect();
        others.get(number as usize % others.len().max(1)).copied()
    }

    pub(super) fn request_ended(&mut self, caller: Life, id: MessageId, outcome: &RequestOutcome) {
        assert!(self.open_requests.remove(&(caller, id)).is_some(), "request {id} ended twice");
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
            let reached_ids: HashSet<MessageId> =
                self.reached.get(life).into_iter().flatten().map(|(id, _)| *id).collect();
            let failed = self.failed.get(life).into_iter().flatten();
            let failed = failed.filter(|id| !reached_ids.contains(id)).count();
            assert!(
                account.queued <= known + account.in_doubt + failed as u64,
                "{life:?}: silent loss; {reached} reached of {account:?}"
            );
        }
    }
}
