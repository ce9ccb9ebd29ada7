//! Messages that are stored once, however often they are submitted: their ids.

use std::collections::BTreeMap;

use super::{Fate, NewMessage, Outbox, Part, State};
use crate::engine::HashMap;
use crate::journal::Position;
use crate::message::MessageId;

/// An id is remembered for as much of the journal as this many full segments, after the one in
/// which its message was stored. Each start begins a segment, and a process that is killed over and
/// over is the one that needs the ids, so it is not their number that counts.
const REMEMBERED_FOR: u64 = 4;
/// But for no more segments than this, however short they are.
const MOST_SEGMENTS: usize = 1024;

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
    Dead(Fate),
}

/// The numbers that the messages with these ids were given, and the segments that say so.
#[derive(Debug, Default)]
pub(super) struct Once {
    numbers: HashMap<MessageId, u64>,
    segments: BTreeMap<u64, Vec<MessageId>>,
    /// How long each segment is, as far as is known.
    ends: BTreeMap<u64, u64>,
}

impl Once {
    fn number(&self, message: &NewMessage) -> Option<u64> {
        let wanted = message.once && !self.numbers.is_empty();
        wanted.then(|| self.numbers.get(&message.id()).copied()).flatten()
    }

    /// It is being stored.
    pub(super) fn submit(&mut self, id: MessageId, number: u64) {
        self.numbers.insert(id, number);
    }

    pub(super) fn remember(&mut self, id: MessageId, number: u64, position: Position) {
        self.numbers.insert(id, number);
        self.segments.entry(position.segment).or_default().push(id);
    }

    /// It could not be stored.
    pub(super) fn forget(&mut self, id: &MessageId) {
        self.numbers.remove(id);
    }

    /// There is something in the journal there.
    pub(super) fn reach(&mut self, position: Position) {
        let end = self.ends.entry(position.segment).or_default();
        *end = (*end).max(position.offset + u64::from(position.length));
    }

    /// The first segment that is to stay for the ids in it.
    pub(super) fn first_wanted(&self, segment_size: u64) -> Option<u64> {
        let mut behind = 0;
        let wanted = self.ends.iter().rev().take(MOST_SEGMENTS).take_while(|(_, end)| {
            let is_wanted = behind < REMEMBERED_FOR * segment_size;
            behind += **end;
            is_wanted
        });
        let first = wanted.last().map(|(segment, _)| *segment)?;
        self.segments.range(first..).next().map(|(segment, _)| *segment)
    }

    pub(super) fn forget_before(&mut self, segment: u64) {
        self.ends = self.ends.split_off(&segment);
        let kept = self.segments.split_off(&segment);
        for id in std::mem::replace(&mut self.segments, kept).into_values().flatten() {
            self.numbers.remove(&id);
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
        let ended = |part: &Part| matches!(part.state, State::Settled | State::Dead(_));
        let dead = entry.parts.iter().find_map(|part| match &part.state {
            State::Dead(fate) => Some(Fate::clone(fate)),
            _ => None,
        });
        Some(match dead {
            Some(fate) if entry.parts.iter().all(ended) => Submitted::Dead(fate),
            _ => Submitted::Pending { number, stored: entry.position.is_some() },
        })
    }
}
