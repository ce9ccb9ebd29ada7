//! Publishing: to every subscribed node, without waiting for any unless asked to.

use std::future::{self, IntoFuture};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Inner;
use super::draft::{Draft, message_setters};
use super::guaranteed::Guaranteed;
use super::publisher::Route;
use crate::address::{AddressError, Destination, Topic};
use crate::core::{Publication, Way, add};
use crate::engine::Backlog;
use crate::identity::NodeId;
use crate::message::{BodyError, Header, Kind, MessageId};
use crate::opaque::opaque;
use crate::report::{DropReason, PublishReport};
use crate::wire::OutgoingEvent;

/// A message that can't be published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The topic can't be parsed.
    #[error(transparent)]
    Topic(#[from] AddressError),
    /// The message is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// A message that is published when this is awaited, or by [`Publish::now`].
#[must_use = "a message is published when this is awaited, or by now()"]
pub struct Publish<'a> {
    node: &'a Arc<Inner>,
    to: Result<To<'a>, AddressError>,
    draft: Draft,
}

opaque!(Publish<'_>, |it| topic: it.to.as_ref().map(To::topic));

/// The receivers of a published message.
pub(crate) enum To<'a> {
    /// The current subscribers of a topic.
    Topic(Topic),
    Known(&'a Route),
}

impl To<'_> {
    fn topic(&self) -> &Topic {
        match self {
            Self::Topic(topic) => topic,
            Self::Known(route) => &route.topic,
        }
    }
}

impl<'a> Publish<'a> {
    pub(crate) fn new(
        node: &'a Arc<Inner>,
        to: Result<To<'a>, AddressError>,
        draft: Draft,
    ) -> Self {
        Self { node, to, draft }
    }

    message_setters!();

    /// Sets the time for which the message is worth handling.
    pub fn time_to_live(mut self, ttl: Duration) -> Self {
        self.draft.rare().ttl = Some(ttl);
        self
    }

    /// Sets the node to which receivers send an answer, if any.
    pub fn reply_to(mut self, node: NodeId) -> Self {
        self.draft.rare().reply_to = Some(node);
        self
    }

    /// Stores the message here until every durable subscription that this node's outbox knows has
    /// processed it ([`Node::consume`](crate::Node::consume)): see [`Guaranteed`]. Other
    /// subscriptions do not receive the message.
    pub fn guaranteed(self) -> Guaranteed<'a> {
        let destination = self.to.map(|to| Destination::Topic(to.topic().clone()));
        Guaranteed::new(self.node, destination, self.draft)
    }

    /// Publishes at once, without waiting for any peer.
    ///
    /// # Errors
    /// [`PublishError`]. A node for which the message is dropped is no error, but is in the report.
    pub fn now(self) -> Result<PublishReport, PublishError> {
        let (node, to, message) = self.into_parts()?;
        let event = message.publication(to.topic(), &node.core.id);
        let mut spread = Spread::to_subscribers(node, &to, &event);
        let full = std::mem::take(&mut spread.full);
        let full = full.iter().map(|way| (way.node(), DropReason::SlowPeer));
        spread.report.dropped.extend(full);
        Ok(spread.finish(node, &event))
    }

    /// Publishes, and waits for peers with full queues, up to a deadline. The message is queued for
    /// the others at once. A publisher that always waits loses no messages to a subscription that
    /// [holds it back](crate::Overflow::HoldBack); other subscriptions drop messages by their own
    /// overflow policy.
    ///
    /// # Errors
    /// [`PublishError`]. A node without room by the deadline is no error, but is in the report as
    /// [`SlowPeer`](DropReason::SlowPeer).
    ///
    /// # Cancel safety
    /// Once polled, the message is queued for all peers that had room. Dropping the future leaves
    /// out the others and this node's own subscriptions, without counting them.
    pub async fn within(self, deadline: Duration) -> Result<PublishReport, PublishError> {
        let (node, to, message) = self.into_parts()?;
        let event = message.publication(to.topic(), &node.core.id);
        let spread = Spread::to_subscribers(node, &to, &event);
        if spread.backlog == Backlog::Same && spread.full.is_empty() {
            return Ok(spread.finish(node, &event));
        }
        // Few messages wait, so the others needn't have room for it.
        Ok(Box::pin(settle(node, to, message, spread, deadline)).await)
    }

    fn into_parts(mut self) -> Result<(&'a Arc<Inner>, To<'a>, Ready), PublishError> {
        let (to, core) = (self.to?, &self.node.core);
        self.draft.check(&core.config)?;
        if core.is_stopping() {
            return Err(PublishError::ShutDown);
        }
        let id = self.draft.id(&core.ids);
        let header = (!self.draft.is_plain())
            .then(|| self.draft.header(id, Kind::Event, Destination::Topic(to.topic().clone())));
        let message = Ready { id, header: header.map(Box::new), body: self.draft.body.bytes };
        Ok((self.node, to, message))
    }
}

