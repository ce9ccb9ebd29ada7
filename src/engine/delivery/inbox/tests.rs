//! Limits, and cases that the simulator does not cover.

use super::senders::MAX_STREAMS;
use super::*;
use crate::wire::Moment;

const SENDER: NodeId = NodeId::from_bytes([7; 32]);
const PLACE: Position = Position { segment: 1, offset: 0, length: 0 };

fn delivery(seq: u64, floor: u64, attempt: u32) -> Delivery {
    let id = DeliveryId { stream: Stream { epoch: 5, subscription: None }, seq };
    Delivery { id, floor, attempt, redelivered: attempt > 1 }
}

/// An inbox whose journal stores entries at once.
struct Bench {
    inbox: Inbox,
    journal: Vec<Vec<u8>>,
    answers: Vec<Answer>,
    begun: u32,
}

impl Bench {
    fn new() -> Self {
        let mut bench =
            Self { inbox: Inbox::new(1), journal: Vec::new(), answers: Vec::new(), begun: 0 };
        bench.inbox.handle_recovered();
        bench.run();
        bench
    }

    fn run(&mut self) {
        while let Some(action) = self.inbox.poll_action() {
            match action {
                InboxAction::Append { token, entry, .. }
                | InboxAction::AppendSnapshot { token, entry, .. } => {
                    self.journal.push(entry);
                    self.inbox.handle_appended(token, Ok(PLACE));
                }
                InboxAction::Note(entry) => self.journal.push(entry),
                InboxAction::RemoveBefore(_) | InboxAction::Forgot { .. } => {}
                InboxAction::Answer(_, answer) => self.answers.push(answer),
                InboxAction::Begin(from, _) => {
                    self.begun += 1;
                    self.inbox.handle_begun(from);
                }
            }
        }
    }

    fn deliver(&mut self, mut delivery: Delivery) -> Verdict {
        let verdict = self.inbox.handle_delivery(SENDER, &mut delivery, || true);
        self.run();
        verdict
    }

    fn end(&mut self, seq: u64, outcome: DeliveryOutcome) {
        self.inbox.handle_ended(SENDER, &delivery(seq, 0, 1).id, outcome);
        self.run();
    }

    fn restart(&mut self) {
        self.inbox = Inbox::new(99);
        for entry in &self.journal {
            self.inbox.recover(entry).unwrap();
        }
    }
}

#[test]
fn what_was_processed_is_answered_again_under_its_current_attempt_also_after_a_restart() {
    let mut bench = Bench::new();
    assert_eq!(bench.deliver(delivery(1, 1, 1)), Verdict::Run);
    assert_eq!(bench.deliver(delivery(1, 1, 2)), Verdict::Wait, "it runs");
    bench.end(1, DeliveryOutcome::Processed);
    assert_eq!(bench.answers[0].attempt, 2);
    assert_eq!(bench.deliver(delivery(1, 1, 3)), Verdict::Answer(DeliveryOutcome::Processed));
    bench.restart();
    assert_eq!(bench.inbox.epoch(), 1);
    assert_eq!(bench.deliver(delivery(1, 1, 4)), Verdict::Answer(DeliveryOutcome::Processed));
    assert_eq!(bench.deliver(delivery(2, 2, 1)), Verdict::Run);
}

#[test]
fn what_came_again_before_its_lost_copy_was_given_up_comes_once_more() {
    let mut bench = Bench::new();
    for seq in 1..3 {
        assert_eq!(bench.deliver(delivery(seq, 1, 1)), Verdict::Run);
    }
    assert_eq!(bench.deliver(delivery(1, 1, 2)), Verdict::Wait, "over a new link");
    for seq in 1..3 {
        bench.inbox.handle_unqueued(SENDER, &delivery(seq, 1, 1).id);
    }
    bench.run();
    let told: Vec<_> = bench.answers.iter().map(|it| (it.id.seq, it.attempt)).collect();
    assert_eq!(told, [(1, 2)], "the sender of the other knows that its link was lost");
    assert_eq!(bench.answers[0].outcome, DeliveryOutcome::Refused);
    assert_eq!(bench.deliver(delivery(1, 1, 3)), Verdict::RunLater);
}

