//! A node's outbox and inbox at work, and the disks beneath them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::calls::choose_by;
use super::disks::{Disks, Which};
use super::{Later, Life, Request, SimHold, SimNode, node_id};
use crate::engine::delivery::{
    Contents, DeliveryKey, Inbox, InboxAction, Now, Outbox, OutboxAction, OutboxConfig,
    OutboxEvent, RetryPolicy, Source, Verdict,
};
use crate::engine::sim::Random;
use crate::engine::sim::disk::{Disk, SEGMENT, kind};
use crate::engine::sim::ledger::Ledger;
use crate::engine::sim::promises::place;
use crate::engine::sim::rules::Rule;
use crate::engine::sim::settings::Settings;
use crate::engine::{Path, Settlement, Time};
use crate::identity::NodeId;
use crate::journal::stepped::EntryKind;
use crate::journal::{Entry, Need, Position};
use crate::message::{Message, MessageId};
use crate::report::DropReason;
use crate::trust::Grants;
use crate::wire::{
    Answer, Control, Delivery, DeliveryId, DeliveryOutcome, Envelope, InboxInfo, Lane, Payload,
    Totals, decode_stored,
};

/// How often the inbox tries again what its disk refused.
const RETRY: Duration = Duration::from_secs(1);

pub(in super::super) struct Store {
    pub(in super::super) outbox: Outbox,
    pub(super) inbox: Inbox,
    pub(in super::super) disks: Disks,
    /// By its number in this outbox.
    pub(in super::super) numbers: HashMap<u64, MessageId>,
    /// Redelivered messages, until it is written that their handlers begin.
    parked: HashMap<(NodeId, DeliveryId), (Box<Message>, SimHold)>,
    /// What arrived, and what its handlers run.
    arrived: HashMap<(NodeId, DeliveryId), MessageId>,
    in_hand: HashSet<(NodeId, DeliveryId)>,
    /// Messages to the node itself.
    looped: VecDeque<Box<Message>>,
    snapshots: u64,
    retry_at: Time,
    /// The outbox's disk will be looked at.
    pub(super) looks: bool,
    /// When the outbox's disk refused something last.
    pub(super) failed_at: Option<Time>,
    /// Nothing more is written.
    pub(super) closed: bool,
}

/// The configuration of an outbox.
pub(in super::super) fn outbox_config(
    node: usize,
    settings: Settings,
    random: &mut Random,
) -> OutboxConfig {
    OutboxConfig {
        me: node_id(node),
        epoch: random.next(),
        seed: random.next(),
        max_bytes: 1 << 30,
        max_messages: 1000,
        window_bytes: settings.window_bytes,
        // Shorter than in production, so that nobody waits for the last of them.
        retry: RetryPolicy {
            first: Duration::from_millis(20),
            longest: Duration::from_secs(6),
            ..RetryPolicy::default()
        },
        hold_keys: settings.hold_keys,
        segment_size: SEGMENT,
        reassign_after: settings.reassign_after,
        gone_after: Duration::from_secs(3600),
        lapse_after: None,
    }
}

/// A message that an outbox has stored.
pub(in super::super) fn stored(disk: &Disk, number: u64, position: Position) -> Envelope {
    let bytes = disk.at(position).expect("it is kept");
    let encoded = Outbox::stored_message(&bytes, number).unwrap().unwrap();
    // The same whoever reads it.
    decode_stored(&encoded, &node_id(0)).unwrap()
}

