//! A session with NATS; guaranteed messages use JetStream.
//!
//! | peerbus | NATS, all under `peerbus.MESH` |
//! |---|---|
//! | topic | subject `.e.TOPIC`; patterns are NATS's own wildcards |
//! | service | subject `.s.NAME`, queue group `peerbus` |
//! | a node, replies | subject `.n.NODE` |
//! | no instance | "no responders", to the reply subject `.x.NODE.ID` |
//! | every node | subject `.c` |
//! | guaranteed, to a service or node | stream `peerbus_MESH_work` (work queue), subject `.w.NAME`, one durable consumer for each name |
//! | guaranteed, on a topic | stream `peerbus_MESH_kept` (interest), subject `.k.TOPIC`, one durable consumer for each subscription |
//! | dead letter | stream `peerbus_MESH_dead`, subject `.d.` and the rest of its own, reason in the header `peerbus-reason` |
//!
//! The parcel's head is the header `peerbus`, in base64; the payload is the body.
//!
//! A killed server may forget that it delivered a message, and count its deliveries from one again.
//! So the metadata of each durable consumer states for which life of the server the counts are
//! right, and after which message of the stream. Earlier messages are marked as redelivered, even
//! if they were not. A server older than 2.10 keeps no such metadata: then all messages stored
//! before a node connects are marked. In a cluster the life is that of the server to which the node
//! is connected: if another server is killed, some messages may not be marked.

use std::collections::HashMap;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::{self, AckKind, stream};
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, HeaderMap, ServerAddr, StatusCode, Subscriber,
};
use bytes::Bytes;
use data_encoding::BASE64_NOPAD;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use ring::digest;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::credentials::{Credentials, Kind};
use super::session::{
    ANSWER, ConnectError, Connecting, DurableSession, Ending, Failed, Lost, Performed, Session,
    boxed, certificates, unlogged,
};
use super::{
    Ack, AckAction, BrokerUrl, Guaranteed, Incoming, Kept, Me, Outgoing, StoreFailure, Via,
};
use crate::address::{Destination, Pattern, Recipient, ServiceName};
use crate::engine::delivery::RetryPolicy;
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::text::Line;
use crate::wire::{DeliveryOutcome, Parcel};

/// The header with the parcel's head.
const HEAD: &str = "peerbus";
/// The header of a dead letter with its reason.
const REASON: &str = "peerbus-reason";
const GROUP: &str = "peerbus";
/// The keys of a consumer's metadata: the life of the server that counts its deliveries, and the
/// last message of the stream before that life.
const COUNTED_BY: &str = "peerbus-counted-by";
const COUNTED_BEHIND: &str = "peerbus-counted-behind";
/// The most guaranteed messages requested at a time.
const BATCH: usize = 500;

/// Connects to a server.
pub(super) fn connect<'a>(
    url: &'a BrokerUrl,
    me: &'a Me,
    incoming: &'a Arc<dyn Incoming>,
) -> Connecting<'a> {
    boxed(NatsSession::connect(url, me, incoming))
}

struct NatsSession {
    client: Client,
    jetstream: Option<Streams>,
    names: Names,
    me: Me,
    incoming: Arc<dyn Incoming>,
    ending: Ending,
    tasks: Mutex<HashMap<Task, AbortHandle>>,
}

/// The streams of a mesh on the server.
#[derive(Clone)]
struct Streams {
    context: jetstream::Context,
    work: stream::Stream,
    kept: stream::Stream,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Task {
    Inbox,
    All,
    Unrouted,
    Topics(Pattern),
    Service(ServiceName),
    Work(ServiceName),
    Durable(ServiceName),
}

/// The subjects of a mesh.
#[derive(Debug, Clone)]
struct Names {
    prefix: String,
}

impl Names {
    fn topic(&self, topic: &str) -> String {
        format!("{}.e.{topic}", self.prefix)
    }

    fn service(&self, name: &str) -> String {
        format!("{}.s.{name}", self.prefix)
    }

    fn node(&self, node: &NodeId) -> String {
        format!("{}.n.{node}", self.prefix)
    }

