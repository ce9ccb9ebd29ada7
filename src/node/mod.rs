//! The async shell: handles for users, and the tasks that perform what the engine decides.

pub(crate) mod broker;
mod choose;
mod consumer;
mod counters;
mod delivery;
mod draft;
mod driver;
mod event_batch;
mod events;
mod guaranteed;
mod handler;
mod last_read;
mod lease;
mod log;
mod loopback;
mod peer_link;
mod progress;
mod publish;
mod publisher;
mod reader;
mod receive;
mod reply;
mod request;
mod send;
mod service;
mod service_runner;
mod shared;
mod shutdown;
mod start;
pub(crate) mod store;
mod subscription;
mod transport;

pub use consumer::{Consume, Consumer};
pub use delivery::DeliveryError;
pub use draft::BodyError;
pub(crate) use draft::Draft;
pub use events::{DownCause, Event, Events};
pub use guaranteed::{Guaranteed, NotStored, OutboxError, Receipt, Storing, Transaction};
pub use handler::{Call, HandlerError, Reply};
pub(crate) use publish::To;
pub use publish::{Publish, PublishError};
pub use publisher::Publisher;
pub use request::{Request, RequestError};
pub use send::{Send, SendError, Sent};
pub use service::{Serve, ServeError, Service};
pub use shutdown::ShutdownReport;
pub use start::StartError;
pub use store::{DamagedPart, StoreError, StoreProblem, StoreReport};
pub use subscription::{Overflow, Subscription};

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use crate::address::{AddressError, IntoRecipient, Pattern, ServiceName, Topic};
use crate::broker::Unsupported;
use crate::config::Config;
use crate::identity::NodeId;
use crate::message::{Body, Message};
use crate::opaque::opaque;
use crate::peer::{PeerInfo, Unreachable};
use crate::report::Counters;
use crate::sync::lock;
use broker::{Ask, Brokered};
use shared::Shared;

/// What brokers lack, in words.
const ORDERED_SERVICES: &str = "order by key among the instances of a service";

/// How long [`Node::shutdown`] gives what is on its way.
const DRAIN: Duration = Duration::from_secs(5);

/// A participant of a mesh. Cloning is cheap; all clones are the same node.
///
/// It lives until [`Node::shutdown`], or until the last clone is dropped, which ends it without
/// a goodbye.
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let node = peerbus::Node::builder().mesh("doctest-node".parse()?).start().await?;
/// let mut orders = node.subscribe("orders.>")?;
/// node.publish("orders.eu.placed", "17 apples").await?;
/// assert_eq!(orders.recv().await.unwrap().text(), "17 apples");
/// node.shutdown().await;
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

opaque!(Node, |node| id: node.id(), name: node.name());

/// Ends the node's tasks with the last handle.
struct Inner {
    shared: Arc<Shared>,
    listening: Vec<SocketAddr>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        lock(&self.shared.tasks).abort_all();
        if let Some(broker) = self.shared.broker() {
            broker.client.abandon();
        }
        self.shared.cells().iter().for_each(|cell| cell.close());
        self.shared.fail_all_requests();
        self.shared.inboxes.load().all().into_iter().for_each(|inbox| inbox.close());
        for handlers in self.shared.handling() {
            handlers.abort(&self.shared);
        }
        let shared = self.shared.clone();
        self.shared.runtime.spawn(async move {
            if let Some(transport) = shared.transport.get() {
                transport.close().await;
            }
            shared.close_store().await;
            shared.log.write();
        });
    }
}

impl Node {
    /// A configuration with the defaults, to be changed and started.
    pub fn builder() -> Config {
        Config::default()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// Whether it shuts down, or has.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn is_stopping(&self) -> bool {
        self.shared().is_stopping()
    }

    /// This node's id.
    pub fn id(&self) -> NodeId {
        self.shared().id
    }

    /// This node's human name.
    pub fn name(&self) -> &str {
        &self.shared().name
    }

    /// The TCP addresses that it listens on, with their ports.
    pub fn listening(&self) -> &[SocketAddr] {
        &self.inner.listening
    }