impl Store {
    /// Reads what is on the disks, and goes on from there.
    pub(super) fn open(
        now: Now,
        life: Life,
        settings: Settings,
        random: &mut Random,
        mut disks: Disks,
        ledger: &mut Ledger,
    ) -> Self {
        let mut outbox = Outbox::new(outbox_config(life.node, settings, random));
        let mut inbox = Inbox::new(random.next()).with_snapshots_after(SEGMENT);
        let mut numbers = HashMap::new();
        let take = |it: Entry<'_>| outbox.recover(it.position, it.payload).unwrap();
        let outbox_read = disks.outbox.open(take);
        for Contents { number, position, .. } in outbox.contents() {
            let message = stored(&disks.outbox, number, position.expect("it is stored"));
            numbers.insert(number, message.header.id);
        }
        outbox.handle_segments(&disks.outbox.segments());
        outbox.handle_room(now, disks.outbox.look_for_room());
        let inbox_read = disks.inbox.open(|it| inbox.recover(it.payload).unwrap());
        let promises = &mut ledger.promises;
        for read in [outbox_read, inbox_read] {
            promises.seen.when("journals with a torn tail", read.torn > 0);
            promises.seen.when("journals with holes", !read.damaged.is_empty());
        }
        outbox.handle_recovered(now);
        let contents: Vec<_> = outbox.contents().collect();
        for letter in &contents {
            let of_this = |other: &&Contents| other.number == letter.number;
            let ended = contents.iter().filter(of_this).all(|other| other.dead.is_some());
            let sent = promises.of(numbers[&letter.number]);
            if ended && sent.done.as_ref().is_none_or(Result::is_ok) {
                // It crashed before it could tell.
                sent.done = letter.dead.clone().map(Err);
                sent.may_end_again = true;
            }
        }
        let recovered: HashSet<MessageId> = numbers.values().copied().collect();
        promises.check_transactions(life.node, &recovered);
        promises.check_ends(life.node, &recovered);
        promises.forget_lost_probe(life.node, &recovered);
        inbox.handle_recovered();
        let me = node_id(life.node);
        let heard = inbox.heard(&me);
        outbox.handle_link_up(me);
        let own = InboxInfo { epoch: 0, heard, ..InboxInfo::default() };
        outbox.handle_inbox(now, me, own, &Grants::Everything);
        Self {
            outbox,
            inbox,
            disks,
            numbers,
            parked: HashMap::new(),
            arrived: HashMap::new(),
            in_hand: HashSet::new(),
            looped: VecDeque::new(),
            snapshots: 0,
            retry_at: Time::default(),
            looks: false,
            failed_at: None,
            closed: false,
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Now) {
        self.outbox.handle_timeout(now);
        if self.retry_at <= now.time {
            self.inbox.handle_timeout();
            self.retry_at = now.time + RETRY;
        }
    }

    pub(super) fn poll_timeout(&self, now: Now) -> Option<Time> {
        let (timer, wall) = self.outbox.poll_timeout();
        let wall = wall.map(|at| now.time + Duration::from_millis(at.saturating_sub(now.unix_ms)));
        // The clock on the wall may be set: nobody sleeps longer than that.
        let longest = now.time + Duration::from_secs(1);
        let retry = self.inbox.has_unstored().then_some(self.retry_at);
        let all = timer.into_iter().chain(wall.map(|at| at.min(longest))).chain(retry);
        all.min().filter(|at| *at < Time::after_start(Duration::MAX))
    }

    /// Whether nothing is on its way in it.
    pub(super) fn is_quiet(&self) -> bool {
        self.looped.is_empty() && self.inbox.is_idle() && !self.inbox.has_unstored()
    }

    /// Whether the outbox may know more than is written, since its disk fails.
    pub(in super::super) fn is_behind(&self, now: Time) -> bool {
        self.failed_at.is_some_and(|at| now.since(at) <= 2 * RETRY)
    }

    /// The bytes of the messages that are not settled.
    pub(in super::super) fn live_bytes(&self) -> u64 {
        self.outbox.contents().map(|it| u64::from(it.size)).sum()
    }
}

impl SimNode {
    /// Carries out what outbox and inbox have decided. Returns false if that is nothing.
    pub(super) fn perform_store(&mut self, ledger: &mut Ledger) -> bool {
        let Self { store: Some(store), routing, front, turn, id, .. } = self else { return false };
        let choose = &mut |name: &_, key: Option<&str>, load: &dyn Fn(&NodeId) -> Option<u64>| {
            choose_by(routing, front, *id, turn, name, key, load)
        };
        if let Some(action) = store.outbox.poll_action(choose) {
            self.perform_outbox(action, ledger);
        } else if let Some(action) = store.inbox.poll_action() {
            self.perform_inbox(action, ledger);
        } else {
            return false;
        }
        true
    }

