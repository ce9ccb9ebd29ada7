//! Descriptions for failed tests.

use super::{DeliveryKey, Outbox};
use crate::engine::delivery::Target;

impl Outbox {
    /// Describes the state of the cleaning.
    pub(crate) fn describe_room(&self) -> String {
        let segments = self.segments.iter().map(|(number, it)| {
            let cost = self.cost(number, it);
            format!(
                "{number}: {} bytes, {} live, costs {cost}, goes: {}",
                it.size, it.live, it.goes
            )
        });
        let (room, retry, end) = (self.room, self.clean_retry, self.is_at_an_end);
        let all: Vec<String> = segments.collect();
        format!("{room:?}, {:?}, retry {retry:?}, at an end: {end}; {all:#?}", self.cleaning)
    }

    /// Describes what is known of a message.
    pub(crate) fn describe_message(&self, number: u64) -> String {
        let Some(entry) = self.entries.get(number) else { return format!("{number} is gone") };
        let targets = entry.parts.iter().map(|part| &self.targets[part.target as usize]);
        let subscriptions = targets.clone().map(|target| match target {
            Target::Subscription(node, name) => self.subscriptions.get(node, name),
            Target::Service(_) | Target::Node(_) => None,
        });
        let subscriptions: Vec<_> = subscriptions.collect();
        let keys = (0..).zip(&entry.parts).map(|(part, _)| DeliveryKey { number, part });
        let queues = keys.filter_map(|key| self.key_queues.get(&self.key_queue(key)?));
        let (targets, queues): (Vec<_>, Vec<_>) = (targets.collect(), queues.collect());
        let peers = &self.peers;
        format!("{number}: {entry:?} for {targets:?}, {subscriptions:?}, {queues:?}, {peers:#?}")
    }
}
