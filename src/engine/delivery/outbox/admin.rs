//! Operator commands for messages and durable subscriptions. Each changes an outbox that is not
//! running, and returns the journal entry that records the change.

use super::{DeliveryKey, Outbox, State};
use crate::address::{Pattern, ServiceName};
use crate::engine::delivery::Target;
use crate::engine::delivery::record::{BindingRecord, OutboxRecord};
use crate::identity::NodeId;

/// The outcome of removing a durable subscription.
pub(crate) struct Forgotten {
    /// The number of messages kept for it.
    pub(crate) messages: u64,
    pub(crate) entries: [Vec<u8>; 2],
}

impl Outbox {
    /// Replays a dead letter at the next start of the outbox; `None` if it is not a dead letter.
    pub(crate) fn replay(&mut self, key: DeliveryKey) -> Option<Vec<u8>> {
        matches!(self.part(key)?.state, State::Dead(_)).then(|| {
            self.revive_for_good(key);
            OutboxRecord::Dead(key.number, key.part, None).encode()
        })
    }

    /// Removes a message, processed or not; returns `None` if it does not exist.
    pub(crate) fn purge(&mut self, key: DeliveryKey) -> Option<Vec<u8>> {
        self.part(key)?;
        self.recover_settled(key);
        Some(OutboxRecord::Settled(vec![(key.number, key.part)]).encode())
    }

    /// Unbinds a message to a service from its node, and binds it to another or to none; returns
    /// `None` if its target is not a service.
    pub(crate) fn reassign_to(
        &mut self,
        key: DeliveryKey,
        node: Option<NodeId>,
    ) -> Option<Vec<u8>> {
        let target = self.targets[self.part(key)?.target as usize].clone();
        if !matches!(target, Target::Service(_)) {
            return None;
        }
        self.leave(key);
        let DeliveryKey { number, part } = key;
        let Some(node) = node else {
            return Some(OutboxRecord::Left(vec![(number, part)]).encode());
        };
        let bound = self.bind(key, node, &target);
        self.part_mut(key)?.bound = Some(bound);
        let binding = BindingRecord::from(&self.binding(bound));
        Some(OutboxRecord::Bound(vec![(number, part, Some(binding))]).encode())
    }

    /// Returns the known durable subscriptions.
    pub(crate) fn subscriptions(&self) -> impl Iterator<Item = (NodeId, &ServiceName, &Pattern)> {
        self.subscriptions.iter().map(|(node, name, it)| (node, name, &it.pattern))
    }

    /// Removes a durable subscription and its messages from an outbox that is not running; returns
    /// `None` if it is unknown. The entries must be stored in this order.
    pub(crate) fn unsubscribe(&mut self, node: NodeId, name: &ServiceName) -> Option<Forgotten> {
        let messages = self.drop_subscription(node, name)?;
        while !self.dropping.is_empty() {
            self.drop_messages();
        }
        let settled = std::mem::take(&mut self.settled);
        self.actions.clear();
        let entries = [OutboxRecord::Settled(settled), OutboxRecord::Peers(self.peer_records())];
        Some(Forgotten { messages, entries: entries.map(|record| record.encode()) })
    }

    /// [`Outbox::unsubscribe`] for a running outbox.
    pub(crate) fn handle_unsubscribed(&mut self, node: NodeId, name: &ServiceName) -> Option<u64> {
        let messages = self.drop_subscription(node, name)?;
        self.store_peer(node, true);
        Some(messages)
    }
}
