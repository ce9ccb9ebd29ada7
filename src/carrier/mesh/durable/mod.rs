//! Guaranteed delivery over the mesh: carries out the actions of the outbox and the inbox.

mod inbox;
mod last_read;
mod loopback;
mod reader;
pub(crate) mod store;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use smallvec::SmallVec;

use super::links::Links;
use super::peer_link::PeerLink;
use crate::address::Topic;
use crate::carrier::{NewGuaranteed, OutboxError, Receipt, Submission};
use crate::clock::unix_ms;
use crate::core::{Alarm, Core, Event, Line, NotStored, Progress, add};
use crate::engine::Time;
use crate::engine::delivery::{
    DeliveryKey, Full, Lapse, NewMessage, NewMessages, Now, Numbered, Outbox, OutboxAction,
    OutboxEvent, Source, Submitted, Target,
};
use crate::identity::NodeId;
use crate::journal::{DiskNews, Ended};
use crate::message::Message;
use crate::report::DropReason;
use crate::sync::lock;
use crate::trust::Grants;
use crate::wire::{
    Answer, Control, Delivery, DeliveryOutcome, Envelope, InboxInfo, MAX_ANSWERS, Payload,
};
use reader::{Transmission, Wanted};
use store::{Store, StoreReport};

/// The outbox and inbox of a node, and the means to carry out their actions.
pub(crate) struct Durable {
    core: Arc<Core>,
    links: Arc<Links>,
    /// The alarm of the mesh's driver, which also handles the outbox's timeouts.
    alarm: Arc<Alarm>,
    store: Store,
    /// The second since the start in which the inbox's entries were last retried.
    inbox_retried: AtomicU64,
}

/// Returns the answer of a node without a store.
pub(super) fn no_inbox(message: &Message) -> Option<Answer> {
    let delivery = message.delivery.as_ref()?;
    let (id, attempt) = (delivery.id.clone(), delivery.attempt);
    Some(Answer { id, attempt, outcome: DeliveryOutcome::NoInbox })
}

impl Durable {
    pub(super) fn new(
        core: &Arc<Core>,
        links: &Arc<Links>,
        alarm: &Arc<Alarm>,
        store: Store,
    ) -> Arc<Self> {
        let (core, links, alarm) = (core.clone(), links.clone(), alarm.clone());
        Arc::new(Self { core, links, alarm, store, inbox_retried: AtomicU64::new(0) })
    }

    /// Starts: from here on the journals report to this, and the outbox sends.
    pub(super) fn begin(self: &Arc<Self>) {
        self.store.belongs_to(self);
        let me = self.core.id;
        let heard = lock(&self.store.inbox).heard(&me);
        let own = InboxInfo { epoch: 0, heard, ..InboxInfo::default() };
        self.with_outbox(|outbox, now| {
            outbox.handle_link_up(me);
            outbox.handle_inbox(now, me, own, &Grants::Everything);
        });
        self.with_inbox(|_| ());
        self.core.spawn(self.clone().watch_routes());
        self.core.spawn(self.clone().keep_reading());
    }

    pub(crate) fn report(&self) -> &StoreReport {
        &self.store.report
    }

    /// Returns the numbers of unprocessed messages and of dead letters, once for each destination.
    pub(crate) fn outbox_size(&self) -> (u64, u64) {
        let outbox = lock(&self.store.outbox);
        (outbox.pending(), outbox.dead_letters())
    }

    /// Returns the number of durable subscriptions to a topic that the outbox knows.
    pub(super) fn count_consumers(&self, topic: &Topic) -> usize {
        lock(&self.store.outbox).subscribers(topic).len()
    }

    /// Returns the number of those that accept messages now.
    pub(super) fn count_present_consumers(&self, topic: &Topic) -> usize {
        lock(&self.store.outbox).present_subscribers(topic)
    }

    fn now(&self) -> Now {
        Now { time: self.core.now(), unix_ms: unix_ms() }
    }

    // The outbox.

