//! What a user sends: publishes, one-way messages, requests.

use std::future::{Future, IntoFuture, Ready, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::cell::LinkCell;
use super::counters::add;
use super::service::HandlerError;
use super::shared::{Outcome, Shared};
use crate::address::{AddressError, Destination, Recipient, ServiceName, Topic};
use crate::engine::{Instance, least_loaded};
use crate::message::{Body, Header, Kind, Message, MessageId};
use crate::peer::NodeId;
use crate::report::{DropReason, PublishReport};
use crate::wire::{Envelope, MAX_HEADER, Payload};

/// What any message may carry besides its body.
#[derive(Debug, Default, Clone)]
pub(crate) struct Draft {
    kind: Option<Kind>,
    body: Body,
    ttl: Option<Duration>,
    reply_to: Option<NodeId>,
    correlation_id: Option<MessageId>,
    extra: Option<Box<crate::message::Extra>>,
}

impl Draft {
    pub(crate) fn new(body: Body) -> Self {
        Self { body, ..Self::default() }
    }

    fn check(&self, shared: &Shared) -> Result<(), BodyError> {
        let (len, max) = (self.body.len(), shared.config.max_body);
        if len > max {
            return Err(BodyError::Body { len, max });
        }
        let mut probe =
            Header::new(MessageId::from_bytes([0; 16]), Kind::Event, Destination::Node(shared.id));
        probe.extra.clone_from(&self.extra);
        match probe.extra_len() {
            len if len > MAX_HEADER => Err(BodyError::Header { len, max: MAX_HEADER }),
            _ => Ok(()),
        }
    }

    fn header(&mut self, id: MessageId, usual: Kind, destination: Destination) -> Header {
        let mut header = Header::new(id, self.kind.unwrap_or(usual), destination);
        header.time_to_live = self.ttl;
        header.reply_to = self.reply_to;
        header.correlation_id = self.correlation_id;
        header.extra = self.extra.take();
        if let Some(content_type) = self.body.content_type {
            let known = &mut header.extra_mut().content_type;
            known.get_or_insert_with(|| content_type.to_owned());
        }
        header
    }
}

/// A message that is too large to send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The body is over [`Config::max_body`](crate::Config::max_body).
    #[error("the body is {len} bytes long; at most {max} are allowed")]
    Body {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The user headers, the key, the content type and the trace take over 64 KiB.
    #[error("the header is {len} bytes long; at most {max} are allowed")]
    Header {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
}

/// Gives a builder the setters that every message has.
macro_rules! message_setters {
    () => {
        /// Says what the message is: event, command or document.
        pub fn kind(mut self, kind: Kind) -> Self {
            self.draft.kind = Some(kind);
            self
        }

        /// Messages with the same key belong in one order.
        pub fn key(mut self, key: impl Into<String>) -> Self {
            self.extra().ordering_key = Some(key.into());
            self
        }

        /// Names the body's media type.
        pub fn content_type(mut self, media_type: impl Into<String>) -> Self {
            self.extra().content_type = Some(media_type.into());
            self
        }

        /// Makes it part of a trace: a W3C `traceparent`.
        pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
            self.extra().traceparent = Some(traceparent.into());
            self
        }

        /// Adds a user header.
        pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
            self.extra().headers.push((name.into(), value.into()));
            self
        }

        fn extra(&mut self) -> &mut crate::message::Extra {
            self.draft.extra.get_or_insert_default()
        }
    };
}

// Publish.

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
            let message = Message { from: shared.id, header, body };
            let cost = message.body.len() as u64 + 128;
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

// Send and request.

/// A one-way message that can't be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The service's name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// It is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// Nobody takes messages for the recipient. Try again when it is back.
    #[error("no node serves {0}")]
    NoService(Recipient),
    /// The recipient can't take it now.
    #[error("the message was dropped: {0}")]
    Dropped(DropReason),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// A one-way message that was queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sent {
    /// Its id.
    pub id: MessageId,
    /// The node that was chosen.
    pub to: NodeId,
}

/// A one-way message that is sent when this is awaited.
#[must_use = "a message is sent when this is awaited"]
pub struct Send<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) recipient: Result<Recipient, AddressError>,
    pub(crate) draft: Draft,
}

impl<'a> Send<'a> {
    message_setters!();

