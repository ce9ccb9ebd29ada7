//! Who sends guaranteed messages.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::{SmallVec, smallvec};

use super::calls::choose_by;
use super::{SimNode, node_id};
use crate::address::{Destination, ServiceName, Topic};
use crate::engine::delivery::{NewMessage, NewMessages, Submitted, Target};
use crate::engine::sim::ledger::Ledger;
use crate::engine::sim::promises::{KEYS, Nature, Sent};
use crate::engine::sim::settings::STORES;
use crate::identity::NodeId;
use crate::message::{Header, Kind, MessageId};
use crate::wire::Envelope;

const TOPIC: &str = "a.orders.new";

/// The targets of a message with an ordering key, each with the key.
fn lanes(message: &NewMessage) -> Vec<(Target, &'static str)> {
    let key = message.envelope.header.ordering_key();
    let Some(key) = KEYS.into_iter().find(|it| key == Some(*it)) else { return Vec::new() };
    message.targets.iter().map(|target| (target.clone(), key)).collect()
}

impl SimNode {
    /// Sends a message, or a few together.
    pub(in super::super) fn send(&mut self, ledger: &mut Ledger) {
        let together = if self.random.once_in(8) { self.random.between(2, 4) } else { 1 };
        let all: NewMessages = (0..together).filter_map(|_| self.draw(ledger)).collect();
        let Some(first) = all.first().map(|message| message.id()) else { return };
        ledger.promises.seen.when("transactions", all.len() > 1);
        let ids: Vec<_> = all.iter().map(|message| message.id()).collect();
        for message in &ids {
            ledger.promises.of(*message).transaction = first;
        }
        for (submitted, message) in self.submit(all).into_iter().zip(ids) {
            self.enter(submitted.number(), message, ledger);
        }
    }

    /// A message has a number in the outbox.
    fn enter(&mut self, number: u64, message: MessageId, ledger: &mut Ledger) {
        let store = self.store.as_mut().expect("it sends");
        store.numbers.insert(number, message);
        ledger.promises.order.push(message);
    }

    fn submit(&mut self, all: NewMessages) -> SmallVec<[Submitted; 1]> {
        let Self { store: Some(store), routing, front, turn, id, now, .. } = self else { panic!() };
        let choose = &mut |name: &_, key: Option<&str>, load: &dyn Fn(&NodeId) -> Option<u64>| {
            choose_by(routing, front, *id, turn, name, key, load)
        };
        store.outbox.submit(*now, all, choose).expect("it is never full")
    }

    /// Submits again what is to be stored once, and of which nobody heard whether it was.
    pub(super) fn submit_again(&mut self, ledger: &mut Ledger) {
        if self.store.is_none() {
            return;
        }
        let unsure = ledger.promises.sent.iter().filter(|(_, sent)| {
            let is_known = sent.stored || sent.done.is_some() || sent.forgotten;
            sent.sender == self.life.node && sent.once.is_some() && !is_known
        });
        let unsure: Vec<MessageId> = unsure.map(|(message, _)| *message).collect();
        for message in unsure {
            let mut new = ledger.promises.sent[&message].once.clone().expect("it is stored once");
            if let Destination::Topic(topic) = &new.envelope.header.destination {
                // It may have lost what it knew of them.
                let store = self.store.as_ref().expect("it sends");
                new.targets = store.outbox.subscribers(topic);
            }
            if new.targets.is_empty() {
                continue;
            }
            ledger.promises.seen.add("messages submitted again", 1);
            let submitted = self.submit(smallvec![new.clone()]).remove(0);
            let sent = ledger.promises.of(message);
            let done = match submitted {
                Submitted::New(number) => {
                    // One that is known keeps the targets that it had.
                    (sent.parts, sent.lanes) = (new.targets.len(), lanes(&new));
                    // It comes behind what was stored meanwhile.
                    ledger.promises.order.retain(|other| *other != message);
                    self.enter(number, message, ledger);
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
        let small = self.settings.capacity.is_some();
        let length = if small { self.random.below(1200) } else { 6 };
        Bytes::from(vec![b'x'; length as usize])
    }

    /// A message that is sent now.
    fn draw(&mut self, ledger: &mut Ledger) -> Option<NewMessage> {
        let message = self.next_id();
        let (destination, targets) = match self.random.below(4) {
            0 => {
                let topic: Topic = TOPIC.parse().unwrap();
                let targets = self.store.as_ref()?.outbox.subscribers(&topic);
                (Destination::Topic(topic), targets)
            }
            1 => {
                let to = node_id(self.random.below(STORES as u64) as usize);
                (Destination::Node(to), smallvec![Target::Node(to)])
            }
            _ => {
                let work: ServiceName = "work".parse().unwrap();
                (Destination::Service(work.clone()), smallvec![Target::Service(work)])
            }
        };
        if targets.is_empty() {
            return None;
        }
        let nature = match self.random.below(40) {
            0 => Nature::Poison,
            1 => Nature::Rejected,
            2 if self.random.once_in(4) && self.settings.faults => Nature::Killer,
            3..=8 => Nature::Flaky(self.random.between(1, 3) as u32),
            _ => Nature::Good,
        };
        let mut header = Header::new(message, Kind::Command, destination);
        let key = self.random.once_in(3).then(|| KEYS[self.random.below(2) as usize]);
        let key = key.filter(|_| targets.len() == 1);
        header.extra.get_or_insert_default().ordering_key = key.map(str::to_owned);
        let unix_ms = self.now.unix_ms;
        let soon = unix_ms + self.random.below(400);
        let expires_at = self.random.once_in(8).then_some(soon);
        let not_before = self.random.once_in(8).then_some(soon / 2 + unix_ms / 2);
        let parts = targets.len();
        let is_event = matches!(header.destination, Destination::Topic(_));
        let envelope = Arc::new(Envelope::one_way(header, self.body()));
        let once = self.random.once_in(6);
        let new = NewMessage { envelope, targets, expires_at, not_before, once };
        let sent = Sent {
            nature,
            lanes: lanes(&new),
            is_event,
            once: once.then(|| new.clone()),
            ..Sent::new(self.life.node, message, parts)
        };
        ledger.promises.sent.insert(message, sent);
        Some(new)
    }

    /// Sends one message when all others are processed; it has to be, too.
    pub(in super::super) fn send_probe(&mut self, ledger: &mut Ledger) {
        let message = self.next_id();
        let work: ServiceName = "work".parse().unwrap();
        let header = Header::new(message, Kind::Command, Destination::Service(work.clone()));
        let envelope = Arc::new(Envelope::one_way(header, Bytes::from_static(b"is there room?")));
        let targets = smallvec![Target::Service(work)];
        let new = NewMessage { envelope, targets, expires_at: None, not_before: None, once: false };
        ledger.promises.sent.insert(message, Sent::new(self.life.node, message, 1));
        let number = self.submit(smallvec![new]).remove(0).number();
        self.enter(number, message, ledger);
        ledger.promises.probes[self.life.node] = Some(message);
        self.perform(ledger);
    }
}
