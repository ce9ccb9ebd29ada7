//! Cases that the simulator does not cover: wrong answers, absences, limits.

mod cleaning;
mod instances;
mod peers;

use bytes::Bytes;
use smallvec::smallvec;

use super::answers::MOST_UNREADABLE;
use super::peers::MAX_PEERS;
use super::subscriptions::{MAX_ALL, MAX_SUBSCRIPTIONS, MAX_UNPROVEN};
use super::*;
use crate::address::Destination;
use crate::engine::delivery::record::OutboxRecord;
use crate::engine::delivery::{Now, RetryPolicy};
use crate::message::{Header, IdSource, Kind};
use crate::trust::Grants;
use crate::wire::{Answer, DeliveryId, DeliveryOutcome, InboxInfo};

const ME: NodeId = NodeId::from_bytes([1; 32]);
const BOB: NodeId = NodeId::from_bytes([2; 32]);
const CAROL: NodeId = NodeId::from_bytes([3; 32]);
const HOUR: Duration = Duration::from_secs(3600);

/// An outbox whose journal stores entries at once.
struct Bench {
    outbox: Outbox,
    now: Duration,
    serving: Vec<NodeId>,
    key: Option<&'static str>,
    journal: Vec<(Position, Vec<u8>)>,
    sent: Vec<(NodeId, Delivery)>,
    done: Vec<(u64, Result<(), DeadLetterReason>)>,
    events: Vec<OutboxEvent>,
    /// The disk refuses all appends.
    full: bool,
    refused: usize,
    /// Messages to be sent can't be read.
    damaged: bool,
    /// The message that can't be read to be rewritten.
    unreadable: Option<u64>,
    reads: usize,
    /// The segment of appended entries.
    segment: u64,
    removed: Vec<u64>,
    /// The segment that can't be removed.
    kept: Option<u64>,
    /// Entries that may be written later are never written.
    forgetful: bool,
}

impl NewMessage {
    /// Marks the message as stored once, with that id.
    fn once_as(&mut self, id: MessageId) {
        Arc::make_mut(&mut self.envelope).header.id = id;
        self.once = true;
    }
}

impl Bench {
    fn new(reassign_after: Option<Duration>) -> Self {
        let config = OutboxConfig {
            me: ME,
            epoch: 7,
            seed: 1,
            max_bytes: 1000,
            max_messages: 3,
            window_bytes: 1 << 20,
            retry: RetryPolicy::default(),
            hold_keys: false,
            reassign_after,
            segment_size: 1 << 20,
            gone_after: HOUR,
            lapse_after: Some(24 * HOUR),
        };
        Self {
            outbox: Outbox::new(config),
            now: Duration::ZERO,
            serving: Vec::new(),
            key: None,
            journal: Vec::new(),
            sent: Vec::new(),
            done: Vec::new(),
            events: Vec::new(),
            full: false,
            refused: 0,
            damaged: false,
            unreadable: None,
            reads: 0,
            segment: 1,
            removed: Vec::new(),
            kept: None,
            forgetful: false,
        }
    }

    fn now(&self) -> Now {
        Now { time: Time::after_start(self.now), unix_ms: self.now.as_millis() as u64 }
    }

    fn run(&mut self) {
        let (now, serving) = (self.now(), self.serving.clone());
        let choose = &mut |_: &_, _: Option<&str>, load: &dyn Fn(&NodeId) -> Option<u64>| {
            serving.iter().copied().find(|node| load(node).is_some())
        };
        while let Some(action) = self.outbox.poll_action(choose) {
            match action {
                OutboxAction::Append { token, .. } if self.full => {
                    self.refused += 1;
                    self.outbox.handle_appended(now, token, Err("the disk is full".into()));
                }
                OutboxAction::Append { persist: Persist::Lazy, .. } if self.forgetful => {}
                OutboxAction::Append { token, entry, .. } => self.store(token, entry),
                OutboxAction::AppendFirst { token, entry } => {
                    self.segment += 1;
                    self.store(token, entry);
                }
                OutboxAction::Remove(mut segments) => {
                    segments.retain(|segment| self.kept != Some(*segment));
                    self.journal.retain(|(position, _)| !segments.contains(&position.segment));
                    self.outbox.handle_removed(now, &segments);
                    self.removed.extend(segments);
                }
                OutboxAction::Read(number, position) => {
                    let encoded = self
                        .stored_message(position, number)
                        .filter(|_| self.unreadable != Some(number));
                    self.outbox.handle_read(now, number, encoded);
                }
                OutboxAction::Transmit { key, .. } if self.damaged => {
                    self.reads += 1;
                    self.outbox.handle_unreadable(now, key);
                }
                OutboxAction::Transmit { to, delivery, .. } => {
                    self.sent.push((to, Arc::unwrap_or_clone(delivery)))
                }
                OutboxAction::Done(number, result) => self.done.push((number, result)),
                OutboxAction::Report(event) => self.events.push(event),
                _ => {}
            }
        }
    }