    fn all(&self) -> String {
        format!("{}.c", self.prefix)
    }

    fn unrouted(&self, node: &NodeId) -> String {
        format!("{}.x.{node}", self.prefix)
    }

    fn work(&self, name: &str) -> String {
        format!("{}.w.{name}", self.prefix)
    }

    fn kept(&self, topic: &str) -> String {
        format!("{}.k.{topic}", self.prefix)
    }

    fn dead(&self, subject: &str) -> String {
        format!("{}.d{}", self.prefix, subject.strip_prefix(&self.prefix).unwrap_or_default())
    }
}

impl NatsSession {
    async fn connect(
        url: &BrokerUrl,
        me: &Me,
        incoming: &Arc<dyn Incoming>,
    ) -> Result<Self, ConnectError> {
        let ending = Ending::new();
        let (tell, receiver) = (ending.clone(), incoming.clone());
        let mut options = match url.credentials() {
            Some(credentials) => authenticated(credentials),
            None => ConnectOptions::new(),
        };
        options = options
            .name(format!("peerbus {} {}", me.name, me.id.short()))
            // Another session restores the state of this one.
            .max_reconnects(1)
            .connection_timeout(ANSWER)
            .event_callback(move |event| {
                match event {
                    async_nats::Event::Disconnected => tell.tell("the connection was closed"),
                    async_nats::Event::Closed => tell.tell("the connection has ended"),
                    async_nats::Event::ClientError(error) => tell.tell(error),
                    // The client's own queue of received messages is full. It may not report each
                    // lost message.
                    async_nats::Event::SlowConsumer(_) => {
                        receiver.handle_dropped(DropReason::SlowSubscriber, 1);
                    }
                    other => tracing::debug!(event = %other, "NATS"),
                }
                async {}
            });
        let server: ServerAddr = url.to_string().parse().map_err(ConnectError::for_good)?;
        if let Some(ca) = &me.ca {
            // The client reads the file itself.
            certificates(ca)?;
            options = options.add_root_certificates(ca.clone());
        }
        let client =
            unlogged(options.connect(server)).await.map_err(|error| match error.kind() {
                ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                    ConnectError::for_good("wrong credentials")
                }
                ConnectErrorKind::ServerParse | ConnectErrorKind::Tls => {
                    ConnectError::for_good(error)
                }
                _ => ConnectError::passing(error),
            })?;
        let names = Names { prefix: format!("peerbus.{}", me.mesh) };
        let jetstream = Streams::open(&client, &names, me).await?;
        let session = Self {
            client,
            jetstream,
            names,
            me: me.clone(),
            incoming: incoming.clone(),
            ending,
            tasks: Mutex::new(Rank::Leaf, HashMap::new()),
        };
        session.listen().await.map_err(ConnectError::passing)?;
        Ok(session)
    }

    /// Subscribes to the subjects that every node receives.
    async fn listen(&self) -> Result<(), async_nats::Error> {
        let inbox = self.client.subscribe(self.names.node(&self.me.id)).await?;
        self.forward(Task::Inbox, inbox, |_| Some(Via::Inbox));
        let all = self.client.subscribe(self.names.all()).await?;
        self.forward(Task::All, all, |_| Some(Via::All));
        let subject = format!("{}.*", self.names.unrouted(&self.me.id));
        let mut unrouted = self.client.subscribe(subject).await?;
        let incoming = self.incoming.clone();
        self.spawn(Task::Unrouted, async move {
            while let Some(message) = unrouted.next().await {
                let id = message.subject.rsplit('.').next().and_then(|id| id.parse().ok());
                if let (Some(StatusCode::NO_RESPONDERS), Some(id)) = (message.status, id) {
                    incoming.handle_unrouted(id);
                }
            }
        });
        self.client.flush().await?;
        Ok(())
    }

