//! An inbox on a disk that is full.

use std::sync::Arc;

use super::disk::kind;
use crate::engine::delivery::{Inbox, InboxAction, Verdict};
use crate::identity::NodeId;
use crate::journal::crashing::Disk;
use crate::journal::stepped::{EntryKind, Stepped};
use crate::journal::{Need, Options};
use crate::wire::{Delivery, DeliveryId, DeliveryOutcome, Stream};

const SENDER: NodeId = NodeId::from_bytes([7; 32]);

struct Receiver {
    inbox: Inbox,
    journal: Stepped,
    answers: u64,
    snapshots: u64,
}

impl Receiver {
    fn open(disk: &Arc<Disk>) -> Self {
        let mut inbox = Inbox::new(1);
        let take = |entry: crate::journal::Entry<'_>| inbox.recover(entry.payload).unwrap();
        let (journal, _) = Stepped::open(disk, &Options::default(), take).unwrap();
        inbox.handle_recovered();
        let mut receiver = Self { inbox, journal, answers: 0, snapshots: 0 };
        receiver.perform();
        receiver
    }

    fn perform(&mut self) {
        while let Some(action) = self.inbox.poll_action() {
            let (token, entry, kind) = match action {
                InboxAction::Append { token, entry, persist, .. } => {
                    (Some(token), entry, kind(persist, Need::Urgent))
                }
                InboxAction::AppendSnapshot { token, entry, .. } => {
                    (Some(token), entry, EntryKind::First)
                }
                InboxAction::Note(entry) => (None, entry, EntryKind::Note),
                InboxAction::RemoveBefore(segment) => {
                    self.journal.remove_before(segment);
                    continue;
                }
                InboxAction::Answer(..) => {
                    self.answers += 1;
                    continue;
                }
                InboxAction::Begin(..) | InboxAction::Forgot { .. } => continue,
            };
            self.snapshots += u64::from(kind == EntryKind::First);
            let written = self.journal.write(std::iter::once((entry, kind))).remove(0);
            if let Some(token) = token {
                self.inbox.handle_appended(token, written);
            }
        }
    }

    fn deliver(&mut self, epoch: u64, seq: u64, floor: u64) -> Verdict {
        let id = DeliveryId { stream: Stream { epoch, subscription: None }, seq };
        let mut delivery = Delivery { id, floor, attempt: 1, redelivered: false };
        let verdict = self.inbox.handle_delivery(SENDER, &mut delivery, || true);
        if verdict == Verdict::Run {
            self.inbox.handle_ended(SENDER, &delivery.id, DeliveryOutcome::Processed);
        }
        self.perform();
        verdict
    }
}

#[test]
fn an_inbox_on_a_full_disk_stores_what_it_processes_and_frees_room_for_more() {
    const GAPS: u64 = 60_000;
    const MORE: u64 = 120_000;
    let disk = Arc::new(Disk::default());
    let mut receiver = Receiver::open(&disk);
    // Senders with many gaps: what is known of them is long, and there is no room for it twice in
    // what is kept for an inbox that knows little.
    for epoch in 1..=2 {
        for seq in 0..GAPS {
            assert_eq!(receiver.deliver(epoch, 2 * seq + 2, 1), Verdict::Run);
        }
    }
    disk.fill();
    let snapshots = receiver.snapshots;
    for seq in 1..=MORE {
        assert_eq!(receiver.deliver(9, seq, seq), Verdict::Run);
        assert!(!receiver.inbox.has_unstored(), "{seq} could not be stored");
    }
    assert_eq!(receiver.answers, 2 * GAPS + MORE);
    assert!(receiver.snapshots > snapshots + 2, "{snapshots}, then {}", receiver.snapshots);

    drop(receiver);
    let mut receiver = Receiver::open(&disk);
    let known = Verdict::Answer(DeliveryOutcome::Processed);
    assert_eq!(receiver.deliver(2, 2 * GAPS, 1), known);
    assert_eq!(receiver.deliver(9, MORE, MORE), known);
}
