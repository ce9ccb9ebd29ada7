//! Known peers: connected ones, absent ones with queued messages, and durable subscriptions.

use std::time::Duration;

use super::subscriptions::MAX_SUBSCRIPTIONS;
use super::{
    DeliveryKey, OutboundDelivery, Outbox, OutboxAction, OutboxEvent, Peer, Pending, State,
};
use crate::engine::Time;
use crate::engine::delivery::record::{NodeBytes, OutboxRecord, PeerRecord};
use crate::engine::delivery::{DeadLetterReason, Lapse, Now, Target};
use crate::identity::NodeId;
use crate::trust::Grants;
use crate::wire::InboxInfo;

/// The most peers remembered while they are absent and nothing is queued for them. A member of the
/// mesh can create any number of ids, and each new peer has all of them stored again.
pub(super) const MAX_PEERS: usize = if cfg!(test) { 64 } else { 4096 };

/// The time for which a full table of peers is not searched for room again.
const FULL_FOR: Duration = Duration::from_secs(1);
/// The interval between searches for subscriptions of peers that are gone.
const LAPSE_EVERY: Duration = Duration::from_secs(3600);

impl Peer {
    /// Returns the time since which its messages wait for it, or for another node to take them.
    fn waits_for_others_since(&self) -> Time {
        self.reassigned_at.unwrap_or(self.down_since)
    }

    /// Returns true if messages are bound to it or wait for it.
    fn is_wanted(&self) -> bool {
        self.bound > 0 || self.waiting > 0 || !self.ready.is_empty() || !self.paused.is_empty()
    }

    /// Returns true if it can be forgotten without loss.
    fn is_forgettable(&self) -> bool {
        !self.up && self.known_inbox.is_none() && !self.is_wanted()
    }

    /// Returns true if it is absent and messages are kept for it.
    fn is_missed(&self) -> bool {
        !self.up && (self.bound > 0 || self.waiting > 0)
    }
}

impl Outbox {
    /// Handles a new link to a peer. The peer announces its inbox itself.
    pub(crate) fn handle_link_up(&mut self, node: NodeId) {
        let peer = self.peers.entry(node).or_default();
        peer.up = true;
        peer.told_gone = false;
        if let Some(at) = peer.absence.take() {
            self.absences.remove(&(at, node));
        }
        self.subscriptions.set_gone(node, false);
        self.announce_epochs(node);
    }

    /// Handles the end of a link. Messages in flight may have been processed or not.
    pub(crate) fn handle_link_down(&mut self, now: Now, node: NodeId) {
        self.now = now.time;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        (peer.up, peer.inbox, peer.down_since) = (false, None, now.time);
        peer.seen_at = now.unix_ms;
        (peer.told_inbox, peer.told, peer.reassigned_at) = (None, None, None);
        peer.told_full = false;
        peer.active.clear();
        let ready = std::mem::take(&mut peer.ready);
        let keys = self.bound_to(node);
        let in_flight: Vec<DeliveryKey> = keys
            .filter(|key| self.part(*key).is_some_and(|part| part.state == State::InFlight))
            .collect();
        for key in in_flight {
            if self.node_of(key) != Some(node) {
                continue;
            }
            self.stop(key);
            if let Some(part) = self.part_mut(key) {
                part.redelivered = true;
            }
            match self.has_expired(now, key) {
                true => self.dead_letter(key, DeadLetterReason::Expired { maybe_processed: true }),
                false => self.make_ready(key),
            }
        }
        for key in ready {
            if self.part(key).is_some_and(|part| part.state == State::Ready) {
                self.release(key);
            }
        }
        if self.subscriptions.count_of(&node) > 0 {
            self.begin_probation(node);
            self.store_peer(node, false);
        }
        self.note_absence(node);
        if self.peers.get(&node).is_some_and(Peer::is_forgettable) {
            self.peers.remove(&node);
        }
    }