    pub(super) fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("it has a store")
    }

    fn perform_outbox(&mut self, action: OutboxAction, ledger: &mut Ledger) {
        let (now, me) = (self.now, self.id);
        let store = self.store();
        let promises = &mut ledger.promises;
        match action {
            OutboxAction::Append { token, entry, persist, need, .. } => {
                store.append(Which::Outbox, Some(token), entry, kind(persist, need));
            }
            OutboxAction::AppendFirst { token, entry } => {
                promises.seen.add("segments begun to clean the newest", 1);
                store.append(Which::Outbox, Some(token), entry, EntryKind::First);
            }
            OutboxAction::Remove(segments) => {
                promises.seen.add("segments removed", segments.len() as u64);
                if !store.closed {
                    store.disks.outbox.remove(segments);
                }
            }
            OutboxAction::Read(number, position) => {
                promises.seen.add("messages moved to another segment", 1);
                let bytes = store.disks.outbox.at(position).expect("it is kept");
                let encoded = Outbox::stored_message(&bytes, number).unwrap();
                store.outbox.handle_read(now, number, encoded);
            }
            OutboxAction::Transmit { to, key, source, delivery, expires_at } => {
                let mut message = match source {
                    Source::Memory(message) => Arc::unwrap_or_clone(message),
                    Source::Journal(at, number) => stored(&store.disks.outbox, number, at),
                };
                let left = expires_at.map(|at| at.saturating_sub(now.unix_ms));
                message.header.time_to_live = left.map(Duration::from_millis);
                self.send_stored(to, key, message, delivery, ledger);
            }
            OutboxAction::Send(to, Control::Epochs(epochs, moment)) if to == me => {
                store.inbox.handle_epochs(to, &epochs, moment);
            }
            OutboxAction::Send(to, control) => self.send_control(to, control),
            OutboxAction::Stored(number, result) => {
                let message = store.numbers[&number];
                promises.handle_stored(message, result.is_ok());
                if result.is_err() && promises.probes.contains(&Some(message)) {
                    self.requests.push_back(Request::ProbeRefused(message));
                }
            }
            OutboxAction::Done(number, result) => {
                let message = store.numbers[&number];
                promises.handle_done(message, result);
                // It comes too late to be written.
                promises.of(message).may_end_again |= store.closed;
            }
            OutboxAction::Report(OutboxEvent::Lapsed { .. }) => {
                promises.seen.add("subscriptions that a rule ended", 1);
                promises.handle_subscription_ended(self.life.node);
            }
            OutboxAction::Report(_) => {}
        }
    }

    /// Hands a stored message to the link of its node.
    fn send_stored(
        &mut self,
        to: NodeId,
        key: DeliveryKey,
        Envelope { header, mut payload }: Envelope,
        delivery: Arc<Delivery>,
        ledger: &mut Ledger,
    ) {
        let (now, body) = (self.now, payload.take_body());
        let link = self.routing.link(&to).copied();
        let (grants, rule) = match link.and_then(|link| self.links.get(&link)) {
            Some(end) => (end.grants.clone(), end.rule),
            None => (Grants::Everything, Rule::All),
        };
        let outbox = &mut self.store().outbox;
        let objection = outbox.objection(key, &header.destination, &grants);
        if let Some(reason) = objection {
            if reason == DropReason::NoSubscriber {
                ledger.promises.handle_subscription_ended(self.life.node);
            }
            let kept = reason == DropReason::NotAllowed;
            ledger.promises.seen.when("guaranteed messages that a rule kept from a peer", kept);
            ledger.promises.handle_kept_back(header.id, rule);
            return self.store().outbox.handle_not_transmitted(now, key, reason);
        }
        assert!(rule.lets_have(&header.destination), "{} is sent against {rule:?}", header.id);
        if to == self.id {
            let mut message = Box::new(Message::new(to, header, body));
            message.delivery = Some(delivery);
            self.store().looped.push_back(message);
            let after = self.random.below(300);
            return self.later(after, Later::LoopBack);
        }
        let payload = Payload::Guaranteed(body, delivery);
        let Some((link, end)) = link.and_then(|link| Some((link, self.links.get_mut(&link)?)))
        else {
            return self.store().outbox.handle_link_down(now, to);
        };
        match end.flow.enqueue(Envelope { header, payload }) {
            Ok(()) => self.transmit(link),
            Err(DropReason::LinkLost) => self.store().outbox.handle_link_down(now, to),
            Err(reason) => {
                let full = reason == DropReason::SlowPeer;
                ledger.seen.when("guaranteed messages that found their link full", full);
                self.store().outbox.handle_not_transmitted(now, key, reason);
            }
        }
    }

