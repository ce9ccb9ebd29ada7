//! Which segments of the journal can go, and what has to move before they can.

use bytes::Bytes;
use smallvec::smallvec;

use super::answers::MOST_UNREADABLE;
use super::{Bound, DISK_RETRY, Outbox, OutboxAction, Part, PartKey, Pending, State};
use crate::engine::delivery::record::{
    BindingRecord, MessageRecord, OutboxRecord, PartRecord, Raw,
};
use crate::engine::delivery::{Fate, Now};
use crate::journal::Position;

impl Outbox {
    /// Has the segments removed that hold nothing more that counts.
    pub(super) fn remove_segments(&mut self) {
        let first = self.live.first_key_value().map(|(segment, _)| *segment);
        let before = first.unwrap_or(self.newest_segment).min(self.newest_segment);
        let wanted = self.once.first_wanted(self.config.segment_size);
        let before = wanted.map_or(before, |wanted| wanted.min(before));
        if self.disk_retry.is_some()
            || self.removing
            || before <= self.removed_before
            || self.newest_segment == 0
        {
            return;
        }
        self.removing = true;
        // It is said again in a segment that stays.
        let peers = self.peer_records();
        self.append(&OutboxRecord::Peers(peers), Pending::Removal(before));
    }

    pub(super) fn leave_segment(&mut self, segment: u64) {
        if let Some(live) = self.live.get_mut(&segment) {
            *live -= 1;
            if *live == 0 {
                self.live.remove(&segment);
            }
        }
    }

    /// Moves what is left in the oldest segment to the newest, when the journal takes more than
    /// twice of what is in it: one message that waits for long would keep all that came after it.
    pub(super) fn compact(&mut self) {
        let Some((oldest, count)) = self.live.first_key_value().map(|(at, count)| (*at, *count))
        else {
            return;
        };
        let needed = self.bytes / self.config.segment_size.max(1);
        let waits = self.moving > 0 || self.disk_retry.is_some() || self.compact_retry.is_some();
        if waits || self.newest_segment - oldest <= 2 + 2 * needed {
            return;
        }
        let here = self.entries.iter().filter_map(|(number, entry)| {
            let position = entry.position?;
            // What says that it is dying is on its way to the journal, and this would undo it.
            let dying = entry.parts.iter().any(|part| part.state == State::Dying);
            (position.segment == oldest && !dying).then_some((number, position))
        });
        let here: Vec<_> = here.take(count as usize).collect();
        self.moving = here.len() as u64;
        let reads = here.into_iter().map(|(number, position)| OutboxAction::Read(number, position));
        self.actions.extend(reads);
    }

    /// A message that was to be read is this; `None` if it can't be read.
    pub(crate) fn handle_read(&mut self, now: Now, number: u64, frozen: Option<Bytes>) {
        self.moving -= 1;
        match frozen {
            Some(frozen) => self.move_message(number, frozen),
            None => self.give_up_unread(now, number),
        }
    }

    /// What can't be read is tried some more times, then it is a dead letter without a body, which
    /// doesn't keep the segment.
    fn give_up_unread(&mut self, now: Now, number: u64) {
        let Some(entry) = self.entries.get(number) else { return };
        let waits = |part: &Part| {
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
        let waiting: Vec<_> = parts.map(|(part, _)| PartKey { number, part }).collect();
        let ended = |part: &Part| matches!(part.state, State::Dead(_) | State::Settled);
        let is_over = entry.parts.iter().all(ended);
        let is_lost = self.count_unreadable(number) >= MOST_UNREADABLE;
        if is_lost && is_over {
            return self.move_message(number, Bytes::new());
        }
        self.compact_retry = Some(now.time + DISK_RETRY);
        if is_lost {
            waiting.into_iter().for_each(|key| self.kill(key, Fate::Unreadable));
        }
    }

    /// Stores a message once more, as it stands.
    fn move_message(&mut self, number: u64, frozen: Bytes) {
        let Some(entry) = self.entries.get(number) else { return };
        if entry.parts.iter().any(|part| part.state == State::Dying) {
            // What says so is in the journal by now, and this would undo it.
            return;
        }
        let record = |bound: &Bound| BindingRecord::from(&self.binding(*bound));
        let parts = (0u32..).zip(&entry.parts).map(|(at, part)| {
            let binding = part.bound.as_ref().map(record);
            let former = self.former.get(&PartKey { number, part: at });
            let former = former.into_iter().flatten().map(record).collect();
            let dead = match &part.state {
                State::Dead(fate) => Some(Fate::clone(fate)),
                _ => None,
            };
            let settled = part.state == State::Settled;
            let target = (&self.targets[part.target as usize]).into();
            let redelivered = part.redelivered || part.attempts > 0;
            let failures = part.failures;
            PartRecord { target, binding, failures, redelivered, settled, dead, former }
        });
        let rare = entry.rare.as_deref();
        let record = MessageRecord {
            number,
            parts: parts.collect(),
            expires_at: rare.and_then(|rare| rare.expires_at),
            not_before: rare.and_then(|rare| rare.not_before),
            order: self.order(number).map(|order| order.to_string()),
            frozen: Raw(frozen[..].into()),
        };
        self.moving += 1;
        self.append(&OutboxRecord::Messages(smallvec![record]), Pending::Moved(number));
    }

    pub(super) fn handle_moved(&mut self, number: u64, position: Option<Position>) {
        self.moving -= 1;
        let (Some(position), Some(entry)) = (position, self.entries.get_mut(number)) else {
            return;
        };
        if let Some(before) = entry.position.replace(position) {
            self.leave_segment(before.segment);
        }
        *self.live.entry(position.segment).or_default() += 1;
    }
}
