//! What receivers do, and what they must never see.

use super::{Decision, Event, NODES, Nature, Packet, Sent, World, id};
use crate::engine::delivery::Verdict;
use crate::engine::sim::disk::Crash;
use crate::message::MessageId;
use crate::wire::{Answer, Delivery, DeliveryId, DeliveryOutcome};

impl World {
    pub(super) fn handle_message(
        &mut self,
        from: usize,
        node: usize,
        message: MessageId,
        mut it: Delivery,
    ) {
        let serves = self.nodes[node].serves;
        let Some(life) = &mut self.nodes[node].life else { return };
        let verdict = life.inbox.handle_delivery(id(from), &mut it);
        let attempt = it.attempt;
        match verdict {
            Verdict::Run | Verdict::RunLater if it.redelivered => self.seen.add("redeliveries", 1),
            _ => {}
        }
        match verdict {
            Verdict::Run if !serves => {
                self.seen.add("refusals", 1);
                life.inbox.handle_ended(id(from), &it.id, DeliveryOutcome::Refused);
            }
            Verdict::Run => self.begin(from, node, it.id, message, it.redelivered),
            Verdict::RunLater => _ = life.waiting.insert((id(from), it.id), message),
            Verdict::Wait => {}
            Verdict::Answer(outcome) => {
                if outcome == DeliveryOutcome::Processed {
                    let place = (node, it.id.stream.subscription.is_some(), message);
                    assert!(self.begun.contains_key(&place), "{message} was never begun");
                    // Its answer may have been lost in a crash.
                    self.durable.insert(place);
                    self.processed.insert(place);
                    self.seen.add("suppressed duplicates", 1);
                }
                let answer = Answer { id: it.id, attempt, outcome };
                self.answer(node, from, answer);
            }
        }
    }

    pub(super) fn answer(&mut self, node: usize, to: usize, answer: Answer) {
        if node != to {
            return self.transmit(node, to, Packet::Answer(answer));
        }
        let now = self.clock();
        if let Some(life) = &mut self.nodes[node].life {
            life.outbox.handle_answer(now, id(node), answer);
        }
    }

    pub(super) fn begin(
        &mut self,
        from: usize,
        node: usize,
        it: DeliveryId,
        message: MessageId,
        again: bool,
    ) {
        let subscribed = it.stream.subscription.is_some();
        let place = (node, subscribed, message);
        let sent = &self.sent[&message];
        let sure = !sent.forgotten && sent.decided.is_none();
        assert!(!(sure && self.durable.contains(&place)), "{message} is processed again at {node}");
        // One that is sent goes to one node, and to another when that refuses it, or is away for
        // longer than is waited for it.
        let others = (0..NODES).filter(|other| *other != node && !subscribed);
        let others = others.map(|other| (other, false, message));
        let elsewhere = others.clone().any(|place| self.begun.contains_key(&place));
        let processed = others.clone().any(|place| self.durable.contains(&place));
        self.seen.when("messages taken from a node that had processed them", processed);
        let one_only = sure && self.reassign_after.is_none();
        assert!(!(one_only && processed), "{message} was processed elsewhere");
        let begun = self.begun.entry(place).or_default();
        let new = *begun == 0 && !elsewhere;
        assert!(again || new || !sure, "{message} comes again, and doesn't say so");
        *begun += 1;
        self.check_order(message);
        let running = self.nodes[node].life.as_mut().map(|life| &mut life.running);
        assert!(running.is_some_and(|running| running.insert((id(from), it.clone()))));
        if self.sent[&message].nature == Nature::Killer {
            self.seen.add("messages that kill their process", 1);
            return self.crash(node, Crash::Process);
        }
        let takes = self.random.between(10, 20_000);
        self.after(takes, node, Event::Ended { from, id: it, message });
    }

    /// All before it with its key are through.
    fn check_order(&self, message: MessageId) {
        if self.sent[&message].forgotten {
            return;
        }
        for other in self.before_in_lane(message) {
            assert!(
                !other.stored || self.is_through(other),
                "{message} is ahead of one with its key before it: {other:?}"
            );
        }
    }

    /// What its sender sent before it with its key.
    pub(super) fn before_in_lane(&self, message: MessageId) -> impl Iterator<Item = &Sent> {
        let sent = &self.sent[&message];
        let before = self.order.iter().take_while(move |other| **other != message);
        before.map(|other| &self.sent[other]).filter(|other| {
            sent.lane.is_some() && other.sender == sent.sender && other.lane == sent.lane
        })
    }

    /// Whether those behind it may go.
    pub(super) fn is_through(&self, sent: &Sent) -> bool {
        match &sent.done {
            Some(Err(_)) => !self.hold_keys || sent.decided == Some(Decision::Removed),
            done => done.is_some(),
        }
    }

    pub(super) fn handle_ended(
        &mut self,
        node: usize,
        from: usize,
        it: DeliveryId,
        message: MessageId,
    ) {
        let place = (node, it.stream.subscription.is_some(), message);
        let times = self.begun[&place];
        let outcome = match self.sent[&message].nature {
            Nature::Flaky(fails) if times <= fails => DeliveryOutcome::Failed("flaky".into()),
            Nature::Good | Nature::Flaky(_) => DeliveryOutcome::Processed,
            Nature::Poison => DeliveryOutcome::Failed("poison".into()),
            Nature::Rejected => DeliveryOutcome::Rejected("no".into()),
            Nature::Killer => unreachable!("it killed its process"),
        };
        let Some(life) = &mut self.nodes[node].life else { return };
        life.running.remove(&(id(from), it.clone()));
        life.waiting.insert((id(from), it.clone()), message);
        life.inbox.handle_ended(id(from), &it, outcome);
    }
}