    /// Makes space scarce, and segments short.
    fn scarce(&mut self) {
        let config = &mut self.outbox.config;
        (config.max_messages, config.max_bytes, config.segment_size) = (1000, 1 << 20, 1000);
        let room = Room { level: Level::Scarce, bytes: u64::MAX, last: 0 };
        self.outbox.handle_room(self.now(), room);
    }

    /// Submits n messages and has them processed.
    fn process(&mut self, messages: usize) {
        for _ in 0..messages {
            self.submit(Target::Node(BOB)).unwrap();
            let id = self.sent.last().unwrap().1.id.clone();
            self.answer(BOB, &id, 1, DeliveryOutcome::Processed);
        }
    }

    fn store(&mut self, token: u64, entry: Vec<u8>) {
        let ends = self.journal.iter().filter(|(position, _)| position.segment == self.segment);
        let offset = ends.map(|(it, _)| it.offset + u64::from(it.length)).max().unwrap_or(48);
        let position = Position { segment: self.segment, offset, length: entry.len() as u32 };
        self.journal.push((position, entry));
        self.outbox.handle_appended(self.now(), token, Ok(position));
    }

    fn stored_message(&self, position: Position, number: u64) -> Option<Bytes> {
        let (_, entry) = self.journal.iter().find(|(it, _)| *it == position)?;
        Outbox::stored_message(entry, number).unwrap()
    }

    /// Restarts the outbox from its journal.
    fn restart(self) -> Self {
        let mut next = Self { journal: self.journal, ..Self::new(None) };
        let epoch = self.outbox.config.epoch + 1;
        next.outbox = Outbox::new(OutboxConfig { epoch, ..self.outbox.config });
        for (position, entry) in &next.journal {
            next.outbox.recover(*position, entry).unwrap();
        }
        next.outbox.handle_recovered(next.now());
        next
    }

    fn message(&self, target: Target) -> NewMessage {
        let id = IdSource::new(1).next(1);
        let mut header = Header::new(id, Kind::Command, Destination::Node(BOB));
        header.extra.get_or_insert_default().ordering_key = self.key.map(str::to_owned);
        let envelope = Arc::new(Envelope::one_way(header, Bytes::from_static(b"a body")));
        let (targets, expires_at, not_before) = (smallvec![target], None, None);
        NewMessage { envelope, targets, expires_at, not_before, once: false }
    }

    fn submit(&mut self, target: Target) -> Result<u64, Full> {
        let message = self.message(target);
        let submitted = self.outbox.submit(self.now(), smallvec![message], &mut |_, _, _| None)?;
        self.run();
        Ok(submitted[0].number())
    }

    fn meet(&mut self, node: NodeId) {
        self.outbox.handle_link_up(node);
        let info = InboxInfo { epoch: 1, ..InboxInfo::default() };
        self.outbox.handle_inbox(self.now(), node, info, &Grants::Everything);
        self.run();
    }

    fn subscribe(&mut self, node: NodeId, names: &[&ServiceName], ended: &[&ServiceName]) {
        self.outbox.handle_link_up(node);
        let all = names.iter().map(|name| (ServiceName::clone(name), "orders.>".parse().unwrap()));
        let (subscriptions, ended) = (all.collect(), ended.iter().copied().cloned().collect());
        let info = InboxInfo { epoch: 1, subscriptions, ended, heard: None };
        self.outbox.handle_inbox(self.now(), node, info, &Grants::Everything);
        self.run();
    }

    fn lose(&mut self, node: NodeId) {
        self.outbox.handle_link_down(self.now(), node);
        self.run();
    }

    fn answer(
        &mut self,
        from: NodeId,
        id: &DeliveryId,
        attempt: u32,
        outcome: DeliveryOutcome,
    ) -> bool {
        let answer = Answer { id: id.clone(), attempt, outcome };
        let known = self.outbox.handle_answer(self.now(), from, answer);
        self.run();
        known
    }

