//! Known peers: connected ones, absent ones with queued messages, and durable subscriptions.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    DeliveryKey, OutboundDelivery, Outbox, OutboxAction, OutboxEvent, Peer, Pending, State,
};
use crate::address::ServiceName;
use crate::engine::Time;
use crate::engine::delivery::record::{NodeBytes, OutboxRecord, PeerRecord};
use crate::engine::delivery::{DeadLetterReason, Now, Target};
use crate::identity::NodeId;
use crate::wire::InboxInfo;

/// The most durable subscriptions remembered for a peer.
pub(super) const MAX_SUBSCRIPTIONS: usize = 256;
/// The most peers remembered while they are absent and nothing is queued for them. A member of the
/// mesh can create any number of ids, and each new peer has all of them stored again.
pub(super) const MAX_PEERS: usize = if cfg!(test) { 64 } else { 4096 };

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
}

impl Outbox {
    /// Handles a new link to a peer. The peer announces its inbox itself.
    pub(crate) fn handle_link_up(&mut self, node: NodeId) {
        let peer = self.peers.entry(node).or_default();
        peer.up = true;
        peer.told_gone = false;
        self.announce_epochs(node);
    }

    /// Handles the end of a link. Messages in flight may have been processed or not.
    pub(crate) fn handle_link_down(&mut self, now: Now, node: NodeId) {
        self.now = now.time;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        (peer.up, peer.inbox, peer.down_since) = (false, None, now.time);
        (peer.told_inbox, peer.told, peer.reassigned_at) = (None, None, None);
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
        if self.peers.get(&node).is_some_and(Peer::is_forgettable) {
            self.peers.remove(&node);
        }
    }

    /// Handles the announcement of a peer's inbox, or of this node's own, whose epoch is 0 here.
    pub(crate) fn handle_inbox(&mut self, now: Now, node: NodeId, info: InboxInfo) {
        self.now = now.time;
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.up) else { return };
        let is_first = peer.told_inbox.is_none();
        // The epoch is constant for the lifetime of a process.
        if *peer.told_inbox.get_or_insert(info.epoch) != info.epoch {
            return;
        }
        if let Some(heard) = info.heard.filter(|_| is_first) {
            self.handle_heard(node, heard);
        }
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.inbox = Some(info.epoch);
        peer.active = info.subscriptions.iter().map(|(name, _)| name.clone()).collect();
        self.dirty.insert(node);
        self.waiting_dirty = true;
        self.remember(node, info);
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
            peer.known_inbox = Some(info.epoch);
        }
        if before.is_some_and(|before| before != info.epoch) {
            self.actions.push_back(OutboxAction::Report(OutboxEvent::InboxLost(node)));
        }
        let (mut changed, mut met) = (before != Some(info.epoch), before.is_none());
        let known = self.subscriptions.keys().filter(|(owner, _)| *owner == node).count();
        let room = MAX_SUBSCRIPTIONS.saturating_sub(known);
        let mut new = 0;
        for name in &info.ended {
            changed |= self.drop_subscription(node, name).is_some();
        }
        for (name, pattern) in info.subscriptions {
            if !self.subscriptions.contains_key(&(node, name.clone())) {
                new += 1;
                if new > room {
                    continue;
                }
                met = true;
            }
            let known = self.subscriptions.insert((node, name), pattern.clone());
            changed |= known != Some(pattern);
        }
        if changed {
            self.store_peers(met);
        }
    }

    /// Returns true if one more peer may be remembered; may forget peers without messages.
    fn has_room_to_remember(&mut self) -> bool {
        let known = |peers: &BTreeMap<_, Peer>| {
            peers.values().filter(|peer| peer.known_inbox.is_some()).count()
        };
        if known(&self.peers) < MAX_PEERS {
            return true;
        }
        let owners: BTreeSet<NodeId> = self.subscriptions.keys().map(|(owner, _)| *owner).collect();
        self.peers.retain(|node, peer| peer.up || peer.is_wanted() || owners.contains(node));
        known(&self.peers) < MAX_PEERS
    }

    /// Stores the state of peers: at once for a new peer or subscription, otherwise once a second.
    pub(super) fn store_peers(&mut self, met: bool) {
        self.peers_dirty = true;
        self.peers_met |= met;
        if self.peers_pending || self.peers_retry.is_some() && !self.peers_met {
            return;
        }
        (self.peers_pending, self.peers_dirty, self.peers_met) = (true, false, false);
        let peers = self.peer_records();
        self.append(&OutboxRecord::Peers(peers), Pending::Peers);
    }

    pub(super) fn peer_records(&self) -> Vec<PeerRecord> {
        let known = self.peers.iter().filter_map(|(node, peer)| Some((node, peer.known_inbox?)));
        known
            .map(|(node, inbox)| {
                let own = self.subscriptions.iter().filter(|((owner, _), _)| owner == node);
                let texts = |name: &ServiceName, pattern: &crate::address::Pattern| {
                    (name.as_str().to_owned(), pattern.as_str().to_owned())
                };
                let subscriptions = own.map(|((_, name), pattern)| texts(name, pattern)).collect();
                PeerRecord { node: NodeBytes(*node), inbox, subscriptions }
            })
            .collect()
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
    fn resume(&mut self, node: NodeId, wanted: impl Fn(bool) -> bool) {
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
        let due = self.missed().flat_map(|(_, peer)| {
            let gone = (!peer.told_gone).then(|| peer.down_since + self.config.gone_after);
            let reassign =
                self.config.reassign_after.map(|after| peer.waits_for_others_since() + after);
            [gone, reassign]
        });
        due.flatten().min()
    }

    /// Returns the absent peers with queued messages.
    pub(super) fn missed(&self) -> impl Iterator<Item = (&NodeId, &Peer)> {
        let away = self.peers.iter().filter(|(_, peer)| !peer.up);
        away.filter(|(_, peer)| peer.bound > 0 || peer.waiting > 0)
    }

    pub(super) fn handle_absence(&mut self, now: Now, node: NodeId) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
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
    fn bound_to(&self, node: NodeId) -> impl Iterator<Item = DeliveryKey> {
        let streams = self.streams_of.get(&node).into_iter().flatten();
        let streams = streams.map(|number| &self.streams[*number as usize]);
        streams.flat_map(|stream| stream.outstanding.iter().map(|(_, key)| *key))
    }

    fn reassign(&mut self, key: DeliveryKey) {
        self.leave(key);
        self.note(&OutboxRecord::Left(vec![(key.number, key.part)]), [key.number]);
    }
}
