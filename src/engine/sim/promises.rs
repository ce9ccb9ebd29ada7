//! The ledger of guaranteed messages: what was promised of them, held against what happened.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::rules::Rule;
use super::seen::Seen;
use super::settings::{SENDERS, Settings};
use crate::engine::delivery::{DeadLetterReason, NewMessage, Target};
use crate::message::{Message, MessageId};

/// Ordering keys of calls and guaranteed messages.
pub(super) const KEYS: [&str; 2] = ["x", "y"];

/// What a message's handler does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    Good,
    /// Fails so often, then succeeds.
    Flaky(u32),
    Poison,
    Rejected,
    /// Kills its process.
    Killer,
}

/// What an operator does about a dead letter that others wait behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Replayed,
    Removed,
}

#[derive(Debug)]
pub(super) struct Sent {
    pub(super) sender: usize,
    pub(super) nature: Nature,
    /// The targets of the message, each with its ordering key.
    pub(super) lanes: Vec<(Target, &'static str)>,
    pub(super) parts: usize,
    /// The message is for durable subscriptions.
    pub(super) is_event: bool,
    pub(super) stored: bool,
    /// Of those that are stored together, by the first.
    pub(super) transaction: MessageId,
    /// To be submitted again by whoever doesn't know whether it is stored.
    pub(super) once: Option<NewMessage>,
    pub(super) done: Option<Result<(), DeadLetterReason>>,
    /// What said that it is settled was perhaps not written when its sender crashed.
    pub(super) may_end_again: bool,
    /// Its outbox was put back to an older state, and knows nothing of it or too little.
    pub(super) forgotten: bool,
    /// A subscription that it is for has ended or changed: it need not be processed there.
    pub(super) released: bool,
    /// A rule kept it from a peer.
    pub(super) kept_back: bool,
    /// An operator had it sent again when it was a dead letter, or removed it.
    pub(super) decided: Option<Decision>,
}

impl Sent {
    /// One that is good, and not stored yet.
    pub(super) fn new(sender: usize, id: MessageId, parts: usize) -> Self {
        Self {
            sender,
            nature: Nature::Good,
            lanes: Vec::new(),
            parts,
            is_event: false,
            stored: false,
            transaction: id,
            once: None,
            done: None,
            may_end_again: false,
            forgotten: false,
            released: false,
            kept_back: false,
            decided: None,
        }
    }
}

/// Where a message is processed: the node, whether by its durable subscription, and which.
pub(super) type Place = (usize, bool, MessageId);

/// The place of a message that arrived at a node.
pub(super) fn place(node: usize, message: &Message) -> Place {
    let delivery = message.delivery.as_ref().expect("it is guaranteed");
    (node, delivery.id.stream.subscription.is_some(), message.header.id)
}

/// The record of all guaranteed messages of a run.
#[derive(Debug)]
pub(super) struct Promises {
    settings: Settings,
    pub(super) sent: BTreeMap<MessageId, Sent>,
    /// In the order in which they were submitted.
    pub(super) order: Vec<MessageId>,
    /// How often handlers were begun.
    begun: BTreeMap<Place, u32>,
    /// Of these, the ones whose end is on the disk, and those whose end ever was.
    durable: HashSet<Place>,
    processed: BTreeSet<Place>,
    /// Of these, those whose sender, or whose receiver, was put back to an older state since: they may
    /// be processed again, and say so. Where both were, nobody knows.
    sender_put_back: HashSet<Place>,
    receiver_put_back: HashSet<Place>,
    /// What a rule refused.
    refused: HashSet<MessageId>,
    /// How often each node ended without warning.
    pub(super) deaths: BTreeMap<usize, u64>,
    /// Messages that were settled and gone when their outbox was last read.
    gone: HashSet<MessageId>,
    /// Of each sender, when the storm was over and all was processed: the message that shows that
    /// its outbox takes one again.
    pub(super) probes: [Option<MessageId>; SENDERS],
    pub(super) seen: Seen,
}

impl Promises {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            sent: BTreeMap::new(),
            order: Vec::new(),
            begun: BTreeMap::new(),
            durable: HashSet::new(),
            processed: BTreeSet::new(),
            sender_put_back: HashSet::new(),
            receiver_put_back: HashSet::new(),
            refused: HashSet::new(),
            deaths: BTreeMap::new(),
            gone: HashSet::new(),
            probes: [None; SENDERS],
            seen: Seen::default(),
        }
    }

    pub(super) fn of(&mut self, message: MessageId) -> &mut Sent {
        self.sent.get_mut(&message).expect("it was sent")
    }

    pub(super) fn unsettled(&self) -> impl Iterator<Item = (&MessageId, &Sent)> {
        self.sent.iter().filter(|(_, sent)| sent.stored && sent.done.is_none())
    }

    // What senders learn.

    pub(super) fn handle_stored(&mut self, message: MessageId, is_stored: bool) {
        self.of(message).stored = is_stored;
        let what = if is_stored { "messages stored" } else { "messages that could not be stored" };
        self.seen.add(what, 1);
    }

    pub(super) fn handle_done(&mut self, message: MessageId, result: Result<(), DeadLetterReason>) {
        let ran = self.begun.keys().filter(|(.., other)| *other == message).count();
        let there = self.processed.iter().filter(|(.., other)| *other == message).count();
        // One that only dies with others is taken for a killer when that happens ten times.
        let deaths = self.deaths.values().copied().max().unwrap_or_default();
        let refused = self.refused.contains(&message);
        let sent = self.sent.get_mut(&message).expect("it was sent");
        if sent.forgotten {
            sent.done = Some(result);
            return;
        }
        if let Some(before) = &sent.done {
            assert!(sent.may_end_again, "{message} ended twice: {before:?}, then {result:?}");
            // It may hold up others now.
            sent.done = Some(result);
            return;
        }
        match &result {
            Ok(()) => {
                let released = sent.released || there >= sent.parts;
                assert!(released, "{message} is settled and was not processed");
                self.seen.add("messages processed", 1);
            }
            Err(DeadLetterReason::Expired { maybe_processed }) => {
                self.seen.add("dead letters by expiry", 1);
                self.seen.when("dead letters that may have been processed", *maybe_processed);
                // Another part of it may have run, also one that an operator removed since.
                let one_only = sent.parts == 1 && sent.decided != Some(Decision::Removed);
                assert!(*maybe_processed || ran == 0 || !one_only, "{message} did run");
            }
            Err(DeadLetterReason::Rejected { text }) if text.contains("rules") => {
                assert!(refused, "no rule refused {message}");
            }
            Err(DeadLetterReason::Rejected { .. }) => {
                self.seen.add("rejections", 1);
                let suspected = sent.nature == Nature::Killer || deaths >= 10;
                assert!(sent.nature == Nature::Rejected || suspected);
            }
            Err(DeadLetterReason::Failed { .. }) => {
                self.seen.add("dead letters by failure", 1);
                assert_eq!(sent.nature, Nature::Poison);
            }
            Err(DeadLetterReason::NotAllowed) => {
                assert!(sent.kept_back, "no rule forbade {message}")
            }
            Err(DeadLetterReason::TooLarge | DeadLetterReason::Unreadable) => panic!("nothing is"),
        }
        sent.done = Some(result);
    }

    /// The sender ended without warning, and perhaps before it wrote what it knew.
    pub(super) fn handle_sender_lost(&mut self, node: usize) {
        let ended = self.sent.values_mut().filter(|it| it.sender == node && it.done.is_some());
        ended.for_each(|sent| sent.may_end_again = true);
    }

    /// An outbox was put back to what it was: what was in it has no promise left. What is stored
    /// from then on has all of them.
    pub(super) fn handle_put_back(&mut self, node: usize) {
        let sent = &self.sent;
        self.gone.retain(|message| sent[message].sender != node);
        let of_node = self.processed.iter().filter(|(.., message)| sent[message].sender == node);
        self.sender_put_back.extend(of_node.copied());
        self.sent.values_mut().filter(|sent| sent.sender == node).for_each(|sent| {
            (sent.stored, sent.forgotten) = (false, true);
        });
    }

    /// A durable subscription that a node's outbox knew has ended, or changed its pattern.
    pub(super) fn handle_subscription_ended(&mut self, node: usize) {
        for sent in self.sent.values_mut().filter(|it| it.sender == node && it.is_event) {
            match &sent.done {
                None => sent.released = true,
                // A dead letter that was for it goes too.
                Some(Err(_)) => (sent.released, sent.may_end_again) = (true, true),
                Some(Ok(())) => {}
            }
        }
    }

    /// A rule kept a message from a peer.
    pub(super) fn handle_kept_back(&mut self, message: MessageId, rule: Rule) {
        self.of(message).kept_back |= rule != Rule::All;
    }

    // What is in an outbox that was read.

    /// Those of a transaction are stored together or not at all.
    pub(super) fn check_transactions(&mut self, node: usize, recovered: &HashSet<MessageId>) {
        let mut open = BTreeMap::<MessageId, Vec<bool>>::new();
        for (message, sent) in self.sent.iter().filter(|(_, sent)| sent.sender == node) {
            let is_known = sent.done.is_some() || sent.forgotten || sent.once.is_some();
            if !sent.stored && !is_known {
                open.entry(sent.transaction).or_default().push(recovered.contains(message));
            }
        }
        for (first, members) in open {
            let there = members.iter().filter(|there| **there).count();
            assert!([0, members.len()].contains(&there), "a part of {first} is stored");
            let lost = there == 0 && members.len() > 1;
            self.seen.when("transactions that a crash left nothing of", lost);
        }
    }

    /// What was settled and gone doesn't come back; dead letters and what is not settled stay.
    pub(super) fn check_ends(&mut self, node: usize, recovered: &HashSet<MessageId>) {
        for (message, sent) in self.sent.iter().filter(|(_, it)| it.sender == node) {
            if sent.forgotten || !sent.stored {
                continue;
            }
            let is_there = recovered.contains(message);
            match &sent.done {
                Some(Ok(())) if !is_there => {
                    self.seen.when("messages gone for good", self.gone.insert(*message));
                }
                Some(Ok(())) => assert!(!self.gone.contains(message), "{message} came back"),
                Some(Err(_)) if sent.decided.is_none() && !sent.released => {
                    assert!(is_there, "the dead letter {message} is lost");
                }
                Some(Err(_)) | None => {}
            }
        }
    }

    /// A probe that was lost before anybody knew of it is sent again.
    pub(super) fn forget_lost_probe(&mut self, node: usize, recovered: &HashSet<MessageId>) {
        if let Some(probe) = self.probes.get_mut(node)
            && let Some(message) = probe.as_ref()
            && !self.sent[message].stored
            && !recovered.contains(message)
        {
            *probe = None;
        }
    }

    // What receivers do.

    /// A node's rules refused a message.
    pub(super) fn handle_refused_by_rule(&mut self, message: MessageId) {
        self.refused.insert(message);
        self.seen.add("guaranteed messages that a rule refused", 1);
    }

    /// The end of a message is on a node's disk.
    pub(super) fn handle_processed(&mut self, place: Place) {
        let message = place.2;
        assert!(self.begun.contains_key(&place), "{message} was never begun");
        self.durable.insert(place);
        self.processed.insert(place);
        self.sender_put_back.remove(&place);
        self.receiver_put_back.remove(&place);
    }

    /// A node lost its inbox: it may process again what it has processed.
    pub(super) fn handle_inbox_lost(&mut self, node: usize) {
        let here = self.processed.iter().filter(|(other, ..)| *other == node);
        self.receiver_put_back.extend(here.copied());
        self.durable.retain(|(other, ..)| *other != node);
    }

    /// A handler begins; what it will do. `again` is what it is told: that it may have run before.
    pub(super) fn begin(&mut self, place: Place, again: bool) -> Nature {
        let (node, subscribed, message) = place;
        let sent = &self.sent[&message];
        let nature = sent.nature;
        let sure = !sent.forgotten && sent.decided.is_none();
        assert!(!(sure && self.durable.contains(&place)), "{message} is processed again at {node}");
        // One that is sent goes to one node, and to another when that refuses it, or is away for
        // longer than is waited for it.
        let others = (0..self.settings.nodes).filter(|other| *other != node && !subscribed);
        let others = others.map(|other| (other, false, message));
        let elsewhere = others.clone().any(|place| self.begun.contains_key(&place));
        let processed = others.clone().any(|place| self.durable.contains(&place));
        self.seen.when("messages taken from a node that had processed them", processed);
        let one_only = sure && self.settings.reassign_after.is_none();
        assert!(!(one_only && processed), "{message} was processed elsewhere");
        let put_back = [&self.sender_put_back, &self.receiver_put_back];
        let [by_sender, by_receiver] = put_back.map(|places| places.contains(&place));
        self.seen.when("messages processed again after a restore", by_sender && !by_receiver);
        let is_known = self.processed.contains(&place) && !(by_sender && by_receiver);
        assert!(again || !is_known, "{message} was processed at {node}, and doesn't say so");
        let begun = self.begun.entry(place).or_default();
        let new = *begun == 0 && !elsewhere;
        assert!(again || new || !sure, "{message} comes again, and doesn't say so");
        *begun += 1;
        self.check_order(message);
        nature
    }

    /// Whether a handler that ends has failed often enough.
    pub(super) fn times_begun(&self, place: Place) -> u32 {
        self.begun[&place]
    }

    /// All before it with its key are through. One for several targets is through at each of them at
    /// another time, and is not checked.
    fn check_order(&self, message: MessageId) {
        let sent = &self.sent[&message];
        if sent.forgotten || sent.lanes.len() > 1 {
            return;
        }
        for (_, other) in self.before_in_lanes(message).filter(|(_, it)| it.lanes.len() == 1) {
            assert!(
                !other.stored || self.is_through(other),
                "{message} is ahead of one with its key before it: {other:?}"
            );
        }
    }

    /// Returns the messages that the same sender sent before with the same key to one of the same
    /// targets.
    fn before_in_lanes(&self, message: MessageId) -> impl Iterator<Item = (MessageId, &Sent)> {
        let sent = &self.sent[&message];
        let before = self.order.iter().take_while(move |other| **other != message);
        before
            .filter(|_| !sent.lanes.is_empty())
            .map(|other| (*other, &self.sent[other]))
            .filter(|(_, other)| other.sender == sent.sender)
            .filter(|(_, other)| other.lanes.iter().any(|lane| sent.lanes.contains(lane)))
    }

    /// Whether those behind it may go.
    fn is_through(&self, sent: &Sent) -> bool {
        match &sent.done {
            Some(Err(_)) => !self.settings.hold_keys || sent.decided == Some(Decision::Removed),
            done => done.is_some(),
        }
    }

    /// Whether a message is behind a dead letter.
    pub(super) fn is_held_up(&self, message: MessageId) -> bool {
        self.before_in_lanes(message).any(|(other, it)| match it.done {
            Some(_) => !self.is_through(it),
            // One for several targets may be behind a dead letter for another of them.
            None => it.lanes.len() > 1 && self.is_held_up(other),
        })
    }
}
