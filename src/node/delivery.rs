//! Guaranteed delivery: performs what outbox and inbox decide.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use smallvec::SmallVec;

use super::counters::add;
use super::events::Event;
use super::guaranteed::NotStored;
use super::log::Line;
use super::peer_link::{Credit, PeerLink};
use super::reader::{Transmission, Wanted};
use super::shared::Shared;
use super::store::Store;
use crate::address::ServiceName;
use crate::broker::Unsupported;
use crate::clock::unix_ms;
use crate::engine::delivery::{
    DeadLetterReason, Inbox, InboxAction, Now, Outbox, OutboxAction, OutboxEvent, Source, Verdict,
};
use crate::engine::{Time, least_loaded, preferred};
use crate::identity::NodeId;
use crate::journal::{DiskNews, Ended, Need};
use crate::message::Message;
use crate::report::DropReason;
use crate::sync::lock;
use crate::wire::{
    Answer, Control, Delivery, DeliveryId, DeliveryOutcome, Envelope, InboxInfo, MAX_ANSWERS,
    Payload,
};

/// An instance that could take a message: its load, and how many it runs at once.
struct Candidate {
    node: NodeId,
    load: u64,
    concurrency: u32,
}

impl Shared {
    pub(crate) fn delivery_now(&self) -> Now {
        Now { time: self.now(), unix_ms: unix_ms() }
    }

    // The outbox.

    /// Tells the outbox something, then performs what it decided before anyone else can.
    pub(crate) fn with_outbox<R>(
        self: &Arc<Self>,
        tell: impl FnOnce(&mut Outbox, Now) -> R,
    ) -> Option<R> {
        let store = self.store.as_ref()?;
        let mut outbox = lock(&store.outbox);
        let now = self.delivery_now();
        let result = tell(&mut outbox, now);
        let choose = &mut |name: &_, order: Option<&str>, load: &dyn Fn(&_) -> _| {
            self.choose_instance(name, order, load)
        };
        while let Some(action) = outbox.poll_action(choose) {
            self.perform_outbox(store, &mut outbox, now, action);
        }
        let (timer, wall) = outbox.poll_timeout();
        drop(outbox);
        for at in [timer, wall.map(|at| after_wall(now, at))].into_iter().flatten() {
            self.wake_by(at);
        }
        Some(result)
    }

    fn perform_outbox(
        self: &Arc<Self>,
        store: &Store,
        outbox: &mut Outbox,
        now: Now,
        action: OutboxAction,
    ) {
        match action {
            OutboxAction::Append { token, entry, messages, persist, need } => {
                store.with_journals(|it| {
                    it.outbox.append_for_sink(token, &entry, messages, persist, need);
                });
            }
            OutboxAction::AppendFirst { token, entry } => {
                store.with_journals(|it| it.outbox.append_first_for_sink(token, &entry, 0));
            }
            OutboxAction::Read(number, position) => {
                store.reader.push(Wanted::Move(number, position));
            }
            OutboxAction::Remove(segments) => {
                store.with_journals(|it| it.outbox.remove(segments));
            }
            OutboxAction::Transmit { to, key, source, delivery, expires_at } => {
                let transmission = Transmission { to, key, delivery, expires_at };
                match source {
                    Source::Memory(message) if !store.reader.is_busy_for(&to) => {
                        let message = Arc::unwrap_or_clone(message);
                        self.transmit(store, outbox, now, transmission, message);
                    }
                    source => store.reader.push(Wanted::Transmit(transmission, source)),
                }
            }
            OutboxAction::Send(to, control) => self.send_control_to(&to, control),
            OutboxAction::Stored(number, result) => {
                if result.is_ok() {
                    add(&self.counters.stored, 1);
                }
                let result = result.map_err(|problem| NotStored {
                    reason: problem.reason.to_string(),
                    may_turn_up: problem.may_turn_up,
                });
                let mut waiters = lock(&store.waiters);
                for waiter in waiters.get(number).into_iter().flatten() {
                    waiter.notify_stored(result.clone());
                }
                if result.is_err() {
                    waiters.remove(number);
                }
            }
            OutboxAction::Done(number, result) => {
                if result.is_ok() {
                    add(&self.counters.settled, 1);
                }
                let waiters = lock(&store.waiters).remove(number);
                waiters.into_iter().flatten().for_each(|waiter| waiter.notify_done(result.clone()));
            }
            OutboxAction::Report(event) => self.report_outbox(event),
        }
    }

    /// Hands a stored message to the link of its node.
    pub(super) fn transmit(
        self: &Arc<Self>,
        store: &Store,
        outbox: &mut Outbox,
        now: Now,
        Transmission { to, key, delivery, expires_at }: Transmission,
        mut message: Envelope,
    ) {
        let left = expires_at.map(|at| at.saturating_sub(now.unix_ms));
        message.header.time_to_live = left.map(Duration::from_millis);
        match self.send_guaranteed(store, to, message, delivery) {
            Ok(()) => {}
            Err(DropReason::LinkLost) => outbox.handle_link_down(now, to),
            Err(reason) => outbox.handle_not_transmitted(now, key, reason),
        }
    }

