//! Starts of handlers of redelivered messages. They are counted, so that a handler that kills its
//! process is detected; suspects are run one at a time; all start in the order of arrival.

use std::collections::VecDeque;

use super::{Inbox, InboxAction, Pending};
use crate::engine::delivery::record::InboxRecord;
use crate::identity::NodeId;
use crate::journal::Persist;
use crate::wire::DeliveryId;

impl Inbox {
    /// Writes the start of a handler, which begins once that is done.
    pub(super) fn count_begun(&mut self, place: usize, seq: u64) {
        let failures = self.failures;
        let Some(seen) = self.streams.get_mut(&place) else { return };
        if seen.opening != Some(failures) && seen.opened != Some(failures) {
            seen.opening = Some(failures);
            let opened = InboxRecord::Opened(seen.record());
            self.append(&opened, Pending::Opened(place), Persist::Flush);
        }
        let Some(seen) = self.streams.get_mut(&place) else { return };
        let begun = seen.begun.entry(seq).or_default();
        *begun += 1;
        if let Some(open) = seen.open.get_mut(&seq) {
            open.counted = true;
        }
        let record = InboxRecord::Begun(seen.number, seq, *begun);
        self.append(&record, Pending::Begun(place, seq), Persist::Flush);
        self.charge(place);
    }

    pub(super) fn next_suspect(&mut self) {
        if self.suspect.is_none()
            && let Some((place, seq)) = self.suspects.pop_front()
        {
            self.suspect = Some((place, seq));
            self.count_begun(place, seq);
        }
    }

    pub(super) fn end_suspect(&mut self, place: usize, seq: u64) {
        if self.suspect == Some((place, seq)) {
            self.suspect = None;
            self.next_suspect();
        }
    }

    /// Lets a handler begin, and those queued behind it that were only waiting for that.
    pub(super) fn begin(&mut self, node: NodeId, id: &DeliveryId) {
        let Some(later) = self.later.get_mut(&node) else { return };
        if let Some(found) = later.iter_mut().find(|(waiting, _)| waiting == id) {
            found.1 = true;
        }
        while let Some((_, true)) = later.front()
            && let Some((id, _)) = later.pop_front()
        {
            self.actions.push_back(InboxAction::Begin(node, id));
        }
    }

    /// Notes that begun deliveries have reached their handlers, which keep the order from here on.
    pub(crate) fn handle_begun(&mut self, node: NodeId) {
        match self.later.get_mut(&node).map(VecDeque::front_mut) {
            Some(None) => _ = self.later.remove(&node),
            Some(Some((id, true))) => {
                let id = id.clone();
                self.begin(node, &id);
            }
            Some(Some((_, false))) | None => {}
        }
    }
}
