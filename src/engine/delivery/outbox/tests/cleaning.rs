//! The choice and order of removed segments, and the records rewritten before.

use super::*;

const FULL: Room = Room { level: Level::Full, bytes: 1 << 20, last: 0 };
const SCARCE: Room = Room { level: Level::Scarce, ..FULL };

/// A bench with space for many messages, and short segments.
fn bench() -> Bench {
    let mut bench = Bench::new(None);
    let config = &mut bench.outbox.config;
    (config.max_messages, config.max_bytes, config.segment_size) = (1000, 1 << 20, 2000);
    bench.meet(BOB);
    bench
}

impl Bench {
    fn room(&mut self, room: Room) {
        self.outbox.handle_room(self.now(), room);
        self.run();
    }

    /// Submits messages for an absent node.
    fn wait(&mut self, messages: usize) {
        (0..messages).for_each(|_| _ = self.submit(Target::Node(CAROL)).unwrap());
    }

    /// Continues in a new segment.
    fn turn_over(&mut self) {
        self.segment += 1;
        self.process(1);
    }
}

#[test]
fn with_room_enough_nothing_is_written_again() {
    let mut bench = bench();
    bench.wait(1);
    bench.process(9);
    bench.turn_over();
    bench.process(9);
    bench.turn_over();
    assert!(bench.removed.contains(&2), "it holds no message: {:?}", bench.removed);
    assert!(!bench.removed.contains(&1));
    let moved = |bench: &Bench| {
        let all = bench.journal.iter().filter(|(at, _)| at.segment > 1);
        all.filter(|(_, entry)| Outbox::stored_message(entry, 1).unwrap().is_some()).count()
    };
    assert_eq!(moved(&bench), 0);
    bench.room(SCARCE);
    assert_eq!(moved(&bench), 1, "space is scarce");
    assert!(bench.removed.contains(&1));
    let bench = bench.restart();
    assert_eq!(bench.outbox.pending(), 1);
}

#[test]
fn the_segment_goes_first_that_frees_the_most_for_what_it_costs() {
    let mut bench = bench();
    for waiting in [6, 1, 3] {
        bench.wait(waiting);
        bench.process(20);
        bench.segment += 1;
    }
    bench.process(1);
    bench.room(SCARCE);
    for _ in 0..3 {
        bench.sleep(Duration::from_secs(1));
    }
    assert_eq!(bench.removed.first(), Some(&2));
    let place = |segment| bench.removed.iter().position(|it| *it == segment);
    assert!(place(3) < place(1) || place(1).is_none(), "{:?}", bench.removed);
    let bench = bench.restart();
    assert_eq!(bench.outbox.pending(), 10);
}

#[test]
fn what_says_that_a_message_is_settled_is_said_again_while_its_bytes_are_there() {
    let mut bench = bench();
    // Its segment stays: too many live messages are in it.
    bench.wait(9);
    bench.submit(Target::Node(BOB)).unwrap();
    let id = bench.sent.last().unwrap().1.id.clone();
    bench.segment += 1;
    bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    bench.process(9);
    for _ in 0..3 {
        bench.turn_over();
        bench.process(9);
    }
    assert!(bench.removed.contains(&2) && !bench.removed.contains(&1), "{:?}", bench.removed);
    let bench = bench.restart();
    assert_eq!(bench.outbox.pending(), 9);
}

#[test]
fn how_a_message_stands_is_said_again_when_what_said_it_goes() {
    let mut bench = bench();
    bench.wait(9);
    bench.submit(Target::Node(BOB)).unwrap();
    let id = bench.sent.last().unwrap().1.id.clone();
    bench.segment += 1;
    bench.answer(BOB, &id, 1, DeliveryOutcome::Failed("no".into()));
    bench.submit(Target::Node(BOB)).unwrap();
    let (_, rejected) = bench.sent.last().unwrap().clone();
    bench.answer(BOB, &rejected.id, 1, DeliveryOutcome::Rejected("never".into()));
    bench.process(30);
    for _ in 0..3 {
        bench.turn_over();
        bench.process(9);
    }
    bench.room(SCARCE);
    assert!(bench.removed.contains(&2), "{:?}", bench.removed);
    let bench = bench.restart();
    let failed = bench.outbox.contents().find(|it| it.number == 10).unwrap();
    assert_eq!((failed.failures, failed.node), (1, Some(BOB)));
    assert_eq!((bench.outbox.pending(), bench.outbox.dead_letters()), (10, 1));
}