    async fn publish(&self, message: Outgoing) -> Result<(), async_nats::PublishError> {
        let (subject, reply, parcel) = match message {
            Outgoing::Publish(topic, parcel) => (self.names.topic(topic.as_str()), None, parcel),
            Outgoing::Call(to, id, _, parcel) => {
                let subject = match &to {
                    Recipient::Service(name) => self.names.service(name.as_str()),
                    Recipient::Node(node) => self.names.node(node),
                };
                (subject, Some(format!("{}.{id}", self.names.unrouted(&self.me.id))), parcel)
            }
            Outgoing::Reply(node, parcel) => (self.names.node(&node), None, parcel),
            Outgoing::Broadcast(parcel) => (self.names.all(), None, parcel),
        };
        let headers = headers(&parcel);
        match reply {
            Some(reply) => {
                let client = &self.client;
                client.publish_with_reply_and_headers(subject, reply, headers, parcel.body).await
            }
            None => self.client.publish_with_headers(subject, headers, parcel.body).await,
        }
    }

    async fn subscribe_events(&self, pattern: Pattern) -> Result<(), Failed> {
        let subject = self.names.topic(pattern.as_str());
        let subscriber = self.client.subscribe(subject).await.map_err(Failed::lost)?;
        let start = self.names.topic("").len();
        let wanted = pattern.clone();
        self.forward(Task::Topics(pattern), subscriber, move |subject| {
            let topic = subject.get(start..)?.parse().ok()?;
            Some(Via::Topic(topic, Some(wanted.clone())))
        });
        self.client.flush().await.map_err(Failed::lost)
    }

    async fn serve_calls(&self, name: ServiceName, concurrency: u32) -> Result<(), Failed> {
        let subject = self.names.service(name.as_str());
        if name != ServiceName::node_inbox() {
            let subscriber = self.client.queue_subscribe(subject, GROUP.into()).await;
            let via = Via::Service(name.clone());
            let forwarded = move |_: &str| Some(via.clone());
            self.forward(Task::Service(name.clone()), subscriber.map_err(Failed::lost)?, forwarded);
        }
        self.client.flush().await.map_err(Failed::lost)?;
        let Some(streams) = &self.jetstream else { return Ok(()) };
        let (channel, via) = match name == ServiceName::node_inbox() {
            true => (self.me.id.to_string(), Via::Inbox),
            false => (name.to_string(), Via::Service(name.clone())),
        };
        let config = self.consumer_config(escape(&channel), self.names.work(&channel));
        let taken = self.take_on(&streams.work, config).await?;
        self.work(Task::Work(name), taken, concurrency, None, move |_| Some(via.clone())).await
    }

    async fn consume_kept(
        &self,
        name: ServiceName,
        pattern: &Pattern,
        concurrency: u32,
    ) -> Result<(), Failed> {
        let Some(streams) = &self.jetstream else {
            return Err(Failed::Refused("the server has no JetStream".into()));
        };
        let subject = self.names.kept(pattern.as_str());
        let config = self.consumer_config(self.durable_name(&name), subject);
        let taken = self.take_on(&streams.kept, config).await?;
        let start = self.names.kept("").len();
        let via = move |subject: &str| Some(Via::Topic(subject.get(start..)?.parse().ok()?, None));
        self.work(Task::Durable(name.clone()), taken, concurrency, Some(name), via).await
    }

    /// Opens a durable consumer with these settings, and returns which deliveries are counted.
    async fn take_on(
        &self,
        stream: &stream::Stream,
        mut config: pull::Config,
    ) -> Result<Taken, Failed> {
        let name = config.durable_name.clone().unwrap_or_default();
        let server = self.client.server_info().server_id;
        let told = match stream.consumer_info(&name).await {
            Ok(there) => Counted::told(&there.config.metadata).filter(|it| it.server == server),
            // Nothing was delivered yet.
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => {
                Some(Counted { server: server.clone(), behind: 0 })
            }
            Err(error) => return Err(refused(error)),
        };
        let counted = match told {
            Some(counted) => counted,
            None => {
                let info = stream.get_info().await.map_err(refused)?;
                Counted { server, behind: info.state.last_sequence }
            }
        };
        config.metadata = counted.metadata();
        let consumer = stream.create_consumer(config).await.map_err(|error| {
            let told =
                format!("the consumer {name} exists with other settings, or can't be created");
            Failed::Refused(format!("{told}: {error}"))
        })?;
        Ok(Taken { consumer, counted })
    }

