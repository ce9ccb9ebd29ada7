//! A session with RabbitMQ (AMQP 0-9-1); guaranteed messages use quorum queues.
//!
//! | peerbus | RabbitMQ, all names begin with `peerbus.MESH` |
//! |---|---|
//! | topic | topic exchange `.events`, routing key the topic; `>` is `*.#` |
//! | service | queue `.service.NAME`, consumed by its instances, deleted with the last of them |
//! | a node, replies, its subscriptions | queue `.node.NODE`, deleted after 60 s without its node |
//! | no instance | `mandatory`: the message is returned |
//! | every node | fanout exchange `.all` |
//! | guaranteed, to a service or node | quorum queue `.work.NAME`, publisher confirms |
//! | guaranteed, on a topic | topic exchange `.kept`, a quorum queue `.durable.NODE.NAME` for each subscription |
//! | dead letter | fanout exchange and queue `.dead`, the reason in RabbitMQ's `x-death` |
//!
//! The parcel's head is the header `peerbus`; the payload is the body. The delivery limit of the
//! quorum queues for work and for subscriptions is `max_attempts` of the node that declares them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions,
    BasicRejectOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::tcp::OwnedTLSConfig;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::uri::AMQPUri;
use lapin::{
    Acker, BasicProperties, Channel, Connection, ConnectionProperties, DefaultConnectionBuilder,
    ErrorKind, Event, ExchangeKind,
};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::credentials::Credentials;
use super::session::{
    ANSWER, ConnectError, Connecting, DurableSession, Ending, Failed, Lost, Performed, Session,
    boxed, certificates, unlogged,
};
use super::{
    Ack, AckAction, BrokerUrl, Guaranteed, Incoming, Kept, Me, Outgoing, StoreFailure, Via,
};
use crate::address::{Destination, Pattern, Recipient, ServiceName};
use crate::clock::unix_ms;
use crate::engine::delivery::RetryPolicy;
use crate::message::MessageId;
use crate::sync::{Mutex, Rank, lock};
use crate::wire::{DeliveryOutcome, Parcel};

const HEAD: &str = "peerbus";
/// The time for which a node's queue outlives it, in milliseconds.
const ORPHANED_MS: i32 = 60_000;
/// The limit of a node's queue, in bytes; beyond it the oldest messages are dropped.
const INBOX_BYTES: i64 = 64 * 1024 * 1024;
/// The heartbeat interval, in seconds.
const HEARTBEAT: u16 = 5;
const PERSISTENT: u8 = 2;

/// Connects to a server.
pub(super) fn connect<'a>(
    url: &'a BrokerUrl,
    me: &'a Me,
    incoming: &'a Arc<dyn Incoming>,
) -> Connecting<'a> {
    boxed(RabbitSession::connect(url, me, incoming))
}

struct RabbitSession {
    connection: Connection,
    names: Names,
    me: Me,
    incoming: Arc<dyn Incoming>,
    /// The channel for messages without a confirmation.
    plain: Channel,
    /// The channel for calls: one without a receiver is returned with its confirmation.
    calls: Channel,
    /// The channel for stored messages.
    storing: Channel,
    declaring: tokio::sync::Mutex<Channel>,
    declared: Mutex<HashSet<String>>,
    ending: Ending,
    tasks: Mutex<HashMap<Task, Running>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Task {
    Watch,
    Inbox,
    Service(ServiceName),
    Work(ServiceName),
    Durable(ServiceName),
}

/// A consumer. When its channel closes, unsettled messages go back to the queue.
struct Running {
    task: AbortHandle,
    channel: Option<Channel>,
}

/// The names of a mesh.
#[derive(Debug, Clone)]
struct Names {
    prefix: String,
}

impl Names {
    fn of(&self, what: &str) -> String {
        format!("{}.{what}", self.prefix)
    }

    fn node(&self, node: &impl std::fmt::Display) -> String {
        self.of(&format!("node.{node}"))
    }

