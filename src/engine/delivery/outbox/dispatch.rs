//! Dispatch of stored messages: to which node, and when.

use std::sync::Arc;
use std::time::Duration;

use super::{
    Choose, DeliveryKey, OutboundDelivery, Outbox, OutboxAction, Peer, Pending, Source, State,
};
use crate::address::ServiceName;
use crate::engine::Time;
use crate::engine::delivery::record::{BindingRecord, OutboxRecord};
use crate::engine::delivery::{DeadLetterReason, Now, Target};
use crate::identity::NodeId;
use crate::wire::{Delivery, DeliveryId};

/// The most messages in flight to a peer.
const WINDOW_MESSAGES: u64 = 8192;

impl Outbox {
    /// Returns the node that currently takes messages to `target`, if there is one.
    pub(super) fn taker(
        &self,
        target: &Target,
        order: Option<&str>,
        choose: &mut Choose<'_>,
    ) -> Option<NodeId> {
        match target {
            Target::Service(name) => self.choose(name, order, choose),
            Target::Node(node) => Some(*node).filter(|node| self.is_reachable(node)),
            Target::Subscription(node, name) => {
                let active = self.peers.get(node).is_some_and(|peer| peer.active.contains(name));
                Some(*node).filter(|node| active && self.is_reachable(node))
            }
        }
    }

    /// Chooses an instance of a service.
    fn choose(
        &self,
        name: &ServiceName,
        order: Option<&str>,
        choose: &mut Choose<'_>,
    ) -> Option<NodeId> {
        let load = |node: &NodeId| {
            let peer = self.peers.get(node)?;
            (peer.up && peer.inbox.is_some()).then_some(peer.bound)
        };
        choose(name, order, &load)
    }

    /// Lets a message be sent as soon as a node takes it.
    pub(super) fn release(&mut self, key: DeliveryKey) {
        if self.is_behind(key) {
            return self.set_state(key, State::Blocked);
        }
        let Some(part) = self.part(key) else { return };
        let (target, never_sent) = (part.target, part.was_never_sent());
        match self.node_of(key) {
            Some(node) if !never_sent || self.is_reachable(&node) => {
                self.make_ready(key);
            }
            _ => {
                self.free(key);
                if let Some(node) = self.only_taker(target) {
                    // The peer counts as absent from now on, even if it was never connected.
                    let missed = Peer { down_since: self.now, ..Peer::default() };
                    self.peers.entry(node).or_insert(missed).waiting += 1;
                    self.note_absence(node);
                }
                self.set_state(key, State::Waiting);
                self.waiting.entry(target).or_default().push_back(key);
                self.waiting_dirty = true;
            }
        }
    }

    /// Returns the only node that may take messages to a target; `None` for a service.
    fn only_taker(&self, target: u32) -> Option<NodeId> {
        match self.targets[target as usize] {
            Target::Node(node) | Target::Subscription(node, _) => Some(node),
            Target::Service(_) => None,
        }
    }

    /// Ends the wait of a message for a node. Its entry in the queue is dropped later.
    fn end_waiting(&mut self, key: DeliveryKey) {
        let Some(part) = self.part_mut(key).filter(|part| part.state == State::Waiting) else {
            return;
        };
        part.state = State::Idle;
        let target = part.target;
        if let Some(peer) = self.only_taker(target).and_then(|node| self.peers.get_mut(&node)) {
            peer.waiting -= 1;
        }
    }

    pub(super) fn is_reachable(&self, node: &NodeId) -> bool {
        self.peers.get(node).is_some_and(|peer| peer.up && peer.inbox.is_some())
    }

    pub(super) fn make_ready(&mut self, key: DeliveryKey) {
        let Some(node) = self.node_of(key) else { return };
        self.set_state(key, State::Ready);
        self.peers.entry(node).or_default().ready.push_back(key);
        self.dirty.insert(node);
    }