#[test]
fn what_failed_runs_again() {
    let mut bench = Bench::new();
    bench.deliver(delivery(1, 1, 1));
    bench.end(1, DeliveryOutcome::Failed("no".into()));
    assert!(matches!(bench.deliver(delivery(1, 1, 2)), Verdict::RunLater));
    assert_eq!(bench.begun, 1);
}

#[test]
fn a_message_that_kills_its_process_is_found_out() {
    let mut bench = Bench::new();
    bench.deliver(delivery(1, 1, 1));
    for attempt in 2..2 + MAX_BEGUN {
        bench.restart();
        assert!(matches!(bench.deliver(delivery(1, 1, attempt)), Verdict::RunLater));
    }
    bench.restart();
    let verdict = bench.deliver(delivery(1, 1, 99));
    assert!(matches!(verdict, Verdict::Answer(DeliveryOutcome::Rejected(_))));
}

#[test]
fn an_outbox_that_is_an_older_copy_loses_nothing() {
    let mut bench = Bench::new();
    for seq in 1..=3 {
        bench.deliver(delivery(seq, seq, 1));
        bench.end(seq, DeliveryOutcome::Processed);
    }
    // The sender had sent 1 to 3 and been notified of their end; the copy has not.
    let mut old = delivery(1, 1, 1);
    let verdict = bench.inbox.handle_delivery(SENDER, &mut old, || true);
    assert!(matches!(verdict, Verdict::RunLater) && old.redelivered);
    bench.run();
    // Messages that it stores from now on have a new epoch.
    let mut fresh = delivery(1, 1, 1);
    fresh.id.stream.epoch = 6;
    assert_eq!(bench.deliver(fresh), Verdict::Run);
    bench.inbox.handle_epochs(SENDER, &[6], None);
    assert_eq!(bench.inbox.places.len(), 2, "one of the old epoch still runs");
    bench.end(1, DeliveryOutcome::Processed);
    bench.inbox.handle_epochs(SENDER, &[6], None);
    assert_eq!(bench.inbox.places.len(), 1);
}

#[test]
fn streams_are_forgotten_only_by_a_sender_that_knows_what_was_heard() {
    let mut bench = Bench::new();
    let moment = |epoch| Some(Moment { epoch, segment: 1, offset: 48 });
    bench.inbox.handle_epochs(SENDER, &[5], moment(5));
    bench.process(SENDER, 1);
    bench.inbox.handle_link_down(SENDER);
    // A later life of it, which may not have received what this inbox announces.
    bench.inbox.handle_epochs(SENDER, &[6], moment(6));
    assert_eq!((bench.inbox.places.len(), bench.inbox.heard(&SENDER)), (1, moment(5)));
    bench.inbox.handle_epochs(SENDER, &[6], moment(6));
    bench.run();
    assert_eq!((bench.inbox.places.len(), bench.inbox.heard(&SENDER)), (0, moment(6)));
    bench.restart();
    assert_eq!((bench.inbox.places.len(), bench.inbox.heard(&SENDER)), (0, moment(6)));
}

#[test]
fn a_sender_with_ever_new_streams_is_refused() {
    let mut bench = Bench::new();
    let mut odd = delivery(1, 1, 1);
    for epoch in 0..MAX_STREAMS as u64 {
        odd.id.stream.epoch = epoch;
        assert_eq!(bench.deliver(odd.clone()), Verdict::Run);
    }
    odd.id.stream.epoch = u64::MAX;
    assert_eq!(bench.deliver(odd.clone()), Verdict::Full);
    let other = NodeId::from_bytes([8; 32]);
    assert_eq!(bench.inbox.handle_delivery(other, &mut odd, || true), Verdict::Run);
}