    /// How long the message is worth handling: what is older when its turn comes is dropped by
    /// the receiver, and counted here.
    pub fn time_to_live(mut self, ttl: Duration) -> Self {
        self.draft.ttl = Some(ttl);
        self
    }

    /// Names the node to which an answer should go. The answer is a message of its own, sent
    /// there by the receiver's handler.
    pub fn reply_to(mut self, node: NodeId) -> Self {
        self.draft.reply_to = Some(node);
        self
    }

    /// Says which message this one answers.
    pub fn correlation_id(mut self, id: MessageId) -> Self {
        self.draft.correlation_id = Some(id);
        self
    }

    async fn run(mut self) -> Result<Sent, SendError> {
        let recipient = self.recipient?;
        self.draft.check(self.shared)?;
        if self.shared.is_stopping() {
            return Err(SendError::ShutDown);
        }
        let to = self.shared.find(&recipient).await;
        let to = to.ok_or_else(|| SendError::NoService(recipient.clone()))?;
        let id = self.shared.ids.next_now();
        let header = self.draft.header(id, Kind::Command, recipient.into());
        let node = to.node(self.shared);
        self.shared.hand_over(&to, header, self.draft.body).map_err(|reason| {
            self.shared.count_drop(node, reason, 1);
            SendError::Dropped(reason)
        })?;
        Ok(Sent { id, to: node })
    }
}

impl<'a> IntoFuture for Send<'a> {
    type Output = Result<Sent, SendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + std::marker::Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

/// A request that got no reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The service's name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// It is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// Nobody takes messages for the recipient.
    #[error("no node serves {0}")]
    NoService(Recipient),
    /// The request could not be queued; it was not executed.
    #[error("the request was dropped: {0}")]
    Dropped(DropReason),
    /// The handler declined, with its own code and text.
    #[error("the handler declined: {0}")]
    Handler(HandlerError),
    /// No reply came in time. The request may or may not have been executed.
    #[error("no reply within {0:?}")]
    DeadlineExceeded(Duration),
    /// The chosen node was lost. It is not run again elsewhere by itself: that is the caller's
    /// choice.
    #[error("the peer was lost{}", if *.maybe_executed { "; the request may have been executed" } else { " before the request was sent" })]
    PeerLost {
        /// Whether the request may have been executed.
        maybe_executed: bool,
    },
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
}

/// A request that is sent when this is awaited. Dropping the future takes the request back: from
/// the queue, or by telling its handler that it is cancelled.
#[must_use = "a request is sent when this is awaited"]
pub struct Request<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) recipient: Result<Recipient, AddressError>,
    pub(crate) draft: Draft,
    pub(crate) deadline: Duration,
}

impl<'a> Request<'a> {
    message_setters!();

    /// How long to wait for the reply: 10 s by default
    /// ([`Config::request_deadline`](crate::Config::request_deadline)). The time spent in
    /// waiting for an instance of the service counts.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    async fn run(mut self) -> Result<Message, RequestError> {
        let recipient = self.recipient?;
        self.draft.check(self.shared)?;
        let shared = self.shared;
        if shared.is_stopping() {
            return Err(RequestError::ShutDown);
        }
        let begun = shared.now();
        let to = timeout(self.deadline, shared.find(&recipient)).await.ok().flatten();
        let to = to.ok_or_else(|| RequestError::NoService(recipient.clone()))?;
        let id = shared.ids.next_now();
        let mut header = self.draft.header(id, Kind::Command, recipient.into());
        header.reply_to = Some(shared.id);
        header.time_to_live = Some(self.deadline.saturating_sub(shared.now().since(begun)));
        let (waiter, outcome) = oneshot::channel();
        let link = to.link();
        shared.open_request(id, begun + self.deadline, link, waiter);
        let mut pending = Pending { shared, id, ended: false };
        add(&shared.counters.requests, 1);
        if let Err(reason) = shared.hand_over(&to, header, self.draft.body) {
            pending.ended = shared.end_request(id).is_some();
            shared.count_drop(to.node(shared), reason, 1);
            return Err(match reason {
                DropReason::LinkLost => RequestError::PeerLost { maybe_executed: false },
                reason => RequestError::Dropped(reason),
            });
        }
        let outcome = outcome.await;
        pending.ended = true;
        match outcome {
            Ok(Outcome::Reply(message)) => Ok(message),
            Ok(Outcome::Failed(failure)) => {
                Err(RequestError::Handler(HandlerError::new(failure.code, failure.text)))
            }
            Ok(Outcome::DeadlineExceeded) => Err(RequestError::DeadlineExceeded(self.deadline)),
            Ok(Outcome::PeerLost { maybe_executed }) => {
                Err(RequestError::PeerLost { maybe_executed })
            }
            Ok(Outcome::ShutDown) | Err(_) => Err(RequestError::ShutDown),
        }
    }
}