    /// Takes a message out of its state: waiting, in flight, or paused.
    pub(super) fn stop(&mut self, key: DeliveryKey) {
        let node = self.node_of(key);
        let Some(entry) = self.entries.get(key.number) else { return };
        let size = u64::from(entry.size);
        match entry.parts[key.part as usize].state {
            State::Waiting => self.end_waiting(key),
            State::InFlight => {
                self.set_state(key, State::Idle);
                if let Some(node) = node
                    && let Some(peer) = self.peers.get_mut(&node)
                {
                    peer.in_flight -= 1;
                    peer.in_flight_bytes -= size;
                    self.dirty.insert(node);
                    self.waiting_dirty |= !self.waiting.is_empty();
                }
            }
            State::Paused { until, .. } => {
                self.set_state(key, State::Idle);
                self.timers.remove(&(until, key));
                match node.and_then(|node| self.peers.get_mut(&node)) {
                    Some(peer) => _ = peer.paused.remove(&key),
                    None => _ = self.paused.remove(&key),
                }
            }
            _ => {}
        }
    }

    /// Retries after a backoff, which doubles with each earlier attempt, with full jitter.
    pub(super) fn pause(&mut self, now: Now, key: DeliveryKey, times_before: u32, refused: bool) {
        let until = now.time + self.config.retry.pause(times_before).mul_f64(self.random.unit());
        self.pause_until(key, until, refused);
    }

    pub(super) fn pause_until(&mut self, key: DeliveryKey, until: Time, refused: bool) {
        self.set_state(key, State::Paused { until, refused });
        self.timers.insert((until, key));
        match self.node_of(key).and_then(|node| self.peers.get_mut(&node)) {
            Some(peer) => peer.paused.insert(key),
            None => self.paused.insert(key),
        };
    }

    pub(super) fn has_expired(&self, now: Now, key: DeliveryKey) -> bool {
        let rare = self.entries.get(key.number).and_then(|entry| entry.rare.as_ref());
        rare.and_then(|rare| rare.expires_at).is_some_and(|at| at <= now.unix_ms)
    }

    /// Sends the messages that can be sent, and performs pending work.
    pub(super) fn pump(&mut self, choose: &mut Choose<'_>) {
        self.store_freed();
        if std::mem::take(&mut self.waiting_dirty) {
            self.bind_waiting(choose);
        }
        while let Some(node) = self.dirty.pop_first() {
            while let Some(key) = self.next_for(node) {
                self.transmit(node, key);
            }
        }
        self.store_settled();
        self.clean();
    }

    fn bind_waiting(&mut self, choose: &mut Choose<'_>) {
        let (mut keys, mut record) = (Vec::new(), Vec::new());
        for target in self.waiting.keys().copied().collect::<Vec<_>>() {
            let Some(mut queue) = self.waiting.remove(&target) else { continue };
            while let Some(key) = queue.front().copied() {
                if self.part(key).is_none_or(|part| part.state != State::Waiting) {
                    queue.pop_front();
                    continue;
                }
                let order = self.order(key.number).cloned();
                let to = self.targets[target as usize].clone();
                let Some(node) = self.taker(&to, order.as_deref(), choose) else { break };
                let busy =
                    |peer: &Peer| peer.in_flight + peer.ready.len() as u64 >= WINDOW_MESSAGES;
                if self.peers.get(&node).is_some_and(busy) || keys.len() as u64 >= WINDOW_MESSAGES {
                    break;
                }
                queue.pop_front();
                self.end_waiting(key);
                let bound = self.bind(key, node, &to);
                if let Some(part) = self.part_mut(key) {
                    (part.bound, part.state) = (Some(bound), State::Binding);
                }
                let binding = BindingRecord::from(&self.binding(bound));
                record.push((key.number, key.part, Some(binding)));
                keys.push(key);
            }
            if !queue.is_empty() {
                self.waiting.insert(target, queue);
            }
        }
        if !keys.is_empty() {
            self.append(&OutboxRecord::Bound(record), Pending::Bound(keys));
        }
    }

    /// Returns the next message for a node, if the node can take one.
    fn next_for(&mut self, node: NodeId) -> Option<DeliveryKey> {
        let mut asleep = Vec::new();
        let found = loop {
            let peer = self.peers.get_mut(&node)?;
            let has_room = peer.in_flight == 0
                || peer.in_flight < WINDOW_MESSAGES
                    && peer.in_flight_bytes < self.config.window_bytes;
            if !(peer.up && peer.inbox.is_some() && has_room) {
                break None;
            }
            let Some(key) = peer.ready.pop_front() else { break None };
            // The message may have been bound to another node since, and queued there too.
            let ready = |part: &&OutboundDelivery| part.state == State::Ready;
            let Some(part) = self.part(key).filter(ready) else { continue };
            if self.node_of(key) != Some(node) {
                continue;
            }
            if let Target::Subscription(_, name) = &self.targets[part.target as usize]
                && !self.peers[&node].active.contains(name)
            {
                asleep.push(key);
                continue;
            }
            break Some(key);
        };
        for key in asleep {
            // Paused until the peer announces the subscription again.
            let never = Time::after_start(Duration::MAX);
            self.pause_until(key, never, true);
        }
        found
    }

