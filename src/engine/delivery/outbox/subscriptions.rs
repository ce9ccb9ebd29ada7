//! The durable subscriptions of peers, and how many of them are kept.
//!
//! A subscription that never acknowledged a message is unproven. A peer that goes leaves its unproven
//! ones on probation: when there are too many, those of the peer with the most lapse first. So ids
//! that are drawn by the thousand make room for each other, and not for those who do take messages.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use smallvec::SmallVec;

use super::{DeliveryKey, Outbox, OutboxAction, OutboxEvent, State};
use crate::address::{Destination, Pattern, ServiceName, Topic};
use crate::engine::PatternTrie;
use crate::engine::delivery::{DeadLetterReason, Lapse, Now, Target};
use crate::identity::NodeId;
use crate::report::DropReason;
use crate::trust::{Action, Grants};

/// The most durable subscriptions of a peer, and of all peers.
pub(crate) const MAX_SUBSCRIPTIONS: usize = 256;
pub(super) const MAX_ALL: usize = if cfg!(test) { 640 } else { 4096 };
/// The most unproven subscriptions of absent peers.
pub(super) const MAX_UNPROVEN: usize = if cfg!(test) { 320 } else { 1024 };
/// The most messages of an ended subscription that are dropped at a time.
const MOST_DROPPED: usize = 1024;
/// The pause before the next of them.
const DROP_PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) pattern: Pattern,
    /// The number from which on messages are kept for it.
    since: u64,
    pub(super) proven: bool,
    number: u64,
}

/// The subscriptions of a peer, and its place among the peers that make room.
#[derive(Debug, Default)]
struct Owner {
    all: BTreeMap<ServiceName, Subscription>,
    unproven: usize,
    is_gone: bool,
    turn: u64,
}

type Rank = (bool, usize, Reverse<u64>, NodeId);

impl Owner {
    fn rank(&self, node: NodeId) -> Rank {
        (self.is_gone, self.unproven, Reverse(self.turn), node)
    }
}

#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    owners: BTreeMap<NodeId, Owner>,
    /// The peers with unproven subscriptions; the last makes room first.
    ranks: BTreeSet<Rank>,
    index: PatternTrie<(NodeId, ServiceName)>,
    numbers: u64,
    count: usize,
    /// The number of unproven subscriptions of absent peers.
    on_probation: usize,
}

impl Subscriptions {
    pub(super) fn matching(&self, topic: &Topic) -> SmallVec<[Target; 1]> {
        let all = self.index.matches(topic).into_iter();
        all.map(|(_, (node, name))| Target::Subscription(*node, name.clone())).collect()
    }

    pub(super) fn get(&self, node: &NodeId, name: &ServiceName) -> Option<&Subscription> {
        self.owners.get(node)?.all.get(name)
    }

