//! Messages that are stored once, however often they are submitted: their ids.

use std::collections::BTreeMap;

use super::{DeadLetterReason, NewMessage, OutboundDelivery, Outbox, State};
use crate::engine::HashMap;
use crate::message::MessageId;

/// An id is remembered for as much of the journal as this, in bytes, after its message was stored.
/// Each start begins a segment, and a process that is killed over and over is the one that needs
/// the ids, so it is not the number of segments that counts.
const REMEMBERED_FOR: u64 = 256 * 1024 * 1024;
/// But for no more than so many full segments, which is what a small disk holds.
const MOST_SEGMENTS: u64 = 32;

/// What becomes of a message that is to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Submitted {
    /// It is new.
    New(u64),
    /// It was submitted before, and is not processed yet.
    Pending { number: u64, stored: bool },
    /// It was processed.
    Processed,
    /// It is a dead letter.
    Dead(DeadLetterReason),
}

/// The numbers that the messages with these ids were given, and the segments that say so.
#[derive(Debug, Default)]
pub(super) struct Once {
    /// With the segment that says so last; zero while it is being stored.
    numbers: HashMap<MessageId, (u64, u64)>,
    segments: BTreeMap<u64, Vec<Group>>,
}

/// Ids that are equally old.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// How much of the journal had been written by then, in bytes. It may have been before this
    /// life began to count.
    pub(super) since: i64,
    pub(super) ids: Vec<(MessageId, u64)>,
}

impl Group {
    fn is_wanted(&self, written: u64, segment_size: u64) -> bool {
        let wanted_for = REMEMBERED_FOR.min(MOST_SEGMENTS.saturating_mul(segment_size));
        self.age(written) < wanted_for
    }

    /// How much of the journal was written since, in bytes.
    pub(super) fn age(&self, written: u64) -> u64 {
        (written as i64).saturating_sub(self.since).max(0) as u64
    }
}

impl Once {
    fn number(&self, message: &NewMessage) -> Option<u64> {
        let wanted = message.once && !self.numbers.is_empty();
        wanted.then(|| self.numbers.get(&message.id()).map(|(number, _)| *number)).flatten()
    }

    /// It is being stored.
    pub(super) fn submit(&mut self, id: MessageId, number: u64) {
        self.numbers.insert(id, (number, 0));
    }

    /// A segment says it.
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

    /// It could not be stored.
    pub(super) fn forget(&mut self, id: &MessageId) {
        self.numbers.remove(id);
    }

    /// What only that segment says, and is to be remembered for longer; also of messages that
    /// `is_live` says to be in the outbox.
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

    /// Whether ids in that segment are to be remembered for longer.
    pub(super) fn wants(&self, segment: u64, written: u64, segment_size: u64) -> bool {
        let groups = self.segments.get(&segment);
        groups.into_iter().flatten().any(|group| group.is_wanted(written, segment_size))
    }

    /// How many of them there are.
    pub(super) fn count_wanted(&self, segment: u64, written: u64, segment_size: u64) -> u64 {
        let groups = self.segments.get(&segment).into_iter().flatten();
        let wanted = groups.filter(|group| group.is_wanted(written, segment_size));
        wanted.map(|group| group.ids.len() as u64).sum()
    }

    /// That segment is gone.
    pub(super) fn forget_segment(&mut self, segment: u64) {
        for (id, _) in self.segments.remove(&segment).into_iter().flatten().flat_map(|it| it.ids) {
            if self.numbers.get(&id).is_some_and(|(_, said)| *said == segment) {
                self.numbers.remove(&id);
            }
        }
    }
}

impl Submitted {
    /// The number of a message that was new.
    #[cfg(test)]
    pub(crate) fn number(&self) -> u64 {
        match self {
            Self::New(number) => *number,
            other => panic!("it was submitted before: {other:?}"),
        }
    }
}

impl Outbox {
    /// What became of a message that was submitted before, if it was.
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