impl<'a> IntoFuture for Request<'a> {
    type Output = Result<Message, RequestError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + std::marker::Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

/// Takes a request back when its future is dropped.
struct Pending<'a> {
    shared: &'a Arc<Shared>,
    id: MessageId,
    ended: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.ended
            && let Some((_, link)) = self.shared.end_request(self.id)
        {
            self.shared.cancel_call(self.id, link);
        }
    }
}

/// Who was chosen to take a call.
enum Chosen {
    Here,
    There(Arc<LinkCell>),
}

impl Chosen {
    fn link(&self) -> Option<crate::engine::LinkId> {
        match self {
            Self::Here => None,
            Self::There(cell) => Some(cell.id),
        }
    }

    fn node(&self, shared: &Shared) -> NodeId {
        match self {
            Self::Here => shared.id,
            Self::There(cell) => cell.peer,
        }
    }
}

impl Shared {
    /// Chooses who takes a call; waits for the grace if nobody does.
    async fn find(&self, recipient: &Recipient) -> Option<Chosen> {
        if let Some(chosen) = self.choose(recipient) {
            return Some(chosen);
        }
        if self.config.fail_fast && self.routing.load().peers() > 0 {
            return None;
        }
        let mut changes = self.routing_version.subscribe();
        let found = async {
            loop {
                if let Some(chosen) = self.choose(recipient) {
                    return chosen;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        timeout(self.config.service_grace, found).await.ok()
    }

    fn choose(&self, recipient: &Recipient) -> Option<Chosen> {
        let routing = self.routing.load();
        match recipient {
            Recipient::Node(node) if *node == self.id => {
                self.service(&ServiceName::node_inbox()).map(|_| Chosen::Here)
            }
            Recipient::Node(node) => {
                let inbox = routing.instances(&ServiceName::node_inbox());
                let instance = inbox.iter().find(|instance| instance.peer == *node)?;
                instance.link.clone().map(Chosen::There)
            }
            Recipient::Service(name) => {
                let there = routing.instances(name);
                let Some(here) = self.service(name) else {
                    return self.choose_among(there);
                };
                // This node is one competitor among the others.
                let local = (here.running() as u64, here.concurrency);
                let best = self.choose_among(there);
                match best {
                    Some(Chosen::There(cell)) => {
                        let of =
                            there.iter().find(|instance| instance.peer == cell.peer)?.concurrency;
                        let load = cell.unfinished_calls();
                        let here_is_freer = local.0 * u64::from(of) <= load * u64::from(local.1);
                        let tie = local.0 == 0 && load == 0;
                        let turn =
                            self.turn.load(Ordering::Relaxed).is_multiple_of(there.len() + 1);
                        let here = if tie { turn } else { here_is_freer };
                        Some(if here { Chosen::Here } else { Chosen::There(cell) })
                    }
                    _ => Some(Chosen::Here),
                }
            }
        }
    }

    fn choose_among(&self, instances: &[Instance<Option<Arc<LinkCell>>>]) -> Option<Chosen> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if let [only] = instances {
            return only.link.clone().map(Chosen::There);
        }
        let chosen = least_loaded(instances, turn, |instance| {
            let load = instance.link.as_ref().map(|cell| cell.unfinished_calls());
            (load.unwrap_or(u64::from(u32::MAX)), instance.concurrency)
        });
        chosen?.link.clone().map(Chosen::There)
    }

    fn hand_over(
        self: &Arc<Self>,
        to: &Chosen,
        header: Header,
        body: Body,
    ) -> Result<(), DropReason> {
        match to {
            Chosen::There(cell) => {
                cell.send_message(Envelope { header, payload: Payload::Call(body.bytes) })?;
                add(&self.counters.queued, 1);
            }
            Chosen::Here => self.admit(Message { from: self.id, header, body: body.bytes }, None),
        }
        Ok(())
    }
}
