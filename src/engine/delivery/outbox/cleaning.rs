//! Cleaning: selects journal segments to remove, and rewrites their live records first.
//!
//! ```text
//!   the newest ─▶ Beginning ─▶ Moving ─▶ Keeping ─▶ Removing
//!   another one ───────────────┘ its      │ other live records: about messages elsewhere,
//!   one without messages ──────── messages ┘ ids, peers
//! ```
//!
//! Segments are removed in any order, first those that free the most space for the least rewriting.
//! Rewritten records follow all records that they replace, and are synced before those are removed,
//! so that a crash at any point leaves one or both.

use std::time::Duration;

use super::once::Group;
use super::segments::Segment;
use super::{DISK_RETRY, Outbox, OutboxAction, Pending, State};
use crate::engine::delivery::ranges::Ranges;
use crate::engine::delivery::record::{IdsRecord, KeptRecord, OutboxRecord};
use crate::engine::delivery::{DeadLetterReason, Now};
use crate::journal::{Level, Position, Room};

/// The interval between searches for a removable segment while space is short.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// The time a full disk waits for a segment of which half can be freed; then less suffices.
const PATIENCE: Duration = Duration::from_millis(500);
/// The most journal bytes of a message beyond its size in the outbox.
const MOVE: u64 = 160;
/// The most bytes to rewrite the state of a message, a settled range, an id, or a peer.
const STATE: u64 = 32;
const RANGE: u64 = 24;
const ID: u64 = 32;
const PEER: u64 = 64;
/// The most bytes of a record's fixed part, and of an empty entry.
const ENTRY: u64 = 256;
const SHORT_ENTRY: u64 = 160;
/// The part of the last space left for other entries: a fraction of a segment, and in bytes.
const LEFT_PART: u64 = 4;
const LEFT: u64 = 256 * 1024;
/// The number of segments above which none is kept only for its ids.
const MOST_FOR_IDS: usize = 1024;

/// The progress of a cleaning.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Cleaning {
    #[default]
    Idle,
    /// A new segment is being begun, so that this one is no longer written.
    Beginning(u64),
    /// The segment's messages are being rewritten; those before `next` are done.
    Moving {
        segment: u64,
        next: u64,
    },
    /// The other live records are being stored.
    Keeping,
    Removing,
}

/// The live records that an entry rewrites so that segments can be removed.
#[derive(Debug)]
pub(super) struct Keeping {
    pub(super) segments: Vec<u64>,
    settled: Vec<(u64, u64)>,
    states: Vec<u64>,
    groups: Vec<Group>,
    peers: bool,
    history: bool,
}

/// The records of a segment about messages stored elsewhere.
#[derive(Debug, Default)]
struct Facts {
    /// Settled messages whose bytes are still in another segment.
    settled: Vec<(u64, u64)>,
    states: Vec<u64>,
}

/// A segment that may be cleaned.
struct Candidate {
    number: u64,
    size: u64,
    /// The bytes to be written for its removal.
    cost: u64,
}

impl Candidate {
    /// Returns the bytes freed for each byte written.
    fn yields(&self) -> f64 {
        self.size.saturating_sub(self.cost) as f64 / (self.cost + ENTRY) as f64
    }
}

impl Outbox {
    /// Handles a change of the free space on the journal's disk.
    pub(crate) fn handle_room(&mut self, now: Now, room: Room) {
        self.now = now.time;
        let (was_full, is_full) = (self.room.level == Level::Full, room.level == Level::Full);
        if was_full && !is_full {
            self.full_until = Some(now.time);
        }
        if is_full && !was_full {
            self.full_since = now.time;
            // A disk whose reserve is taken again and again is short of space all the while.
            let is_again = |until| now.time.since(until) < 2 * PATIENCE;
            if !self.full_until.is_some_and(is_again) {
                self.short_since = now.time;
            }
        }
        self.room = room;
        self.clean_due |= room.level != Level::Ample;
    }

    /// Handles the removal of segments: those in `gone` no longer exist.
    pub(crate) fn handle_removed(&mut self, now: Now, gone: &[u64]) {
        self.now = now.time;
        for segment in gone {
            if self.segments.remove(*segment) {
                self.once.forget_segment(*segment);
                (self.full_since, self.short_since) = (now.time, now.time);
                self.is_at_an_end = false;
            }
        }
        if self.cleaning == Cleaning::Removing {
            self.cleaning = Cleaning::Idle;
        }
        self.clean_due = true;
        if self.segments.iter().any(|(_, segment)| segment.goes) {
            // Some remain, perhaps because a sync failed.
            self.doubt_written();
            self.clean_retry = Some(now.time + DISK_RETRY);
        }
    }