fn minted(number: u64) -> NodeId {
    let mut id = [9; 32];
    id[..8].copy_from_slice(&number.to_le_bytes());
    NodeId::from_bytes(id)
}

impl Bench {
    /// A message of a sender arrives, and is processed.
    fn process(&mut self, from: NodeId, seq: u64) {
        let mut delivery = delivery(seq, 1, 1);
        assert_eq!(self.inbox.handle_delivery(from, &mut delivery, || true), Verdict::Run);
        self.inbox.handle_ended(from, &delivery.id, DeliveryOutcome::Processed);
        self.run();
    }
}

#[test]
fn what_nothing_serves_takes_no_place_and_leaves_no_trace() {
    let mut bench = Bench::new();
    let stored = bench.journal.len();
    for (number, attempt) in (0..10_000).flat_map(|number| [(number, 1), (number, 2)]) {
        let mut delivery = delivery(1, 1, attempt);
        let verdict = bench.inbox.handle_delivery(minted(number), &mut delivery, || false);
        assert_eq!(verdict, Verdict::Answer(DeliveryOutcome::Refused));
    }
    bench.run();
    assert_eq!((bench.journal.len(), bench.inbox.count_senders()), (stored, 0));
    // What was processed is known, whether or not it is still served.
    bench.process(SENDER, 1);
    let verdict = bench.inbox.handle_delivery(SENDER, &mut delivery(1, 1, 2), || false);
    assert_eq!(verdict, Verdict::Answer(DeliveryOutcome::Processed));
}

#[test]
fn what_was_not_processed_leaves_nothing_behind() {
    let mut bench = Bench::new();
    for number in 0..100 {
        let from = minted(number);
        bench.inbox.handle_epochs(from, &[5], Some(Moment { epoch: 5, segment: 1, offset: 48 }));
        let mut first = delivery(1, 1, 1);
        assert_eq!(bench.inbox.handle_delivery(from, &mut first, || true), Verdict::Run);
        let outcome = DeliveryOutcome::Rejected("no".into());
        bench.inbox.handle_ended(from, &first.id, outcome);
        bench.inbox.handle_link_down(from);
    }
    bench.run();
    assert_eq!((bench.inbox.count_senders(), bench.inbox.streams.len()), (0, 0));
}

#[test]
fn a_full_inbox_forgets_whom_it_has_not_heard_for_long_and_those_who_came_once_before() {
    let mut bench = Bench::new();
    let moment = |offset| Some(Moment { epoch: 5, segment: 1, offset });
    // One comes back, one only once.
    for from in [SENDER, minted(0)] {
        bench.inbox.handle_epochs(from, &[5], moment(1));
        bench.process(from, 1);
        bench.inbox.handle_link_down(from);
    }
    bench.inbox.handle_epochs(SENDER, &[5], moment(2));
    bench.process(SENDER, 2);
    let mut number = 1;
    while !bench.inbox.senders.has_forgotten {
        bench.process(minted(number), 1);
        number += 1;
        assert!(number < 100_000, "it grows for ever");
    }
    for more in number..number + 1000 {
        bench.process(minted(more), 1);
    }
    let known = Verdict::Answer(DeliveryOutcome::Processed);
    assert_eq!(bench.deliver(delivery(2, 1, 2)), known);
    assert_eq!(bench.inbox.heard(&SENDER), moment(2));
    // The other is forgotten, and can't be told from a newcomer: both doubt what they have.
    assert_eq!(bench.inbox.heard(&minted(0)), Some(Moment::FORGOTTEN));
    let bytes = bench.inbox.bytes();
    bench.restart();
    assert_eq!(bench.inbox.bytes(), bytes, "the same is charged after a restart");
    assert_eq!(bench.deliver(delivery(2, 1, 2)), known);
    assert_eq!(bench.inbox.heard(&minted(0)), Some(Moment::FORGOTTEN));
    bench.process(minted(number + 2000), 1);
}