    fn send_control(&mut self, to: NodeId, control: Control) {
        let Some(link) = self.routing.link(&to).copied() else { return };
        if let Some(end) = self.links.get_mut(&link) {
            end.flow.enqueue_control(&control);
        }
        self.transmit(link);
    }

    fn perform_inbox(&mut self, action: InboxAction, ledger: &mut Ledger) {
        let store = self.store();
        match action {
            InboxAction::Append { token, entry, persist, .. } => {
                let kind = kind(persist, Need::Urgent);
                store.append(Which::Inbox, Some(token), entry, kind);
            }
            InboxAction::AppendSnapshot { token, entry, .. } => {
                // Each life begins with one.
                let lives = store.snapshots > 0;
                ledger.promises.seen.when("snapshots of inboxes that live", lives);
                store.snapshots += 1;
                store.append(Which::Inbox, Some(token), entry, EntryKind::First);
            }
            InboxAction::Note(entry) => store.append(Which::Inbox, None, entry, EntryKind::Note),
            InboxAction::RemoveBefore(segment) => {
                if !store.closed {
                    store.disks.inbox.remove_before(segment);
                }
            }
            InboxAction::Answer(to, answer) => {
                if answer.outcome == DeliveryOutcome::Processed {
                    let message = store.arrived[&(to, answer.id.clone())];
                    let subscribed = answer.id.stream.subscription.is_some();
                    let place = (self.life.node, subscribed, message);
                    ledger.promises.handle_processed(place);
                }
                self.answer(to, answer);
            }
            InboxAction::Begin(from, id) => {
                let (message, hold) = store.parked.remove(&(from, id)).expect("it waits");
                self.front.handle_call(self.now.time, hold.path, message, hold);
                self.store().inbox.handle_begun(from);
            }
            InboxAction::Forgot { .. } => panic!("there are few senders"),
        }
    }

    fn answer(&mut self, to: NodeId, answer: Answer) {
        let now = self.now;
        match to == self.id {
            true => _ = self.store().outbox.handle_answer(now, to, answer),
            false => self.send_control(to, Control::Answers(vec![answer])),
        }
    }

    // What arrives.

    pub(super) fn take_looped_back(&mut self, ledger: &mut Ledger) {
        let Some(message) = self.store().looped.pop_front() else { return };
        ledger.promises.seen.add("messages of a node to itself", 1);
        let (path, lane, returned) = (Path::Local, Lane::Calls, self.returned.clone());
        let hold = SimHold { path, lane, held: Totals::default(), returned };
        self.handle_delivery(message, hold, ledger);
    }

    /// A guaranteed message arrived.
    pub(super) fn handle_delivery(
        &mut self,
        mut message: Box<Message>,
        hold: SimHold,
        ledger: &mut Ledger,
    ) {
        let (from, place) = (message.from, place(self.life.node, &message));
        let mut delivery = message.delivery.take().expect("it is guaranteed");
        let (id, attempt) = (delivery.id.clone(), delivery.attempt);
        let Self { store: Some(store), front, .. } = self else { return };
        store.arrived.insert((from, id.clone()), place.2);
        let is_served = || front.serves(&message.header, id.stream.subscription.as_ref());
        let verdict = store.inbox.handle_delivery(from, Arc::make_mut(&mut delivery), is_served);
        let again = delivery.redelivered;
        message.delivery = Some(delivery);
        let promises = &mut ledger.promises;
        match verdict {
            Verdict::Run => {
                promises.seen.when("redeliveries", again);
                self.front.handle_call(self.now.time, hold.path, message, hold);
            }
            Verdict::RunLater => {
                promises.seen.when("redeliveries", again);
                store.parked.insert((from, id), (message, hold));
            }
            Verdict::Wait => {}
            Verdict::Answer(outcome) => {
                drop(hold);
                if outcome == DeliveryOutcome::Processed {
                    // Its answer may have been lost in a crash.
                    promises.handle_processed(place);
                    promises.seen.add("suppressed duplicates", 1);
                }
                self.answer(from, Answer { id, attempt, outcome });
            }
            Verdict::Full => panic!("there are few senders"),
        }
    }