    /// Handles the announcement of a peer's inbox, or of this node's own, whose epoch is 0 here. The
    /// peer has the rights `grants`, and announces only subscriptions that they cover.
    pub(crate) fn handle_inbox(
        &mut self,
        now: Now,
        node: NodeId,
        info: InboxInfo,
        grants: &Grants,
    ) {
        self.now = now.time;
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.up) else { return };
        let is_first = peer.told_inbox.is_none();
        // The epoch is constant for the lifetime of a process.
        if *peer.told_inbox.get_or_insert(info.epoch) != info.epoch {
            return;
        }
        if is_first {
            if let Some(heard) = info.heard {
                self.handle_heard(node, heard);
            }
            // Rights are constant for the lifetime of a link.
            self.lapse_forbidden(node, grants);
        }
        let is_silent = self.has_unstored_doubts(&node);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.inbox = (!is_silent).then_some(info.epoch);
        let active = info.subscriptions.iter().map(|(name, _)| name.clone()).collect();
        self.dirty.insert(node);
        self.waiting_dirty = true;
        self.remember(node, info);
        // A name that has ended may have begun again.
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.active = active;
        }
        if is_first && !is_silent {
            self.announce_epochs(node);
        }
        self.resume(node, |_| true);
    }

    /// Remembers a peer's announcement for when the peer is absent.
    fn remember(&mut self, node: NodeId, info: InboxInfo) {
        let Some(before) = self.peers.get(&node).map(|peer| peer.known_inbox) else { return };
        if before.is_none() && !self.has_room_to_remember() {
            let event = OutboxEvent::NotRemembered(node);
            return self.actions.push_back(OutboxAction::Report(event));
        }
        if let Some(peer) = self.peers.get_mut(&node) {
            self.peers_known += usize::from(peer.known_inbox.is_none());
            peer.known_inbox = Some(info.epoch);
        }
        if before.is_some_and(|before| before != info.epoch) {
            self.actions.push_back(OutboxAction::Report(OutboxEvent::InboxLost(node)));
        }
        let (mut changed, mut met) = (before != Some(info.epoch), before.is_none());
        for name in &info.ended {
            changed |= self.drop_subscription(node, name).is_some();
        }
        let mut is_over = false;
        for (name, pattern) in &info.subscriptions {
            let is_known = self.subscriptions.get(&node, name).is_some();
            is_over |= !is_known && self.subscriptions.count_of(&node) >= MAX_SUBSCRIPTIONS;
            let is_changed = self.subscribe(node, name, pattern);
            met |= is_changed && !is_known;
            changed |= is_changed;
        }
        if changed || met {
            self.store_peer(node, met);
        }
        if is_over
            && let Some(peer) = self.peers.get_mut(&node)
            && !std::mem::replace(&mut peer.told_full, true)
        {
            let event = OutboxEvent::SubscriptionsNotRemembered(node);
            self.actions.push_back(OutboxAction::Report(event));
        }
    }

    /// Returns true if one more peer may be remembered; may forget peers without messages.
    fn has_room_to_remember(&mut self) -> bool {
        if self.peers_known < MAX_PEERS {
            return true;
        }
        if self.now < self.peers_full_until {
            return false;
        }
        let subscriptions = &self.subscriptions;
        self.peers
            .retain(|node, peer| peer.up || peer.is_wanted() || subscriptions.count_of(node) > 0);
        self.peers_known = self.peers.values().filter(|it| it.known_inbox.is_some()).count();
        let has_room = self.peers_known < MAX_PEERS;
        if !has_room {
            self.peers_full_until = self.now + FULL_FOR;
        }
        has_room
    }

    /// Stores the state of a peer: at once if it or a subscription is new, otherwise once a second.
    pub(super) fn store_peer(&mut self, node: NodeId, met: bool) {
        self.peers_dirty.insert(node);
        self.peers_met |= met;
        self.store_peers();
    }

    pub(super) fn store_peers(&mut self) {
        if self.peers_pending || self.peers_retry.is_some() && !self.peers_met {
            return;
        }
        (self.peers_pending, self.peers_met) = (true, false);
        let nodes: Vec<NodeId> = std::mem::take(&mut self.peers_dirty).into_iter().collect();
        let records = nodes.iter().filter_map(|node| self.peer_record(node)).collect();
        self.append(&OutboxRecord::Met(records), Pending::Peers(nodes));
    }

    pub(super) fn peer_records(&self) -> Vec<PeerRecord> {
        self.peers.keys().filter_map(|node| self.peer_record(node)).collect()
    }

    fn peer_record(&self, node: &NodeId) -> Option<PeerRecord> {
        let peer = self.peers.get(node)?;
        let inbox = peer.known_inbox?;
        let own = self.subscriptions.of(node);
        let texts =
            own.map(|(name, it)| (name.as_str().to_owned(), it.pattern.as_str().to_owned()));
        let subscriptions = texts.collect();
        let unproven = self.subscriptions.of(node).filter(|(_, it)| !it.proven);
        let unproven = unproven.map(|(name, _)| name.as_str().to_owned()).collect();
        let seen_at = peer.seen_at;
        Some(PeerRecord { node: NodeBytes(*node), inbox, subscriptions, seen_at, unproven })
    }

    /// Ends the subscriptions of peers that were away for too long.
    pub(super) fn lapse_absent(&mut self, now: Now) {
        let Some(after) = self.config.lapse_after else { return };
        self.lapse_at = Some(now.time + LAPSE_EVERY);
        let after = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        let absent = self.subscriptions.iter().filter(|(node, ..)| {
            self.peers
                .get(node)
                .is_none_or(|peer| !peer.up && now.unix_ms.saturating_sub(peer.seen_at) >= after)
        });
        let absent: Vec<_> = absent.map(|(node, name, _)| (node, name.clone())).collect();
        for (node, name) in absent {
            self.lapse(node, &name, Lapse::Absent);
        }
    }

    /// Handles a change of routes: refused messages are retried.
    pub(crate) fn handle_routes_changed(&mut self) {
        self.waiting_dirty = true;
        for key in std::mem::take(&mut self.paused) {
            if matches!(self.part(key).map(|part| &part.state), Some(State::Paused { .. })) {
                self.stop(key);
                self.release(key);
            }
        }
        let nodes: Vec<NodeId> = self.peers.keys().copied().collect();
        nodes.into_iter().for_each(|node| self.resume(node, |refused| refused));
    }

    /// Ends the pauses of messages bound to a node.
    pub(super) fn resume(&mut self, node: NodeId, wanted: impl Fn(bool) -> bool) {
        let Some(peer) = self.peers.get(&node) else { return };
        for key in peer.paused.clone() {
            if let Some(State::Paused { refused, .. }) = self.part(key).map(|part| &part.state)
                && wanted(*refused)
            {
                self.stop(key);
                self.release(key);
            }
        }
    }

    pub(super) fn peer_timeout(&self) -> Option<Time> {
        self.absences.first().map(|(at, _)| *at)
    }

    /// Schedules the next look at a peer, if it is absent and messages are kept for it.
    pub(super) fn note_absence(&mut self, node: NodeId) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if peer.absence.is_some() || !peer.is_missed() {
            return;
        }
        let gone = (!peer.told_gone).then(|| peer.down_since + self.config.gone_after);
        let reassign = self.config.reassign_after.map(|it| peer.waits_for_others_since() + it);
        if let Some(at) = gone.into_iter().chain(reassign).min() {
            peer.absence = Some(at);
            self.absences.insert((at, node));
        }
    }

    pub(super) fn handle_absence(&mut self, now: Now, node: NodeId) {
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.is_missed()) else { return };
        let absent = now.time.since(peer.down_since);
        if absent >= self.config.gone_after && !peer.told_gone {
            peer.told_gone = true;
            let messages = peer.bound + peer.waiting;
            let gone = OutboxEvent::PeerGone { peer: node, messages };
            self.actions.push_back(OutboxAction::Report(gone));
        }
        let waited = now.time.since(peer.waits_for_others_since());
        if self.config.reassign_after.is_none_or(|after| waited < after) {
            return;
        }
        peer.reassigned_at = Some(now.time);
        let keys: Vec<DeliveryKey> = self.bound_to(node).collect();
        for key in keys {
            let Some(part) = self.part(key) else { continue };
            let moves = matches!(self.targets[part.target as usize], Target::Service(_))
                && matches!(part.state, State::Ready | State::Paused { .. } | State::Blocked)
                && self.node_of(key) == Some(node);
            if moves {
                self.stop(key);
                match self.part(key).is_some_and(OutboundDelivery::was_never_sent) {
                    true => self.free(key),
                    false => self.reassign(key),
                }
                self.release(key);
            }
        }
    }

    /// Returns the messages bound to a node, now or before.
    pub(super) fn bound_to(&self, node: NodeId) -> impl Iterator<Item = DeliveryKey> {
        let streams = self.streams_of.get(&node).into_iter().flatten();
        let streams = streams.map(|number| &self.streams[*number as usize]);
        streams.flat_map(|stream| stream.outstanding.iter().map(|(_, key)| *key))
    }

    fn reassign(&mut self, key: DeliveryKey) {
        self.leave(key);
        self.note(&OutboxRecord::Left(vec![(key.number, key.part)]), [key.number]);
    }
}