    fn service(&self, name: &ServiceName) -> String {
        self.of(&format!("service.{name}"))
    }

    fn work(&self, name: &impl std::fmt::Display) -> String {
        self.of(&format!("work.{name}"))
    }

    fn durable(&self, me: &Me, name: &ServiceName) -> String {
        self.of(&format!("durable.{}.{name}", me.id.short()))
    }
}

impl RabbitSession {
    async fn connect(
        url: &BrokerUrl,
        me: &Me,
        incoming: &Arc<dyn Incoming>,
    ) -> Result<Self, ConnectError> {
        let mut uri: AMQPUri = url.bare().parse().map_err(ConnectError::for_good)?;
        if let Some((name, password)) = url.credentials().and_then(Credentials::as_user) {
            uri.authority.userinfo.username = name.to_owned();
            uri.authority.userinfo.password = password.reveal().to_owned();
        }
        if uri.vhost.is_empty() {
            uri.vhost = "/".into();
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        let cert_chain = me.ca.as_deref().map(certificates).transpose()?;
        let name = format!("peerbus {} {}", me.name, me.id.short());
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let builder = DefaultConnectionBuilder::new().map_err(ConnectError::passing)?;
        let builder = builder
            .with_uri(uri)
            .with_properties(properties)
            .with_tls_config(OwnedTLSConfig { identity: None, cert_chain });
        let connection = unlogged(builder.connect()).await.map_err(|error| match error.kind() {
            // 403 and 530: wrong credentials, and an unknown virtual host.
            ErrorKind::ProtocolError(refused) if matches!(refused.kind().get_id(), 403 | 530) => {
                ConnectError::for_good(refused.get_message())
            }
            ErrorKind::AuthProviderError(_) => ConnectError::for_good(&error),
            _ => ConnectError::passing(&error),
        })?;
        let session = Self::open(connection, me, incoming).await.map_err(ConnectError::passing)?;
        session.listen().await.map_err(|failed| match failed {
            Failed::Refused(error) => ConnectError::for_good(error),
            Failed::Lost(Lost(error)) => ConnectError::passing(error),
        })?;
        Ok(session)
    }

    async fn open(
        connection: Connection,
        me: &Me,
        incoming: &Arc<dyn Incoming>,
    ) -> lapin::Result<Self> {
        let ending = Ending::new();
        let tell = ending.clone();
        let mut events = Box::pin(connection.events_listener());
        let watching = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::Error(error) => {
                        tell.tell(error);
                        return;
                    }
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!(reason, "RabbitMQ blocks publishers for now");
                    }
                    other => tracing::debug!(?other, "RabbitMQ"),
                }
            }
            tell.tell("the connection has ended");
        });
        let confirming = async || {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            lapin::Result::Ok(channel)
        };
        let (calls, storing) = (confirming().await?, confirming().await?);
        let watching = Running { task: watching.abort_handle(), channel: None };
        Ok(Self {
            names: Names { prefix: format!("peerbus.{}", me.mesh) },
            me: me.clone(),
            incoming: incoming.clone(),
            plain: connection.create_channel().await?,
            calls,
            storing,
            declaring: tokio::sync::Mutex::new(connection.create_channel().await?),
            declared: Mutex::new(Rank::Leaf, HashSet::new()),
            ending,
            tasks: Mutex::new(Rank::Leaf, HashMap::from([(Task::Watch, watching)])),
            connection,
        })
    }

    /// Declares the exchanges and queues of every node, and takes this node's messages.
    async fn listen(&self) -> Result<(), Failed> {
        self.declare_exchange("events", ExchangeKind::Topic).await?;
        self.declare_exchange("kept", ExchangeKind::Topic).await?;
        self.declare_exchange("all", ExchangeKind::Fanout).await?;
        self.declare_exchange("dead", ExchangeKind::Fanout).await?;
        let dead = self.names.of("dead");
        self.declare_queue(&dead, durable(), quorum(None)).await?;
        self.bind(&dead, "dead", "").await?;
        let inbox = self.inbox();
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), AMQPValue::LongInt(ORPHANED_MS));
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(INBOX_BYTES));
        self.declare_queue(&inbox, QueueDeclareOptions::default(), arguments).await?;
        self.bind(&inbox, "all", "").await?;
        let channel = self.connection.create_channel().await.map_err(Failed::lost)?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumer =
            channel.basic_consume(short(&inbox)?, "".into(), options, FieldTable::default());
        let mut consumer = consumer.await.map_err(Failed::lost)?;
        let (incoming, events) = (self.incoming.clone(), self.names.of("events"));
        let all = self.names.of("all");
        let task = tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let exchange = delivery.exchange.as_str();
                let via = match exchange {
                    "" => Some(Via::Inbox),
                    _ if exchange == all => Some(Via::All),
                    _ if exchange == events => topic(&delivery),
                    _ => None,
                };
                if let Some(via) = via {
                    incoming.handle_message(via, parcel(delivery), None);
                }
            }
        });
        self.keep(Task::Inbox, task.abort_handle(), channel);
        Ok(())
    }

    fn inbox(&self) -> String {
        self.names.node(&self.me.id)
    }

    async fn send_now(&self, message: Outgoing) -> Result<(), Failed> {
        match message {
            Outgoing::Publish(topic, parcel) => {
                self.publish(&self.names.of("events"), topic.as_str(), parcel).await
            }
            Outgoing::Reply(node, parcel) => {
                self.publish("", &self.names.node(&node), parcel).await
            }
            Outgoing::Broadcast(parcel) => self.publish(&self.names.of("all"), "", parcel).await,
            Outgoing::Call(to, id, ttl, parcel) => {
                let queue = match &to {
                    Recipient::Service(name) => self.names.service(name),
                    Recipient::Node(node) => self.names.node(node),
                };
                self.call(&queue, id, ttl, parcel).await
            }
        }
    }

    async fn unbind(&self, pattern: &Pattern) -> Result<(), Failed> {
        let (queue, exchange) = (short(&self.inbox())?, short(&self.names.of("events"))?);
        let (key, none) = (short(&binding(pattern)?)?, FieldTable::default());
        let unbound = self.declaring.lock().await.queue_unbind(queue, exchange, key, none).await;
        unbound.map_err(Failed::lost)
    }

    async fn consume_kept(
        &self,
        name: ServiceName,
        pattern: &Pattern,
        concurrency: u32,
    ) -> Result<(), Failed> {
        let queue = self.names.durable(&self.me, &name);
        self.declare_queue(&queue, durable(), self.kept_arguments()).await?;
        self.bind(&queue, "kept", &binding(pattern)?).await?;
        let task = Task::Durable(name.clone());
        self.work(task, &queue, concurrency, Some(name), topic).await
    }

    async fn forget_kept(&self, name: ServiceName) -> Result<(), Failed> {
        self.end(&Task::Durable(name.clone())).await;
        let queue = short(&self.names.durable(&self.me, &name))?;
        let channel = self.declaring.lock().await;
        let deleted = channel.queue_delete(queue, QueueDeleteOptions::default()).await;
        deleted.map(drop).map_err(Failed::lost)
    }

    async fn publish(&self, exchange: &str, key: &str, parcel: Parcel) -> Result<(), Failed> {
        let (properties, options) = (properties(&parcel), BasicPublishOptions::default());
        let (exchange, key) = (short(exchange)?, short(key)?);
        let sent = self.plain.basic_publish(exchange, key, options, &parcel.body, properties).await;
        sent.map(drop).map_err(Failed::lost)
    }

    async fn call(
        &self,
        queue: &str,
        id: MessageId,
        ttl: Option<Duration>,
        parcel: Parcel,
    ) -> Result<(), Failed> {
        let mut properties = properties(&parcel);
        if let Some(ttl) = ttl {
            properties = properties.with_expiration(ttl.as_millis().max(1).to_string().into());
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let queue = short(queue)?;
        let sent =
            self.calls.basic_publish("".into(), queue, options, &parcel.body, properties).await;
        let (confirmed, incoming) = (sent.map_err(Failed::lost)?, self.incoming.clone());
        tokio::spawn(async move {
            if let Ok(confirmation) = confirmed.await
                && confirmation.take_message().is_some()
            {
                incoming.handle_unrouted(id);
            }
        });
        Ok(())
    }

    async fn serve_all(&self, name: ServiceName, concurrency: u32) -> Result<(), Failed> {
        let (channel, via) = match name == ServiceName::node_inbox() {
            true => (self.me.id.to_string(), Via::Inbox),
            false => {
                self.serve_calls(&name, concurrency).await?;
                (name.to_string(), Via::Service(name.clone()))
            }
        };
        let queue = self.names.work(&channel);
        self.declare_queue(&queue, durable(), self.kept_arguments()).await?;
        self.work(Task::Work(name), &queue, concurrency, None, move |_| Some(via.clone())).await
    }

    /// Takes calls, up to twice as many as are handled at a time.
    async fn serve_calls(&self, name: &ServiceName, concurrency: u32) -> Result<(), Failed> {
        let queue = self.names.service(name);
        let options = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
        self.declare_queue(&queue, options, FieldTable::default()).await?;
        let (channel, mut consumer) = self.consumer(&queue, concurrency).await?;
        let (incoming, via) = (self.incoming.clone(), Via::Service(name.clone()));
        let task = tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let acker = delivery.acker.clone();
                let (ticket, handled) = oneshot::channel();
                incoming.handle_message(via.clone(), parcel(delivery), Some(ticket));
                tokio::spawn(async move {
                    let _either_way = handled.await;
                    let _lost = acker.ack(BasicAckOptions::default()).await;
                });
            }
        });
        self.keep(Task::Service(name.clone()), task.abort_handle(), channel);
        Ok(())
    }

    /// Takes guaranteed messages, and acknowledges them to the broker.
    async fn work(
        &self,
        task: Task,
        queue: &str,
        concurrency: u32,
        subscription: Option<ServiceName>,
        via: impl Fn(&Delivery) -> Option<Via> + Send + 'static,
    ) -> Result<(), Failed> {
        let (channel, mut consumer) = self.consumer(queue, concurrency).await?;
        let (incoming, retry) = (self.incoming.clone(), self.me.retry);
        let running = tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let attempt = attempt(&delivery);
                let (ack, acked) = oneshot::channel();
                let redelivered = delivery.redelivered || attempt > 1;
                let kept = Kept { subscription: subscription.clone(), attempt, redelivered, ack };
                let (acker, via) = (delivery.acker.clone(), via(&delivery));
                match via {
                    Some(via) => incoming.handle_kept(via, parcel(delivery), kept),
                    None => {
                        let reason = format!("{} is not a topic", delivery.routing_key);
                        let _waits = kept.ack.send(Ack::Ended(DeliveryOutcome::Rejected(reason)));
                    }
                }
                tokio::spawn(settle(acker, attempt, acked, retry));
            }
        });
        self.keep(task, running.abort_handle(), channel);
        Ok(())
    }

    async fn consumer(
        &self,
        queue: &str,
        concurrency: u32,
    ) -> Result<(Channel, lapin::Consumer), Failed> {
        let channel = self.connection.create_channel().await.map_err(Failed::lost)?;
        let prefetch = concurrency.saturating_mul(2).clamp(1, 4096) as u16;
        channel.basic_qos(prefetch, BasicQosOptions::default()).await.map_err(Failed::lost)?;
        let options = BasicConsumeOptions::default();
        let consumer =
            channel.basic_consume(short(queue)?, "".into(), options, FieldTable::default());
        let consumer = consumer.await.map_err(|error| refused(queue, &error))?;
        Ok((channel, consumer))
    }

    async fn store_kept(&self, message: Guaranteed) -> Result<(), Failed> {
        let Guaranteed { to, parcel, expires_at, stored, .. } = message;
        let (exchange, key) = match &to {
            Destination::Topic(topic) => (self.names.of("kept"), topic.to_string()),
            Destination::Service(name) => (String::new(), self.names.work(name)),
            Destination::Node(node) => (String::new(), self.names.work(node)),
        };
        // Declared here, so that the message is kept even if the name was never served yet.
        if !matches!(to, Destination::Topic(_))
            && let Err(Failed::Refused(error)) =
                self.declare_queue(&key, durable(), self.kept_arguments()).await
        {
            let _gave_up = stored.send(Err(StoreFailure::Refused(error)));
            return Ok(());
        }
        let mut properties = properties(&parcel).with_delivery_mode(PERSISTENT);
        if let Some(at) = expires_at {
            let left = at.saturating_sub(unix_ms()).max(1);
            properties = properties.with_expiration(left.to_string().into());
        }
        let (exchange, key) = (short(&exchange)?, short(&key)?);
        let options = BasicPublishOptions::default();
        let sent =
            self.storing.basic_publish(exchange, key, options, &parcel.body, properties).await;
        let confirmed = match sent {
            Ok(confirmed) => confirmed,
            Err(error) => {
                let _gave_up = stored.send(Err(StoreFailure::Lost));
                return Err(Failed::lost(error));
            }
        };
        tokio::spawn(async move {
            let result = match confirmed.await {
                Ok(confirmation) if confirmation.is_ack() => Ok(()),
                Ok(_) => {
                    Err(StoreFailure::Refused("the broker did not confirm the message".into()))
                }
                Err(_) => Err(StoreFailure::Lost),
            };
            let _gave_up = stored.send(result);
        });
        Ok(())
    }

    fn kept_arguments(&self) -> FieldTable {
        quorum(Some((&self.names.of("dead"), self.me.retry.max_attempts)))
    }

    async fn declare_exchange(&self, what: &str, kind: ExchangeKind) -> Result<(), Failed> {
        let name = self.names.of(what);
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let channel = self.declaring.lock().await;
        let declared =
            channel.exchange_declare(short(&name)?, kind, options, FieldTable::default()).await;
        drop(channel);
        self.declared(&name, declared).await
    }

    /// Declares a queue, unless this session has done so already.
    async fn declare_queue(
        &self,
        name: &str,
        options: QueueDeclareOptions,
        arguments: FieldTable,
    ) -> Result<(), Failed> {
        // A queue that is deleted with its last consumer may be gone.
        if !options.auto_delete && lock(&self.declared).contains(name) {
            return Ok(());
        }
        let channel = self.declaring.lock().await;
        let declared = channel.queue_declare(short(name)?, options, arguments).await.map(drop);
        drop(channel);
        self.declared(name, declared).await?;
        lock(&self.declared).insert(name.to_owned());
        Ok(())
    }

    /// Checks a declaration. A refusal closes its channel, so another channel replaces it.
    async fn declared(&self, name: &str, result: lapin::Result<()>) -> Result<(), Failed> {
        let Err(error) = result else { return Ok(()) };
        let failed = refused(name, &error);
        if matches!(failed, Failed::Refused(_)) {
            let fresh = self.connection.create_channel().await.map_err(Failed::lost)?;
            *self.declaring.lock().await = fresh;
        }
        Err(failed)
    }

    async fn bind(&self, queue: &str, exchange: &str, key: &str) -> Result<(), Failed> {
        let (queue, exchange) = (short(queue)?, short(&self.names.of(exchange))?);
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        let channel = self.declaring.lock().await;
        channel.queue_bind(queue, exchange, short(key)?, options, none).await.map_err(Failed::lost)
    }

    fn keep(&self, task: Task, running: AbortHandle, channel: Channel) {
        let running = Running { task: running, channel: Some(channel) };
        if let Some(before) = lock(&self.tasks).insert(task, running) {
            before.task.abort();
        }
    }

    /// Ends a consumer. Running handlers still settle their messages; queued messages go back.
    async fn end(&self, task: &Task) {
        let Some(Running { task, channel }) = lock(&self.tasks).remove(task) else { return };
        task.abort();
        if let Some(channel) = channel {
            let _runs_meanwhile = tokio::spawn(async move {
                // Running handlers have this time to end.
                sleep(ANSWER).await;
                let _gone = channel.close(200, "done".into()).await;
            });
        }
    }

    async fn close_now(&self) {
        let closing = async {
            let queue = ShortString::try_new(self.inbox());
            if let Ok(queue) = queue {
                let channel = self.declaring.lock().await;
                let _gone = channel.queue_delete(queue, QueueDeleteOptions::default()).await;
            }
            let _closed = self.connection.close(200, "goodbye".into()).await;
        };
        let _too_late = timeout(ANSWER, closing).await;
    }
}