    fn durable_name(&self, name: &ServiceName) -> String {
        format!("{}_{}", self.me.id.short(), escape(name.as_str()))
    }

    fn consumer_config(&self, name: String, filter_subject: String) -> pull::Config {
        pull::Config {
            durable_name: Some(name),
            filter_subject,
            ack_policy: AckPolicy::Explicit,
            ack_wait: self.me.lease,
            max_ack_pending: 10_000,
            ..pull::Config::default()
        }
    }

    /// Takes guaranteed messages, and acknowledges them to the server.
    async fn work(
        &self,
        task: Task,
        taken: Taken,
        concurrency: u32,
        subscription: Option<ServiceName>,
        via: impl Fn(&str) -> Option<Via> + Send + 'static,
    ) -> Result<(), Failed> {
        let Taken { consumer, counted } = taken;
        let batch = (concurrency as usize * 2).clamp(1, BATCH);
        let mut messages =
            consumer.stream().max_messages_per_batch(batch).messages().await.map_err(refused)?;
        let incoming = self.incoming.clone();
        let Some(streams) = self.jetstream.clone() else { return Ok(()) };
        let (names, lease, retry) = (self.names.clone(), self.me.lease, self.me.retry);
        let client = self.client.clone();
        self.spawn(task, async move {
            while let Some(Ok(message)) = messages.next().await {
                let info = message.info().ok();
                let attempt = info.as_ref().map_or(1, |info| info.delivered.max(1) as u32);
                let sequence = info.map_or(0, |info| info.stream_sequence);
                // The client may have reconnected before this session ends.
                let server = client.server_info().server_id;
                let redelivered = attempt > 1 || !counted.counts(&server, sequence);
                let (ack, acked) = oneshot::channel();
                match via(&message.subject) {
                    Some(via) => {
                        let subscription = subscription.clone();
                        let kept = Kept { subscription, attempt, redelivered, ack };
                        incoming.handle_kept(via, parcel(&message), kept);
                    }
                    None => {
                        let reason = format!("{} is not a topic", message.subject);
                        let _waits = ack.send(Ack::Ended(DeliveryOutcome::Rejected(reason)));
                    }
                }
                let (context, names) = (streams.context.clone(), names.clone());
                tokio::spawn(settle(message, attempt, acked, lease, retry, context, names));
            }
        });
        Ok(())
    }

    async fn store_kept(&self, message: Guaranteed) {
        let Guaranteed { id, to, parcel, stored, .. } = message;
        let Some(streams) = &self.jetstream else {
            let text = "the server has no JetStream".to_owned();
            let _gave_up = stored.send(Err(StoreFailure::Refused(text)));
            return;
        };
        let subject = match &to {
            Destination::Topic(topic) => self.names.kept(topic.as_str()),
            Destination::Service(name) => self.names.work(name.as_str()),
            Destination::Node(node) => self.names.work(&node.to_string()),
        };
        let mut headers = headers(&parcel);
        // The server detects duplicates by this for two minutes.
        headers.insert("Nats-Msg-Id", deduplication_id(&self.me.id, id, &parcel.body));
        let sent = streams.context.publish_with_headers(subject, headers, parcel.body).await;
        tokio::spawn(async move {
            let result = match sent {
                Ok(confirmed) => confirmed.await.map(drop),
                Err(error) => Err(error),
            };
            use jetstream::context::PublishErrorKind::{BrokenPipe, TimedOut};
            let _gave_up = stored.send(result.map_err(|error| match error.kind() {
                BrokenPipe | TimedOut => StoreFailure::Lost,
                _ => StoreFailure::Refused(error.to_string()),
            }));
        });
    }

