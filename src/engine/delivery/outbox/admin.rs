//! What an operator decides about messages: each call changes the outbox and gives the entry
//! that says so in its journal.

use super::{Outbox, PartKey, State};
use crate::engine::delivery::Target;
use crate::engine::delivery::record::{BindingRecord, OutboxRecord};
use crate::identity::NodeId;

impl Outbox {
    /// Sends a dead letter again when its outbox is opened next; `None` if it is none.
    pub(crate) fn replay(&mut self, key: PartKey) -> Option<Vec<u8>> {
        matches!(self.part(key)?.state, State::Dead(_)).then(|| {
            self.revive(key);
            OutboxRecord::Dead(key.number, key.part, None).encode()
        })
    }

    /// Removes a message, processed or not; `None` if it isn't there.
    pub(crate) fn purge(&mut self, key: PartKey) -> Option<Vec<u8>> {
        self.part(key)?;
        self.recover_settled(key);
        Some(OutboxRecord::Settled(vec![(key.number, key.part)]).encode())
    }

    /// Takes a message to a service from the node that it was given to, and gives it to another
    /// or to whichever comes; `None` if it goes to no service.
    pub(crate) fn reassign_to(&mut self, key: PartKey, node: Option<NodeId>) -> Option<Vec<u8>> {
        let target = self.targets[self.part(key)?.target as usize].clone();
        if !matches!(target, Target::Service(_)) {
            return None;
        }
        self.unbind(key);
        let bound = node.map(|node| self.bind(key, node, &target));
        self.part_mut(key)?.bound = bound;
        let binding = bound.map(|bound| BindingRecord::from(&self.binding(bound)));
        Some(OutboxRecord::Bound(vec![(key.number, key.part, binding)]).encode())
    }
}
