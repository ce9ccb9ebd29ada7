//! Recovery of an inbox from its journal.

use super::senders::Senders;
use super::{Inbox, RecordError, Seen};
use crate::engine::delivery::record::{
    InboxRecord, InboxState, NodeBytes, SenderRecord, StreamRecord,
};

impl Inbox {
    /// Applies a journal entry. Entries must be passed in their order.
    ///
    /// # Errors
    /// [`RecordError`] if this version can't read it.
    pub(crate) fn recover(&mut self, entry: &[u8]) -> Result<(), RecordError> {
        match InboxRecord::decode(entry)? {
            InboxRecord::Snapshot(epoch, streams) => {
                self.begin_anew(epoch, false);
                for stream in streams {
                    self.recover_stream(&stream)?;
                }
            }
            InboxRecord::State(InboxState { epoch, has_forgotten, senders, streams }) => {
                self.begin_anew(epoch, has_forgotten);
                for SenderRecord { node: NodeBytes(node), heard, returned } in senders {
                    self.recover_sender(node, heard.map(Into::into), returned);
                }
                for stream in streams {
                    self.recover_stream(&stream)?;
                }
            }
            InboxRecord::Heard(NodeBytes(node), moment) => {
                self.recover_sender(node, Some(moment.into()), false);
            }
            InboxRecord::Evicted(NodeBytes(node)) => self.evict(node),
            InboxRecord::Opened(stream) => self.recover_stream(&stream)?,
            InboxRecord::Processed(number, seq) => {
                if let Some(seen) = self.numbered(number) {
                    seen.processed.insert(seq);
                    seen.begun.remove(&seq);
                }
                self.charge_numbered(number);
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
                let places: Vec<_> =
                    numbers.iter().filter_map(|it| self.numbers.get(it).copied()).collect();
                for place in places {
                    self.drop_stream(place);
                }
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
            let before = std::mem::replace(&mut seen.number, record.number);
            seen.opened = Some(self.failures);
            self.numbers.remove(&before);
            self.numbers.insert(record.number, place);
            seen.floor = seen.floor.max(record.floor);
            for (first, last) in &record.processed {
                seen.processed.insert_range(*first, *last);
            }
        }
        self.charge(place);
        Ok(())
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Seen> {
        self.streams.get_mut(self.numbers.get(&number)?)
    }

    fn charge_numbered(&mut self, number: u64) {
        if let Some(place) = self.numbers.get(&number).copied() {
            self.charge(place);
        }
    }

    /// Forgets all that was read so far.
    fn begin_anew(&mut self, epoch: u64, has_forgotten: bool) {
        self.epoch = epoch;
        self.streams.clear();
        self.places.clear();
        self.numbers.clear();
        self.senders = Senders::default();
        self.senders.has_forgotten = has_forgotten;
    }

    /// Completes the recovery with a snapshot, which stores the epoch.
    pub(crate) fn handle_recovered(&mut self) {
        self.take_snapshot();
    }
}
