//! Publishing: to every node that subscribes, without waiting for any.

use std::future::{IntoFuture, Ready, ready};
use std::sync::Arc;
use std::time::Duration;

use super::counters::add;
use super::draft::{BodyError, Draft, message_setters};
use super::shared::Shared;
use crate::address::{AddressError, Destination, Topic};
use crate::identity::NodeId;
use crate::message::{Kind, Message};
use crate::report::{DropReason, PublishReport};
use crate::wire::{BASE_COST, Envelope, Payload};

/// A message that can't be published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The topic can't be parsed.
    #[error(transparent)]
    Topic(#[from] AddressError),
    /// It is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// A publish that happens when it is awaited, or by [`Publish::now`].
#[must_use = "a message is published when this is awaited, or by now()"]
pub struct Publish<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) topic: Result<Topic, AddressError>,
    pub(crate) draft: Draft,
}

impl Publish<'_> {
    message_setters!();

    /// How long the message is worth handling.
    pub fn time_to_live(mut self, ttl: Duration) -> Self {
        self.draft.ttl = Some(ttl);
        self
    }

    /// Asks receivers to send an answer, if any, to this node.
    pub fn reply_to(mut self, node: NodeId) -> Self {
        self.draft.reply_to = Some(node);
        self
    }

    /// Publishes at once: it never waits for anybody.
    ///
    /// # Errors
    /// [`PublishError`]; a node that gets nothing is no error, but in the report.
    pub fn now(mut self) -> Result<PublishReport, PublishError> {
        let topic = self.topic?;
        let shared = self.shared;
        self.draft.check(shared)?;
        if shared.is_stopping() {
            return Err(PublishError::ShutDown);
        }
        let id = shared.ids.next_now();
        let header = self.draft.header(id, Kind::Event, Destination::Topic(topic.clone()));
        let body = self.draft.body.bytes;
        let mut report = PublishReport::default();
        let routing = shared.routing.load();
        for (peer, cell) in routing.subscribers(&topic) {
            let envelope =
                Envelope { header: header.clone(), payload: Payload::Event(body.clone()) };
            let sent = match cell {
                Some(cell) => cell.send_message(envelope),
                None => Err(DropReason::LinkLost),
            };
            match sent {
                Ok(()) => report.queued += 1,
                Err(reason) => report.dropped.push((*peer, reason)),
            }
        }
        add(&shared.counters.published, 1);
        add(&shared.counters.queued, report.queued as u64);
        for (peer, reason) in &report.dropped {
            shared.count_drop(*peer, *reason, 1);
        }
        if !shared.inboxes.load().matching(&topic).is_empty() {
            let message = Message::new(shared.id, header, body);
            let cost = BASE_COST + message.body.len() as u64;
            if shared.deliver(&message, cost, None) {
                report.queued += 1;
            } else {
                report.dropped.push((shared.id, DropReason::SlowSubscriber));
            }
        }
        Ok(report)
    }
}

impl IntoFuture for Publish<'_> {
    type Output = Result<PublishReport, PublishError>;
    type IntoFuture = Ready<Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        ready(self.now())
    }
}
