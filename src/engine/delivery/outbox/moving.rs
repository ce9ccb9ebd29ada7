//! Rewrites messages, so that the segment that holds them can be removed.

use bytes::Bytes;
use smallvec::smallvec;

use super::answers::MOST_UNREADABLE;
use super::cleaning::Cleaning;
use super::{
    Bound, DISK_RETRY, DeliveryKey, OutboundDelivery, Outbox, OutboxAction, Pending, State,
};
use crate::engine::delivery::record::{
    BindingRecord, MessageRecord, OutboxRecord, PartRecord, Raw,
};
use crate::engine::delivery::{DeadLetterReason, Now};
use crate::journal::Position;

/// The most bytes read and rewritten at a time.
const MOST_AT_ONCE: u64 = 1024 * 1024;

impl Outbox {
    /// Continues with the messages of a segment, from number `next` on.
    pub(super) fn move_more(&mut self, segment: u64, next: u64) {
        if self.moving > 0 {
            return;
        }
        let Some(there) = self.segments.get(segment).filter(|_| self.clean_retry.is_none()) else {
            return self.give_up_cleaning();
        };
        let (mut reads, mut bytes, mut after) = (Vec::new(), 0, next);
        let ranges = there.messages.iter().filter(|(_, last)| *last >= next);
        'full: for (first, last) in ranges {
            for (number, entry) in self.entries.range(first.max(next), last) {
                let Some(position) = entry.position.filter(|it| it.segment == segment) else {
                    continue;
                };
                if bytes >= MOST_AT_ONCE {
                    break 'full;
                }
                bytes += u64::from(entry.size);
                after = number + 1;
                reads.push(OutboxAction::Read(number, position));
            }
        }
        if !reads.is_empty() {
            self.cleaning = Cleaning::Moving { segment, next: after };
            self.moving = reads.len() as u64;
            return self.actions.extend(reads);
        }
        match there.live {
            0 => self.keep(vec![segment]),
            // Some messages can't be read.
            _ => self.give_up_cleaning(),
        }
    }

    /// Handles the bytes of a message that was to be read; `None` if it can't be read.
    pub(crate) fn handle_read(&mut self, now: Now, number: u64, encoded: Option<Bytes>) {
        self.moving -= 1;
        match encoded {
            Some(encoded) => self.move_message(number, encoded),
            None => self.give_up_unread(now, number),
        }
    }

    /// Handles an unreadable message. After some retries it becomes a dead letter without a body,
    /// which no longer keeps the segment.
    fn give_up_unread(&mut self, now: Now, number: u64) {
        let Some(entry) = self.entries.get(number) else { return };
        let waits = |part: &OutboundDelivery| {
            matches!(
                part.state,
                State::Scheduled
                    | State::Blocked
                    | State::Waiting
                    | State::Ready
                    | State::Paused { .. }
            )
        };
        let parts = (0u32..).zip(&entry.parts).filter(|(_, part)| waits(part));
        let waiting: Vec<_> = parts.map(|(part, _)| DeliveryKey { number, part }).collect();
        let ended = |part: &OutboundDelivery| matches!(part.state, State::Dead(_) | State::Settled);
        let is_over = entry.parts.iter().all(ended);
        let is_lost = self.count_unreadable(number) >= MOST_UNREADABLE;
        if is_lost && is_over {
            return self.move_message(number, Bytes::new());
        }
        self.clean_retry = Some(now.time + DISK_RETRY);
        if is_lost {
            waiting.into_iter().for_each(|key| self.dead_letter(key, DeadLetterReason::Unreadable));
        }
    }

    /// Rewrites a message in its current state.
    fn move_message(&mut self, number: u64, encoded: Bytes) {
        self.note_copy(number);
        let Some(record) = self.message_record(number, &encoded) else { return };
        let record = OutboxRecord::Messages(smallvec![record]).encode();
        self.moving += 1;
        self.append_encoded(record, Pending::Moved(number));
    }

    /// Notes that a message is rewritten, with bindings that may be refused yet.
    pub(super) fn note_copy(&mut self, number: u64) {
        let parts = self.entries.get(number).into_iter().flat_map(|entry| (0..).zip(&entry.parts));
        let being_bound = parts.filter(|(_, part)| part.state == State::Binding);
        self.bindings_copied.extend(being_bound.map(|(part, _)| DeliveryKey { number, part }));
    }

    /// Returns the record of a message in its current state, with these bytes.
    pub(super) fn message_record<'a>(
        &self,
        number: u64,
        encoded: &'a [u8],
    ) -> Option<MessageRecord<'a>> {
        let entry = self.entries.get(number)?;
        let record = |bound: &Bound| BindingRecord::from(&self.binding(*bound));
        let parts = (0u32..).zip(&entry.parts).map(|(at, part)| {
            let binding = part.bound.as_ref().map(record);
            let former = self.former.get(&DeliveryKey { number, part: at });
            let former = former.into_iter().flatten().map(record).collect();
            let dead = match &part.state {
                // The record of that precedes this one in the journal, or will follow.
                State::Dead(reason) | State::DeadLettering(reason) => {
                    Some(DeadLetterReason::clone(reason))
                }
                _ => None,
            };
            let settled = part.state == State::Settled;
            let target = (&self.targets[part.target as usize]).into();
            let redelivered = part.redelivered || part.attempts > 0;
            let failures = part.failures;
            PartRecord { target, binding, failures, redelivered, settled, dead, former }
        });
        let rare = entry.rare.as_deref();
        Some(MessageRecord {
            number,
            parts: parts.collect(),
            expires_at: rare.and_then(|rare| rare.expires_at),
            not_before: rare.and_then(|rare| rare.not_before),
            order: self.order(number).map(|order| order.to_string()),
            encoded: Raw(encoded.into()),
        })
    }

    pub(super) fn handle_moved(&mut self, number: u64, position: Option<Position>) {
        self.moving -= 1;
        let Some(position) = position else { return };
        let Some(entry) = self.entries.get_mut(number) else {
            // The message was settled meanwhile, but its copy exists.
            return self.segments.store(position.segment, number);
        };
        let size = entry.size;
        let before = entry.position.replace(position);
        self.segments.enter(position.segment, number, size);
        if let Some(before) = before {
            self.leave_segment(before, size);
        }
    }
}
