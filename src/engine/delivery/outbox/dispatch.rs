//! Whom a stored message goes to, when, and what its answer means.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{
    Bound, Choose, Outbox, OutboxAction, OutboxEvent, Part, PartKey, Peer, Pending, Source, State,
};
use crate::address::ServiceName;
use crate::engine::Time;
use crate::engine::delivery::record::{BindingRecord, NodeBytes};
use crate::engine::delivery::record::{OutboxRecord, PeerRecord};
use crate::engine::delivery::{Fate, Now, Target, longest_pause};
use crate::identity::NodeId;
use crate::report::DropReason;
use crate::wire::{Answer, Control, Delivery, DeliveryId, InboxInfo, Outcome};

/// While the queue of a link is full of other messages.
const QUEUE_RETRY: Duration = Duration::from_millis(50);
/// A message that can't be read so often in a row is lost.
pub(super) const MOST_UNREADABLE: u32 = 10;
/// So many durable subscriptions of one peer are remembered.
pub(super) const MAX_SUBSCRIPTIONS: usize = 256;
/// So many peers are remembered while they are away and nothing is kept for them; a member of the
/// mesh can have as many ids as it likes. Each new one has all of them stored again.
pub(super) const MAX_PEERS: usize = if cfg!(test) { 64 } else { 4096 };
/// What may be sent to a peer and not be answered, in messages.
const WINDOW_MESSAGES: u64 = 8192;

impl Peer {
    /// Since when its messages have waited for it, or for others to take them.
    fn waits_for_others_since(&self) -> Time {
        self.reassigned_at.unwrap_or(self.down_since)
    }

    /// Whether there is anything for it.
    fn is_wanted(&self) -> bool {
        self.bound > 0 || self.waiting > 0 || !self.ready.is_empty() || !self.paused.is_empty()
    }

    /// Whether nothing is lost with what is known of it.
    fn is_forgettable(&self) -> bool {
        !self.up && self.known_inbox.is_none() && !self.is_wanted()
    }
}

impl Outbox {
    // What is known of peers.

    /// A peer can be talked to; whether it has an inbox it tells itself.
    pub(crate) fn handle_link_up(&mut self, node: NodeId) {
        let mut epochs = vec![self.config.epoch];
        for stream in &self.streams {
            let epoch = stream.stream.epoch;
            if stream.node == node && !stream.outstanding.is_empty() && !epochs.contains(&epoch) {
                epochs.push(epoch);
            }
        }
        let peer = self.peers.entry(node).or_default();
        peer.up = true;
        peer.told_gone = false;
        self.actions.push_back(OutboxAction::Send(node, Control::Epochs(epochs)));
    }

    /// What was sent to the peer may have been processed or not.
    pub(crate) fn handle_link_down(&mut self, now: Now, node: NodeId) {
        self.now = now.time;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        (peer.up, peer.inbox, peer.down_since) = (false, None, now.time);
        (peer.told_inbox, peer.reassigned_at) = (None, None);
        peer.active.clear();
        let ready = std::mem::take(&mut peer.ready);
        let of_node = self.streams.iter().filter(|stream| stream.node == node);
        let keys = of_node.flat_map(|stream| stream.outstanding.iter().map(|(_, key)| *key));
        let in_flight: Vec<PartKey> = keys
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
                true => self.kill(key, Fate::Expired { maybe_processed: true }),
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

    /// A peer told of its inbox, or this node of its own, whose epoch is 0 here.
    pub(crate) fn handle_inbox(&mut self, node: NodeId, info: InboxInfo) {
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.up) else { return };
        // It stays for as long as a process does.
        if *peer.told_inbox.get_or_insert(info.epoch) != info.epoch {
            return;
        }
        peer.inbox = Some(info.epoch);
        peer.active = info.subscriptions.iter().map(|(name, _)| name.clone()).collect();
        self.dirty.insert(node);
        self.waiting_dirty = true;
        self.remember(node, info);
        self.resume(node, |_| true);
    }

