//! Guaranteed messages of a node to itself, which use no link.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Durable;
use crate::core::Hold;
use crate::message::Message;
use crate::sync::lock;

/// Queued messages, in the order in which the outbox sent them, as on a link.
#[derive(Default)]
pub(crate) struct Loopback {
    waiting: VecDeque<Box<Message>>,
    /// A task is passing the messages to the inbox; there is at most one.
    taken: bool,
}

impl Durable {
    /// Sends a message to this node. A task passes it on, since the outbox is locked.
    pub(super) fn loop_back(self: &Arc<Self>, message: Box<Message>) {
        let mut loopback = lock(&self.store.loopback);
        loopback.waiting.push_back(message);
        if !std::mem::replace(&mut loopback.taken, true) {
            let durable = self.clone();
            self.core.runtime.spawn(async move { durable.take_looped_back() });
        }
    }

    fn take_looped_back(self: &Arc<Self>) {
        loop {
            let mut loopback = lock(&self.store.loopback);
            let Some(message) = loopback.waiting.pop_front() else {
                loopback.taken = false;
                return;
            };
            drop(loopback);
            self.handle_delivery(message, Hold::unbounded(self.core.local().clone()));
        }
    }
}