    fn sleep(&mut self, time: Duration) {
        self.now += time;
        self.outbox.handle_timeout(self.now());
        self.run();
    }
}

#[test]
fn an_answer_to_no_message_or_from_another_peer_changes_nothing() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    bench.meet(CAROL);
    bench.submit(Target::Node(BOB)).unwrap();
    let id = bench.sent[0].1.id.clone();
    let mut other = id.clone();
    other.seq += 1;
    assert!(!bench.answer(BOB, &other, 1, DeliveryOutcome::Processed));
    other = id.clone();
    other.stream.epoch += 1;
    assert!(!bench.answer(BOB, &other, 1, DeliveryOutcome::Processed));
    assert!(!bench.answer(CAROL, &id, 1, DeliveryOutcome::Processed));
    // An attempt that was never made can't fail.
    bench.answer(BOB, &id, 2, DeliveryOutcome::Rejected("no".into()));
    assert!(bench.done.is_empty() && bench.outbox.pending() == 1);
    assert!(
        bench.answer(BOB, &id, 9, DeliveryOutcome::Processed),
        "an Ok settles whatever it names"
    );
    assert_eq!(bench.done, [(1, Ok(()))]);
    bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    assert_eq!((bench.done.len(), bench.outbox.pending()), (1, 0));
}

#[test]
fn what_is_behind_its_key_takes_no_number_before_its_turn() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    bench.key = Some("hot");
    bench.submit(Target::Node(BOB)).unwrap();
    bench.submit(Target::Node(BOB)).unwrap();
    bench.key = None;
    bench.submit(Target::Node(BOB)).unwrap();
    let numbers: Vec<_> = bench.sent.iter().map(|(_, sent)| sent.id.seq).collect();
    assert_eq!(numbers, [1, 2], "the one behind its key makes no gap");
    let id = bench.sent[0].1.id.clone();
    bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    let (_, second) = bench.sent.last().unwrap();
    assert_eq!((second.id.seq, second.redelivered), (3, false));
}

#[test]
fn a_full_outbox_refuses_and_takes_again_when_there_is_room() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    for _ in 0..3 {
        bench.submit(Target::Node(BOB)).unwrap();
    }
    assert_eq!(bench.submit(Target::Node(BOB)).unwrap_err().messages, 3);
    let id = bench.sent[0].1.id.clone();
    bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    bench.submit(Target::Node(BOB)).unwrap();
}

#[test]
fn a_failing_message_is_retried_ever_more_rarely_and_becomes_a_dead_letter() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    bench.submit(Target::Node(BOB)).unwrap();
    let id = bench.sent[0].1.id.clone();
    for attempt in 1..=10 {
        assert_eq!(bench.sent.len() as u32, attempt);
        bench.answer(BOB, &id, attempt, DeliveryOutcome::Failed("no".into()));
        bench.sleep(Duration::from_secs(60));
    }
    assert_eq!(bench.sent.len(), 10);
    assert!(matches!(bench.done[..], [(1, Err(DeadLetterReason::Failed { failures: 10, .. }))]));
    assert_eq!((bench.outbox.pending(), bench.outbox.dead_letters()), (0, 1));
}

#[test]
fn a_message_that_cannot_be_read_becomes_a_dead_letter_and_keeps_no_segment() {
    let minute = Duration::from_secs(60);
    let mut bench = Bench::new(None);
    bench.scarce();
    bench.damaged = true;
    bench.meet(BOB);
    bench.submit(Target::Node(BOB)).unwrap();
    assert_eq!(bench.reads, 1);
    bench.sleep(Duration::from_millis(1));
    for _ in 0..20 {
        bench.sleep(minute);
    }
    assert_eq!(bench.reads, MOST_UNREADABLE as usize, "a limited number of times");
    assert_eq!(bench.done, [(1, Err(DeadLetterReason::Unreadable))]);
    assert_eq!((bench.outbox.pending(), bench.outbox.dead_letters()), (0, 1));
    bench.damaged = false;
    bench.unreadable = Some(1);
    bench.process(9);
    for segment in 2..8 {
        bench.segment = segment;
        bench.submit(Target::Node(BOB)).unwrap();
        let id = bench.sent.last().unwrap().1.id.clone();
        bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    }
    bench.sleep(minute);
    assert!(bench.removed.contains(&1), "its segment can be removed");
    bench = bench.restart();
    assert_eq!((bench.outbox.pending(), bench.outbox.dead_letters()), (0, 1));
}