    /// Removes a message from its segment.
    pub(super) fn leave_segment(&mut self, position: Position, size: u32) {
        let was_last = self.segments.leave(position.segment, size);
        // The current segment is empty now and then.
        self.clean_due |= was_last && position.segment < self.segments.newest;
        if self.room.level != Level::Ample {
            self.clean_at.get_or_insert(self.now + LOOK_AGAIN);
        }
    }

    /// Starts or continues the removal of segments with few or no live records.
    pub(super) fn clean(&mut self) {
        if let Cleaning::Moving { segment, next } = self.cleaning {
            return self.move_more(segment, next);
        }
        let waits = self.clean_retry.is_some();
        if self.cleaning != Cleaning::Idle || waits || !std::mem::take(&mut self.clean_due) {
            return;
        }
        let dead = self.dead_segments();
        if !dead.is_empty() {
            return self.keep(dead);
        }
        let chosen = self.choose_segment();
        self.is_at_an_end = chosen.is_none() && self.room.level == Level::Full;
        let Some(chosen) = chosen else { return self.remove_going() };
        match chosen.number == self.segments.newest {
            true => {
                self.cleaning = Cleaning::Beginning(chosen.number);
                let kept = KeptRecord { next: self.next_number, ..KeptRecord::default() };
                self.append_first(&OutboxRecord::Kept(kept), Pending::Begun);
            }
            false => self.begin_moving(chosen.number),
        }
    }

    fn begin_moving(&mut self, segment: u64) {
        self.cleaning = Cleaning::Moving { segment, next: 0 };
        self.move_more(segment, 0);
    }

    /// Handles the outcome of beginning a new segment.
    pub(super) fn handle_begun(&mut self, begun: bool) {
        let Cleaning::Beginning(segment) = self.cleaning else { return };
        match begun && segment < self.segments.newest {
            true => self.begin_moving(segment),
            false => self.give_up_cleaning(),
        }
    }

    /// Postpones the cleaning after a refused append.
    pub(super) fn clean_later(&mut self, now: Now) {
        let is_full = self.room.level == Level::Full;
        self.clean_retry = Some(now.time + if is_full { LOOK_AGAIN } else { DISK_RETRY });
    }

    /// Gives up the current cleaning; it is restarted later.
    pub(super) fn give_up_cleaning(&mut self) {
        (self.cleaning, self.clean_due) = (Cleaning::Idle, true);
    }

    /// Returns true if a segment is kept for its ids.
    fn stays_for_ids(&self, number: u64) -> bool {
        let (written, size) = (self.segments.written, self.config.segment_size);
        self.room.level == Level::Ample
            && self.segments.len() <= MOST_FOR_IDS
            && self.once.wants(number, written, size)
    }

    /// Returns the segments without messages and with few other live records: as many as the space
    /// for rewriting allows, or first those that need no rewriting.
    fn dead_segments(&self) -> Vec<u64> {
        let newest = self.segments.newest;
        let part = if self.room.level == Level::Full { 2 } else { 8 };
        let dead = self.segments.iter().filter(|(number, segment)| {
            let is_dead = segment.live == 0 && !segment.goes && *number < newest;
            is_dead && !self.stays_for_ids(*number)
        });
        let mut dead: Vec<(u64, u64)> = dead
            .map(|(number, segment)| (self.cost(number, segment), number, segment))
            .filter(|(cost, _, segment)| *cost <= (segment.size / part).max(2 * ENTRY))
            .map(|(cost, number, _)| (cost, number))
            .collect();
        dead.sort_unstable();
        if self.room.level == Level::Full && dead.first().is_some_and(|(cost, _)| *cost == 0) {
            dead.retain(|(cost, _)| *cost == 0);
        }
        let room = self.room.bytes.saturating_sub(SHORT_ENTRY);
        let mut left = room.min(self.config.segment_size / LEFT_PART);
        let mut is_first = true;
        dead.retain(|(cost, _)| {
            // The cheapest is tried in any case: its cost is an upper bound.
            let fits = *cost <= left || is_first;
            is_first = false;
            left = left.saturating_sub(*cost);
            fits
        });
        dead.into_iter().map(|(_, number)| number).collect()
    }