    /// Passes on the messages of a subscription.
    fn forward(
        &self,
        task: Task,
        mut subscriber: Subscriber,
        via: impl Fn(&str) -> Option<Via> + Send + 'static,
    ) {
        let incoming = self.incoming.clone();
        self.spawn(task, async move {
            while let Some(message) = subscriber.next().await {
                if let Some(via) = via(&message.subject) {
                    incoming.handle_message(via, parcel(&message), None);
                }
            }
        });
    }

    fn spawn(&self, task: Task, future: impl Future<Output = ()> + Send + 'static) {
        let running = tokio::spawn(future).abort_handle();
        if let Some(before) = lock(&self.tasks).insert(task, running) {
            before.abort();
        }
    }

    /// Ends a task. Dropping its subscriber unsubscribes.
    fn end(&self, task: &Task) {
        if let Some(running) = lock(&self.tasks).remove(task) {
            running.abort();
        }
    }
}

impl Session for NatsSession {
    fn title(&self) -> String {
        let info = self.client.server_info();
        let jetstream = if self.jetstream.is_some() { "" } else { " without JetStream" };
        format!("NATS {}{jetstream}", info.version)
    }

    /// Puts the message into the client's own queue, if that has room.
    fn try_send(&self, message: Outgoing) -> Option<Outgoing> {
        let again = message.clone();
        match self.publish(message).now_or_never() {
            Some(Ok(())) => None,
            Some(Err(_)) | None => Some(again),
        }
    }

    fn send(&self, message: Outgoing) -> Performed<'_> {
        async { self.publish(message).await.map_err(Failed::lost) }.boxed()
    }

    fn subscribe(&self, pattern: Pattern) -> Performed<'_> {
        self.subscribe_events(pattern).boxed()
    }

    fn unsubscribe(&self, pattern: Pattern) -> Performed<'_> {
        self.end(&Task::Topics(pattern));
        ready(Ok(())).boxed()
    }

    fn serve(&self, name: ServiceName, concurrency: u32) -> Performed<'_> {
        self.serve_calls(name, concurrency).boxed()
    }

    fn withdraw(&self, name: ServiceName) -> Performed<'_> {
        self.end(&Task::Service(name.clone()));
        self.end(&Task::Work(name));
        async { self.client.flush().await.map_err(Failed::lost) }.boxed()
    }

    fn durable(&self) -> Option<&dyn DurableSession> {
        Some(self)
    }

    fn lost(&self) -> BoxFuture<'_, Lost> {
        self.ending.lost().boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        timeout(ANSWER, self.client.flush()).map(drop).boxed()
    }
}

impl DurableSession for NatsSession {
    fn store(&self, message: Guaranteed) -> Performed<'_> {
        self.store_kept(message).map(Ok).boxed()
    }

    fn consume(&self, name: ServiceName, pattern: Pattern, concurrency: u32) -> Performed<'_> {
        async move { self.consume_kept(name, &pattern, concurrency).await }.boxed()
    }

    fn pause(&self, name: ServiceName) -> Performed<'_> {
        self.end(&Task::Durable(name));
        ready(Ok(())).boxed()
    }

    fn forget(&self, name: ServiceName) -> Performed<'_> {
        self.end(&Task::Durable(name.clone()));
        let forgetting = async move {
            let Some(streams) = &self.jetstream else { return Ok(()) };
            let gone = streams.kept.delete_consumer(&self.durable_name(&name)).await;
            gone.map(drop).map_err(refused)
        };
        forgetting.boxed()
    }
}

impl Drop for NatsSession {
    fn drop(&mut self) {
        lock(&self.tasks).values().for_each(AbortHandle::abort);
    }
}

impl Streams {
    /// Opens the streams of a mesh, creating missing ones; `None` if the server has no JetStream.
    async fn open(client: &Client, names: &Names, me: &Me) -> Result<Option<Self>, ConnectError> {
        let context = jetstream::new(client.clone());
        if let Err(error) = context.query_account().await {
            tracing::debug!(%error, "no JetStream");
            return Ok(None);
        }
        let config = |what: &str, subject: &str, retention| stream::Config {
            name: format!("peerbus_{}_{what}", me.mesh),
            subjects: vec![format!("{}.{subject}.>", names.prefix)],
            retention,
            storage: stream::StorageType::File,
            ..stream::Config::default()
        };
        use stream::RetentionPolicy::{Interest, Limits, WorkQueue};
        let work = find(&context, config("work", "w", WorkQueue)).await?;
        let kept = find(&context, config("kept", "k", Interest)).await?;
        find(&context, config("dead", "d", Limits)).await?;
        Ok(Some(Self { context, work, kept }))
    }
}