#[test]
fn a_damaged_message_that_waits_does_not_keep_a_segment_either() {
    let mut bench = Bench::new(None);
    bench.scarce();
    bench.meet(BOB);
    bench.submit(Target::Node(CAROL)).unwrap();
    bench.process(9);
    bench.unreadable = Some(1);
    for segment in 2..8 {
        bench.segment = segment;
        bench.submit(Target::Node(BOB)).unwrap();
        let id = bench.sent.last().unwrap().1.id.clone();
        bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    }
    for _ in 0..3 * MOST_UNREADABLE {
        bench.sleep(2 * DISK_RETRY);
    }
    assert_eq!((bench.outbox.pending(), bench.outbox.dead_letters()), (0, 1));
    assert!(bench.removed.contains(&1));
}

#[test]
fn a_dead_letter_holds_up_its_key_if_that_is_wanted_until_it_is_replayed() {
    for hold in [false, true] {
        let mut bench = Bench::new(None);
        bench.outbox.config.hold_keys = hold;
        bench.key = Some("in order");
        bench.meet(BOB);
        for _ in 0..2 {
            bench.submit(Target::Node(BOB)).unwrap();
        }
        let id = bench.sent[0].1.id.clone();
        bench.answer(BOB, &id, 1, DeliveryOutcome::Rejected("no".into()));
        assert_eq!(bench.sent.len(), if hold { 1 } else { 2 });

        // After a restart, then after another one with the dead letter replayed.
        let first = DeliveryKey { number: 1, part: 0 };
        for replayed in [false, true] {
            if replayed {
                let entry = bench.outbox.replay(first).unwrap();
                bench.journal.push((Position { segment: 1, offset: 99, length: 0 }, entry));
            }
            bench = bench.restart();
            bench.meet(BOB);
            let numbers: Vec<_> = bench.sent.iter().map(|(_, sent)| sent.id.seq).collect();
            match (hold, replayed) {
                (true, false) => assert!(numbers.is_empty(), "{numbers:?}"),
                (false, false) | (_, true) => assert_eq!(numbers.len(), 1, "{numbers:?}"),
            }
            assert_eq!(bench.outbox.dead_letters(), u64::from(!replayed));
        }
        // The replayed message precedes the other again.
        let id = bench.sent[0].1.id.clone();
        bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
        assert_eq!(bench.done, [(1, Ok(()))]);
        assert_eq!(bench.sent.len(), 2);
    }
}

#[test]
fn what_is_replayed_expires_no_more_and_what_is_purged_leaves_the_rest_its_time() {
    for replayed in [true, false] {
        let mut bench = Bench::new(None);
        let mut message = bench.message(Target::Node(BOB));
        message.targets.push(Target::Node(CAROL));
        message.expires_at = Some(1000);
        bench.meet(CAROL);
        bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None).unwrap();
        bench.run();
        bench.sleep(Duration::from_secs(2));
        assert_eq!(bench.outbox.dead_letters(), 1, "that to Bob; Carol's answer decides");
        let to_bob = DeliveryKey { number: 1, part: 0 };
        let entry = match replayed {
            true => bench.outbox.replay(to_bob),
            false => bench.outbox.purge(to_bob),
        };
        bench.journal.push((Position { segment: 1, offset: 99, length: 0 }, entry.unwrap()));
        let mut bench = bench.restart();
        bench.meet(BOB);
        bench.sleep(Duration::from_secs(2));
        let (to_bob, dead) = if replayed { (1, 0) } else { (0, 1) };
        assert_eq!((bench.sent.len(), bench.outbox.dead_letters()), (to_bob, dead));
    }
}

#[test]
fn what_expires_on_its_way_to_a_node_without_an_inbox_is_a_dead_letter() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    let mut message = bench.message(Target::Node(BOB));
    message.expires_at = Some(1000);
    bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None).unwrap();
    bench.run();
    let (_, sent) = bench.sent[0].clone();
    bench.sleep(Duration::from_secs(2));
    assert_eq!(bench.done, [], "its answer decides");
    bench.answer(BOB, &sent.id, 1, DeliveryOutcome::NoInbox);
    assert_eq!(bench.done, [(1, Err(DeadLetterReason::Expired { maybe_processed: false }))]);
}