    fn send_guaranteed(
        self: &Arc<Self>,
        store: &Store,
        to: NodeId,
        Envelope { header, mut payload }: Envelope,
        delivery: Arc<Delivery>,
    ) -> Result<(), DropReason> {
        let body = payload.take_body();
        if to == self.id {
            let mut message = Message::new(to, header, body);
            message.delivery = Some(delivery);
            self.loop_back(store, message);
            return Ok(());
        }
        let routing = self.routing.load();
        let cell = routing.link(&to).ok_or(DropReason::LinkLost)?;
        cell.send_message(Envelope { header, payload: Payload::Guaranteed(body, delivery) })?;
        add(&self.counters.queued, 1);
        Ok(())
    }

    pub(super) fn choose_instance(
        &self,
        name: &crate::address::ServiceName,
        order: Option<&str>,
        load: &dyn Fn(&NodeId) -> Option<u64>,
    ) -> Option<NodeId> {
        let routing = self.routing.load();
        let there = routing.instances(name).filter_map(|instance| {
            let (node, concurrency) = (instance.peer, instance.concurrency);
            Some(Candidate { node, load: load(&node)?, concurrency })
        });
        let here = self.service(name).filter(|service| service.load().is_some());
        let here = here.and_then(|service| {
            let (node, concurrency) = (self.id, service.concurrency);
            Some(Candidate { node, load: load(&node)?, concurrency })
        });
        let mut all = there.chain(here);
        let first = all.next()?;
        let Some(second) = all.next() else { return Some(first.node) };
        let all: SmallVec<[_; 4]> = [first, second].into_iter().chain(all).collect();
        let chosen = match order {
            Some(key) => preferred(&all, key, |candidate| candidate.node)?,
            None => {
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                least_loaded(&all, turn, |candidate| (candidate.load, candidate.concurrency))?
            }
        };
        Some(chosen.node)
    }

    fn report_outbox(&self, event: OutboxEvent) {
        let event = match event {
            OutboxEvent::NotRemembered(peer) => {
                self.log.push(Line::NotRemembered(peer));
                return self.counters.refused("too_many_subscribers");
            }
            OutboxEvent::DeadLetter { number, reason } => {
                add(&self.counters.dead_lettered, 1);
                Event::DeadLetter { number, reason }
            }
            OutboxEvent::InboxLost(peer) => Event::InboxLost { peer },
            OutboxEvent::PeerGone { peer, messages } => Event::PeerGone { peer, messages },
        };
        self.tell(event);
    }

    pub(crate) fn handle_outbox_stored(self: &Arc<Self>, stored: Ended<'_>) {
        self.with_outbox(|outbox, now| {
            for (token, result) in stored {
                outbox.handle_appended(now, token, result);
            }
        });
    }

    /// The outbox's journal tells of its disk.
    pub(crate) fn handle_outbox_disk(self: &Arc<Self>, news: DiskNews) {
        self.with_outbox(|outbox, now| match news {
            DiskNews::Room(room) => outbox.handle_room(now, room),
            DiskNews::Removed(gone) => outbox.handle_removed(now, &gone),
        });
    }

    pub(crate) fn handle_answers(self: &Arc<Self>, from: NodeId, answers: Vec<Answer>) {
        self.with_outbox(|outbox, now| {
            for answer in answers {
                if !outbox.handle_answer(now, from, answer) {
                    self.log.push(Line::UnknownAnswer(from));
                }
            }
        });
    }

    pub(crate) fn handle_inbox(self: &Arc<Self>, from: NodeId, info: InboxInfo) {
        self.with_outbox(|outbox, _| outbox.handle_inbox(from, info));
        self.notify_routes_changed();
    }

    /// A link can be used: each side says what it has stored.
    pub(crate) fn handle_delivery_link_up(self: &Arc<Self>, peer: NodeId) {
        if let Some(store) = &self.store {
            self.with_outbox(|outbox, _| outbox.handle_link_up(peer));
            self.announce_inbox(store, &peer);
        }
    }

    fn announce_inbox(&self, store: &Store, peer: &NodeId) {
        let ended = lock(&store.ended);
        self.send_control_to(peer, Control::Inbox(Box::new(self.inbox_info(store, &ended))));
    }

    fn inbox_info(&self, store: &Store, ended: &BTreeSet<ServiceName>) -> InboxInfo {
        let (epoch, ended) = (lock(&store.inbox).epoch(), ended.iter().cloned().collect());
        InboxInfo { epoch, subscriptions: self.consumed(), ended }
    }