#[test]
fn a_failed_write_has_the_whole_stream_written_once_more_and_no_more() {
    let mut bench = Bench::new();
    let last = 200;
    for seq in (1..=last).step_by(2) {
        bench.deliver(delivery(seq, 1, 1));
        bench.end(seq, DeliveryOutcome::Processed);
    }
    let id = |seq| delivery(seq, 1, 1).id;
    for seq in [2, 4] {
        bench.deliver(delivery(seq, 1, 1));
    }
    for seq in [2, 4] {
        bench.inbox.handle_ended(SENDER, &id(seq), DeliveryOutcome::Processed);
    }
    // The first append fails; the second follows it, and depends on an entry that may be lost.
    let appends: Vec<_> = std::iter::from_fn(|| bench.inbox.poll_action()).collect();
    for (failed, append) in [true, false].into_iter().zip(appends) {
        let InboxAction::Append { token, entry, .. } = append else { panic!() };
        if !failed {
            bench.journal.push(entry);
        }
        let result = if failed { Err("no".into()) } else { Ok(PLACE) };
        bench.inbox.handle_appended(token, result);
    }
    let before = bench.journal.len();
    bench.run();
    assert_eq!(bench.journal.len(), before + 1);
    assert!(bench.journal[before].len() > 200, "the whole stream");
    bench.inbox.handle_timeout();
    bench.deliver(delivery(6, 1, 1));
    bench.end(6, DeliveryOutcome::Processed);
    assert!(bench.journal[before + 1..].iter().all(|entry| entry.len() < 50));
    assert_eq!(bench.answers.len(), 103);
    bench.journal.remove(1);
    bench.restart();
    for seq in [1, 2, 4, 6] {
        assert_eq!(bench.deliver(delivery(seq, 1, 2)), Verdict::Answer(DeliveryOutcome::Processed));
    }
}

#[test]
fn gaps_are_limited_and_what_closes_or_makes_none_is_always_taken() {
    let mut bench = Bench::new();
    let last = 2 * MAX_RANGES as u64;
    for seq in (2..=last).step_by(2) {
        assert_eq!(bench.deliver(delivery(seq, 1, 1)), Verdict::Run);
        bench.end(seq, DeliveryOutcome::Processed);
    }
    assert_eq!(bench.deliver(delivery(last + 2, 1, 1)), Verdict::Full);
    for seq in [last + 1, 3, 1] {
        assert_eq!(bench.deliver(delivery(seq, 1, 1)), Verdict::Run, "{seq}");
        bench.end(seq, DeliveryOutcome::Processed);
    }
    assert_eq!(bench.deliver(delivery(last + 3, 5, 1)), Verdict::Run, "there is room again");
    // The lowest number is accepted, though its neighbours are not processed.
    let mut bench = Bench::new();
    for seq in (3..=last + 1).step_by(2) {
        bench.deliver(delivery(seq, 1, 1));
        bench.end(seq, DeliveryOutcome::Processed);
    }
    assert_eq!(bench.deliver(delivery(1, 1, 1)), Verdict::Run);
}

#[test]
fn an_answer_waits_until_its_record_is_stored() {
    let mut bench = Bench::new();
    bench.deliver(delivery(1, 1, 1));
    bench.inbox.handle_ended(SENDER, &delivery(1, 1, 1).id, DeliveryOutcome::Processed);
    let Some(InboxAction::Append { token, .. }) = bench.inbox.poll_action() else { panic!() };
    bench.inbox.handle_appended(token, Err("the disk is full".into()));
    assert!(bench.inbox.poll_action().is_none());
    assert_eq!(bench.deliver(delivery(1, 1, 2)), Verdict::Wait);
    assert!(bench.answers.is_empty() && bench.inbox.has_unstored());
    bench.inbox.handle_timeout();
    bench.run();
    assert_eq!(bench.answers.len(), 1);
}