    /// Passes an input to the outbox, then carries out its actions before any other input.
    pub(crate) fn with_outbox<R>(self: &Arc<Self>, input: impl FnOnce(&mut Outbox, Now) -> R) -> R {
        let mut outbox = lock(&self.store.outbox);
        let now = self.now();
        let result = input(&mut outbox, now);
        let choose = &mut |name: &_, order: Option<&str>, load: &dyn Fn(&_) -> _| {
            self.links.choose_by(&self.core, name, order, load)
        };
        while let Some(action) = outbox.poll_action(choose) {
            self.perform(&mut outbox, now, action);
        }
        let (timer, wall) = outbox.poll_timeout();
        drop(outbox);
        for at in [timer, wall.map(|at| after_wall(now, at))].into_iter().flatten() {
            self.alarm.wake_by(at);
        }
        result
    }

    fn perform(self: &Arc<Self>, outbox: &mut Outbox, now: Now, action: OutboxAction) {
        let (store, counters) = (&self.store, &self.core.reporter.counters);
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
                        self.transmit(outbox, now, transmission, message);
                    }
                    source => store.reader.push(Wanted::Transmit(transmission, source)),
                }
            }
            OutboxAction::Send(to, Control::Epochs(epochs, moment)) if to == self.core.id => {
                lock(&store.inbox).handle_epochs(to, &epochs, moment);
            }
            OutboxAction::Send(to, control) => self.links.send_control(&to, control),
            OutboxAction::Stored(number, result) => {
                if result.is_ok() {
                    add(&counters.stored, 1);
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
                    add(&counters.settled, 1);
                }
                let waiters = lock(&store.waiters).remove(number);
                let waiters = waiters.into_iter().flatten();
                waiters.for_each(|waiter| waiter.notify_done(result.clone()));
            }
            OutboxAction::Report(event) => self.report_outbox(event),
        }
    }

    /// Passes a stored message to the link of its node.
    fn transmit(
        self: &Arc<Self>,
        outbox: &mut Outbox,
        now: Now,
        Transmission { to, key, delivery, expires_at }: Transmission,
        mut message: Envelope,
    ) {
        let left = expires_at.map(|at| at.saturating_sub(now.unix_ms));
        message.header.time_to_live = left.map(Duration::from_millis);
        match self.send(outbox, to, key, message, delivery) {
            Ok(()) => {}
            Err(DropReason::LinkLost) => outbox.handle_link_down(now, to),
            Err(reason) => outbox.handle_not_transmitted(now, key, reason),
        }
    }

    fn send(
        self: &Arc<Self>,
        outbox: &Outbox,
        to: NodeId,
        key: DeliveryKey,
        Envelope { header, mut payload }: Envelope,
        delivery: Arc<Delivery>,
    ) -> Result<(), DropReason> {
        let body = payload.take_body();
        let check = |grants: &Grants| match outbox.objection(key, &header.destination, grants) {
            Some(reason) => Err(reason),
            None => Ok(()),
        };
        if to == self.core.id {
            check(&Grants::Everything)?;
            let mut message = Box::new(Message::new(to, header, body));
            message.delivery = Some(delivery);
            self.loop_back(message);
            return Ok(());
        }
        let routing = self.links.routing();
        let route = routing.link(&to).ok_or(DropReason::LinkLost)?;
        check(&route.link.grants)?;
        let payload = Payload::Guaranteed(body, delivery);
        route.link.send_message(Envelope { header, payload })?;
        add(&self.core.reporter.counters.queued, 1);
        Ok(())
    }

    fn report_outbox(&self, event: OutboxEvent) {
        let reporter = &self.core.reporter;
        reporter.report(match event {
            OutboxEvent::NotRemembered(peer) => {
                reporter.log(Line::NotRemembered(peer));
                return reporter.counters.refused("too_many_subscribers");
            }
            OutboxEvent::SubscriptionsNotRemembered(peer) => {
                reporter.log(Line::SubscriptionsNotRemembered(peer));
                return reporter.counters.refused("too_many_subscriptions");
            }
            OutboxEvent::Lapsed { node, name, reason, messages } => {
                reporter.counters.refused("lapsed_subscriptions");
                // Ids that are drawn by the thousand would fill the log, and lose nothing.
                if reason == Lapse::NoRoom && messages == 0 {
                    return;
                }
                Event::SubscriptionLapsed { peer: node, name, reason, messages }
            }
            OutboxEvent::DeadLetter { number, reason } => {
                add(&reporter.counters.dead_lettered, 1);
                Event::DeadLetter { number, reason }
            }
            OutboxEvent::InboxLost(peer) => Event::InboxLost { peer },
            OutboxEvent::IsOlder(peer) => Event::OutboxIsOlder { peer },
            OutboxEvent::PeerGone { peer, messages } => Event::PeerGone { peer, messages },
        });
    }

    fn handle_outbox_stored(self: &Arc<Self>, stored: Ended<'_>) {
        self.with_outbox(|outbox, now| {
            for (token, result) in stored {
                outbox.handle_appended(now, token, result);
            }
        });
    }

    /// Handles news of the disk of the outbox's journal.
    fn handle_outbox_disk(self: &Arc<Self>, news: DiskNews) {
        self.with_outbox(|outbox, now| match news {
            DiskNews::Room(room) => outbox.handle_room(now, room),
            DiskNews::Removed(gone) => outbox.handle_removed(now, &gone),
        });
    }

    pub(super) fn handle_answers(self: &Arc<Self>, from: NodeId, answers: Vec<Answer>) {
        self.with_outbox(|outbox, now| {
            for answer in answers {
                if !outbox.handle_answer(now, from, answer) {
                    self.core.reporter.log(Line::UnknownAnswer(from));
                }
            }
        });
    }

    pub(super) fn handle_inbox(self: &Arc<Self>, over: &PeerLink, info: InboxInfo) {
        self.with_outbox(|outbox, now| outbox.handle_inbox(now, over.peer, info, &over.grants));
    }

    /// Handles the removal of trusted keys: nothing is kept for them any more.
    pub(super) fn handle_distrusted(self: &Arc<Self>, is_meant: impl Fn(&NodeId) -> bool) {
        self.with_outbox(|outbox, now| outbox.handle_distrusted(now, is_meant));
    }

    /// Handles a new link: each side announces its epochs and its inbox.
    pub(super) fn handle_link_up(self: &Arc<Self>, peer: NodeId) {
        self.with_outbox(|outbox, _| outbox.handle_link_up(peer));
        self.announce_inbox(&peer);
    }

    pub(super) fn handle_link_down(self: &Arc<Self>, peer: NodeId) {
        self.with_outbox(|outbox, now| outbox.handle_link_down(now, peer));
        self.with_inbox(|inbox| inbox.handle_link_down(peer));
    }

    fn send_answers(self: &Arc<Self>, to: NodeId, answers: Vec<Answer>) {
        if to == self.core.id {
            return self.handle_answers(to, answers);
        }
        for answers in answers.chunks(MAX_ANSWERS) {
            self.links.send_control(&to, Control::Answers(answers.to_vec()));
        }
    }

    // Messages of the user.

    /// Submits messages to the outbox, all of them or none.
    pub(super) fn submit(
        self: &Arc<Self>,
        messages: SmallVec<[NewGuaranteed; 1]>,
    ) -> Result<Submission, OutboxError> {
        let (mut receipts, mut wanted) = (SmallVec::<[Receipt; 1]>::new(), NewMessages::new());
        for message in messages {
            let id = message.id();
            let message = self.addressed(message);
            receipts.push(Receipt::new(id, message.targets.len()));
            // Without a subscriber there is nothing to store.
            if !message.targets.is_empty() {
                wanted.push(message);
            }
        }
        if wanted.is_empty() {
            return Ok(Submission::to_disk(receipts));
        }
        let submitted = self.with_outbox(|outbox, now| {
            let choose = &mut |name: &_, order: Option<&str>, load: &dyn Fn(&_) -> _| {
                self.links.choose_by(&self.core, name, order, load)
            };
            let submitted = outbox.submit(now, wanted, choose)?;
            let sent = receipts.iter_mut().filter(|receipt| receipt.destinations() > 0);
            self.follow(submitted, sent);
            Ok(())
        });
        match submitted {
            Ok(()) => Ok(Submission::to_disk(receipts)),
            Err(Full { messages, bytes }) => Err(OutboxError::OutboxFull { messages, bytes }),
        }
    }

    /// Adds its destinations to a message.
    fn addressed(&self, message: NewGuaranteed) -> NewMessage {
        use crate::address::Destination;
        let NewGuaranteed { envelope, expires_at, not_before, once } = message;
        let targets = match &envelope.header.destination {
            Destination::Topic(topic) => lock(&self.store.outbox).subscribers(topic),
            Destination::Service(name) => smallvec::smallvec![Target::Service(name.clone())],
            Destination::Node(node) => smallvec::smallvec![Target::Node(*node)],
        };
        NewMessage { envelope, targets, expires_at, not_before, once }
    }

    /// Connects receipts to the progress of submitted messages.
    fn follow<'a>(
        &self,
        submitted: impl IntoIterator<Item = Submitted>,
        receipts: impl Iterator<Item = &'a mut Receipt>,
    ) {
        let mut waiters = lock(&self.store.waiters);
        for (submitted, receipt) in submitted.into_iter().zip(receipts) {
            let (sender, progress) = Progress::new();
            match submitted {
                Submitted::New(number) => waiters.get_or_insert_default(number).push(sender),
                Submitted::Pending { number, stored } => {
                    if stored {
                        sender.notify_stored(Ok(()));
                    }
                    waiters.get_or_insert_default(number).push(sender);
                }
                Submitted::Processed => continue,
                Submitted::Dead(reason) => {
                    sender.notify_stored(Ok(()));
                    sender.notify_done(Err(reason));
                }
            }
            receipt.follow(progress);
        }
    }

    // The store.

    /// Ends the waits for messages: nothing is sent any more.
    pub(super) fn abandon(&self) {
        *lock(&self.store.waiters) = Numbered::default();
    }

    /// Closes the files. Returns the number of messages left in the outbox.
    pub(super) async fn close(self: &Arc<Self>) -> u64 {
        let durable = self.clone();
        let _panicked = tokio::task::spawn_blocking(move || durable.store.close()).await;
        lock(&self.store.outbox).pending()
    }

    // Clocks and changes.

    /// Returns the next timeout of the outbox, by the monotonic clock.
    pub(super) fn outbox_timeout(&self, now: Time) -> Option<Time> {
        let (timer, wall) = lock(&self.store.outbox).poll_timeout();
        let now = Now { time: now, unix_ms: unix_ms() };
        timer.into_iter().chain(wall.map(|at| after_wall(now, at))).min()
    }

    pub(super) fn handle_outbox_timeout(self: &Arc<Self>, now: Time) {
        if self.outbox_timeout(now).is_some_and(|at| at <= now) {
            self.with_outbox(|outbox, now| outbox.handle_timeout(now));
        }
    }

    /// Notifies the outbox of each change of services and subscriptions, until this is dropped.
    async fn watch_routes(self: Arc<Self>) {
        let mut changes = self.core.routes.subscribe();
        // Changes before the start of this task count too.
        changes.mark_changed();
        while changes.changed().await.is_ok() {
            self.with_outbox(|outbox, _| outbox.handle_routes_changed());
        }
    }
}

/// Returns the monotonic time at which the wall clock shows `unix_ms`, unless it is set.
fn after_wall(now: Now, unix_ms: u64) -> Time {
    now.time + Duration::from_millis(unix_ms.saturating_sub(now.unix_ms))
}