    /// The durable subscriptions here are not what they were.
    pub(crate) fn announce_consumers(self: &Arc<Self>) {
        let Some(store) = &self.store else { return };
        // Not by two at once: what is told last has to be what is.
        let ended = lock(&store.ended);
        let info = self.inbox_info(store, &ended);
        let own = InboxInfo { epoch: 0, ..info.clone() };
        self.with_outbox(|outbox, _| outbox.handle_inbox(self.id, own));
        self.notify_routes_changed();
        for cell in self.cells().iter().filter(|cell| cell.is_open()) {
            cell.send_control(Control::Inbox(Box::new(info.clone())));
        }
    }

    fn send_control_to(&self, peer: &NodeId, control: Control) {
        if let Some(cell) = self.routing.load().link(peer) {
            cell.send_control(control);
        }
    }

    // The inbox.

    fn with_inbox<R>(self: &Arc<Self>, tell: impl FnOnce(&mut Inbox) -> R) -> Option<R> {
        let store = self.store.as_ref()?;
        let mut inbox = lock(&store.inbox);
        let result = tell(&mut inbox);
        let (mut answers, mut begin) = (BTreeMap::<NodeId, Vec<Answer>>::new(), Vec::new());
        while let Some(action) = inbox.poll_action() {
            match action {
                InboxAction::Append { token, entry, messages, persist } => {
                    // What is processed here lets others free room.
                    store.with_journals(|it| {
                        it.inbox.append_for_sink(token, &entry, messages, persist, Need::Urgent);
                    });
                }
                InboxAction::AppendSnapshot { token, entry, messages } => {
                    store.with_journals(|it| {
                        it.inbox.append_first_for_sink(token, &entry, messages);
                    });
                }
                InboxAction::Note(entry) => store.with_journals(|it| it.inbox.note(&entry)),
                InboxAction::RemoveBefore(segment) => {
                    store.with_journals(|it| it.inbox.remove_before(segment));
                }
                InboxAction::Answer(to, answer) => answers.entry(to).or_default().push(answer),
                InboxAction::Begin(from, id) => begin.push((from, id)),
            }
        }
        drop(inbox);
        for (to, answers) in answers {
            self.send_answers(to, answers);
        }
        let mut nodes: Vec<NodeId> = Vec::new();
        for key in begin {
            let parked = lock(&store.parked).remove(&key);
            if let Some((message, credit)) = parked {
                self.admit(message, credit);
            }
            if nodes.last() != Some(&key.0) {
                nodes.push(key.0);
            }
        }
        for node in nodes {
            self.handle_begun(node);
        }
        Some(result)
    }

    fn handle_begun(self: &Arc<Self>, node: NodeId) {
        self.with_inbox(|inbox| inbox.handle_begun(node));
    }

    fn send_answers(self: &Arc<Self>, to: NodeId, answers: Vec<Answer>) {
        if to == self.id {
            return self.handle_answers(to, answers);
        }
        for answers in answers.chunks(MAX_ANSWERS) {
            self.send_control_to(&to, Control::Answers(answers.to_vec()));
        }
    }

    pub(crate) fn handle_inbox_stored(self: &Arc<Self>, stored: Ended<'_>) {
        self.with_inbox(|inbox| {
            for (token, result) in stored {
                inbox.handle_appended(token, result);
            }
        });
    }

    pub(crate) fn handle_epochs(self: &Arc<Self>, over: &PeerLink, epochs: &[u64]) {
        self.with_inbox(|inbox| inbox.handle_epochs(over.peer, epochs));
        // What it was told before may have come before it knew that the link is up.
        if let (Some(store), true) = (&self.store, over.is_first_epochs()) {
            self.announce_inbox(store, &over.peer);
        }
    }

    /// A guaranteed message arrived.
    pub(crate) fn handle_delivery(self: &Arc<Self>, mut message: Message, credit: Option<Credit>) {
        let from = message.from;
        let Some(mut delivery) = message.delivery.take() else { return };
        let (id, attempt) = (delivery.id.clone(), delivery.attempt);
        let mut held = Some((message, credit));
        let verdict = self.with_inbox(|inbox| {
            let verdict = inbox.handle_delivery(from, Arc::make_mut(&mut delivery));
            if let Some((message, _)) = &mut held {
                message.delivery = Some(delivery);
            }
            if let (Verdict::RunLater, Some(store), Some(held)) =
                (&verdict, &self.store, held.take_if(|_| matches!(verdict, Verdict::RunLater)))
            {
                lock(&store.parked).insert((from, id.clone()), held);
            }
            verdict
        });
        let outcome = match verdict {
            Some(Verdict::Run) => {
                if let Some((message, credit)) = held {
                    self.admit(message, credit);
                }
                return;
            }
            Some(Verdict::RunLater | Verdict::Wait) => return,
            Some(Verdict::Answer(outcome)) => outcome,
            None => DeliveryOutcome::NoInbox,
        };
        drop(held);
        add(&self.counters.duplicates, u64::from(outcome == DeliveryOutcome::Processed));
        if outcome == DeliveryOutcome::Refused {
            self.counters.dropped_for_others(DropReason::InboxFull, 1);
        }
        self.send_answers(from, vec![Answer { id, attempt, outcome }]);
    }