impl Session for RabbitSession {
    fn title(&self) -> String {
        "RabbitMQ".into()
    }

    fn send(&self, message: Outgoing) -> Performed<'_> {
        self.send_now(message).boxed()
    }

    fn subscribe(&self, pattern: Pattern) -> Performed<'_> {
        async move { self.bind(&self.inbox(), "events", &binding(&pattern)?).await }.boxed()
    }

    fn unsubscribe(&self, pattern: Pattern) -> Performed<'_> {
        async move { self.unbind(&pattern).await }.boxed()
    }

    fn serve(&self, name: ServiceName, concurrency: u32) -> Performed<'_> {
        self.serve_all(name, concurrency).boxed()
    }

    fn withdraw(&self, name: ServiceName) -> Performed<'_> {
        let withdrawing = async move {
            self.end(&Task::Service(name.clone())).await;
            self.end(&Task::Work(name)).await;
            Ok(())
        };
        withdrawing.boxed()
    }

    fn durable(&self) -> Option<&dyn DurableSession> {
        Some(self)
    }

    fn lost(&self) -> BoxFuture<'_, Lost> {
        self.ending.lost().boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.close_now().boxed()
    }
}

impl DurableSession for RabbitSession {
    fn store(&self, message: Guaranteed) -> Performed<'_> {
        self.store_kept(message).boxed()
    }

    fn consume(&self, name: ServiceName, pattern: Pattern, concurrency: u32) -> Performed<'_> {
        async move { self.consume_kept(name, &pattern, concurrency).await }.boxed()
    }

    fn pause(&self, name: ServiceName) -> Performed<'_> {
        let pausing = async move {
            self.end(&Task::Durable(name)).await;
            Ok(())
        };
        pausing.boxed()
    }

    fn forget(&self, name: ServiceName) -> Performed<'_> {
        self.forget_kept(name).boxed()
    }
}

