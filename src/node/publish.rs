//! Publishing: to every subscribed node, without waiting for any unless asked to.

use std::future::{self, IntoFuture};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Inner;
use super::draft::{Draft, message_setters};
use super::guaranteed::Guaranteed;
use super::publisher::Route;
use crate::address::{AddressError, Destination, Topic};
use crate::core::{Publication, RUNTIME_ENDED_TEXT, Stopped, Way, add};
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
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}

impl From<Stopped> for PublishError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::ShutDown => Self::ShutDown,
            Stopped::RuntimeEnded => Self::RuntimeEnded,
        }
    }
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
    /// Inlined into the caller's crate, so that the message is written in place.
    #[inline]
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
    pub fn now(mut self) -> Result<PublishReport, PublishError> {
        match self.begin() {
            Begun::Done(report) => Ok(report),
            Begun::Failed(error) => Err(*error),
            Begun::Rest(rest) => {
                let Rest { stamp, mut spread } = *rest;
                let full = std::mem::take(&mut spread.full);
                let full = full.iter().map(|way| (way.node(), DropReason::SlowPeer));
                spread.report.dropped.extend(full);
                Ok(spread
                    .finish(self.node, &publication(self.node, &self.to?, &self.draft, &stamp)))
            }
        }
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
    pub async fn within(mut self, deadline: Duration) -> Result<PublishReport, PublishError> {
        match self.begin() {
            Begun::Done(report) => Ok(report),
            Begun::Failed(error) => Err(*error),
            Begun::Rest(rest) => Box::pin(self.finish(rest, deadline)).await,
        }
    }

    /// Queues the event on all ways that have room. The message is not moved meanwhile: that would
    /// cost as much as all the rest.
    fn begin(&mut self) -> Begun {
        let Self { node, to, draft } = self;
        let to = match to {
            Ok(to) => &*to,
            Err(error) => return Begun::Failed(Box::new(error.clone().into())),
        };
        let stamp = match Stamp::new(node, to, draft) {
            Ok(stamp) => stamp,
            Err(error) => return Begun::Failed(error),
        };
        let event = publication(node, to, draft, &stamp);
        let spread = Spread::to_subscribers(node, to, &event);
        if spread.backlog == Backlog::Same && spread.full.is_empty() {
            return Begun::Done(spread.finish(node, &event));
        }
        drop(event);
        Begun::Rest(Box::new(Rest { stamp, spread }))
    }

    /// Waits for the ways that had no room.
    async fn finish(
        self,
        rest: Box<Rest>,
        deadline: Duration,
    ) -> Result<PublishReport, PublishError> {
        let (to, Rest { stamp, mut spread }) = (self.to?, *rest);
        let event = publication(self.node, &to, &self.draft, &stamp);
        spread.settle(&event, deadline).await;
        Ok(spread.finish(self.node, &event))
    }
}

/// The progress of a publish that waits for nothing.
enum Begun {
    Done(PublishReport),
    Failed(Box<PublishError>),
    Rest(Box<Rest>),
}

/// A publish for which some way had no room, or after which a batch more is queued.
struct Rest {
    stamp: Stamp,
    spread: Spread,
}

/// The part of a message that it gets when it is published.
struct Stamp {
    id: MessageId,
    /// `None` where it would hold no more than the id and the topic.
    header: Option<Box<Header>>,
}

impl Stamp {
    /// Checks a message, and gives it an id.
    fn new(node: &Inner, to: &To<'_>, draft: &mut Draft) -> Result<Self, Box<PublishError>> {
        let core = &node.core;
        draft.check(&core.config).map_err(|error| Box::new(error.into()))?;
        core.check_running().map_err(|stopped| Box::new(stopped.into()))?;
        let id = draft.id(&core.ids);
        let header = (!draft.is_plain()).then(|| {
            Box::new(draft.header(id, Kind::Event, Destination::Topic(to.topic().clone())))
        });
        Ok(Self { id, header })
    }
}

fn publication<'a>(
    node: &Inner,
    to: &'a To<'_>,
    draft: &'a Draft,
    stamp: &'a Stamp,
) -> Publication<'a> {
    let (topic, body) = (to.topic(), &draft.body.bytes);
    let (id, header) = (stamp.id, stamp.header.as_deref());
    let encoded = match header {
        Some(header) => OutgoingEvent::new(header, topic, body, &node.core.id),
        None => OutgoingEvent::plain(id, topic, body),
    };
    Publication { topic, id, header, body, encoded }
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
