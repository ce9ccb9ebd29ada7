//! The choice among instances of a service, and reassignment.

use super::*;

#[test]
fn a_message_stays_with_its_node_unless_reassigning_is_wanted() {
    let work = || Target::Service("work".parse().unwrap());
    for wanted in [None, Some(HOUR / 2)] {
        let mut bench = Bench::new(wanted);
        bench.serving = vec![BOB, CAROL];
        bench.meet(BOB);
        bench.submit(work()).unwrap();
        let first = bench.sent[0].1.id.clone();
        bench.lose(BOB);
        bench.meet(CAROL);
        bench.sleep(HOUR / 4);
        assert_eq!(bench.sent.len(), 1);
        bench.sleep(HOUR / 2);
        let Some((to, delivery)) = bench.sent.get(1).cloned() else {
            assert_eq!(wanted, None);
            continue;
        };
        assert_eq!((to, wanted), (CAROL, Some(HOUR / 2)));
        assert!(delivery.redelivered);
        // The first answer that it is processed settles it.
        bench.meet(BOB);
        assert!(bench.answer(BOB, &first, 1, DeliveryOutcome::Processed));
        assert_eq!(bench.done, [(1, Ok(()))]);
        bench.answer(CAROL, &delivery.id, 1, DeliveryOutcome::Processed);
        assert_eq!(bench.done.len(), 1);
    }
}

#[test]
fn a_message_that_was_never_sent_goes_to_whoever_is_there() {
    let mut bench = Bench::new(None);
    bench.serving = vec![BOB, CAROL];
    bench.submit(Target::Service("work".parse().unwrap())).unwrap();
    bench.sleep(HOUR);
    bench.meet(CAROL);
    assert_eq!(bench.sent.len(), 1);
    assert!(bench.sent[0].0 == CAROL && !bench.sent[0].1.redelivered);
}

#[test]
fn what_was_never_sent_goes_to_whoever_is_there_also_after_a_restart() {
    let mut bench = Bench::new(None);
    bench.outbox.config.window_bytes = 1;
    bench.serving = vec![BOB];
    bench.meet(BOB);
    for _ in 0..2 {
        bench.submit(Target::Service("work".parse().unwrap())).unwrap();
    }
    assert_eq!(bench.sent.len(), 1, "his window is full");
    bench.lose(BOB);
    bench = bench.restart();
    bench.serving = vec![CAROL];
    bench.meet(CAROL);
    let [(to, second)] = &bench.sent[..] else { panic!("{:?}", bench.sent) };
    assert_eq!((*to, second.redelivered), (CAROL, false));
    // The first message may or may not have been processed.
    bench.meet(BOB);
    let (to, first) = bench.sent.last().unwrap();
    assert_eq!((*to, first.redelivered), (BOB, true));
}

#[test]
fn what_is_behind_its_key_goes_to_others_with_what_it_is_behind() {
    let minute = Duration::from_secs(60);
    let service = || Target::Service("work".parse().unwrap());
    let mut bench = Bench::new(Some(minute));
    bench.serving = vec![BOB];
    bench.meet(BOB);
    bench.key = Some("in order");
    bench.submit(service()).unwrap();
    let second = bench.submit(service()).unwrap();
    // An earlier version bound it to him when it was stored.
    let key = DeliveryKey { number: second, part: 0 };
    let bound = bench.outbox.reassign_to(key, Some(BOB)).unwrap();
    bench.journal.push((Position { segment: 1, offset: 99, length: 0 }, bound));
    bench = bench.restart();
    bench.serving = vec![BOB, CAROL];
    bench.meet(CAROL);
    bench.sleep(2 * minute);
    let (to, first) = bench.sent.last().unwrap().clone();
    assert_eq!((to, bench.sent.len()), (CAROL, 1));
    bench.answer(CAROL, &first.id, first.attempt, DeliveryOutcome::Processed);
    assert_eq!(bench.sent.last().unwrap().0, CAROL);
    assert_eq!(bench.sent.len(), 2);
}

