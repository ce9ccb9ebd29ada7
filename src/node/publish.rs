//! Publishing: to every node that subscribes, without waiting for any unless one asks to.

use std::future::{self, IntoFuture};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::time::{Instant, timeout_at};

use super::counters::add;
use super::draft::{BodyError, Draft, message_setters};
use super::event_batch::EventBatch;
use super::guaranteed::Guaranteed;
use super::peer_link::PeerLink;
use super::publisher::Route;
use super::shared::Shared;
use crate::address::{AddressError, Destination, Topic};
use crate::broker::Pace;
use crate::engine::Backlog;
use crate::identity::NodeId;
use crate::message::{Header, Kind, Message, MessageId};
use crate::opaque::opaque;
use crate::report::{DropReason, PublishReport};
use crate::wire::{Envelope, OutgoingEvent, Payload};

/// A message that can't be published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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
    pub(crate) to: Result<To<'a>, AddressError>,
    pub(crate) draft: Draft,
}

opaque!(Publish<'_>, |it| topic: it.to.as_ref().map(To::topic));

/// Whom a message is published to.
pub(crate) enum To<'a> {
    /// Whoever subscribes now.
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
    message_setters!();

    /// How long the message is worth handling.
    pub fn time_to_live(mut self, ttl: Duration) -> Self {
        self.draft.rare().ttl = Some(ttl);
        self
    }

    /// Asks receivers to send an answer, if any, to this node.
    pub fn reply_to(mut self, node: NodeId) -> Self {
        self.draft.rare().reply_to = Some(node);
        self
    }

    /// Stores the message here until every durable subscription that this node's outbox has met
    /// has processed it ([`Node::consume`](crate::Node::consume)): see [`Guaranteed`]. It goes to
    /// those alone, and not to other subscriptions.
    pub fn guaranteed(self) -> Guaranteed<'a> {
        let destination = self.to.map(|to| Destination::Topic(to.topic().clone()));
        Guaranteed::new(self.shared, destination, self.draft)
    }

    /// Publishes at once: it never waits for anybody.
    ///
    /// # Errors
    /// [`PublishError`]; a node that gets nothing is no error, but in the report.
    pub fn now(self) -> Result<PublishReport, PublishError> {
        let (shared, to, message) = self.into_parts()?;
        if let Some(broker) = shared.broker() {
            let sent = shared.publish_by_broker(
                broker,
                to.topic(),
                message.envelope(to.topic()),
                Pace::Now,
            );
            // It waits only where it was asked to.
            let sent = sent.now_or_never().unwrap_or(Err(DropReason::SlowPeer));
            return Ok(shared.end_publish_by_broker(sent));
        }
        let event = message.outgoing(to.topic(), &shared.id);
        let Spread { mut report, full, .. } = shared.send_event(&to, &event);
        report.dropped.extend(full.into_iter().map(|cell| (cell.peer, DropReason::SlowPeer)));
        shared.end_publish(&to, message, &mut report);
        Ok(report)
    }

    /// Publishes, and waits for the peers whose queues are full, up to a deadline. The others
    /// have the message at once. A publisher that always waits loses nothing to a
    /// subscription that [holds it back](crate::Overflow::HoldBack); other subscriptions drop by
    /// their own rule what they don't take in time.
    ///
    /// # Errors
    /// [`PublishError`]; a node that had no room by then is no error, but in the report as
    /// [`SlowPeer`](DropReason::SlowPeer).
    ///
    /// # Cancel safety
    /// Once polled, the message is on its way to all peers that had room; dropping the future
    /// leaves out the others and this node's own subscriptions, uncounted.
    pub async fn within(self, deadline: Duration) -> Result<PublishReport, PublishError> {
        let (shared, to, message) = self.into_parts()?;
        if let Some(broker) = shared.broker() {
            let (envelope, pace) =
                (message.envelope(to.topic()), Pace::Until(Instant::now() + deadline));
            let sent = shared.publish_by_broker(broker, to.topic(), envelope, pace).await;
            return Ok(shared.end_publish_by_broker(sent));
        }
        let event = message.outgoing(to.topic(), &shared.id);
        let mut spread = shared.send_event(&to, &event);
        if spread.backlog == Backlog::Grew || !spread.full.is_empty() {
            // Few messages wait, so those that don't needn't have room for it.
            Box::pin(spread.settle(&event, deadline)).await;
        }
        shared.end_publish(&to, message, &mut spread.report);
        Ok(spread.report)
    }

    fn into_parts(mut self) -> Result<(&'a Arc<Shared>, To<'a>, Ready), PublishError> {
        let to = self.to?;
        self.draft.check(self.shared)?;
        if self.shared.is_stopping() {
            return Err(PublishError::ShutDown);
        }
        let id = self.draft.id(&self.shared.ids);
        let header = (!self.draft.is_plain())
            .then(|| self.draft.header(id, Kind::Event, Destination::Topic(to.topic().clone())));
        let message = Ready { id, header: header.map(Box::new), body: self.draft.body.bytes };
        Ok((self.shared, to, message))
    }
}