/// Opens a stream with these settings, or creates it.
async fn find(
    context: &jetstream::Context,
    wanted: stream::Config,
) -> Result<stream::Stream, ConnectError> {
    let name = wanted.name.clone();
    let found = context.get_or_create_stream(&wanted).await.map_err(ConnectError::passing)?;
    let there = &found.cached_info().config;
    match there.subjects == wanted.subjects && there.retention == wanted.retention {
        true => Ok(found),
        false => Err(ConnectError::for_good(format!(
            "the stream {name} exists with other settings: retention {:?} and subjects {:?} \
             instead of {:?} and {:?}",
            there.retention, there.subjects, wanted.retention, wanted.subjects
        ))),
    }
}

/// A durable consumer, and which of its deliveries are counted.
struct Taken {
    consumer: jetstream::consumer::Consumer<pull::Config>,
    counted: Counted,
}

/// The messages of a consumer of which the server has counted all deliveries.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Counted {
    /// The life of the server.
    server: String,
    /// The sequence of the last message of the stream whose deliveries may not be counted.
    behind: u64,
}

impl Counted {
    fn told(metadata: &HashMap<String, String>) -> Option<Self> {
        let behind = metadata.get(COUNTED_BEHIND)?.parse().ok()?;
        Some(Self { server: metadata.get(COUNTED_BY)?.clone(), behind })
    }

    fn metadata(&self) -> HashMap<String, String> {
        let told = [(COUNTED_BY, self.server.clone()), (COUNTED_BEHIND, self.behind.to_string())];
        told.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Returns true if that server has counted all deliveries of a message.
    fn counts(&self, server: &str, sequence: u64) -> bool {
        server == self.server && sequence > self.behind
    }
}

/// Waits for the acknowledgement of a guaranteed message, and passes it to the server.
async fn settle(
    message: jetstream::Message,
    attempt: u32,
    mut acked: oneshot::Receiver<Ack>,
    lease: Duration,
    retry: RetryPolicy,
    context: jetstream::Context,
    names: Names,
) {
    let ack = loop {
        tokio::select! {
            ack = &mut acked => break ack,
            // The node ends a handler that takes too long; until then it is working.
            () = sleep(lease / 3) => {
                let _too_late = message.ack_with(AckKind::Progress).await;
            }
        }
    };
    let kind = match AckAction::after(ack.ok(), attempt, &retry) {
        AckAction::Forget => AckKind::Ack,
        AckAction::Again(wait) => AckKind::Nak(Some(wait)),
        AckAction::DeadLetter(reason) => {
            match dead_letter(&message, &reason, &context, &names).await {
                Ok(()) => AckKind::Term,
                Err(error) => {
                    tracing::warn!(%error, "can't store a dead letter; its message is redelivered");
                    AckKind::Nak(Some(retry.pause(attempt.saturating_sub(1))))
                }
            }
        }
    };
    if let Err(error) = message.ack_with(kind).await {
        tracing::debug!(%error, "an acknowledgement was lost; its message is redelivered");
    }
}

/// Stores a dead letter.
async fn dead_letter(
    message: &jetstream::Message,
    reason: &str,
    context: &jetstream::Context,
    names: &Names,
) -> Result<(), jetstream::context::PublishError> {
    let mut headers = message.headers.clone().unwrap_or_default();
    headers.insert(REASON, Line(reason).to_string());
    let subject = names.dead(&message.subject);
    let buried = context.publish_with_headers(subject, headers, message.payload.clone()).await?;
    buried.await.map(drop)
}

/// Options that give the credentials to the first connection alone. The client logs them whenever it
/// connects, and connects again by itself once, where its log can't be kept away from it.
fn authenticated(Credentials(credentials): &Credentials) -> ConnectOptions {
    let mut auth = async_nats::Auth::new();
    match credentials {
        Kind::User { name, password } => {
            auth.username = Some(name.clone());
            auth.password = Some(password.reveal().to_owned());
        }
        Kind::Token(token) => auth.token = Some(token.reveal().to_owned()),
    }
    let auth = Mutex::new(Rank::Leaf, Some(auth));
    ConnectOptions::with_auth_callback(move |_nonce| {
        let again = || async_nats::AuthError::new("another session connects");
        ready(lock(&auth).take().ok_or_else(again))
    })
}

/// The id by which the server detects a message that is stored again. The message's own id can be
/// guessed, and whoever used it first would keep the message from being stored.
fn deduplication_id(from: &NodeId, id: MessageId, body: &[u8]) -> String {
    let mut digest = digest::Context::new(&digest::SHA256);
    for part in [from.as_bytes(), &id.to_bytes()[..], body] {
        digest.update(part);
    }
    format!("{id}-{}", BASE64_NOPAD.encode(digest.finish().as_ref()))
}

fn headers(parcel: &Parcel) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if !parcel.head.is_empty() {
        headers.insert(HEAD, BASE64_NOPAD.encode(&parcel.head));
    }
    headers
}