    /// Keeps in mind what a peer told, for when it is away.
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

    /// Whether one more peer may be remembered, when those that nothing is kept for are forgotten.
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

    /// Stores what is remembered of peers: whom it has met at once, what changes once a second.
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

    /// Who serves what is not what it was: what was refused may be tried again.
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

    /// Ends the pause of what is bound to a node.
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

    // On the way.

    /// The node that takes a message to `target` now, if there is one.
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

    /// Chooses the instance of a service.
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

    /// It may go, as soon as somebody takes it.
    pub(super) fn release(&mut self, key: PartKey) {
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
                    // It is missed from now on, though it may never have been met.
                    let missed = Peer { down_since: self.now, ..Peer::default() };
                    self.peers.entry(node).or_insert(missed).waiting += 1;
                }
                self.set_state(key, State::Waiting);
                self.waiting.entry(target).or_default().push_back(key);
                self.waiting_dirty = true;
            }
        }
    }

    /// The only node that may take what goes there.
    fn only_taker(&self, target: u32) -> Option<NodeId> {
        match self.targets[target as usize] {
            Target::Node(node) | Target::Subscription(node, _) => Some(node),
            Target::Service(_) => None,
        }
    }

    /// It doesn't wait for somebody to be there any more; the queue finds out by itself.
    fn end_waiting(&mut self, key: PartKey) {
        let Some(part) = self.part_mut(key).filter(|part| part.state == State::Waiting) else {
            return;
        };
        part.state = State::Idle;
        let target = part.target;
        if let Some(peer) = self.only_taker(target).and_then(|node| self.peers.get_mut(&node)) {
            peer.waiting -= 1;
        }
    }

    fn is_reachable(&self, node: &NodeId) -> bool {
        self.peers.get(node).is_some_and(|peer| peer.up && peer.inbox.is_some())
    }

    pub(super) fn make_ready(&mut self, key: PartKey) {
        let Some(node) = self.node_of(key) else { return };
        self.set_state(key, State::Ready);
        self.peers.entry(node).or_default().ready.push_back(key);
        self.dirty.insert(node);
    }

    /// Takes it out of what it is in: on its way, or in a pause.
    pub(super) fn stop(&mut self, key: PartKey) {
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

    /// Tries again after a while, doubling with each time before, and with full jitter.
    pub(super) fn pause(&mut self, now: Now, key: PartKey, times_before: u32, refused: bool) {
        let until = now.time + longest_pause(times_before).mul_f64(self.random.unit());
        self.pause_until(key, until, refused);
    }

    fn pause_until(&mut self, key: PartKey, until: Time, refused: bool) {
        self.set_state(key, State::Paused { until, refused });
        self.timers.insert((until, key));
        match self.node_of(key).and_then(|node| self.peers.get_mut(&node)) {
            Some(peer) => peer.paused.insert(key),
            None => self.paused.insert(key),
        };
    }

    fn has_expired(&self, now: Now, key: PartKey) -> bool {
        let rare = self.entries.get(key.number).and_then(|entry| entry.rare.as_ref());
        rare.and_then(|rare| rare.expires_at).is_some_and(|at| at <= now.unix_ms)
    }

    /// Sends what can go. To be called after anything was told.
    pub(crate) fn pump(&mut self, choose: &mut Choose<'_>) {
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
        self.remove_segments();
        self.compact();
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

    /// The next message for a node, if the node can take one.
    fn next_for(&mut self, node: NodeId) -> Option<PartKey> {
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
            // It may have gone to another node meanwhile, whose queue it is in too.
            let ready = |part: &&Part| part.state == State::Ready;
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
            // Until the peer tells that it takes them again.
            let never = Time::after_start(Duration::MAX);
            self.pause_until(key, never, true);
        }
        found
    }

    fn transmit(&mut self, node: NodeId, key: PartKey) {
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
        let peer = self.peers.entry(node).or_default();
        peer.in_flight += 1;
        peer.in_flight_bytes += size;
        let delivery = Box::new(Delivery { id, floor, attempt, redelivered });
        let transmit = OutboxAction::Transmit { to: node, key, source, delivery, expires_at };
        self.actions.push_back(transmit);
    }

    /// It could not be handed to its link.
    pub(crate) fn handle_not_transmitted(&mut self, now: Now, key: PartKey, reason: DropReason) {
        if self.part(key).is_none_or(|part| part.state != State::InFlight) {
            return;
        }
        self.stop(key);
        match reason {
            DropReason::TooLarge => self.kill(key, Fate::TooLarge),
            // Its end is told in a moment.
            DropReason::LinkLost => self.make_ready(key),
            _ => self.pause_until(key, now.time + QUEUE_RETRY, false),
        }
    }

    /// What is stored of it can't be read. That may pass; if it doesn't, it is a dead letter.
    pub(crate) fn handle_unreadable(&mut self, now: Now, key: PartKey) {
        if self.part(key).is_none_or(|part| part.state != State::InFlight) {
            return;
        }
        self.stop(key);
        if let Some(part) = self.part_mut(key) {
            part.attempts -= 1;
        }
        match self.count_unreadable(key.number) {
            MOST_UNREADABLE.. => self.kill(key, Fate::Unreadable),
            times => self.pause(now, key, times - 1, false),
        }
    }

    /// How often in a row it could not be read by now.
    pub(super) fn count_unreadable(&mut self, number: u64) -> u32 {
        let times = self.unreadable.entry(number).or_default();
        *times = times.saturating_add(1);
        *times
    }

    /// A peer says what became of a delivery; whether it was known.
    pub(crate) fn handle_answer(&mut self, now: Now, from: NodeId, answer: Answer) -> bool {
        let DeliveryId { stream, seq } = answer.id;
        let Some(number) = self.stream_numbers.get(&(from, stream)).copied() else { return false };
        let bound = Bound { stream: number, seq };
        let Some(key) = self.streams[number as usize].outstanding.get(seq).copied() else {
            return false;
        };
        let Some(part) = self.part(key) else { return false };
        if part.was_never_sent() {
            // An answer to what was never sent.
            return true;
        }
        if answer.outcome == Outcome::Processed {
            // Of whichever attempt, also of one before it went to another node.
            if !matches!(part.state, State::Dying | State::Dead(_) | State::Settled) {
                self.settle(key);
            }
            return true;
        }
        let current = part.state == State::InFlight
            && part.bound == Some(bound)
            && part.attempts == answer.attempt;
        if !current {
            return true;
        }
        let (target, attempts) = (part.target, part.attempts);
        self.unreadable.remove(&key.number);
        self.stop(key);
        match answer.outcome {
            Outcome::Processed => unreachable!("it was settled above"),
            Outcome::Failed(text) => self.handle_failure(now, key, text),
            Outcome::Rejected(text) => self.kill(key, Fate::Rejected { text }),
            Outcome::Expired => {
                let maybe_processed = self.part(key).is_some_and(|part| part.redelivered);
                self.kill(key, Fate::Expired { maybe_processed });
            }
            Outcome::Refused if self.has_expired(now, key) => {
                let maybe_processed = self.part(key).is_some_and(|part| part.redelivered);
                self.kill(key, Fate::Expired { maybe_processed });
            }
            Outcome::Refused => {
                if matches!(self.targets[target as usize], Target::Service(_)) {
                    self.unbind(key);
                    let free = OutboxRecord::Bound(vec![(key.number, key.part, None)]);
                    self.note(&free);
                }
                self.pause(now, key, attempts.saturating_sub(1), true);
            }
            Outcome::NoInbox => {
                if let Some(peer) = self.peers.get_mut(&from) {
                    peer.inbox = None;
                }
                self.release(key);
            }
        }
        true
    }

    fn handle_failure(&mut self, now: Now, key: PartKey, text: String) {
        let expired = self.has_expired(now, key);
        let Some(part) = self.part_mut(key) else { return };
        part.redelivered = true;
        part.failures += 1;
        let failures = part.failures;
        if failures >= self.config.max_failures {
            self.kill(key, Fate::Failed { failures, text });
        } else if expired {
            self.kill(key, Fate::Expired { maybe_processed: true });
        } else {
            self.note(&OutboxRecord::Failed(key.number, key.part, failures));
            self.pause(now, key, failures - 1, false);
        }
    }

    // The clocks.

    pub(super) fn peer_timeout(&self) -> Option<Time> {
        let due = self.missed().flat_map(|(_, peer)| {
            let gone = (!peer.told_gone).then(|| peer.down_since + self.config.gone_after);
            let reassign =
                self.config.reassign_after.map(|after| peer.waits_for_others_since() + after);
            [gone, reassign]
        });
        due.flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Now) {
        self.now = now.time;
        while let Some((at, key)) = self.timers.first().copied()
            && at <= now.time
        {
            self.timers.pop_first();
            if let Some(fate) = self.dying.remove(&key) {
                self.store_fate(key, fate);
            }
            if matches!(self.part(key).map(|part| &part.state), Some(State::Paused { until, .. }) if *until == at)
            {
                self.stop(key);
                self.release(key);
            }
        }
        self.disk_retry.take_if(|at| *at <= now.time);
        self.compact_retry.take_if(|at| *at <= now.time);
        if self.peers_retry.take_if(|at| *at <= now.time).is_some() && self.peers_dirty {
            self.store_peers(false);
        }
        while let Some((at, key)) = self.wall.first().copied()
            && at <= now.unix_ms
        {
            self.wall.pop_first();
            self.handle_wall(now, key);
        }
        let missed: Vec<NodeId> = self.missed().map(|(node, _)| *node).collect();
        missed.into_iter().for_each(|node| self.handle_absence(now, node));
    }

    /// The peers that are away and that messages wait for.
    fn missed(&self) -> impl Iterator<Item = (&NodeId, &Peer)> {
        let away = self.peers.iter().filter(|(_, peer)| !peer.up);
        away.filter(|(_, peer)| peer.bound > 0 || peer.waiting > 0)
    }

    fn handle_wall(&mut self, now: Now, key: PartKey) {
        let Some(part) = self.part(key) else { return };
        let maybe_processed = part.redelivered;
        match part.state {
            // Its answer decides, or the end of the link.
            State::InFlight | State::Storing | State::Dying | State::Dead(_) | State::Settled => {}
            _ if self.has_expired(now, key) => self.kill(key, Fate::Expired { maybe_processed }),
            State::Scheduled => self.activate(now, key),
            _ => {}
        }
    }

    fn handle_absence(&mut self, now: Now, node: NodeId) {
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
        let of_node = self.streams.iter().filter(|stream| stream.node == node);
        let keys: Vec<PartKey> =
            of_node.flat_map(|stream| stream.outstanding.iter().map(|(_, key)| *key)).collect();
        for key in keys {
            let Some(part) = self.part(key) else { continue };
            let moves = matches!(self.targets[part.target as usize], Target::Service(_))
                && matches!(part.state, State::Ready | State::Paused { .. } | State::Blocked)
                && self.node_of(key) == Some(node);
            if moves {
                self.stop(key);
                match self.part(key).is_some_and(Part::was_never_sent) {
                    true => self.free(key),
                    false => self.reassign(key),
                }
                self.release(key);
            }
        }
    }

    fn reassign(&mut self, key: PartKey) {
        self.leave(key);
        self.note(&OutboxRecord::Left(vec![(key.number, key.part)]));
    }
}
