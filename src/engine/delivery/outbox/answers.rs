//! What becomes of a message that was sent: what its receiver answers, or why it could not go.

use std::time::Duration;

use super::{Bound, DeliveryKey, Outbox, State};
use crate::engine::delivery::record::OutboxRecord;
use crate::engine::delivery::{DeadLetterReason, Now, Target};
use crate::identity::NodeId;
use crate::report::DropReason;
use crate::wire::{Answer, DeliveryId, DeliveryOutcome};

/// While the queue of a link is full of other messages.
const QUEUE_RETRY: Duration = Duration::from_millis(50);

/// A message that can't be read so often in a row is lost.
pub(super) const MOST_UNREADABLE: u32 = 10;

impl Outbox {
    /// It could not be handed to its link.
    pub(crate) fn handle_not_transmitted(
        &mut self,
        now: Now,
        key: DeliveryKey,
        reason: DropReason,
    ) {
        if self.part(key).is_none_or(|part| part.state != State::InFlight) {
            return;
        }
        self.stop(key);
        match reason {
            DropReason::TooLarge => self.dead_letter(key, DeadLetterReason::TooLarge),
            // Its end is told in a moment.
            DropReason::LinkLost => self.make_ready(key),
            _ => self.pause_until(key, now.time + QUEUE_RETRY, false),
        }
    }

    /// That attempt is still on its way.
    pub(crate) fn is_in_flight(&self, key: DeliveryKey, attempt: u32) -> bool {
        self.part(key).is_some_and(|part| part.state == State::InFlight && part.attempts == attempt)
    }

    /// What is stored of it can't be read. That may pass; if it doesn't, it is a dead letter.
    pub(crate) fn handle_unreadable(&mut self, now: Now, key: DeliveryKey) {
        if self.part(key).is_none_or(|part| part.state != State::InFlight) {
            return;
        }
        self.stop(key);
        if let Some(part) = self.part_mut(key) {
            part.attempts -= 1;
        }
        match self.count_unreadable(key.number) {
            MOST_UNREADABLE.. => self.dead_letter(key, DeadLetterReason::Unreadable),
            times => self.pause(now, key, times - 1, false),
        }
    }

    /// How often in a row it could not be read by now.
    pub(super) fn count_unreadable(&mut self, number: u64) -> u32 {
        let times = self.unreadable.entry(number).or_default();
        *times = times.saturating_add(1);
        *times
    }

    /// A peer says what became of a delivery; whether it was known.
    pub(crate) fn handle_answer(&mut self, now: Now, from: NodeId, answer: Answer) -> bool {
        let DeliveryId { stream, seq } = answer.id;
        let Some(number) = self.stream_numbers.get(&(from, stream)).copied() else { return false };
        let bound = Bound { stream: number, seq };
        let Some(key) = self.streams[number as usize].outstanding.get(seq).copied() else {
            return false;
        };
        let Some(part) = self.part(key) else { return false };
        if part.was_never_sent() {
            // An answer to what was never sent.
            return true;
        }
        if answer.outcome == DeliveryOutcome::Processed {
            // Of whichever attempt, also of one before it went to another node.
            if !matches!(part.state, State::DeadLettering(_) | State::Dead(_) | State::Settled) {
                self.settle(key);
            }
            return true;
        }
        let current = part.state == State::InFlight
            && part.bound == Some(bound)
            && part.attempts == answer.attempt;
        if !current {
            return true;
        }
        let (target, attempts, maybe_processed) = (part.target, part.attempts, part.redelivered);
        self.unreadable.remove(&key.number);
        self.stop(key);
        match answer.outcome {
            DeliveryOutcome::Processed => unreachable!("it was settled above"),
            DeliveryOutcome::Failed(text) => self.handle_failure(now, key, text),
            DeliveryOutcome::Rejected(text) => {
                self.dead_letter(key, DeadLetterReason::Rejected { text })
            }
            DeliveryOutcome::Expired => {
                self.dead_letter(key, DeadLetterReason::Expired { maybe_processed })
            }
            DeliveryOutcome::Refused if self.has_expired(now, key) => {
                self.dead_letter(key, DeadLetterReason::Expired { maybe_processed });
            }
            DeliveryOutcome::Refused => {
                if matches!(self.targets[target as usize], Target::Service(_)) {
                    self.unbind(key);
                    let free = OutboxRecord::Bound(vec![(key.number, key.part, None)]);
                    self.note(&free, [key.number]);
                }
                self.pause(now, key, attempts.saturating_sub(1), true);
            }
            DeliveryOutcome::NoInbox => {
                if let Some(peer) = self.peers.get_mut(&from) {
                    peer.inbox = None;
                }
                match self.has_expired(now, key) {
                    true => self.dead_letter(key, DeadLetterReason::Expired { maybe_processed }),
                    false => self.release(key),
                }
            }
        }
        true
    }

    fn handle_failure(&mut self, now: Now, key: DeliveryKey, text: String) {
        let expired = self.has_expired(now, key);
        let Some(part) = self.part_mut(key) else { return };
        part.redelivered = true;
        part.failures += 1;
        let failures = part.failures;
        if failures >= self.config.retry.max_attempts {
            self.dead_letter(key, DeadLetterReason::Failed { failures, text });
        } else if expired {
            self.dead_letter(key, DeadLetterReason::Expired { maybe_processed: true });
        } else {
            self.note(&OutboxRecord::Failed(key.number, key.part, failures), [key.number]);
            self.pause(now, key, failures - 1, false);
        }
    }
}
