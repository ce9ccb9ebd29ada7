//! Recovery of an inbox from its journal.

use super::{Inbox, RecordError, Seen};
use crate::engine::delivery::record::{InboxRecord, StreamRecord};

impl Inbox {
    /// Applies a journal entry. Entries must be passed in their order.
    ///
    /// # Errors
    /// [`RecordError`] if this version can't read it.
    pub(crate) fn recover(&mut self, entry: &[u8]) -> Result<(), RecordError> {
        match InboxRecord::decode(entry)? {
            InboxRecord::Snapshot(epoch, streams) => {
                self.epoch = epoch;
                self.streams.clear();
                self.places.clear();
                self.senders.clear();
                for stream in streams {
                    self.recover_stream(&stream)?;
                }
            }
            InboxRecord::Opened(stream) => self.recover_stream(&stream)?,
            InboxRecord::Processed(number, seq) => {
                if let Some(seen) = self.numbered(number) {
                    seen.processed.insert(seq);
                    seen.begun.remove(&seq);
                }
            }
            InboxRecord::Begun(number, seq, times) => {
                if let Some(seen) = self.numbered(number) {
                    match times {
                        0 => _ = seen.begun.remove(&seq),
                        _ => _ = seen.begun.insert(seq, times),
                    }
                }
            }
            InboxRecord::Forgotten(numbers) => {
                self.forget(|seen| numbers.contains(&seen.number));
            }
        }
        Ok(())
    }

    fn recover_stream(&mut self, record: &StreamRecord) -> Result<(), RecordError> {
        let (node, stream) = (record.node.0, record.stream());
        let place = match self.places.get(&(node, stream.clone())) {
            Some(place) => *place,
            None => self.open_stream(node, &stream, record.number),
        };
        if let Some(seen) = self.streams.get_mut(&place) {
            (seen.number, seen.opened) = (record.number, true);
            seen.floor = seen.floor.max(record.floor);
            for (first, last) in &record.processed {
                seen.processed.insert_range(*first, *last);
            }
        }
        Ok(())
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Seen> {
        self.streams.values_mut().find(|seen| seen.number == number)
    }

    /// Completes the recovery with a snapshot, which stores the epoch.
    pub(crate) fn handle_recovered(&mut self) {
        self.take_snapshot();
    }
}
