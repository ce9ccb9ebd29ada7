//! Snapshots of the whole inbox, which bound the length of the journal.

use super::{Inbox, InboxAction, Pending, Phase, Seen, SnapshotPhase};
use crate::engine::delivery::record::{
    InboxRecord, InboxState, Name, NodeBytes, SenderRecord, StreamRecord,
};

impl Inbox {
    pub(super) fn snapshot_if_due(&mut self) {
        let due = self.since_snapshot >= self.snapshot_after.max(self.snapshot_size);
        if due && self.snapshot == SnapshotPhase::Stored {
            self.take_snapshot();
        }
    }

    /// Writes a snapshot, so that earlier entries can be removed.
    pub(super) fn take_snapshot(&mut self) {
        let recorded = self.streams.values().filter(|seen| seen.is_recorded());
        let streams: Vec<_> = recorded.map(Seen::record).collect();
        let processed = streams.iter().flat_map(|stream| &stream.processed);
        let messages: u64 = processed.map(|(first, last)| last.saturating_sub(*first) + 1).sum();
        let messages = messages.try_into().unwrap_or(u32::MAX);
        let senders = self.senders.recorded().map(|(node, heard, returned)| SenderRecord {
            node: NodeBytes(*node),
            heard: heard.map(Into::into),
            returned,
        });
        let (epoch, has_forgotten) = (self.epoch, self.senders.has_forgotten);
        let state = InboxState { epoch, has_forgotten, senders: senders.collect(), streams };
        let snapshot = InboxRecord::State(state);
        let (token, entry) = (self.token_for(Pending::Snapshot), snapshot.encode());
        self.snapshot_size = entry.len() as u64;
        self.since_snapshot = 0;
        self.snapshot = SnapshotPhase::Storing;
        self.actions.push_back(InboxAction::AppendSnapshot { token, entry, messages });
        let counts = self.streams.values().flat_map(|seen| {
            seen.begun.iter().map(|(seq, times)| InboxRecord::Begun(seen.number, *seq, *times))
        });
        for count in counts.collect::<Vec<_>>() {
            self.note(&count);
        }
    }
}

impl Seen {
    /// Returns true if the journal holds the stream, or is about to.
    fn is_recorded(&self) -> bool {
        self.opening.is_some() || self.opened.is_some()
    }

    /// Returns true if deliveries are on their way through it.
    pub(super) fn is_busy(&self) -> bool {
        !self.open.is_empty()
    }

    pub(super) fn record(&self) -> StreamRecord {
        let mut processed = self.processed.clone();
        // Their handlers returned Ok, and the journal holds their records before this one.
        for (seq, open) in &self.open {
            if open.phase != Phase::Running {
                processed.insert(*seq);
            }
        }
        StreamRecord {
            number: self.number,
            node: NodeBytes(self.node),
            epoch: self.stream.epoch,
            subscription: self.stream.subscription.clone().map(Name),
            floor: self.floor,
            processed: processed.iter().collect(),
        }
    }
}