    /// A handler of a guaranteed message begins.
    pub(super) fn begin_delivery(&mut self, message: &Message) {
        let delivery = message.delivery.as_ref().expect("it is guaranteed");
        let fresh = self.store().in_hand.insert((message.from, delivery.id.clone()));
        assert!(fresh, "{} is processed twice at once", message.header.id);
    }

    /// A guaranteed message ended here, or left its queue.
    pub(super) fn settle(&mut self, settlement: Settlement, ledger: &mut Ledger) {
        let Settlement { from, delivery, outcome, .. } = settlement;
        let store = self.store();
        store.in_hand.remove(&(from, delivery.id.clone()));
        let seen = &mut ledger.promises.seen;
        match outcome {
            Some(outcome) => {
                seen.when("refusals", outcome == DeliveryOutcome::Refused);
                let expired = outcome == DeliveryOutcome::Expired;
                seen.when("guaranteed messages that expired in the queue", expired);
                store.inbox.handle_ended(from, &delivery.id, outcome);
            }
            None => {
                seen.add("guaranteed messages that were queued when their link was lost", 1);
                store.inbox.handle_unqueued(from, &delivery.id);
            }
        }
    }

    // What is announced.

    pub(super) fn handle_link_up(&mut self, peer: NodeId, ledger: &mut Ledger) {
        if let Some(store) = &mut self.store {
            store.outbox.handle_link_up(peer);
            // Epochs go before what is announced.
            while self.perform_store(ledger) {}
            self.announce_inbox(peer);
        }
    }

    fn inbox_info(&self) -> Option<InboxInfo> {
        let epoch = self.store.as_ref()?.inbox.epoch();
        let consumers = self.front.consumers();
        let subscriptions = consumers.map(|(name, pattern, _)| (name.clone(), pattern.clone()));
        let (subscriptions, ended) = (subscriptions.collect(), Vec::new());
        Some(InboxInfo { epoch, subscriptions, ended, heard: None })
    }

    /// The announcement of the inbox for one peer.
    fn announcement(&self, peer: &NodeId, info: &InboxInfo) -> InboxInfo {
        let heard = self.store.as_ref().and_then(|store| store.inbox.heard(peer));
        InboxInfo { heard, ..info.clone() }
    }

    pub(super) fn announce_inbox(&mut self, peer: NodeId) {
        if let Some(info) = self.inbox_info() {
            let info = self.announcement(&peer, &info);
            self.send_control(peer, Control::Inbox(Box::new(info)));
        }
    }

    /// Announces the durable subscriptions of this node, itself included.
    pub(super) fn announce_consumers(&mut self, ledger: &mut Ledger) {
        let Some(info) = self.inbox_info() else { return };
        let (id, now) = (self.id, self.now);
        let own = InboxInfo { epoch: 0, ..self.announcement(&id, &info) };
        self.store().outbox.handle_inbox(now, id, own, &Grants::Everything);
        while self.perform_store(ledger) {}
        self.routes_changed = true;
        let open: Vec<_> = self.links.iter().filter(|(_, end)| end.open).map(|it| *it.0).collect();
        for link in open {
            let Some(peer) = self.links.get(&link).map(|end| end.peer) else { continue };
            let info = self.announcement(&peer, &info);
            if let Some(end) = self.links.get_mut(&link) {
                end.flow.enqueue_control(&Control::Inbox(Box::new(info)));
            }
            self.transmit(link);
        }
    }
}