    /// Turns down a guaranteed message for good that its sender may not send.
    pub(crate) fn reject_delivery(self: &Arc<Self>, from: NodeId, delivery: &Delivery, text: &str) {
        self.counters.dropped_for_others(DropReason::NotAllowed, 1);
        let outcome = DeliveryOutcome::Rejected(text.into());
        let answer = Answer { id: delivery.id.clone(), attempt: delivery.attempt, outcome };
        self.send_answers(from, vec![answer]);
    }

    /// The handler of a guaranteed message ended, or it has none.
    pub(crate) fn end_delivery(self: &Arc<Self>, message: &Message, outcome: DeliveryOutcome) {
        let Some(id) = delivery_id(message) else { return };
        match self.broker() {
            Some(broker) => self.settle_by_broker(broker, id, Some(outcome)),
            None => _ = self.with_inbox(|inbox| inbox.handle_ended(message.from, id, outcome)),
        }
    }

    /// A guaranteed message is no longer in the queue of its handler.
    pub(crate) fn unqueue_delivery(self: &Arc<Self>, message: &Message) {
        let Some(id) = delivery_id(message) else { return };
        match self.broker() {
            Some(broker) => self.settle_by_broker(broker, id, None),
            None => _ = self.with_inbox(|inbox| inbox.handle_unqueued(message.from, id)),
        }
    }

    // The store.

    /// From here on the journals tell this node what they have stored.
    pub(crate) fn begin_delivery(self: &Arc<Self>) {
        if let Some(store) = &self.store {
            store.belongs_to(self);
            self.with_inbox(|_| ());
            self.with_outbox(|_, _| ());
        }
    }

    /// Whether all that was processed here is stored, and answered.
    pub(crate) fn inbox_is_idle(&self) -> bool {
        self.store.as_ref().is_none_or(|store| lock(&store.inbox).is_idle())
    }

    /// Closes the files; how many messages are left in the outbox.
    pub(crate) async fn close_store(self: &Arc<Self>) -> u64 {
        let Some(store) = &self.store else { return 0 };
        let shared = self.clone();
        let closing = tokio::task::spawn_blocking(move || {
            shared.store.iter().for_each(Store::close);
        });
        let _panicked = closing.await;
        lock(&store.outbox).pending()
    }

    // Clocks and changes.

    /// When the outbox has to look at a clock.
    pub(crate) fn outbox_timeout(&self, now: Time) -> Option<Time> {
        let store = self.store.as_ref()?;
        let (timer, wall) = lock(&store.outbox).poll_timeout();
        let now = Now { time: now, unix_ms: unix_ms() };
        timer.into_iter().chain(wall.map(|at| after_wall(now, at))).min()
    }

    /// Tries again what the disk refused.
    pub(crate) fn check_inbox(self: &Arc<Self>) {
        if let Some(store) = &self.store
            && lock(&store.inbox).has_unstored()
        {
            self.with_inbox(Inbox::handle_timeout);
        }
    }

    pub(crate) fn check_outbox(self: &Arc<Self>) {
        self.with_outbox(|outbox, now| outbox.handle_timeout(now));
    }

    /// Tells the outbox whenever somebody serves or subscribes who did not.
    pub(crate) async fn watch_routes(self: Arc<Self>) {
        let mut changes = self.routes_changed.subscribe();
        // What was served before this task began counts too.
        changes.mark_changed();
        while changes.changed().await.is_ok() {
            self.with_outbox(|outbox, _| outbox.handle_routes_changed());
        }
    }
}

fn delivery_id(message: &Message) -> Option<&DeliveryId> {
    message.delivery.as_ref().map(|delivery| &delivery.id)
}

/// When the clock on the wall will show that, if nobody sets it.
fn after_wall(now: Now, unix_ms: u64) -> Time {
    now.time + Duration::from_millis(unix_ms.saturating_sub(now.unix_ms))
}

/// Why a stored message was not processed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeliveryError {
    /// It is a dead letter: it stays in the outbox, and is not sent again by itself.
    #[error("the message is a dead letter: {0}")]
    DeadLetter(DeadLetterReason),
    /// A broker keeps the message, and does not tell what becomes of it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The node has shut down. The message is kept, and goes on its way when the store is opened
    /// again.
    #[error("the node is shutting down; the message is kept")]
    ShutDown,
}