impl Drop for RabbitSession {
    fn drop(&mut self) {
        lock(&self.tasks).values().for_each(|running| running.task.abort());
    }
}

/// The longest backoff. RabbitMQ closes the channel of a consumer that leaves a message without an
/// answer for longer than its `consumer_timeout`, by default 30 minutes, in which the handler runs
/// too.
const LONGEST_PAUSE: Duration = Duration::from_secs(10 * 60);

/// Waits for the acknowledgement of a guaranteed message, and passes it to the broker.
async fn settle(acker: Acker, attempt: u32, acked: oneshot::Receiver<Ack>, retry: RetryPolicy) {
    let told = match AckAction::after(acked.await.ok(), attempt, &retry) {
        AckAction::Forget => acker.ack(BasicAckOptions::default()).await,
        AckAction::DeadLetter(reason) => {
            tracing::warn!(reason, "a message is a dead letter");
            acker.reject(BasicRejectOptions { requeue: false }).await
        }
        AckAction::Again(wait) => {
            // The broker has no delay of its own, and keeps the message for this node meanwhile.
            sleep(wait.min(LONGEST_PAUSE)).await;
            acker.nack(BasicNackOptions { requeue: true, multiple: false }).await
        }
    };
    if let Err(error) = told {
        tracing::debug!(%error, "an acknowledgement was lost; its message is redelivered");
    }
}

