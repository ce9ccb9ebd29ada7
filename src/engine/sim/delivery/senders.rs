//! What senders send, and what has to become of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use smallvec::{SmallVec, smallvec};

use super::{KEYS, NODES, Nature, Sent, World, id, least_loaded};
use crate::address::Destination;
use crate::engine::delivery::{DeadLetterReason, NewMessage, NewMessages, Submitted, Target};
use crate::message::{Header, Kind, MessageId};
use crate::wire::Envelope;

impl World {
    pub(super) fn send(&mut self, node: usize) {
        self.to_send -= 1;
        let together = if self.random.once_in(8) { self.random.between(2, 4) } else { 1 };
        let all: NewMessages = (0..together).filter_map(|_| self.draw(node)).collect();
        let Some(first) = all.first().map(|message| message.id()) else { return };
        self.seen.when("transactions", all.len() > 1);
        let ids: Vec<_> = all.iter().map(|message| message.id()).collect();
        for message in &ids {
            self.sent.get_mut(message).expect("it was drawn").transaction = first;
        }
        for (submitted, message) in self.submit(node, all).into_iter().zip(ids) {
            let numbers = &mut self.nodes[node].life.as_mut().expect("it lives").numbers;
            numbers.insert(submitted.number(), message);
            self.order.push(message);
        }
    }

    pub(super) fn submit(&mut self, node: usize, all: NewMessages) -> SmallVec<[Submitted; 1]> {
        let now = self.clock();
        let serving: Vec<usize> = (1..NODES).filter(|node| self.nodes[*node].serves).collect();
        let outbox = &mut self.nodes[node].life.as_mut().expect("it lives").outbox;
        outbox.submit(now, all, &mut |_, _, load| least_loaded(&serving, load)).unwrap()
    }