    /// Returns the segment whose cleaning frees the most for its cost, if one is worth it.
    fn choose_segment(&mut self) -> Option<Candidate> {
        let level = self.room.level;
        let (newest, segment_size) = (self.segments.newest, self.config.segment_size);
        // With ample space, the journal may take twice its live bytes, and some more.
        let counted =
            |(number, _): &(u64, &Segment)| *number < newest && !self.stays_for_ids(*number);
        let total = self.segments.iter().filter(counted);
        let (size, live) = total.fold((0, 0), |(size, live), (_, segment)| {
            (size + segment.size, live + segment.live_bytes)
        });
        let is_spacious = size <= 2 * live + 2 * segment_size;
        if level == Level::Ample && is_spacious {
            return None;
        }
        let patient = self.now.since(self.full_since) < PATIENCE;
        let frugal = self.now.since(self.short_since) < PATIENCE;
        let is_worth = |it: &Candidate| match level {
            Level::Full if !frugal => it.cost <= it.size / 8 * 7,
            _ => it.cost <= it.size / 2,
        };
        let least = segment_size / 64;
        // Some space is left for other entries.
        let Room { bytes, last, .. } = self.room;
        let left = LEFT.min(segment_size / LEFT_PART);
        let room = last.min(bytes).max(bytes.saturating_sub(left));
        let all = self.segments.iter().filter(|(number, segment)| {
            // The current segment grows, and is worth more later.
            let is_over =
                *number < newest || level == Level::Full && segment.size >= segment_size / 8;
            is_over && !segment.goes && segment.live_bytes < segment.size
        });
        let candidates =
            all.filter(|(number, _)| !self.stays_for_ids(*number)).map(|(number, segment)| {
                let cost = self.cost(number, segment);
                Candidate { number, size: segment.size, cost }
            });
        let mut worth: Vec<Candidate> = candidates
            .filter(|it| is_worth(it) && it.size.saturating_sub(it.cost) > least)
            .collect();
        worth.sort_by(|one, other| other.yields().total_cmp(&one.yields()));
        let mut best = worth.iter().position(|it| it.cost + 2 * ENTRY <= room);
        if level == Level::Full && !patient {
            // The cost is an upper bound, and nothing else is left to do.
            best = best.or_else(|| worth.iter().position(|it| it.cost <= bytes));
        }
        let best = best.map(|place| worth.swap_remove(place));
        if best.is_none() && level == Level::Full && patient {
            self.clean_at.get_or_insert(self.full_since + PATIENCE);
        }
        best
    }

    /// Returns the bytes to be written for a segment's removal.
    pub(super) fn cost(&self, number: u64, segment: &Segment) -> u64 {
        let facts = self.facts(number, segment);
        let ranges = facts.settled.len() as u64;
        let states: u64 = facts.states.iter().map(|message| self.state_cost(*message)).sum();
        let (written, size) = (self.segments.written, self.config.segment_size);
        let ids = self.once.count_wanted(number, written, size);
        let moves = segment.live_bytes + MOVE * segment.live;
        let peers = match self.peers_in.is_empty() || self.peers_in.contains(&number) {
            true => ENTRY + PEER * self.peers.len() as u64,
            false => 0,
        };
        let history = match self.history.segment == Some(number) {
            true => ENTRY + PEER * self.history.len() as u64,
            false => 0,
        };
        moves + peers + history + states + RANGE * ranges + ID * ids
    }

    fn state_cost(&self, message: u64) -> u64 {
        let parts = self.entries.get(message).into_iter().flat_map(|entry| &entry.parts);
        let costs = parts.map(|part| match &part.state {
            State::Dead(reason) | State::DeadLettering(reason) => match &**reason {
                DeadLetterReason::Failed { text, .. } | DeadLetterReason::Rejected { text } => {
                    STATE + text.len() as u64
                }
                DeadLetterReason::Expired { .. }
                | DeadLetterReason::TooLarge
                | DeadLetterReason::NotAllowed
                | DeadLetterReason::Unreadable => STATE,
            },
            _ => STATE,
        });
        costs.sum()
    }