/// A message with its id.
struct Ready {
    id: MessageId,
    /// `None` where it would say no more than the id and the topic.
    header: Option<Box<Header>>,
    body: Bytes,
}

impl Ready {
    fn envelope(self, topic: &Topic) -> Envelope {
        let plain = || Header::new(self.id, Kind::Event, Destination::Topic(topic.clone()));
        let header = self.header.map_or_else(plain, |header| *header);
        Envelope { header, payload: Payload::Event(self.body) }
    }

    fn outgoing<'a>(&'a self, topic: &'a Topic, me: &NodeId) -> OutgoingEvent<'a> {
        match &self.header {
            Some(header) => OutgoingEvent::new(header, topic, &self.body, me),
            None => OutgoingEvent::plain(self.id, topic, &self.body),
        }
    }
}

impl PublishReport {
    fn add<T>(&mut self, peer: NodeId, sent: Result<T, DropReason>) {
        match sent {
            Ok(_) => self.queued += 1,
            Err(reason) => self.dropped.push((peer, reason)),
        }
    }
}

/// How far an event got at the first attempt.
#[derive(Default)]
struct Spread {
    report: PublishReport,
    /// Peers whose queues are full.
    full: Vec<Arc<PeerLink>>,
    backlog: Backlog,
}

impl Spread {
    /// Sends an event over one link, or leaves it to wait.
    fn send(&mut self, cell: &Arc<PeerLink>, event: &OutgoingEvent<'_>) {
        match cell.send_event(event) {
            Err(DropReason::SlowPeer) => self.full.push(cell.clone()),
            sent => {
                if sent == Ok(Backlog::Grew) {
                    self.backlog = Backlog::Grew;
                }
                self.report.add(cell.peer, sent);
            }
        }
    }

    /// Lets the tasks that write go on, and waits for the peers that had no room.
    async fn settle(&mut self, event: &OutgoingEvent<'_>, deadline: Duration) {
        let deadline = Instant::now() + deadline;
        if self.backlog == Backlog::Grew {
            tokio::task::yield_now().await;
        }
        for cell in std::mem::take(&mut self.full) {
            let sent = timeout_at(deadline, cell.send_event_waiting(event)).await;
            self.report.add(cell.peer, sent.unwrap_or(Err(DropReason::SlowPeer)));
        }
    }
}

impl Shared {
    /// Queues an event for every peer that subscribes.
    fn send_event(&self, to: &To<'_>, event: &OutgoingEvent<'_>) -> Spread {
        let mut spread = Spread::default();
        match to {
            To::Known(route) => route.links.iter().for_each(|cell| spread.send(cell, event)),
            To::Topic(topic) => {
                let routing = self.routing.load();
                let subscribers = routing.subscribers(topic);
                subscribers.iter().for_each(|(_, cell)| spread.send(cell, event));
            }
        }
        spread
    }

    /// Counts an event, and gives it to this node's own subscriptions.
    fn end_publish(&self, to: &To<'_>, message: Ready, report: &mut PublishReport) {
        add(&self.counters.published, 1);
        add(&self.counters.queued, report.queued as u64);
        for (peer, reason) in &report.dropped {
            self.count_drop(*peer, *reason, 1);
        }
        let here = match to {
            To::Known(route) => route.here,
            To::Topic(topic) => self.inboxes.load().has_match(topic),
        };
        if here {
            self.publish_here(to.topic().clone(), message, report);
        }
    }

    fn end_publish_by_broker(&self, sent: Result<(), DropReason>) -> PublishReport {
        let mut report = PublishReport::default();
        report.add(NodeId::BROKER, sent);
        add(&self.counters.published, 1);
        add(&self.counters.queued, report.queued as u64);
        for (_, reason) in &report.dropped {
            self.count_drop(NodeId::BROKER, *reason, 1);
        }
        report
    }

    fn publish_here(&self, topic: Topic, message: Ready, report: &mut PublishReport) {
        let Ready { id, header, body } = message;
        let plain = || Header::new(id, Kind::Event, Destination::Topic(topic.clone()));
        let header = header.map_or_else(plain, |header| *header);
        let run = EventBatch::single(topic, Message::new(self.id, header, body));
        match self.deliver(run, None, None) {
            0 => report.queued += 1,
            _ => report.dropped.push((self.id, DropReason::SlowSubscriber)),
        }
    }
}

impl IntoFuture for Publish<'_> {
    type Output = Result<PublishReport, PublishError>;
    type IntoFuture = future::Ready<Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        future::ready(self.now())
    }
}
