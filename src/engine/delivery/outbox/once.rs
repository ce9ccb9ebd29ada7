//! The ids of messages that are stored once, however often they are submitted.

use std::collections::BTreeMap;

use super::{DeadLetterReason, NewMessage, OutboundDelivery, Outbox, State};
use crate::engine::HashMap;
use crate::message::MessageId;

/// The journal bytes for which an id is remembered after its message was stored. The number of
/// segments would not do: each start begins a segment, and a process that is killed over and over
/// needs the ids most.
const REMEMBERED_FOR: u64 = 256 * 1024 * 1024;
/// The most full segments for which an id is remembered, which fit a small disk.
const MOST_SEGMENTS: u64 = 32;

/// The outcome of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Submitted {
    /// The message is new.
    New(u64),
    /// The message was submitted before, and is not processed yet.
    Pending { number: u64, stored: bool },
    /// The message was processed.
    Processed,
    /// The message is a dead letter.
    Dead(DeadLetterReason),
}

/// The ids of messages stored once, with their numbers, and the segments that record them.
#[derive(Debug, Default)]
pub(super) struct Once {
    /// The number of each id, and the segment of its last record; zero while it is being stored.
    numbers: HashMap<MessageId, (u64, u64)>,
    segments: BTreeMap<u64, Vec<Group>>,
}

/// Ids of equal age.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// The number of journal bytes written by then. Negative if before this process began to count.
    pub(super) since: i64,
    pub(super) ids: Vec<(MessageId, u64)>,
}

impl Group {
    fn is_wanted(&self, written: u64, segment_size: u64) -> bool {
        let wanted_for = REMEMBERED_FOR.min(MOST_SEGMENTS.saturating_mul(segment_size));
        self.age(written) < wanted_for
    }

    /// Returns the number of journal bytes written since.
    pub(super) fn age(&self, written: u64) -> u64 {
        (written as i64).saturating_sub(self.since).max(0) as u64
    }
}

impl Once {
    fn number(&self, message: &NewMessage) -> Option<u64> {
        let wanted = message.once && !self.numbers.is_empty();
        wanted.then(|| self.numbers.get(&message.id()).map(|(number, _)| *number)).flatten()
    }

    /// Adds the id of a message that is being stored.
    pub(super) fn submit(&mut self, id: MessageId, number: u64) {
        self.numbers.insert(id, (number, 0));
    }

    /// Adds ids that a segment records.
    pub(super) fn remember(&mut self, segment: u64, group: Group) {
        for (id, number) in &group.ids {
            self.numbers.insert(*id, (*number, segment));
        }
        let groups = self.segments.entry(segment).or_default();
        match groups.last_mut().filter(|last| last.since == group.since) {
            Some(last) => last.ids.extend(group.ids),
            None => groups.push(group),
        }
    }

    /// Removes the id of a message that could not be stored.
    pub(super) fn forget(&mut self, id: &MessageId) {
        self.numbers.remove(id);
    }

    /// Returns the ids whose last record is in that segment and that are still needed, also those
    /// of messages for which `is_live` is true.
    pub(super) fn wanted(
        &self,
        segment: u64,
        (written, segment_size): (u64, u64),
        is_live: impl Fn(u64) -> bool,
    ) -> Vec<Group> {
        let groups = self.segments.get(&segment).into_iter().flatten();
        let wanted = groups.map(|group| {
            let is_young = group.is_wanted(written, segment_size);
            let ids = group.ids.iter().filter(|(id, number)| {
                let said = self.numbers.get(id);
                said == Some(&(*number, segment)) && (is_young || is_live(*number))
            });
            Group { since: group.since, ids: ids.copied().collect() }
        });
        wanted.filter(|group| !group.ids.is_empty()).collect()
    }

    /// Returns true if ids in that segment are still needed.
    pub(super) fn wants(&self, segment: u64, written: u64, segment_size: u64) -> bool {
        let groups = self.segments.get(&segment);
        groups.into_iter().flatten().any(|group| group.is_wanted(written, segment_size))
    }

    /// Returns the number of ids in that segment that are still needed.
    pub(super) fn count_wanted(&self, segment: u64, written: u64, segment_size: u64) -> u64 {
        let groups = self.segments.get(&segment).into_iter().flatten();
        let wanted = groups.filter(|group| group.is_wanted(written, segment_size));
        wanted.map(|group| group.ids.len() as u64).sum()
    }

    /// Removes the ids of a removed segment.
    pub(super) fn forget_segment(&mut self, segment: u64) {
        for (id, _) in self.segments.remove(&segment).into_iter().flatten().flat_map(|it| it.ids) {
            if self.numbers.get(&id).is_some_and(|(_, said)| *said == segment) {
                self.numbers.remove(&id);
            }
        }
    }
}

impl Submitted {
    /// Returns the number of a new message.
    #[cfg(test)]
    pub(crate) fn number(&self) -> u64 {
        match self {
            Self::New(number) => *number,
            other => panic!("it was submitted before: {other:?}"),
        }
    }
}

impl Outbox {
    /// Returns the outcome of an earlier submission of the message, if there was one.
    pub(super) fn submitted_before(&self, message: &NewMessage) -> Option<Submitted> {
        let number = self.once.number(message)?;
        let Some(entry) = self.entries.get(number) else { return Some(Submitted::Processed) };
        let ended = |part: &OutboundDelivery| matches!(part.state, State::Settled | State::Dead(_));
        let dead = entry.parts.iter().find_map(|part| match &part.state {
            State::Dead(reason) => Some(DeadLetterReason::clone(reason)),
            _ => None,
        });
        Some(match dead {
            Some(reason) if entry.parts.iter().all(ended) => Submitted::Dead(reason),
            _ => Submitted::Pending { number, stored: entry.position.is_some() },
        })
    }
}