    fn transmit(&mut self, node: NodeId, key: DeliveryKey) {
        let Some(bound) = self.part(key).and_then(|part| part.bound) else { return };
        let stream = &self.streams[bound.stream as usize];
        let floor = stream.outstanding.first().unwrap_or(bound.seq);
        let id = DeliveryId { stream: stream.stream.clone(), seq: bound.seq };
        let Some(entry) = self.entries.get_mut(key.number) else { return };
        let source = match (entry.cached.take(), entry.position) {
            (Some(cached), Some(_)) => {
                if entry.parts.len() > 1 {
                    entry.cached = Some(cached.clone());
                } else {
                    self.cached_bytes -= u64::from(entry.size);
                }
                Source::Memory(cached)
            }
            (_, Some(position)) => Source::Journal(position, key.number),
            (cached, None) => {
                entry.cached = cached;
                return;
            }
        };
        let expires_at = entry.rare.as_ref().and_then(|rare| rare.expires_at);
        let size = u64::from(entry.size);
        let part = &mut entry.parts[key.part as usize];
        part.attempts += 1;
        part.state = State::InFlight;
        let (attempt, redelivered) = (part.attempts, part.redelivered);
        let redelivered = redelivered || self.history.doubts(&node, key.number);
        let peer = self.peers.entry(node).or_default();
        peer.in_flight += 1;
        peer.in_flight_bytes += size;
        if peer.told != Some(self.history.reached()) {
            self.announce_epochs(node);
        }
        let delivery = Arc::new(Delivery { id, floor, attempt, redelivered });
        let transmit = OutboxAction::Transmit { to: node, key, source, delivery, expires_at };
        self.actions.push_back(transmit);
    }

    pub(crate) fn handle_timeout(&mut self, now: Now) {
        self.now = now.time;
        while let Some((at, key)) = self.timers.first().copied()
            && at <= now.time
        {
            self.timers.pop_first();
            if let Some(State::DeadLettering(reason)) = self.part(key).map(|part| &part.state) {
                let reason = DeadLetterReason::clone(reason);
                self.store_dead_letter(key, reason);
            }
            if matches!(self.part(key).map(|part| &part.state), Some(State::Paused { until, .. }) if *until == at)
            {
                self.stop(key);
                self.release(key);
            }
        }
        self.disk_retry.take_if(|at| *at <= now.time);
        self.clean_retry.take_if(|at| *at <= now.time);
        self.clean_due |= self.clean_at.take_if(|at| *at <= now.time).is_some();
        let retry = self.peers_retry.take_if(|at| *at <= now.time).is_some();
        if retry && !self.peers_dirty.is_empty() {
            self.store_peers();
        }
        if self.history.retry.take_if(|at| *at <= now.time).is_some() {
            self.store_history();
        }
        if self.drop_at.take_if(|at| *at <= now.time).is_some() {
            self.drop_messages();
        }
        if self.lapse_at.take_if(|at| *at <= now.time).is_some() {
            self.lapse_absent(now);
        }
        while let Some((at, key)) = self.wall.first().copied()
            && at <= now.unix_ms
        {
            self.wall.pop_first();
            self.handle_wall(now, key);
        }
        while let Some((at, node)) = self.absences.first().copied()
            && at <= now.time
        {
            self.absences.pop_first();
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.absence = None;
            }
            self.handle_absence(now, node);
            self.note_absence(node);
        }
    }

    fn handle_wall(&mut self, now: Now, key: DeliveryKey) {
        let Some(part) = self.part(key) else { return };
        let maybe_processed = part.redelivered;
        match part.state {
            // The answer decides, or the end of the link.
            State::InFlight
            | State::Storing
            | State::DeadLettering(_)
            | State::Dead(_)
            | State::Settled => {}
            _ if self.has_expired(now, key) => {
                self.dead_letter(key, DeadLetterReason::Expired { maybe_processed })
            }
            State::Scheduled => self.activate(now, key),
            _ => {}
        }
    }
}