fn durable() -> QueueDeclareOptions {
    QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() }
}

/// Returns a quorum queue's arguments, with the exchange and delivery limit for dead letters.
fn quorum(dead: Option<(&str, u32)>) -> FieldTable {
    let text = |text: &str| AMQPValue::LongString(LongString::from(text));
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    if let Some((dead, max_attempts)) = dead {
        arguments.insert("x-dead-letter-exchange".into(), text(dead));
        let limit = i64::from(max_attempts);
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(limit));
    }
    arguments
}

/// Converts a pattern to the binding key of a topic exchange.
fn binding(pattern: &Pattern) -> Result<String, Failed> {
    if pattern.as_str().split('.').any(|token| token == "#") {
        return Err(Failed::Refused(format!(
            "{pattern}: `#` is a wildcard of RabbitMQ; choose another pattern"
        )));
    }
    Ok(match pattern.as_str().strip_suffix('>') {
        Some(rest) => format!("{rest}*.#"),
        None => pattern.to_string(),
    })
}

fn topic(delivery: &Delivery) -> Option<Via> {
    Some(Via::Topic(delivery.routing_key.as_str().parse().ok()?, None))
}

/// Returns the number of deliveries, this one included.
fn attempt(delivery: &Delivery) -> u32 {
    let headers = delivery.properties.headers().as_ref();
    match headers.and_then(|headers| headers.inner().get("x-delivery-count")) {
        Some(AMQPValue::LongLongInt(count)) => u32::try_from(*count).unwrap_or(0) + 1,
        _ => 1,
    }
}

