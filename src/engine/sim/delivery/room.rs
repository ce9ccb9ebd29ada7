//! Outboxes on small disks: what must not come back, and that they take messages again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use smallvec::smallvec;

use super::{Event, Life, Nature, Node, Sent, World};
use crate::address::{Destination, ServiceName};
use crate::engine::delivery::{DeadLetterReason, NewMessage, Target};
use crate::engine::sim::disk::SEGMENT;
use crate::journal::Level;
use crate::message::{Header, Kind, MessageId};
use crate::wire::Envelope;

/// How often a disk that is full is looked at.
const LOOKS: u64 = 200_000;
const AGAIN: u64 = 50_000;
/// An outbox takes messages again this long after room can be had, at the most.
const SOON: Duration = Duration::from_secs(1);

impl World {
    pub(super) fn handle_removed(&mut self, node: usize) {
        let now = self.clock();
        let Node { life: Some(life), outbox_disk, .. } = &mut self.nodes[node] else { return };
        let gone = outbox_disk.removed();
        if let Some(room) = outbox_disk.changed_room() {
            life.outbox.handle_room(now, room);
        }
        life.outbox.handle_removed(now, &gone);
    }

    pub(super) fn look_for_room(&mut self, node: usize) {
        let now = self.clock();
        let Node { life: Some(life), outbox_disk, .. } = &mut self.nodes[node] else { return };
        life.looks = false;
        let room = outbox_disk.look_for_room();
        life.outbox.handle_room(now, room);
    }

    /// Has the disk looked at while it is full.
    pub(super) fn look_later(&mut self, node: usize) {
        let Node { life: Some(life), outbox_disk, .. } = &mut self.nodes[node] else { return };
        if !life.looks && outbox_disk.level() == Level::Full {
            life.looks = true;
            self.after(LOOKS, node, Event::Look);
        }
    }

    pub(super) fn describe_room(&self) -> String {
        let lives = self.nodes.iter().flat_map(|node| &node.life);
        lives.map(|life| life.outbox.describe_room() + "\n").collect()
    }

    /// What was settled and gone doesn't come back, and dead letters stay.
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
                Some(Err(_)) if sent.decided.is_none() => {
                    assert!(is_there, "the dead letter {message} is lost");
                }
                Some(Err(_)) | None => {}
            }
        }
    }

    /// When all is processed, each sender's outbox has to take one more message; whether it is
    /// processed too.
    pub(super) fn probe(&mut self) -> bool {
        for node in 0..self.probes.len() {
            if self.probes[node].is_none() && self.nodes[node].life.is_some() {
                self.send_probe(node);
            }
        }
        self.probes.iter().flatten().filter(|it| self.sent[*it].done.is_some()).count()
            == self.probes.len()
    }

    fn send_probe(&mut self, node: usize) {
        let message = self.ids.next(1);
        let work: ServiceName = "work".parse().unwrap();
        let header = Header::new(message, Kind::Command, Destination::Service(work.clone()));
        let envelope = Arc::new(Envelope::one_way(header, Bytes::from_static(b"is there room?")));
        let targets = smallvec![Target::Service(work)];
        let new = NewMessage { envelope, targets, expires_at: None, not_before: None, once: false };
        let sent = Sent {
            sender: node,
            nature: Nature::Good,
            lane: None,
            parts: 1,
            stored: false,
            transaction: message,
            once: None,
            done: None,
            may_end_again: false,
            forgotten: false,
            decided: None,
        };
        self.sent.insert(message, sent);
        self.order.push(message);
        let number = self.submit(node, smallvec![new]).remove(0).number();
        let life = self.nodes[node].life.as_mut().expect("it lives");
        life.numbers.insert(number, message);
        self.probes[node] = Some(message);
    }

    /// A probe was refused: it is sent again, for as long as room may be made.
    pub(super) fn handle_refused(&mut self, node: usize, message: MessageId) {
        if self.probes.get(node) != Some(&Some(message)) {
            return;
        }
        let first = *self.refused_since[node].get_or_insert(self.now);
        let Node { life: Some(Life { outbox, .. }), .. } = &self.nodes[node] else { return };
        let live: u64 = outbox.contents().map(|it| u64::from(it.size)).sum();
        let capacity = self.capacity.unwrap_or(u64::MAX);
        let is_full = live + 24 * 1024 + 8 * SEGMENT > capacity;
        assert!(
            is_full || self.now.since(first) <= SOON,
            "the outbox of {node} takes no message; {live} of {capacity} bytes are live\n{}",
            self.describe_room()
        );
        self.seen.when("outboxes full of what is not processed", is_full);
        if is_full {
            let sent = self.sent.get_mut(&message).expect("it was sent");
            sent.done = Some(Err(DeadLetterReason::TooLarge));
            return;
        }
        self.probes[node] = None;
        self.order.retain(|other| *other != message);
        self.after(AGAIN, node, Event::Calm);
    }
}
