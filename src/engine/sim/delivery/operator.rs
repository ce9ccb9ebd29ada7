//! Who looks after dead letters that hold up others.

use std::collections::BTreeSet;

use super::{Decision, Nature, World};
use crate::engine::delivery::{Contents, DeliveryKey, Outbox, OutboxConfig};
use crate::engine::sim::disk::Crash;
use crate::message::MessageId;

impl World {
    /// Ends a node of which nothing is left but what is held up; at its next start its dead
    /// letters are decided about.
    pub(super) fn free_held(&mut self) {
        if !self.hold_keys {
            return;
        }
        let unsettled = self.unsettled();
        if unsettled.iter().all(|(message, _)| self.is_held_up(**message)) {
            let senders: BTreeSet<usize> = unsettled.iter().map(|(_, sent)| sent.sender).collect();
            senders.into_iter().for_each(|sender| self.crash(sender, Crash::Process));
        }
    }

    /// Whether a message is behind a dead letter.
    fn is_held_up(&self, message: MessageId) -> bool {
        self.before_in_lane(message).any(|it| it.done.is_some() && !self.is_through(it))
    }

    /// Before a node starts in the calm: some dead letters are removed, the others are sent again,
    /// and their handlers mended.
    pub(super) fn decide(&mut self, node: usize, config: &OutboxConfig) {
        if !(self.hold_keys && self.to_send == 0 && self.is_calm()) {
            return;
        }
        let entry = &mut self.nodes[node];
        let mut outbox = Outbox::new(config.clone());
        entry.outbox_disk.open(|it| outbox.recover(it.position, it.payload).unwrap());
        let contents: Vec<Contents> = outbox.contents().collect();
        for letter in contents.iter().filter(|it| it.dead.is_some()) {
            let Contents { number, part, position, .. } = *letter;
            let message = entry.stored_id(number, position.expect("it is stored"));
            let key = DeliveryKey { number, part };
            let (decision, record) = match number % 3 {
                0 => (Decision::Removed, outbox.purge(key)),
                _ => (Decision::Replayed, outbox.replay(key)),
            };
            entry.outbox_disk.store(record.expect("it is a dead letter"));
            let sent = self.sent.get_mut(&message).expect("it was sent");
            sent.decided = Some(decision);
            match decision {
                Decision::Removed => {
                    self.seen.add("dead letters removed", 1);
                    // An outbox that was put back may have it once more.
                    sent.parts = sent.parts.saturating_sub(1);
                    let of_this = |it: &&Contents| it.number == number;
                    if contents.iter().filter(of_this).all(|it| it.dead.is_some()) {
                        // It crashed before it could tell.
                        sent.done = letter.dead.clone().map(Err);
                    }
                }
                Decision::Replayed => {
                    self.seen.add("dead letters replayed", 1);
                    (sent.nature, sent.done) = (Nature::Good, None);
                }
            }
        }
        entry.outbox_disk.close();
    }
}