#[test]
fn a_copy_of_what_is_settled_meanwhile_does_not_come_back() {
    let mut bench = bench();
    bench.wait(9);
    bench.submit(Target::Node(BOB)).unwrap();
    let id = bench.sent.last().unwrap().1.id.clone();
    bench.process(90);
    // The message is moved, and its first copy stays on the disk.
    bench.kept = Some(1);
    bench.turn_over();
    bench.room(SCARCE);
    let copy = |(_, entry): &&(_, Vec<u8>)| Outbox::stored_message(entry, 10).unwrap().is_some();
    let copies = |bench: &Bench| bench.journal.iter().filter(copy).count();
    let last = bench.segment;
    assert_eq!(copies(&bench), 2);
    // The settled record is not stored before the last copy is removed.
    bench.process(90);
    bench.forgetful = true;
    bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    bench.segment += 1;
    bench.wait(1);
    bench.sleep(DISK_RETRY);
    bench.room(SCARCE);
    assert!(bench.removed.contains(&last), "{:?}", bench.removed);
    assert_eq!(copies(&bench), 1);
    let bench = bench.restart();
    assert!(bench.outbox.contents().all(|it| it.number != 10));
}

#[test]
fn ids_are_said_again_without_bodies_when_there_is_little_room() {
    for room in [None, Some(SCARCE), Some(FULL)] {
        let mut bench = bench();
        let ids: Vec<MessageId> = (0..20).map(|_| IdSource::new(1).next(1)).collect();
        for id in &ids {
            let mut message = bench.message(Target::Node(BOB));
            message.once_as(*id);
            bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None).unwrap();
            bench.run();
        }
        for (_, sent) in std::mem::take(&mut bench.sent) {
            bench.answer(BOB, &sent.id, sent.attempt, DeliveryOutcome::Processed);
        }
        bench.turn_over();
        room.into_iter().for_each(|room| bench.room(room));
        assert_eq!(bench.removed.contains(&1), room.is_some(), "{room:?}");
        let mut bench = bench.restart();
        for id in &ids {
            let mut message = bench.message(Target::Node(BOB));
            message.once_as(*id);
            let again = bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None);
            assert_eq!(again.unwrap()[..], [Submitted::Processed], "{room:?}");
        }
    }
}

#[test]
fn a_full_disk_frees_also_what_is_being_written_and_nothing_that_does_not_fit() {
    let mut bench = bench();
    bench.wait(1);
    bench.process(20);
    bench.room(Room { bytes: 100, ..FULL });
    assert!(bench.removed.is_empty(), "{:?}", bench.removed);
    bench.room(FULL);
    assert_eq!((&bench.removed[..], bench.segment), (&[1][..], 2));
    let bench = bench.restart();
    assert_eq!(bench.outbox.pending(), 1);
}

#[test]
fn a_disk_that_is_full_again_and_again_frees_less_than_half_of_a_segment_too() {
    let mut bench = bench();
    bench.wait(5);
    bench.process(12);
    bench.segment += 1;
    bench.process(1);
    bench.room(FULL);
    assert!(!bench.removed.contains(&1), "less than half of it would be free");
    for _ in 0..4 {
        bench.sleep(Duration::from_millis(200));
        bench.room(SCARCE);
        bench.room(FULL);
    }
    assert!(bench.removed.contains(&1));
}

#[test]
fn numbers_are_never_given_twice_to_what_is_remembered() {
    let mut bench = bench();
    let id = IdSource::new(1).next(1);
    let mut message = bench.message(Target::Node(BOB));
    message.once_as(id);
    bench.process(20);
    bench.outbox.submit(bench.now(), smallvec![message], &mut |_, _, _| None).unwrap();
    bench.run();
    let (_, sent) = bench.sent.last().unwrap().clone();
    bench.answer(BOB, &sent.id, 1, DeliveryOutcome::Processed);
    bench.turn_over();
    bench.room(FULL);
    let mut bench = bench.restart();
    assert_eq!(bench.submit(Target::Node(CAROL)).unwrap(), 23);
}

#[test]
fn refusals_take_none_of_the_last_room_of_a_full_disk() {
    let mut bench = bench();
    bench.serving = vec![BOB];
    bench.submit(Target::Service("work".parse().unwrap())).unwrap();
    bench.room(FULL);
    bench.sleep(Duration::from_secs(1));
    assert!(bench.outbox.is_at_an_end, "nothing can be freed");
    let before = bench.journal.len();
    for attempt in 1..5 {
        let (to, sent) = bench.sent.last().unwrap().clone();
        assert_eq!((to, sent.attempt), (BOB, attempt));
        bench.answer(BOB, &sent.id, attempt, DeliveryOutcome::Refused);
        bench.sleep(HOUR);
    }
    assert_eq!(bench.journal.len(), before);
    let (_, sent) = bench.sent.last().unwrap().clone();
    bench.answer(BOB, &sent.id, 5, DeliveryOutcome::Processed);
    assert_eq!((bench.done.as_slice(), bench.outbox.pending()), (&[(1, Ok(()))][..], 0));
}