#[test]
fn an_answer_to_what_is_still_being_stored_settles_nothing() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    bench.submit(Target::Node(BOB)).unwrap();
    let (_, first) = bench.sent[0].clone();
    bench.answer(BOB, &first.id, 1, DeliveryOutcome::Processed);
    bench.full = true;
    let mut next = first.id.clone();
    next.seq += 1;
    // As in `submit`, but without the journal's outcome.
    let message = bench.message(Target::Node(BOB));
    bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None).unwrap();
    let answer = Answer { id: next, attempt: 1, outcome: DeliveryOutcome::Processed };
    bench.outbox.handle_answer(bench.now(), BOB, answer);
    assert_eq!((bench.outbox.pending(), bench.done.len()), (1, 1));
}

#[test]
fn a_disk_that_refuses_is_left_alone_for_a_while() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    bench.submit(Target::Node(BOB)).unwrap();
    let (_, delivery) = bench.sent[0].clone();
    bench.full = true;
    bench.answer(BOB, &delivery.id, 1, DeliveryOutcome::Processed);
    assert_eq!(bench.refused, 1, "tried once");
    bench.sleep(DISK_RETRY / 2);
    assert_eq!(bench.refused, 1);
    bench.full = false;
    let before = bench.journal.len();
    bench.sleep(DISK_RETRY);
    assert!(bench.journal.len() > before, "tried again");
}

#[test]
fn what_is_stored_once_is_stored_once_also_after_a_restart() {
    let mut bench = Bench::new(None);
    let submit = |bench: &mut Bench, id| {
        let mut message = bench.message(Target::Node(BOB));
        message.once_as(id);
        let submitted = bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None);
        submitted.unwrap().remove(0)
    };
    let ids = IdSource::new(1);
    let (id, other) = (ids.next(1), ids.next(1));
    let first = submit(&mut bench, id).number();
    assert_eq!(submit(&mut bench, id), Submitted::Pending { number: first, stored: false });
    bench.run();
    assert_eq!(submit(&mut bench, id), Submitted::Pending { number: first, stored: true });
    assert_ne!(submit(&mut bench, other).number(), first);
    bench.run();
    bench.outbox.config.max_messages = 9;
    let mut twins = [bench.message(Target::Node(BOB)), bench.message(Target::Node(BOB))];
    let twin = ids.next(1);
    twins.iter_mut().for_each(|message| message.once_as(twin));
    let submitted = bench
        .outbox
        .submit(bench.now(), NewMessages::from_iter(twins), &mut |_, _, _| None)
        .unwrap();
    let number = submitted[0].number();
    assert_eq!(submitted[1], Submitted::Pending { number, stored: false });
    bench.run();

    bench.meet(BOB);
    for sent in std::mem::take(&mut bench.sent) {
        assert!(bench.answer(BOB, &sent.1.id, sent.1.attempt, DeliveryOutcome::Processed));
    }
    assert_eq!(bench.outbox.pending(), 0);
    assert_eq!(submit(&mut bench, id), Submitted::Processed);
    let mut bench = bench.restart();
    assert_eq!(submit(&mut bench, id), Submitted::Processed);
}

#[test]
fn an_id_is_remembered_for_so_many_full_segments_and_any_number_of_short_ones() {
    for (length, remembered) in [(1 << 20, 1..=31), (1, 1..=100)] {
        let mut bench = Bench::new(None);
        bench.meet(BOB);
        let mut message = bench.message(Target::Node(BOB));
        message.once_as(IdSource::new(1).next(1));
        bench.outbox.submit(bench.now(), smallvec![message.clone()], &mut |_, _, _| None).unwrap();
        bench.run();
        for segment in 1..=100 {
            bench.segment = segment;
            // The entry is as long as the segment.
            let position = Position { segment, offset: 0, length };
            bench.outbox.segments.reach(position);
            for sent in std::mem::take(&mut bench.sent) {
                bench.answer(BOB, &sent.1.id, sent.1.attempt, DeliveryOutcome::Processed);
            }
            let known = bench.outbox.submitted_before(&message).is_some();
            assert_eq!(known, remembered.contains(&segment), "{length} bytes, {segment}");
            bench.submit(Target::Node(BOB)).unwrap();
        }
    }
}
