//! The receiving side: the inbox, and the durable subscriptions of this node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Durable;
use crate::address::ServiceName;
use crate::carrier::WishEnd;
use crate::carrier::mesh::peer_link::PeerLink;
use crate::core::{Hold, Settle, Ticket, add};
use crate::engine::delivery::{Inbox, InboxAction, MAX_SUBSCRIPTIONS, Verdict};
use crate::engine::{Settlement, Time, TooMany};
use crate::identity::NodeId;
use crate::journal::{Ended, Need};
use crate::message::Message;
use crate::sync::lock;
use crate::trust::Grants;
use crate::wire::{Answer, Control, DeliveryOutcome, InboxInfo, Moment};

/// The most ended durable subscriptions that are still announced, to peers that link later.
const MAX_ENDED: usize = 256;

impl Durable {
    /// Passes an input to the inbox, then carries out its actions.
    pub(super) fn with_inbox<R>(self: &Arc<Self>, input: impl FnOnce(&mut Inbox) -> R) -> R {
        let store = &self.store;
        let mut inbox = lock(&store.inbox);
        let result = input(&mut inbox);
        let (mut answers, mut begin) = (BTreeMap::<NodeId, Vec<Answer>>::new(), Vec::new());
        while let Some(action) = inbox.poll_action() {
            match action {
                InboxAction::Append { token, entry, messages, persist } => {
                    // A processed record lets senders free space.
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
                InboxAction::Forgot { newcomer } => {
                    self.core.reporter.count_inbox_full(newcomer, 1, 0);
                }
            }
        }
        drop(inbox);
        for (to, answers) in answers {
            self.send_answers(to, answers);
        }
        let mut nodes: Vec<NodeId> = Vec::new();
        for key in begin {
            let parked = lock(&store.parked).remove(&key);
            if let Some((message, hold)) = parked {
                self.run(message, hold);
            }
            if nodes.last() != Some(&key.0) {
                nodes.push(key.0);
            }
        }
        for node in nodes {
            self.handle_begun(node);
        }
        result
    }

    /// A separate function, so that [`Self::with_inbox`] is not generic over its own closure.
    fn handle_begun(self: &Arc<Self>, node: NodeId) {
        self.with_inbox(|inbox| inbox.handle_begun(node));
    }

    fn run(&self, message: Box<Message>, hold: Hold) {
        let path = hold.path();
        self.core.with_front(|front, now| front.handle_call(now, path, message, hold));
    }

    pub(super) fn handle_inbox_stored(self: &Arc<Self>, stored: Ended<'_>) {
        self.with_inbox(|inbox| {
            for (token, result) in stored {
                inbox.handle_appended(token, result);
            }
        });
    }

    pub(in crate::carrier::mesh) fn handle_epochs(
        self: &Arc<Self>,
        over: &PeerLink,
        epochs: &[u64],
        moment: Option<Moment>,
    ) {
        self.with_inbox(|inbox| inbox.handle_epochs(over.peer, epochs, moment));
        // An earlier announcement may have arrived before the peer knew that the link is up.
        if over.is_first_epochs() {
            self.announce_inbox(&over.peer);
        }
    }

    /// Handles a guaranteed message that arrived.
    pub(in crate::carrier::mesh) fn handle_delivery(
        self: &Arc<Self>,
        mut message: Box<Message>,
        hold: Hold,
    ) {
        message.unpin();
        let from = message.from;
        let Some(mut delivery) = message.delivery.take() else { return };
        let (id, attempt) = (delivery.id.clone(), delivery.attempt);
        let hold = hold.with_ticket(Some(Ticket::Kept(self.clone())));
        let mut held = Some((message, hold));
        let verdict = self.with_inbox(|inbox| {
            let header = held.as_ref().map(|(message, _)| &message.header);
            let is_served = || {
                let subscription = id.stream.subscription.as_ref();
                header.is_some_and(|it| self.core.look(|front| front.serves(it, subscription)))
            };
            let verdict = inbox.handle_delivery(from, Arc::make_mut(&mut delivery), is_served);
            if let Some((message, _)) = &mut held {
                message.delivery = Some(delivery);
            }
            if let Some(held) = held.take_if(|_| matches!(verdict, Verdict::RunLater)) {
                lock(&self.store.parked).insert((from, id.clone()), held);
            }
            verdict
        });
        let outcome = match verdict {
            Verdict::Run => {
                if let Some((message, hold)) = held {
                    self.run(message, hold);
                }
                return;
            }
            Verdict::RunLater | Verdict::Wait => return,
            Verdict::Answer(outcome) => outcome,
            Verdict::Full => {
                self.core.reporter.count_inbox_full(from, 0, 1);
                DeliveryOutcome::Refused
            }
        };
        drop(held);
        let counters = &self.core.reporter.counters;
        add(&counters.duplicates, u64::from(outcome == DeliveryOutcome::Processed));
        self.send_answers(from, vec![Answer { id, attempt, outcome }]);
    }

    /// Returns true if all messages processed here are stored and answered.
    pub(in crate::carrier::mesh) fn inbox_is_idle(&self) -> bool {
        lock(&self.store.inbox).is_idle()
    }

    /// Retries the entries that the disk refused, once a second.
    pub(in crate::carrier::mesh) fn handle_inbox_timeout(self: &Arc<Self>, now: Time) {
        let (now, last) = (now.since_start().as_secs(), &self.inbox_retried);
        if last.swap(now, Ordering::Relaxed) != now && lock(&self.store.inbox).has_unstored() {
            self.with_inbox(Inbox::handle_timeout);
        }
    }

    // Durable subscriptions.

    /// Announces a durable subscription that began.
    ///
    /// # Errors
    /// [`TooMany`] if publishers would not remember that many of one node.
    pub(in crate::carrier::mesh) fn handle_consumer_began(
        self: &Arc<Self>,
        name: &ServiceName,
    ) -> Result<(), TooMany> {
        if self.core.look(|front| front.consumers().count()) > MAX_SUBSCRIPTIONS {
            return Err(TooMany);
        }
        lock(&self.store.ended).remove(name);
        self.announce_consumers();
        Ok(())
    }

    pub(in crate::carrier::mesh) fn handle_consumer_ended(
        self: &Arc<Self>,
        name: &ServiceName,
        end: WishEnd,
    ) {
        if end == WishEnd::Forget {
            let mut ended = lock(&self.store.ended);
            if ended.len() >= MAX_ENDED {
                // Linked peers were notified; others keep its messages until they forget it.
                ended.pop_first();
            }
            ended.insert(name.clone());
        }
        self.announce_consumers();
    }

    pub(super) fn announce_inbox(&self, peer: &NodeId) {
        let ended = lock(&self.store.ended);
        let info = self.inbox_info(&ended);
        self.links.send_control(peer, self.announcement(peer, &info));
    }

    /// Returns the announcement of this node's inbox for one peer.
    fn announcement(&self, peer: &NodeId, info: &InboxInfo) -> Control {
        let heard = lock(&self.store.inbox).heard(peer);
        Control::Inbox(Box::new(InboxInfo { heard, ..info.clone() }))
    }

    fn inbox_info(&self, ended: &BTreeSet<ServiceName>) -> InboxInfo {
        let (epoch, ended) = (lock(&self.store.inbox).epoch(), ended.iter().cloned().collect());
        let subscriptions = self.core.look(|front| {
            front.consumers().map(|(name, pattern, _)| (name.clone(), pattern.clone())).collect()
        });
        InboxInfo { epoch, subscriptions, ended, heard: None }
    }

    /// Announces this node's durable subscriptions, to its own outbox too.
    fn announce_consumers(self: &Arc<Self>) {
        // The lock keeps announcements in order: the last one must be true.
        let ended = lock(&self.store.ended);
        let info = self.inbox_info(&ended);
        let heard = lock(&self.store.inbox).heard(&self.core.id);
        let own = InboxInfo { epoch: 0, heard, ..info.clone() };
        self.with_outbox(|outbox, now| {
            outbox.handle_inbox(now, self.core.id, own, &Grants::Everything)
        });
        self.core.routes.notify();
        for link in self.links.all().iter().filter(|link| link.is_open()) {
            link.send_control(self.announcement(&link.peer, &info));
        }
    }
}

impl Settle for Durable {
    fn settle(self: Arc<Self>, Settlement { from, delivery, outcome, .. }: Settlement) {
        self.with_inbox(|inbox| match outcome {
            Some(outcome) => inbox.handle_ended(from, &delivery.id, outcome),
            None => inbox.handle_unqueued(from, &delivery.id),
        });
    }
}