#[test]
fn what_comes_back_to_a_node_has_the_number_that_it_had_there() {
    let minute = Duration::from_secs(60);
    for restarts in [false, true] {
        let mut bench = Bench::new(Some(minute));
        bench.serving = vec![BOB, CAROL];
        bench.meet(BOB);
        let number = bench.submit(Target::Service("work".parse().unwrap())).unwrap();
        let (_, at_first) = bench.sent[0].clone();
        bench.lose(BOB);
        bench.meet(CAROL);
        bench.sleep(2 * minute);
        assert_eq!(bench.sent.last().unwrap().0, CAROL);
        if restarts {
            // The first copy is in a segment that is removed.
            let old = bench.journal.len();
            bench.outbox.moving = 1;
            bench.outbox.handle_read(bench.now(), number, Some(Bytes::from_static(b"encoded")));
            bench.run();
            bench.journal.drain(..old);
            bench = bench.restart();
            bench.serving = vec![BOB, CAROL];
        } else {
            bench.lose(CAROL);
        }
        // He may have processed it, and recognises it by its number.
        bench.meet(BOB);
        bench.sleep(2 * minute);
        let (to, again) = bench.sent.last().unwrap().clone();
        assert_eq!((to, &again.id), (BOB, &at_first.id));
        assert!(again.redelivered && again.floor <= again.id.seq);
        bench.answer(BOB, &again.id, again.attempt, DeliveryOutcome::Processed);
        assert_eq!((bench.done.as_slice(), bench.outbox.pending()), (&[(1, Ok(()))][..], 0));
    }
}

#[test]
fn a_number_that_was_given_up_is_not_taken_again_even_if_nothing_says_so() {
    let minute = Duration::from_secs(60);
    let mut bench = Bench::new(Some(minute));
    bench.serving = vec![BOB, CAROL];
    bench.meet(BOB);
    bench.submit(Target::Service("work".parse().unwrap())).unwrap();
    let (_, refused) = bench.sent[0].clone();
    bench.answer(BOB, &refused.id, 1, DeliveryOutcome::Refused);
    bench.sleep(minute);
    let (to, second) = bench.sent.last().unwrap().clone();
    assert!(to == BOB && second.id != refused.id);
    // The disk refused the entry that unbinds him from the first.
    let given_up = OutboxRecord::Bound(vec![(1, 0, None)]).encode();
    let before = bench.journal.len();
    bench.journal.retain(|(_, entry)| *entry != given_up);
    assert_eq!(bench.journal.len(), before - 1);
    bench = bench.restart();
    bench.serving = vec![CAROL];
    bench.meet(CAROL);
    bench.sleep(2 * minute);
    assert_eq!(bench.sent.last().unwrap().0, CAROL);
    bench.lose(CAROL);
    bench.serving = vec![BOB];
    bench.meet(BOB);
    bench.sleep(2 * minute);
    let (to, third) = bench.sent.last().unwrap();
    assert_eq!((*to, &third.id), (BOB, &second.id));
}

#[test]
fn what_was_reassigned_is_not_sent_to_its_old_node_under_its_new_number() {
    let minute = Duration::from_secs(60);
    let mut bench = Bench::new(Some(minute));
    bench.outbox.config.window_bytes = 1;
    bench.serving = vec![BOB];
    bench.meet(BOB);
    let service = || Target::Service("work".parse().unwrap());
    bench.submit(service()).unwrap();
    bench.lose(BOB);
    bench.serving = vec![CAROL];
    bench.meet(CAROL);
    // Her window is full with another message.
    bench.submit(service()).unwrap();
    assert_eq!(bench.sent.last().unwrap().0, CAROL);
    bench.sleep(2 * minute);
    bench.serving = vec![BOB, CAROL];
    let before = bench.sent.len();
    bench.meet(BOB);
    let to_bob = &bench.sent[before..];
    assert!(to_bob.iter().all(|(to, _)| *to != BOB), "it is hers now: {to_bob:?}");
    let (_, first) = bench.sent[before - 1].clone();
    bench.answer(CAROL, &first.id, first.attempt, DeliveryOutcome::Processed);
    let (to, second) = bench.sent.last().unwrap().clone();
    assert_eq!((to, second.redelivered), (CAROL, true));
    bench.answer(CAROL, &second.id, second.attempt, DeliveryOutcome::Processed);
    assert_eq!((bench.done.len(), bench.outbox.pending()), (2, 0));
}