    /// Publishes an event to every node with a matching subscription, this one included.
    ///
    /// It never waits: awaiting it queues the message and returns a
    /// [`PublishReport`](crate::PublishReport). A peer that takes events more slowly than they
    /// are published loses messages, which are counted, and holds nobody up.
    /// [`Publish::within`] waits for such a peer instead, up to a deadline.
    pub fn publish<T>(&self, topic: T, body: impl Into<Body>) -> Publish<'_>
    where
        T: TryInto<Topic>,
        T::Error: Into<AddressError>,
    {
        let to = topic.try_into().map(publish::To::Topic).map_err(Into::into);
        Publish { shared: self.shared(), to, draft: Draft::new(body.into()) }
    }

    /// A publisher for a topic that many messages are published on: it keeps who subscribes.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let node = peerbus::Node::builder().mesh("doctest-publisher".parse()?).start().await?;
    /// let mut prices = node.publisher("prices.apples")?;
    /// for price in [3, 4, 3] {
    ///     prices.publish(format!("{price}")).await?;
    /// }
    /// # node.shutdown().await;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`AddressError`] if the topic can't be parsed.
    pub fn publisher<T>(&self, topic: T) -> Result<Publisher, AddressError>
    where
        T: TryInto<Topic>,
        T::Error: Into<AddressError>,
    {
        let topic = topic.try_into().map_err(Into::into)?;
        Ok(Publisher::new(self.shared(), topic))
    }

