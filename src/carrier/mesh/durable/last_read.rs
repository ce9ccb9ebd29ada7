//! A cache of the last read entry of the outbox's journal, whose messages are read one after the
//! other.

use bytes::Bytes;

use crate::engine::delivery::Outbox;
use crate::journal::Position;

#[derive(Default)]
pub(crate) struct LastRead {
    /// The entry's position, and its messages by their numbers.
    entry: Option<(Position, Vec<(u64, Bytes)>)>,
}

impl LastRead {
    /// Returns a message of the entry at `position`, as it was stored. `read` reads the entry.
    pub(crate) fn message(
        &mut self,
        position: Position,
        number: u64,
        read: impl FnOnce() -> Option<Vec<u8>>,
    ) -> Option<Bytes> {
        if self.entry.as_ref().is_none_or(|(at, _)| *at != position) {
            self.entry = Some((position, Outbox::stored_messages(&read()?).ok()?));
        }
        let (_, messages) = self.entry.as_ref()?;
        let place = messages.binary_search_by_key(&number, |(number, _)| *number).ok();
        let found = place.map(|place| messages[place].1.clone());
        // After its last message, the entry is not wanted again soon.
        self.entry.take_if(|(_, messages)| messages.last().is_none_or(|(last, _)| *last == number));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_messages_of_a_transaction_are_read_at_once() {
        let (position, entry) = Outbox::example_transaction(10);
        let (mut last, mut reads) = (LastRead::default(), 0);
        for number in 1..=10 {
            let read = || {
                reads += 1;
                Some(entry.clone())
            };
            let alone = Outbox::stored_message(&entry, number).unwrap();
            assert_eq!(last.message(position, number, read), alone);
        }
        assert_eq!(reads, 1);
        assert!(last.entry.is_none(), "and not kept when they are all read");
        assert_eq!(last.message(position, 11, || Some(entry)), None);
    }
}
