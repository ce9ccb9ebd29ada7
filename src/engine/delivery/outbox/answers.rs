//! Outcomes of sent messages: the receiver's answers, and failures to send.

use std::time::Duration;

use super::{Bound, DeliveryKey, Outbox, State};
use crate::engine::delivery::record::OutboxRecord;
use crate::engine::delivery::{DeadLetterReason, Now, Target};
use crate::identity::NodeId;
use crate::report::DropReason;
use crate::wire::{Answer, DeliveryId, DeliveryOutcome};

/// The retry delay while the queue of a link is full of other messages.
const QUEUE_RETRY: Duration = Duration::from_millis(50);

/// The number of consecutive failed reads after which a message is lost.
pub(super) const MOST_UNREADABLE: u32 = 10;

/// An answer by which a message is not settled.
enum Refusal {
    Failed(String),
    Rejected(String),
    Refused,
    NoInbox,
    Expired,
}

impl Refusal {
    fn of(outcome: DeliveryOutcome) -> Option<Self> {
        Some(match outcome {
            DeliveryOutcome::Processed => return None,
            DeliveryOutcome::Failed(text) => Self::Failed(text),
            DeliveryOutcome::Rejected(text) => Self::Rejected(text),
            DeliveryOutcome::Refused => Self::Refused,
            DeliveryOutcome::NoInbox => Self::NoInbox,
            DeliveryOutcome::Expired => Self::Expired,
        })
    }
}

impl Outbox {
    /// Handles a message that could not be passed to its link.
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
            // The end of the link is reported shortly.
            DropReason::LinkLost => self.make_ready(key),
            // Its subscription has ended, or changed its pattern.
            DropReason::NoSubscriber => self.settle(key),
            DropReason::NotAllowed => self.handle_forbidden(now, key),
            _ => self.pause_until(key, now.time + QUEUE_RETRY, false),
        }
    }

    /// Handles a message that the rules no longer let its node have.
    fn handle_forbidden(&mut self, now: Now, key: DeliveryKey) {
        let Some(part) = self.part_mut(key) else { return };
        // It was not sent.
        part.attempts = part.attempts.saturating_sub(1);
        let (target, is_new, attempts) = (part.target, part.was_never_sent(), part.attempts);
        if !matches!(self.targets[target as usize], Target::Service(_)) {
            return self.dead_letter(key, DeadLetterReason::NotAllowed);
        }
        // Another instance may have it, unless this one may have processed it.
        if is_new && !self.is_at_an_end {
            self.unbind(key);
            self.note(&OutboxRecord::Bound(vec![(key.number, key.part, None)]), [key.number]);
        }
        self.pause(now, key, attempts, true);
    }

    /// Returns true if that attempt is still in flight.
    pub(crate) fn is_in_flight(&self, key: DeliveryKey, attempt: u32) -> bool {
        self.part(key).is_some_and(|part| part.state == State::InFlight && part.attempts == attempt)
    }

    /// Handles an unreadable message: it is retried, and finally becomes a dead letter.
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

    /// Counts a failed read; returns the number of consecutive ones.
    pub(super) fn count_unreadable(&mut self, number: u64) -> u32 {
        let times = self.unreadable.entry(number).or_default();
        *times = times.saturating_add(1);
        *times
    }

    /// Handles a peer's answer to a delivery; returns true if the delivery is known.
    pub(crate) fn handle_answer(&mut self, now: Now, from: NodeId, answer: Answer) -> bool {
        let DeliveryId { stream, seq } = answer.id;
        let Some(number) = self.stream_numbers.get(&(from, stream)).copied() else { return false };
        let bound = Bound { stream: number, seq };
        let Some(key) = self.streams[number as usize].outstanding.get(seq).copied() else {
            return false;
        };
        let Some(part) = self.part(key) else { return false };
        if part.was_never_sent() {
            // The peer answers a delivery that was never sent.
            return true;
        }
        let current = part.state == State::InFlight
            && part.bound == Some(bound)
            && part.attempts == answer.attempt;
        let over = matches!(part.state, State::DeadLettering(_) | State::Dead(_) | State::Settled);
        let refusal = match Refusal::of(answer.outcome) {
            Some(refusal) if current => refusal,
            Some(_) => return true,
            None => {
                // Any attempt counts, also one from before the message went to another node.
                let target = part.target;
                if !over {
                    self.settle(key);
                }
                self.note_proof(target);
                return true;
            }
        };
        let (target, attempts, maybe_processed) = (part.target, part.attempts, part.redelivered);
        self.unreadable.remove(&key.number);
        self.stop(key);
        match refusal {
            Refusal::Failed(text) => self.handle_failure(now, key, text),
            Refusal::Rejected(text) => self.dead_letter(key, DeadLetterReason::Rejected { text }),
            Refusal::Expired => {
                self.dead_letter(key, DeadLetterReason::Expired { maybe_processed })
            }
            Refusal::Refused if self.has_expired(now, key) => {
                self.dead_letter(key, DeadLetterReason::Expired { maybe_processed });
            }
            Refusal::Refused => {
                // At the end of a disk it stays with its node: records of moves to and fro would
                // take the last space, and nothing could be settled any more.
                if matches!(self.targets[target as usize], Target::Service(_)) && !self.is_at_an_end
                {
                    self.unbind(key);
                    let free = OutboxRecord::Bound(vec![(key.number, key.part, None)]);
                    self.note(&free, [key.number]);
                }
                self.pause(now, key, attempts.saturating_sub(1), true);
            }
            Refusal::NoInbox => {
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
