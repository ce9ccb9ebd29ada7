//! Guaranteed messages of a node to itself, which no link brings.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Durable;
use crate::core::Hold;
use crate::message::Message;
use crate::sync::lock;

/// In the order in which the outbox sends them; a link would keep it too.
#[derive(Default)]
pub(crate) struct Loopback {
    waiting: VecDeque<Box<Message>>,
    /// A task hands them to the inbox: one at a time does.
    taken: bool,
}

impl Durable {
    /// Sends a message to this node. It arrives a little later: the outbox is locked.
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
