//! Who looks after dead letters that hold up others, and sees that outboxes take messages again.

use std::collections::BTreeSet;
use std::time::Duration;

use super::disk::{Crash, SEGMENT};
use super::node::{SimNode, outbox_config, stored};
use super::promises::{Decision, Nature};
use super::settings::SENDERS;
use super::world::World;
use crate::engine::delivery::{Contents, DeadLetterReason, DeliveryKey, Outbox};
use crate::message::MessageId;

/// A probe that was refused is sent again after this time.
const AGAIN: Duration = Duration::from_millis(50);
/// An outbox takes messages again this long after room can be had, at the most. On a full disk it
/// waits for half a second before each segment of which little can be freed.
const SOON: Duration = Duration::from_secs(5);

impl World {
    /// Sees to what is left when the storm is over; whether all is processed.
    pub(super) fn settle(&mut self) -> bool {
        if self.ledger.promises.unsettled().next().is_some() {
            self.free_held();
            return false;
        }
        self.probe()
    }

    /// Ends a node of which nothing is left but what is held up; at its next start its dead
    /// letters are decided about.
    fn free_held(&mut self) {
        if !self.settings.hold_keys {
            return;
        }
        let promises = &self.ledger.promises;
        if promises.unsettled().all(|(message, _)| promises.is_held_up(*message)) {
            let senders: BTreeSet<usize> =
                promises.unsettled().map(|(_, sent)| sent.sender).collect();
            for sender in senders {
                match self.random.once_in(2) {
                    true => self.crash(sender, Crash::Process),
                    false => self.shut_down(sender),
                }
            }
        }
    }

    /// Before a node starts in the calm: some dead letters are removed, the others are sent again,
    /// and their handlers mended.
    pub(super) fn decide(&mut self, node: usize) {
        if !(self.settings.hold_keys && self.calm) {
            return;
        }
        let Some(disks) = &mut self.machines[node].disks else { return };
        let disk = &mut disks.outbox;
        let mut outbox = Outbox::new(outbox_config(node, self.settings, &mut self.random));
        disk.open(|it| outbox.recover(it.position, it.payload).unwrap());
        let contents: Vec<Contents> = outbox.contents().collect();
        let promises = &mut self.ledger.promises;
        if contents.iter().any(|it| it.dead.is_some()) {
            disk.store(outbox.begin_closed_life());
        }
        for letter in contents.iter().filter(|it| it.dead.is_some()) {
            let Contents { number, part, position, .. } = *letter;
            let message = stored(disk, number, position.expect("it is stored")).header.id;
            let key = DeliveryKey { number, part };
            let (decision, record) = match number % 3 {
                0 => (Decision::Removed, outbox.purge(key)),
                _ => (Decision::Replayed, outbox.replay(key)),
            };
            disk.store(record.expect("it is a dead letter"));
            let sent = promises.of(message);
            sent.decided = Some(decision);
            match decision {
                Decision::Removed => {
                    // An outbox that was put back may have it once more.
                    sent.parts = sent.parts.saturating_sub(1);
                    let of_this = |it: &&Contents| it.number == number;
                    if contents.iter().filter(of_this).all(|it| it.dead.is_some()) {
                        // It crashed before it could tell.
                        sent.done = letter.dead.clone().map(Err);
                    }
                    promises.seen.add("dead letters removed", 1);
                }
                Decision::Replayed => {
                    (sent.nature, sent.done) = (Nature::Good, None);
                    promises.seen.add("dead letters replayed", 1);
                }
            }
        }
        disk.close();
    }

    /// When all is processed, each sender's outbox has to take one more message; whether it is
    /// processed too.
    fn probe(&mut self) -> bool {
        for node in 0..SENDERS {
            let is_due = self.next_probe[node] <= self.now;
            if self.ledger.promises.probes[node].is_none()
                && is_due
                && let Some(life) = self.user_of(node)
            {
                self.act(life, SimNode::send_probe);
            }
        }
        let promises = &self.ledger.promises;
        let done =
            |probe: &Option<MessageId>| probe.is_some_and(|it| promises.sent[&it].done.is_some());
        promises.probes.iter().all(done)
    }

    /// A probe was refused: it is sent again, for as long as room may be made.
    pub(super) fn handle_refused(&mut self, node: usize, message: MessageId) {
        let first = *self.refused_since[node].get_or_insert(self.now);
        let Some(store) = self.nodes[node].as_ref().and_then(|node| node.store.as_ref()) else {
            return;
        };
        let (live, capacity) = (store.live_bytes(), self.settings.capacity.unwrap_or(u64::MAX));
        let is_full = live + 24 * 1024 + 8 * SEGMENT > capacity;
        assert!(
            is_full || self.now.since(first) <= SOON,
            "the outbox of {node} takes no message; {live} of {capacity} bytes are live\n{}",
            self.describe_rooms()
        );
        let promises = &mut self.ledger.promises;
        promises.seen.when("outboxes full of what is not processed", is_full);
        if is_full {
            promises.of(message).done = Some(Err(DeadLetterReason::TooLarge));
            return;
        }
        promises.probes[node] = None;
        promises.order.retain(|other| *other != message);
        self.next_probe[node] = self.now + AGAIN;
    }

    pub(super) fn describe_rooms(&self) -> String {
        let stores = self.nodes.iter().flatten().filter_map(|node| node.store.as_ref());
        stores.map(|store| store.outbox.describe_room() + "\n").collect()
    }
}