fn properties(parcel: &Parcel) -> BasicProperties {
    if parcel.head.is_empty() {
        return BasicProperties::default();
    }
    let mut headers = FieldTable::default();
    headers.insert(HEAD.into(), AMQPValue::LongString(LongString::from(parcel.head.to_vec())));
    BasicProperties::default().with_headers(headers)
}

fn parcel(delivery: Delivery) -> Parcel {
    let headers = delivery.properties.headers().as_ref();
    let head = match headers.and_then(|headers| headers.inner().get(HEAD)) {
        Some(AMQPValue::LongString(head)) => Bytes::copy_from_slice(head.as_bytes()),
        _ => Bytes::new(),
    };
    Parcel { head, body: delivery.data.into() }
}

fn short(text: &str) -> Result<ShortString, Failed> {
    ShortString::try_new(text).map_err(|_| {
        Failed::Refused(format!(
            "{text}: a name takes at most 255 bytes in RabbitMQ; choose shorter names"
        ))
    })
}

/// Converts an error. A soft error concerns one operation; any other ends the connection.
fn refused(name: &str, error: &lapin::Error) -> Failed {
    match error.kind() {
        ErrorKind::ProtocolError(told) if error.is_amqp_soft_error() => {
            Failed::Refused(format!("{name}: {}", told.get_message()))
        }
        _ => Failed::lost(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_bound_as_a_topic_exchange_has_it() {
        for (pattern, bound) in [("a.b", "a.b"), ("a.*.c", "a.*.c"), ("a.>", "a.*.#"), (">", "*.#")]
        {
            assert_eq!(binding(&pattern.parse().unwrap()).ok().unwrap(), bound);
        }
        assert!(binding(&"a.#".parse().unwrap()).is_err());
    }
}