    /// Those of a transaction are stored together or not at all.
    pub(super) fn check_transactions(&mut self, node: usize, recovered: &HashSet<MessageId>) {
        let mut open = HashMap::<MessageId, Vec<bool>>::new();
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

    /// Submits again what is to be stored once, and of which nobody heard whether it was.
    pub(super) fn submit_again(&mut self, node: usize) {
        let unsure = self.sent.iter().filter(|(_, sent)| {
            let is_known = sent.stored || sent.done.is_some() || sent.forgotten;
            sent.sender == node && sent.once.is_some() && !is_known
        });
        let mut unsure: Vec<MessageId> = unsure.map(|(message, _)| *message).collect();
        unsure.sort_unstable();
        for message in unsure {
            let sent = self.sent.get_mut(&message).expect("it was sent");
            let mut new = sent.once.clone().expect("it is stored once");
            if let Destination::Topic(topic) = &new.envelope.header.destination {
                // It may have lost what it knew of them.
                let outbox = &self.nodes[node].life.as_ref().expect("it lives").outbox;
                new.targets = outbox.subscribers(topic);
                sent.parts = new.targets.len();
            }
            if new.targets.is_empty() {
                continue;
            }
            self.seen.add("messages submitted again", 1);
            let submitted = self.submit(node, smallvec![new]).remove(0);
            let sent = self.sent.get_mut(&message).expect("it was sent");
            let done = match submitted {
                Submitted::New(number) => {
                    let numbers = &mut self.nodes[node].life.as_mut().expect("it lives").numbers;
                    numbers.insert(number, message);
                    // It comes behind what was stored meanwhile.
                    self.order.retain(|other| *other != message);
                    self.order.push(message);
                    continue;
                }
                Submitted::Pending { stored, .. } => {
                    sent.stored |= stored;
                    continue;
                }
                Submitted::Processed => Ok(()),
                Submitted::Dead(reason) => Err(reason),
            };
            (sent.stored, sent.done, sent.may_end_again) = (true, Some(done), true);
        }
    }

    /// Longer ones where disks are small.
    fn body(&mut self) -> Bytes {
        let length = if self.capacity.is_some() { self.random.below(1200) } else { 6 };
        Bytes::from(vec![b'x'; length as usize])
    }

    /// A message that is sent now.
    fn draw(&mut self, node: usize) -> Option<NewMessage> {
        let now = self.clock();
        let life = self.nodes[node].life.as_ref()?;
        let message = self.ids.next(1);
        let (destination, targets) = match self.random.below(4) {
            0 => {
                let topic = "orders.new".parse().unwrap();
                let targets = life.outbox.subscribers(&topic);
                (Destination::Topic(topic), targets)
            }
            1 => {
                let to = id(self.random.below(3) as usize);
                (Destination::Node(to), smallvec![Target::Node(to)])
            }
            _ => {
                let work: crate::address::ServiceName = "work".parse().unwrap();
                (Destination::Service(work.clone()), smallvec![Target::Service(work)])
            }
        };
        if targets.is_empty() {
            return None;
        }
        let nature = match self.random.below(40) {
            0 => Nature::Poison,
            1 => Nature::Rejected,
            2 if self.random.once_in(4) => Nature::Killer,
            3..=8 => Nature::Flaky(self.random.between(1, 3) as u32),
            _ => Nature::Good,
        };
        let mut header = Header::new(message, Kind::Command, destination);
        let key = self.random.once_in(3).then(|| KEYS[self.random.below(2) as usize]);
        let lane = key.filter(|_| targets.len() == 1).map(|key| (targets[0].clone(), key));
        header.extra.get_or_insert_default().ordering_key =
            lane.as_ref().map(|(_, key)| (*key).to_owned());
        let soon = now.unix_ms + self.random.below(400);
        let expires_at = self.random.once_in(8).then_some(soon);
        let not_before = self.random.once_in(8).then_some(soon / 2 + now.unix_ms / 2);
        let parts = targets.len();
        let envelope = Arc::new(Envelope::one_way(header, self.body()));
        let once = self.random.once_in(6);
        let new = NewMessage { envelope, targets, expires_at, not_before, once };
        let sent = Sent {
            sender: node,
            nature,
            lane,
            parts,
            stored: false,
            transaction: message,
            once: once.then(|| new.clone()),
            done: None,
            may_end_again: false,
            forgotten: false,
            decided: None,
        };
        self.sent.insert(message, sent);
        Some(new)
    }

    pub(super) fn handle_done(
        &mut self,
        node: usize,
        number: u64,
        result: Result<(), DeadLetterReason>,
    ) {
        let message = self.nodes[node].life.as_ref().expect("it lives").numbers[&number];
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
        let ran = self.begun.keys().filter(|(.., other)| *other == message).count();
        match &result {
            Ok(()) => {
                let there = self.processed.iter().filter(|it| it.2 == message).count();
                assert!(there >= sent.parts, "{message} is settled and was not processed");
                self.seen.add("messages processed", 1);
            }
            Err(DeadLetterReason::Expired { maybe_processed }) => {
                self.seen.add("dead letters by expiry", 1);
                self.seen.when("dead letters that may have been processed", *maybe_processed);
                assert!(*maybe_processed || ran == 0 || sent.parts > 1, "{message} did run");
            }
            Err(DeadLetterReason::Rejected { .. }) => {
                self.seen.add("rejections", 1);
                // One that only dies with others is taken for a killer when that happens ten times.
                let deaths = self.nodes.iter().map(|node| node.lives).max().unwrap_or_default();
                let suspected = sent.nature == Nature::Killer || deaths >= 10;
                assert!(sent.nature == Nature::Rejected || suspected);
            }
            Err(DeadLetterReason::Failed { .. }) => {
                self.seen.add("dead letters by failure", 1);
                assert_eq!(sent.nature, Nature::Poison);
            }
            Err(DeadLetterReason::TooLarge | DeadLetterReason::Unreadable) => panic!("nothing is"),
        }
        sent.done = Some(result);
    }
}