    /// Sends a one-way message to a service, or to one node by its id.
    ///
    /// Awaiting it queues the message for the least loaded of the nodes that serve the name. A
    /// handler's error is counted here as a drop.
    pub fn send(&self, recipient: impl IntoRecipient, body: impl Into<Body>) -> Send<'_> {
        let recipient = recipient.into_recipient();
        Send { shared: self.shared(), recipient, draft: Draft::new(body.into()) }
    }

    /// Sends a request and waits for its reply.
    pub fn request(&self, recipient: impl IntoRecipient, body: impl Into<Body>) -> Request<'_> {
        let (recipient, draft) = (recipient.into_recipient(), Draft::new(body.into()));
        let deadline = self.shared().config.request_deadline;
        Request { shared: self.shared(), recipient, draft, deadline }
    }

    /// Answers a message that carries a return address, whenever it suits: the answer is sent
    /// there as a one-way message with the message's id as its correlation id.
    ///
    /// A handler's own return value is sent by itself; this is for answers that come later, or
    /// to messages that were published.
    ///
    /// # Errors
    /// [`SendError`]; `None` where the message has no return address.
    pub fn answer(&self, message: &Message, body: impl Into<Body>) -> Option<Send<'_>> {
        let address = message.header.reply_to?;
        Some(self.send(address, body).correlation_id(message.header.id))
    }

    /// Subscribes to the topics that match a pattern.
    ///
    /// Peers take 10,000 patterns and services from a node in all; one that announces more loses
    /// its links.
    ///
    /// # Errors
    /// [`SubscribeError::Address`] if the pattern can't be parsed.
    pub fn subscribe<P>(&self, pattern: P) -> Result<Subscription, SubscribeError>
    where
        P: TryInto<Pattern>,
        P::Error: Into<AddressError>,
    {
        self.subscribe_with(pattern, Overflow::default())
    }

    /// Subscribes as [`Node::subscribe`] does, and says what is lost when messages are not taken
    /// in time.
    ///
    /// # Errors
    /// [`SubscribeError`] if the pattern can't be parsed, or a broker can't hold back.
    pub fn subscribe_with<P>(
        &self,
        pattern: P,
        overflow: Overflow,
    ) -> Result<Subscription, SubscribeError>
    where
        P: TryInto<Pattern>,
        P::Error: Into<AddressError>,
    {
        let pattern = pattern.try_into().map_err(Into::into)?;
        if let (Some(broker), Overflow::HoldBack) = (self.shared().broker(), overflow) {
            return Err(broker.lacks("way to be held back by one subscription").into());
        }
        Ok(self.shared().subscribe(&pattern, overflow))
    }

    /// Begins a transaction: guaranteed messages that are stored together or not at all.
    pub fn transaction(&self) -> Transaction<'_> {
        Transaction { shared: self.shared(), messages: Vec::new() }
    }

    /// Takes guaranteed events on a pattern's topics: a durable subscription, named for good. Its
    /// publishers keep what it has not processed, whether it runs or not: the handler's Ok tells
    /// them that a message is done, its error has it tried again. It is named within this node,
    /// so the node has to keep its identity, as [`Config::outbox`] does.
    ///
    /// A publisher that has never met this node doesn't know of the subscription: what it
    /// publishes until then is not promised.
    ///
    /// ```no_run
    /// # async fn example(node: peerbus::Node) -> Result<(), Box<dyn std::error::Error>> {
    /// let billing = node.consume("billing", "orders.>", |call| async move {
    ///     println!("{} (attempt {})", call.message.text(), call.message.attempt());
    ///     Ok(())
    /// }).start()?;
    /// # Ok(()) }
    /// ```
    pub fn consume<N, P, F, R, B>(&self, name: N, pattern: P, handler: F) -> Consume
    where
        N: TryInto<ServiceName>,
        N::Error: Into<AddressError>,
        P: TryInto<Pattern>,
        P::Error: Into<AddressError>,
        F: Fn(Call) -> R + std::marker::Send + Sync + 'static,
        R: Future<Output = Result<B, HandlerError>> + std::marker::Send + 'static,
        B: Into<Reply>,
    {
        Consume {
            shared: self.shared().clone(),
            name: name.try_into().map_err(Into::into),
            pattern: pattern.try_into().map_err(Into::into),
            handler: handler::boxed(handler),
            concurrency: service::DEFAULT_CONCURRENCY,
        }
    }

    /// Has this node's outbox forget a durable subscription of a node that is gone for good, with
    /// the messages that it keeps for it: how many, or `None` if it knows no such subscription.
    /// The receipts of those messages take it as processed.
    ///
    /// If that node still has it, it is remembered again, for what is published from then on,
    /// when the two next link.
    pub fn forget_subscription(&self, node: &NodeId, name: &ServiceName) -> Option<u64> {
        self.shared().with_outbox(|outbox, _| outbox.handle_unsubscribed(*node, name)).flatten()
    }

    /// What was found in the store when the node started; `None` if it has none.
    pub fn store_report(&self) -> Option<&StoreReport> {
        self.shared().store.as_ref().map(|store| &store.report)
    }

    /// How much this node's outbox keeps; nothing if it has none.
    pub fn outbox_size(&self) -> OutboxSize {
        let Some(store) = &self.shared().store else { return OutboxSize::default() };
        let outbox = lock(&store.outbox);
        OutboxSize { pending: outbox.pending(), dead_letters: outbox.dead_letters() }
    }

    /// Serves a name with a handler: what it returns is the reply, a body or a [`Reply`], and its
    /// error reaches the caller with code and text. Nodes that serve the same name share its calls (competing
    /// consumers).
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # let node = peerbus::Node::builder().mesh("doctest-serve".parse()?).start().await?;
    /// use peerbus::HandlerError;
    /// let service = node.serve("double", |call| async move {
    ///     let n: u64 = call.message.text().parse().map_err(|_| HandlerError::new("nan", "no number"))?;
    ///     Ok((n * 2).to_string())
    /// }).start()?;
    /// assert_eq!(node.request("double", "21").await?.text(), "42");
    /// # node.shutdown().await;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    pub fn serve<N, F, R, B>(&self, name: N, handler: F) -> Serve
    where
        N: TryInto<ServiceName>,
        N::Error: Into<AddressError>,
        F: Fn(Call) -> R + std::marker::Send + Sync + 'static,
        R: Future<Output = Result<B, HandlerError>> + std::marker::Send + 'static,
        B: Into<Reply>,
    {
        Serve {
            shared: self.shared().clone(),
            name: name.try_into().map_err(Into::into),
            handler: handler::boxed(handler),
            concurrency: service::DEFAULT_CONCURRENCY,
        }
    }

    /// Takes messages that are addressed to this node itself, by its id.
    pub fn serve_node<F, R, B>(&self, handler: F) -> Serve
    where
        F: Fn(Call) -> R + std::marker::Send + Sync + 'static,
        R: Future<Output = Result<B, HandlerError>> + std::marker::Send + 'static,
        B: Into<Reply>,
    {
        Serve {
            shared: self.shared().clone(),
            name: Ok(ServiceName::node_inbox()),
            handler: handler::boxed(handler),
            concurrency: service::DEFAULT_CONCURRENCY,
        }
    }

    /// The peers with a live link.
    ///
    /// In broker mode that is the broker, with the id [`NodeId::BROKER`].
    pub fn peers(&self) -> Vec<PeerInfo> {
        let shared = self.shared();
        if let Some(broker) = shared.broker() {
            return broker.peers();
        }
        let mut peers = shared.with_mesh(|mesh, _| mesh.peers());
        let routing = shared.routing.load();
        for peer in &mut peers {
            if let Some(cell) = routing.link(&peer.id) {
                let silence = cell.now().since(cell.peek(|flow| flow.last_heard()));
                peer.suspect_for = (silence >= shared.timing.suspect).then_some(silence);
            }
        }
        peers
    }

    /// The addresses that are known, but behind which nobody could be reached.
    pub fn unreachable(&self) -> Vec<Unreachable> {
        match self.shared().broker() {
            Some(broker) => broker.unreachable(),
            None => self.shared().with_mesh(|mesh, _| mesh.unreachable()),
        }
    }

    /// What happens: peers that come and go, messages that are dropped. The first call returns
    /// all since the node's start, so that no early peer is missed; later calls what happens
    /// from then on.
    pub fn events(&self) -> Events {
        let first = lock(&self.shared().first_events).take();
        Events::new(first.unwrap_or_else(|| self.shared().events.subscribe()))
    }

    /// All that was sent, received and dropped so far.
    pub fn counters(&self) -> Counters {
        self.shared().counters.snapshot()
    }

    /// What waits here for a peer to take it, in bytes; nothing for one that is not linked.
    pub fn queued_bytes(&self, peer: &NodeId) -> u64 {
        if let (Some(broker), &NodeId::BROKER) = (self.shared().broker(), peer) {
            return broker.client.queued_bytes();
        }
        match self.shared().routing.load().link(peer) {
            Some(cell) => cell.peek(|flow| flow.queued_bytes()),
            None => 0,
        }
    }

    /// Waits until at least `count` nodes subscribe to a topic, this one included.
    ///
    /// # Errors
    /// [`WaitError`] if the topic can't be parsed or the time runs out.
    pub async fn wait_for_subscribers<T>(
        &self,
        topic: T,
        count: usize,
        within: Duration,
    ) -> Result<(), WaitError>
    where
        T: TryInto<Topic>,
        T::Error: Into<AddressError>,
    {
        let topic = topic.try_into().map_err(|error| WaitError::Address(error.into()))?;
        if let Some(broker) = self.shared().broker() {
            return self.ask(broker, Ask::Subscribers(topic.to_string()), count, within).await;
        }
        let enough = || {
            let here = !self.shared().inboxes.load().matching(&topic).is_empty();
            self.shared().routing.load().subscribers(&topic).len() + usize::from(here) >= count
        };
        self.wait_until(enough, within).await
    }

    /// Waits until this node's outbox knows at least `count` durable subscriptions to a topic.
    ///
    /// # Errors
    /// [`WaitError`] if the topic can't be parsed or the time runs out.
    pub async fn wait_for_consumers<T>(
        &self,
        topic: T,
        count: usize,
        within: Duration,
    ) -> Result<(), WaitError>
    where
        T: TryInto<Topic>,
        T::Error: Into<AddressError>,
    {
        let topic = topic.try_into().map_err(|error| WaitError::Address(error.into()))?;
        if let Some(broker) = self.shared().broker() {
            return self.ask(broker, Ask::Consumers(topic.to_string()), count, within).await;
        }
        let known = || match &self.shared().store {
            Some(store) => lock(&store.outbox).subscribers(&topic).len(),
            None => 0,
        };
        self.wait_until(|| known() >= count, within).await
    }

    /// Waits until a node offers a service, this one included.
    ///
    /// # Errors
    /// [`WaitError`] if the name can't be parsed or the time runs out.
    pub async fn wait_for_service<N>(&self, name: N, within: Duration) -> Result<(), WaitError>
    where
        N: TryInto<ServiceName>,
        N::Error: Into<AddressError>,
    {
        self.wait_for_instances(name, 1, within).await
    }

    /// Waits until at least `count` nodes offer a service, this one included. Who sends with
    /// ordering keys does well to know all instances before it begins.
    ///
    /// # Errors
    /// [`WaitError`] if the name can't be parsed or the time runs out.
    pub async fn wait_for_instances<N>(
        &self,
        name: N,
        count: usize,
        within: Duration,
    ) -> Result<(), WaitError>
    where
        N: TryInto<ServiceName>,
        N::Error: Into<AddressError>,
    {
        let name = name.try_into().map_err(|error| WaitError::Address(error.into()))?;
        if let Some(broker) = self.shared().broker() {
            return self.ask(broker, Ask::Instances(name.to_string()), count, within).await;
        }
        let enough = || {
            let there = self.shared().routing.load().instances(&name).count();
            there + usize::from(self.shared().service(&name).is_some()) >= count
        };
        self.wait_until(enough, within).await
    }

    /// Waits until at least `count` peers are up.
    ///
    /// # Errors
    /// [`WaitError::TimedOut`] if the time runs out.
    ///
    /// In broker mode the broker is the only one.
    pub async fn wait_for_peers(&self, count: usize, within: Duration) -> Result<(), WaitError> {
        if let Some(broker) = self.shared().broker() {
            return match count {
                0 | 1 => self.wait_until(|| count == 0 || broker.client.is_up(), within).await,
                _ => Err(broker.lacks("word of how many nodes it serves").into()),
            };
        }
        self.wait_until(|| self.shared().routing.load().peers() >= count, within).await
    }

    async fn ask(
        &self,
        broker: &Brokered,
        ask: Ask,
        count: usize,
        within: Duration,
    ) -> Result<(), WaitError> {
        match self.shared().ask_by_broker(broker, &ask, count, within).await {
            true => Ok(()),
            false => Err(WaitError::TimedOut(within)),
        }
    }

    async fn wait_until(
        &self,
        holds: impl Fn() -> bool,
        within: Duration,
    ) -> Result<(), WaitError> {
        let mut changes = self.shared().routes_changed.subscribe();
        let wait = async { while !holds() && changes.changed().await.is_ok() {} };
        timeout(within, wait).await.map_err(|_| WaitError::TimedOut(within))
    }

    /// Shuts down: withdraws the services and lets their handlers end, waits until the peers
    /// have confirmed what they were sent, says goodbye, closes. Takes 5 s for that at most, and
    /// about one more to say goodbye.
    pub async fn shutdown(&self) -> ShutdownReport {
        self.shutdown_within(DRAIN).await
    }

    /// [`Node::shutdown`] with another limit.
    pub async fn shutdown_within(&self, within: Duration) -> ShutdownReport {
        shutdown::run(self.shared(), within).await
    }
}

/// What an outbox keeps. A message counts once for each of its destinations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutboxSize {
    /// Messages that are not processed yet.
    pub pending: u64,
    /// Those that won't be sent again by themselves.
    pub dead_letters: u64,
}

/// A subscription that can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The pattern can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A broker can't do that.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
}

/// What was waited for did not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The topic or name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A broker can't tell.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The time ran out.
    #[error("it did not happen within {0:?}")]
    TimedOut(Duration),
}