    /// Returns the records of a segment that must be rewritten when it is removed.
    fn facts(&self, number: u64, segment: &Segment) -> Facts {
        // A copy of a settled message would be revived. The record that it is settled may be in
        // this segment, or nowhere yet if the last copy is here.
        let mut copies = Ranges::default();
        for (_, other) in self.segments.iter().filter(|(other, _)| *other != number) {
            let both = [&segment.told, &segment.messages].map(|own| own.overlaps(&other.messages));
            both.into_iter().flatten().for_each(|(first, last)| copies.insert_range(first, last));
        }
        let mut facts = Facts::default();
        for (first, last) in copies.iter() {
            let mut from = first;
            for (live, _) in self.entries.range(first, last) {
                if from < live {
                    facts.settled.push((from, live - 1));
                }
                from = live + 1;
            }
            if from <= last {
                facts.settled.push((from, last));
            }
        }
        for (first, last) in segment.told.iter() {
            let elsewhere = self.entries.range(first, last).filter(|(_, entry)| {
                entry.position.is_some_and(|position| position.segment != number)
            });
            facts.states.extend(elsewhere.map(|(message, _)| message));
        }
        facts
    }

    /// Rewrites the live records of segments without messages.
    pub(super) fn keep(&mut self, segments: Vec<u64>) {
        let (mut settled, mut states) = (Ranges::default(), Ranges::default());
        let mut groups = Vec::new();
        for number in &segments {
            let Some(segment) = self.segments.get(*number) else { continue };
            let facts = self.facts(*number, segment);
            facts.settled.iter().for_each(|(first, last)| settled.insert_range(*first, *last));
            facts.states.iter().for_each(|message| _ = states.insert(*message));
            let counted = (self.segments.written, self.config.segment_size);
            let is_live = |message| self.entries.get(message).is_some();
            groups.extend(self.once.wanted(*number, counted, is_live));
        }
        let peers = self.has_peers_in(&segments);
        let history = self.history.segment.is_some_and(|it| segments.contains(&it));
        if settled == Ranges::default()
            && states == Ranges::default()
            && groups.is_empty()
            && !peers
            && !history
        {
            // This frees space even on a completely full disk.
            return self.go(segments);
        }
        let states: Vec<u64> = states.iter().flat_map(|(first, last)| first..=last).collect();
        let written = self.segments.written;
        let ids = groups.iter().map(|group| IdsRecord::new(group.age(written), &group.ids));
        let mut record = KeptRecord {
            next: self.next_number,
            settled: settled.iter().collect(),
            ids: ids.collect(),
            peers: peers.then(|| self.peer_records()),
            history: history.then(|| self.history_record()),
            ..KeptRecord::default()
        };
        for message in &states {
            self.note_copy(*message);
            let state = self.message_record(*message, &[]).map(|it| record.state(&it));
            record.states.extend(state);
        }
        let record = OutboxRecord::Kept(record).encode();
        let settled = settled.iter().collect();
        let keeping = Keeping { segments, settled, states, groups, peers, history };
        self.cleaning = Cleaning::Keeping;
        self.append_encoded(record, Pending::Kept(Box::new(keeping)));
    }

    /// Returns true if segments hold records of the state of peers, or if none is known to.
    fn has_peers_in(&self, segments: &[u64]) -> bool {
        self.peers_in.is_empty() || segments.iter().any(|it| self.peers_in.contains(it))
    }

    /// The records are rewritten: the segments that held them can be removed.
    pub(super) fn handle_kept(&mut self, position: Position, keeping: Keeping) {
        let Keeping { segments, settled, states, groups, peers, history } = keeping;
        let here = position.segment;
        settled.iter().for_each(|(first, last)| self.segments.tell_range(here, *first, *last));
        self.segments.tell(here, states.into_iter());
        groups.into_iter().for_each(|group| self.once.remember(here, group));
        if peers {
            self.peers_in.retain(|segment| *segment > here);
            self.peers_in.insert(here);
        }
        if history {
            self.history.segment = Some(here);
        }
        self.go(segments);
    }

    /// Marks segments as no longer needed, and removes them.
    fn go(&mut self, segments: Vec<u64>) {
        for segment in segments {
            if let Some(segment) = self.segments.get_mut(segment) {
                segment.goes = true;
            }
        }
        self.remove_going();
    }

    /// Removes the segments that are no longer needed, also after an earlier failure.
    fn remove_going(&mut self) {
        let going = self.segments.iter().filter(|(_, segment)| segment.goes);
        let going: Vec<u64> = going.map(|(number, _)| number).collect();
        if !going.is_empty() {
            self.cleaning = Cleaning::Removing;
            self.actions.push_back(OutboxAction::Remove(going));
        }
    }
}