    pub(super) fn of(&self, node: &NodeId) -> impl Iterator<Item = (&ServiceName, &Subscription)> {
        self.owners.get(node).into_iter().flat_map(|owner| &owner.all)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (NodeId, &ServiceName, &Subscription)> {
        self.owners.iter().flat_map(|(node, owner)| {
            owner.all.iter().map(|(name, subscription)| (*node, name, subscription))
        })
    }

    pub(super) fn count_of(&self, node: &NodeId) -> usize {
        self.owners.get(node).map_or(0, |owner| owner.all.len())
    }

    /// Changes an owner, and its place among those that make room.
    fn change<R>(&mut self, node: NodeId, change: impl FnOnce(&mut Owner) -> R) -> R {
        let owner = self.owners.entry(node).or_default();
        let on_probation = |owner: &Owner| if owner.is_gone { owner.unproven } else { 0 };
        self.ranks.remove(&owner.rank(node));
        let (count, before) = (owner.all.len(), on_probation(owner));
        let result = change(owner);
        self.count = self.count + owner.all.len() - count;
        self.on_probation = self.on_probation + on_probation(owner) - before;
        if owner.unproven > 0 {
            self.ranks.insert(owner.rank(node));
        }
        if owner.all.is_empty() {
            self.owners.remove(&node);
        }
        result
    }

    /// Adds a subscription, or changes its pattern. Returns true if that changed anything.
    pub(super) fn insert(
        &mut self,
        node: NodeId,
        name: &ServiceName,
        pattern: &Pattern,
        since: u64,
        proven: bool,
    ) -> bool {
        if let Some(known) = self.owners.get_mut(&node).and_then(|it| it.all.get_mut(name)) {
            if known.pattern == *pattern {
                return false;
            }
            self.index.remove(&known.pattern, known.number);
            self.index.insert(pattern, known.number, (node, name.clone()));
            known.pattern = pattern.clone();
            return true;
        }
        self.numbers += 1;
        let number = self.numbers;
        self.index.insert(pattern, number, (node, name.clone()));
        let subscription = Subscription { pattern: pattern.clone(), since, proven, number };
        self.change(node, |owner| {
            owner.unproven += usize::from(!proven);
            owner.all.insert(name.clone(), subscription);
        });
        true
    }

    fn remove(&mut self, node: NodeId, name: &ServiceName) -> bool {
        if self.get(&node, name).is_none() {
            return false;
        }
        let removed = self.change(node, |owner| {
            let removed = owner.all.remove(name);
            owner.unproven -= usize::from(removed.as_ref().is_some_and(|it| !it.proven));
            removed
        });
        if let Some(removed) = removed {
            self.index.remove(&removed.pattern, removed.number);
        }
        true
    }

    /// Notes that a peer is here, or gone.
    pub(super) fn set_gone(&mut self, node: NodeId, is_gone: bool) {
        if self.owners.contains_key(&node) {
            self.numbers += 1;
            let turn = self.numbers;
            self.change(node, |owner| (owner.is_gone, owner.turn) = (is_gone, turn));
        }
    }

    /// Notes that a subscription acknowledged a message. Returns true if it is the first.
    pub(super) fn prove(&mut self, node: NodeId, name: &ServiceName) -> bool {
        if self.get(&node, name).is_none_or(|it| it.proven) {
            return false;
        }
        self.change(node, |owner| {
            if let Some(subscription) = owner.all.get_mut(name) {
                subscription.proven = true;
                owner.unproven -= 1;
            }
        });
        true
    }

    /// Removes all of a peer's.
    pub(super) fn forget(&mut self, node: NodeId) {
        let names: Vec<ServiceName> = self.of(&node).map(|(name, _)| name.clone()).collect();
        names.iter().for_each(|name| _ = self.remove(node, name));
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Returns subscriptions to end, so that no more than the most are on probation.
    fn surplus(&self) -> Vec<(NodeId, ServiceName)> {
        match self.on_probation.saturating_sub(MAX_UNPROVEN) {
            0 => Vec::new(),
            surplus => self.unproven_of_last(surplus),
        }
    }

    /// Returns a subscription to end, so that `newcomer` may have another one.
    fn to_make_room(&self, newcomer: &NodeId) -> Vec<(NodeId, ServiceName)> {
        let own = self.owners.get(newcomer).map_or(0, |owner| owner.unproven);
        match self.ranks.last() {
            Some((is_gone, unproven, _, node))
                if node != newcomer && (*is_gone || *unproven > own + 1) =>
            {
                self.unproven_of_last(1)
            }
            _ => Vec::new(),
        }
    }

    /// Returns up to half of the unproven subscriptions of the peer that makes room first.
    fn unproven_of_last(&self, most: usize) -> Vec<(NodeId, ServiceName)> {
        let Some((_, unproven, _, node)) = self.ranks.last() else { return Vec::new() };
        let unwanted = self.of(node).filter(|(_, it)| !it.proven);
        let most = most.min(unproven.div_ceil(2));
        unwanted.take(most).map(|(name, _)| (*node, name.clone())).collect()
    }
}

impl Outbox {
    /// Returns the durable subscriptions that match a topic.
    pub(crate) fn subscribers(&self, topic: &Topic) -> SmallVec<[Target; 1]> {
        self.subscriptions.matching(topic)
    }

    /// Returns the number of those whose nodes are linked and accept their messages now.
    pub(crate) fn present_subscribers(&self, topic: &Topic) -> usize {
        let is_present = |target: &Target| match target {
            Target::Subscription(node, name) => {
                self.peers.get(node).is_some_and(|peer| peer.up && peer.active.contains(name))
            }
            _ => false,
        };
        self.subscriptions.matching(topic).iter().filter(|target| is_present(target)).count()
    }

    /// Adds a subscription that a peer announced, if there is room. Returns true if it is new or
    /// changed.
    pub(super) fn subscribe(
        &mut self,
        node: NodeId,
        name: &ServiceName,
        pattern: &Pattern,
    ) -> bool {
        if self.subscriptions.get(&node, name).is_none() {
            if self.subscriptions.count_of(&node) >= MAX_SUBSCRIPTIONS {
                return false;
            }
            if self.subscriptions.count >= MAX_ALL {
                for (node, name) in self.subscriptions.to_make_room(&node) {
                    self.lapse(node, &name, Lapse::NoRoom);
                }
            }
            if self.subscriptions.count >= MAX_ALL {
                let event = OutboxEvent::NotRemembered(node);
                self.actions.push_back(OutboxAction::Report(event));
                return false;
            }
        }
        self.subscriptions.insert(node, name, pattern, self.next_number, false)
    }

    /// Ends a subscription that its peer did not end. It is reported before its messages end.
    pub(super) fn lapse(&mut self, node: NodeId, name: &ServiceName, reason: Lapse) {
        if self.subscriptions.get(&node, name).is_none() {
            return;
        }
        let messages = self.count_kept(&Target::Subscription(node, name.clone()));
        let event = OutboxEvent::Lapsed { node, name: name.clone(), reason, messages };
        self.actions.push_back(OutboxAction::Report(event));
        self.drop_subscription(node, name);
        self.store_peer(node, false);
    }

    /// Returns the number of messages kept for a durable subscription.
    fn count_kept(&self, target: &Target) -> u64 {
        let target = self.target_numbers.get(target);
        let kept = target.and_then(|target| self.kept_for.get(target));
        kept.map_or(0, super::Numbered::len) as u64
    }

    /// Ends the subscriptions of a peer that its rights no longer cover.
    pub(super) fn lapse_forbidden(&mut self, node: NodeId, grants: &Grants) {
        if *grants == Grants::Everything {
            return;
        }
        let all = self.subscriptions.of(&node);
        let forbidden = all.filter(|(_, it)| !grants.permit_all(Action::Subscribe, &it.pattern));
        let names: Vec<ServiceName> = forbidden.map(|(name, _)| name.clone()).collect();
        names.iter().for_each(|name| self.lapse(node, name, Lapse::NotAllowed));
    }

    /// Notes that a peer went, with its unproven subscriptions.
    pub(super) fn begin_probation(&mut self, node: NodeId) {
        self.subscriptions.set_gone(node, true);
        loop {
            let surplus = self.subscriptions.surplus();
            if surplus.is_empty() {
                return;
            }
            for (node, name) in surplus {
                self.lapse(node, &name, Lapse::NoRoom);
            }
        }
    }

    /// Handles peers whose keys are no longer trusted: their subscriptions end, and messages to them
    /// become dead letters.
    pub(crate) fn handle_distrusted(&mut self, now: Now, is_meant: impl Fn(&NodeId) -> bool) {
        self.now = now.time;
        let nodes: Vec<NodeId> = self.peers.keys().copied().filter(|it| is_meant(it)).collect();
        for node in nodes {
            self.lapse_forbidden(node, &Grants::nothing());
            let target = self.target_numbers.get(&Target::Node(node)).copied();
            let waiting = target.and_then(|target| self.waiting.get(&target));
            let keys = waiting.into_iter().flatten().copied().chain(self.bound_to(node));
            let keys: Vec<DeliveryKey> = keys
                .filter(|key| {
                    self.part(*key).is_some_and(|part| {
                        Some(part.target) == target
                            && matches!(
                                part.state,
                                State::Waiting
                                    | State::Ready
                                    | State::Paused { .. }
                                    | State::Blocked
                            )
                    })
                })
                .collect();
            for key in keys {
                self.dead_letter(key, DeadLetterReason::NotAllowed);
            }
        }
    }

    /// Removes a durable subscription and drops its messages; returns their number.
    pub(super) fn drop_subscription(&mut self, node: NodeId, name: &ServiceName) -> Option<u64> {
        if !self.subscriptions.remove(node, name) {
            return None;
        }
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.active.retain(|active| active != name);
        }
        let target = Target::Subscription(node, name.clone());
        let kept = self.count_kept(&target);
        if let Some(target) = self.target_numbers.get(&target).copied().filter(|_| kept > 0) {
            self.dropping.push_back((target, self.next_number));
            self.drop_messages();
        }
        Some(kept)
    }

    /// Drops messages of ended subscriptions, some at a time.
    pub(super) fn drop_messages(&mut self) {
        let mut left = MOST_DROPPED;
        while let Some((target, below)) = self.dropping.front().copied()
            && left > 0
        {
            let kept = self.kept_for.get(&target).into_iter();
            let kept = kept.flat_map(|kept| kept.range(0, below.saturating_sub(1)));
            let keys = kept.map(|(number, part)| DeliveryKey { number, part: *part });
            // Those that are being stored are settled then.
            let stored = keys.filter(|key| {
                self.entries.get(key.number).is_some_and(|entry| entry.position.is_some())
            });
            let keys: Vec<DeliveryKey> = stored.take(left).collect();
            if keys.is_empty() {
                self.dropping.pop_front();
                continue;
            }
            left -= keys.len();
            for key in keys {
                self.revive(key);
                self.settle(key);
            }
        }
        if let Some((target, _)) = self.dropping.front()
            && self.kept_for.get(target).is_some_and(super::Numbered::is_empty)
        {
            self.kept_for.remove(target);
        }
        self.drop_at = (!self.dropping.is_empty()).then(|| self.now + DROP_PAUSE);
    }

    /// Returns true if the message is for a durable subscription that has since ended.
    pub(super) fn is_unwanted(&self, key: DeliveryKey) -> bool {
        match self.part(key).map(|part| &self.targets[part.target as usize]) {
            Some(Target::Subscription(node, name)) => {
                self.subscriptions.get(node, name).is_none_or(|it| key.number < it.since)
            }
            _ => false,
        }
    }

    /// Notes that a message was acknowledged.
    pub(super) fn note_proof(&mut self, target: u32) {
        if let Target::Subscription(node, name) = &self.targets[target as usize]
            && self.subscriptions.get(node, name).is_some_and(|it| !it.proven)
        {
            let (node, name) = (*node, name.clone());
            if self.subscriptions.prove(node, &name) {
                self.store_peer(node, false);
            }
        }
    }

    /// Returns the reason for which a message must not be sent to a node with these rights, if there
    /// is one. The topic or service decides, at the moment of sending.
    pub(crate) fn objection(
        &self,
        key: DeliveryKey,
        destination: &Destination,
        grants: &Grants,
    ) -> Option<DropReason> {
        let target = &self.targets[self.part(key)?.target as usize];
        match (target, destination) {
            (Target::Subscription(node, name), Destination::Topic(topic)) => {
                let known = self.subscriptions.get(node, name);
                if !known.is_some_and(|it| it.pattern.matches(topic)) {
                    return Some(DropReason::NoSubscriber);
                }
                let is_allowed = grants.permit(Action::Subscribe, topic.as_str());
                (!is_allowed).then_some(DropReason::NotAllowed)
            }
            (Target::Service(name), _) => {
                let is_allowed = grants.permit(Action::Serve, name.as_str());
                (!is_allowed).then_some(DropReason::NotAllowed)
            }
            _ => None,
        }
    }
}