fn parcel(message: &async_nats::Message) -> Parcel {
    let head = message.headers.as_ref().and_then(|headers| headers.get(HEAD));
    let head = head.and_then(|head| BASE64_NOPAD.decode(head.as_str().as_bytes()).ok());
    Parcel { head: head.map_or_else(Bytes::new, Bytes::from), body: message.payload.clone() }
}

/// Escapes a name for use as a consumer's name; different names stay different.
fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for c in name.chars() {
        match c.is_ascii_alphanumeric() || c == '-' {
            true => escaped.push(c),
            false => escaped.push_str(&format!("_{:x}_", u32::from(c))),
        }
    }
    escaped
}

fn refused(error: impl std::fmt::Display) -> Failed {
    Failed::Refused(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_consumers_stay_different() {
        assert_eq!(escape("commands-eu"), "commands-eu");
        assert_ne!(escape("a.b"), escape("a_b"));
        assert!(escape("a.b/c*").chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)));
    }

    #[test]
    fn deliveries_of_an_earlier_life_of_the_server_are_not_counted() {
        let counted = Counted { server: "A".into(), behind: 7 };
        assert_eq!(Counted::told(&counted.metadata()), Some(counted.clone()));
        assert_eq!(Counted::told(&HashMap::new()), None);
        assert!(counted.counts("A", 8));
        assert!(!counted.counts("A", 7), "it was there before");
        assert!(!counted.counts("B", 8), "the client has connected to another one");
    }

    #[test]
    fn a_dead_letter_keeps_its_subject_behind_a_mark() {
        let names = Names { prefix: "peerbus.default".into() };
        assert_eq!(names.dead(&names.work("billing")), "peerbus.default.d.w.billing");
    }

    #[test]
    fn nobody_uses_up_the_deduplication_id_of_anothers_message() {
        let (one, other) = (NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32]));
        let id = MessageId::from_bytes([7; 16]);
        let own = deduplication_id(&one, id, b"true");
        assert_eq!(own, deduplication_id(&one, id, b"true"));
        assert_ne!(own, deduplication_id(&other, id, b"true"));
        assert_ne!(own, deduplication_id(&one, id, b"forged"));
        assert!(own.bytes().all(|byte| byte.is_ascii_graphic()));
    }

    #[test]
    fn a_head_survives_as_a_header() {
        let sent = Parcel { head: Bytes::from_static(&[0, 255, 10, 13]), body: "body".into() };
        let headers = headers(&sent);
        assert_eq!(
            BASE64_NOPAD.decode(headers.get(HEAD).unwrap().as_str().as_bytes()).unwrap(),
            sent.head
        );
    }
}