/// A message with its id.
struct Ready {
    id: MessageId,
    /// `None` if it would hold only the id and the topic.
    header: Option<Box<Header>>,
    body: Bytes,
}

impl Ready {
    fn publication<'a>(&'a self, topic: &'a Topic, me: &NodeId) -> Publication<'a> {
        let (id, header, body) = (self.id, self.header.as_deref(), &self.body);
        let encoded = match header {
            Some(header) => OutgoingEvent::new(header, topic, body, me),
            None => OutgoingEvent::plain(id, topic, body),
        };
        Publication { topic, id, header, body, encoded }
    }
}

/// Publishes the rest of an event, when some way had no room or a batch more is queued.
async fn settle(
    node: &Inner,
    to: To<'_>,
    message: Ready,
    mut spread: Spread,
    deadline: Duration,
) -> PublishReport {
    let event = message.publication(to.topic(), &node.core.id);
    spread.settle(&event, deadline).await;
    spread.finish(node, &event)
}

impl PublishReport {
    fn add<T>(&mut self, way: &Arc<dyn Way>, sent: Result<T, DropReason>) {
        match sent {
            Ok(_) => self.queued += 1,
            Err(reason) => self.dropped.push((way.node(), reason)),
        }
    }
}

/// The progress of an event after the first attempt.
#[derive(Default)]
struct Spread {
    report: PublishReport,
    /// The ways whose queues are full.
    full: Vec<Arc<dyn Way>>,
    backlog: Backlog,
    /// This node's own subscriptions are served separately.
    here: bool,
}

impl Spread {
    /// Queues an event on the ways to all subscribers.
    fn to_subscribers(node: &Inner, to: &To<'_>, event: &Publication<'_>) -> Self {
        let mut spread = Self::default();
        spread.here = match to {
            To::Known(route) => {
                route.ways.iter().for_each(|way| spread.send(way, event));
                route.here
            }
            To::Topic(topic) => {
                node.carrier.subscribers(topic, &mut |way| spread.send(way, event))
                    && node.core.subscriptions.load().has_match(topic)
            }
        };
        spread
    }

    /// Queues an event on one way, or keeps the way if its queue is full.
    fn send(&mut self, way: &Arc<dyn Way>, event: &Publication<'_>) {
        match way.send_event(event) {
            Err(DropReason::SlowPeer) => self.full.push(way.clone()),
            sent => {
                if sent == Ok(Backlog::Grew) {
                    self.backlog = Backlog::Grew;
                }
                self.report.add(way, sent);
            }
        }
    }

    /// Yields to the writing tasks, and waits for the ways without room.
    async fn settle(&mut self, event: &Publication<'_>, deadline: Duration) {
        let deadline = Instant::now() + deadline;
        if self.backlog == Backlog::Grew {
            tokio::task::yield_now().await;
        }
        for way in std::mem::take(&mut self.full) {
            let sent = way.send_event_within(event, deadline).await;
            self.report.add(&way, sent);
        }
    }

    /// Counts the event, and delivers it to this node's own subscriptions.
    fn finish(self, node: &Inner, event: &Publication<'_>) -> PublishReport {
        let (core, mut report) = (&node.core, self.report);
        add(&core.reporter.counters.published, 1);
        add(&core.reporter.counters.queued, report.queued as u64);
        for (peer, reason) in &report.dropped {
            core.reporter.count_drop(*peer, *reason, 1);
        }
        if self.here {
            // Each subscription's loss is counted as it happens.
            match core.publish_here(event) {
                true => report.queued += 1,
                false => report.dropped.push((core.id, DropReason::SlowSubscriber)),
            }
        }
        report
    }
}

impl IntoFuture for Publish<'_> {
    type Output = Result<PublishReport, PublishError>;
    type IntoFuture = future::Ready<Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        future::ready(self.now())
    }
}
