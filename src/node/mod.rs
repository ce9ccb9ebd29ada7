//! The handles of a node for its user.

mod calls;
mod consumer;
mod draft;
mod ending;
mod guaranteed;
mod publish;
mod publisher;
mod request;
mod send;
mod service;
mod shutdown;
mod start;
mod subscription;

pub use consumer::{Consume, Consumer};
pub(crate) use draft::Draft;
pub use guaranteed::{Guaranteed, Storing, Transaction};
pub(crate) use publish::To;
pub use publish::{Publish, PublishError};
pub use publisher::Publisher;
pub use request::{Request, RequestError};
pub use send::{Send, SendError, Sent};
pub use service::{Serve, ServeError, Service};
pub use shutdown::ShutdownReport;
pub use start::StartError;
pub use subscription::Subscription;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ending::{Life, Loss};

use crate::address::{AddressError, IntoRecipient, Pattern, ServiceName, Topic};
use crate::carrier::mesh::durable::Durable;
use crate::carrier::mesh::store::StoreReport;
use crate::carrier::{Capability, Carrier, Condition, NotMet, Unsupported, Wish, WishEnd};
use crate::config::Config;
use crate::core::{Call, Core, Events, HandlerError, RUNTIME_ENDED_TEXT, Reply, Subscriber, boxed};
use crate::engine::{MAX_ANNOUNCED, Overflow, TooMany};
use crate::identity::NodeId;
use crate::message::{Body, Message};
use crate::opaque::opaque;
use crate::peer::{PeerInfo, Unreachable};
use crate::report::Counters;

/// The time limit of [`Node::shutdown`].
const DRAIN: Duration = Duration::from_secs(5);

/// A participant of a mesh. Cloning is cheap; all clones are the same node.
///
/// The node lives until [`Node::shutdown`], until the last clone is dropped, or until the runtime
/// in which it was started ends. The latter two end it without a goodbye, and a log line tells how
/// many messages were lost or are in doubt. Every call on a node whose runtime has ended fails at
/// once, with an error that names this reason.
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
    life: Arc<Life>,
}

opaque!(Node, |node| id: node.id(), name: node.name());

/// The parts of a node that its handles share.
pub(crate) struct Inner {
    pub(crate) core: Arc<Core>,
    pub(crate) carrier: Box<dyn Carrier>,
    /// The outbox and inbox of a node on a mesh.
    durable: Option<Arc<Durable>>,
    listening: Vec<SocketAddr>,
    /// What was lost, if the node ended without a shutdown.
    lost: OnceLock<Loss>,
}

impl Inner {
    fn subscribe(
        self: &Arc<Self>,
        pattern: &Pattern,
        overflow: Overflow,
    ) -> Result<Subscription, SubscribeError> {
        let core = &self.core;
        if core.has_lost_runtime() {
            return Err(SubscribeError::RuntimeEnded);
        }
        let limit = core.config.subscription_queue;
        let subscriber = core.subscriptions.add(pattern, overflow, limit);
        core.routes.notify();
        if let Err(TooMany) = self.carrier.wish(Wish::Subscribe(pattern.clone())) {
            core.subscriptions.remove(&subscriber);
            core.routes.notify();
            return Err(SubscribeError::TooMany);
        }
        if core.is_stopping() {
            subscriber.close();
        }
        Ok(Subscription::new(self, subscriber))
    }

    fn unsubscribe(&self, subscriber: &Subscriber) {
        let wish = Wish::Subscribe(subscriber.pattern().clone());
        self.carrier.end_wish(wish, WishEnd::Forget);
        self.core.subscriptions.remove(subscriber);
        self.core.routes.notify();
    }

    /// Ends the user's requests and subscriptions.
    fn end_calls(&self) {
        self.core.with_front(|front, _| front.handle_shut_down());
        self.core.subscriptions.close_all();
    }
}

impl Node {
    /// Returns a configuration with the defaults, to be changed and started.
    pub fn builder() -> Config {
        Config::default()
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.life.0
    }

    fn core(&self) -> &Arc<Core> {
        &self.inner().core
    }

    /// Returns true if the node is shutting down, or has shut down.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn is_stopping(&self) -> bool {
        self.core().is_stopping()
    }

    /// This node's id.
    pub fn id(&self) -> NodeId {
        self.core().id
    }

    /// This node's human name.
    pub fn name(&self) -> &str {
        &self.core().name
    }

    /// The TCP addresses on which this node listens, with their ports.
    pub fn listening(&self) -> &[SocketAddr] {
        &self.inner().listening
    }

    /// Publishes an event to every node with a matching subscription, this one included.
    ///
    /// Publishing never waits: awaiting it queues the message and returns a
    /// [`PublishReport`](crate::PublishReport). A peer that takes events more slowly than they
    /// are published loses messages, which are counted, and delays no other peer.
    /// [`Publish::within`] waits for such a peer instead, up to a deadline.
    pub fn publish<T>(&self, topic: T, body: impl Into<Body>) -> Publish<'_>
    where
        T: TryInto<Topic>,
        T::Error: Into<AddressError>,
    {
        let to = topic.try_into().map(To::Topic).map_err(Into::into);
        Publish::new(self.inner(), to, Draft::new(body.into()))
    }

    /// Returns a publisher for a topic with many messages. It caches the topic's subscribers.
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
        Ok(Publisher::new(self.inner(), topic))
    }

    /// Sends a one-way message to a service, or to one node by its id.
    ///
    /// Awaiting it queues the message for the least loaded of the nodes that serve the name. A
    /// handler's error is counted here as a drop.
    pub fn send(&self, recipient: impl IntoRecipient, body: impl Into<Body>) -> Send<'_> {
        Send::new(self.inner(), recipient.into_recipient(), Draft::new(body.into()))
    }

    /// Sends a request and waits for its reply.
    pub fn request(&self, recipient: impl IntoRecipient, body: impl Into<Body>) -> Request<'_> {
        Request::new(self.inner(), recipient.into_recipient(), Draft::new(body.into()))
    }

    /// Answers a message with a return address, at any time: the answer is sent there as a one-way
    /// message, with the message's id as its correlation id. Returns `None` if the message has no
    /// return address.
    ///
    /// A handler's return value is sent automatically. This method is for later answers, and for
    /// answers to published messages.
    ///
    /// # Errors
    /// [`SendError`], when the result is awaited.
    pub fn answer(&self, message: &Message, body: impl Into<Body>) -> Option<Send<'_>> {
        let address = message.header.reply_to?;
        Some(self.send(address, body).correlation_id(message.header.id))
    }

    /// Subscribes to the topics that match a pattern.
    ///
    /// Linked peers know of the subscription before any message that this node sends later. After
    /// 5,000 changes of subscriptions and services at once, further changes are announced at 800 a
    /// second, and may be announced later than such a message; a subscription that ends meanwhile
    /// is never announced.
    ///
    /// # Errors
    /// [`SubscribeError::Address`] if the pattern can't be parsed, [`SubscribeError::TooMany`] if
    /// the node has 10,000 different patterns and services already.
    pub fn subscribe<P>(&self, pattern: P) -> Result<Subscription, SubscribeError>
    where
        P: TryInto<Pattern>,
        P::Error: Into<AddressError>,
    {
        self.subscribe_with(pattern, Overflow::default())
    }

    /// Subscribes as [`Node::subscribe`] does, with an overflow policy for messages that are not
    /// taken in time.
    ///
    /// # Errors
    /// [`SubscribeError`] as [`Node::subscribe`] does, or if the broker can't hold back senders.
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
        if overflow == Overflow::HoldBack {
            self.inner().carrier.require(Capability::HoldBack)?;
        }
        self.inner().subscribe(&pattern, overflow)
    }

    /// Begins a transaction: guaranteed messages that are stored together or not at all.
    pub fn transaction(&self) -> Transaction<'_> {
        Transaction { node: self.inner(), messages: Vec::new() }
    }

    /// Takes guaranteed events on a pattern's topics: a durable subscription with a permanent name.
    /// Its publishers keep unprocessed messages, whether it runs or not. The handler's Ok confirms
    /// to them that a message is processed; its error makes them retry. The name belongs to this
    /// node, so the node must keep its identity, as [`Config::outbox`] does.
    ///
    /// A publisher that was never linked to this node does not know the subscription: the delivery
    /// of messages that it published before is not guaranteed.
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
        let (name, pattern) = (name.try_into(), pattern.try_into());
        let (name, pattern) = (name.map_err(Into::into), pattern.map_err(Into::into));
        Consume::new(self.inner(), name, pattern, boxed(handler))
    }

    /// Removes a durable subscription of a permanently absent node from this node's outbox, with
    /// its queued messages. Returns their number, or `None` if the outbox does not know the
    /// subscription. The receipts of those messages report them as processed.
    ///
    /// If that node still has the subscription, the outbox learns of it again when the two link,
    /// for messages published from then on.
    pub fn forget_subscription(&self, node: &NodeId, name: &ServiceName) -> Option<u64> {
        let durable = self.inner().durable.as_ref()?;
        durable.with_outbox(|outbox, _| outbox.handle_unsubscribed(*node, name))
    }

    /// The report of reading the store when the node started; `None` if the node has no store.
    pub fn store_report(&self) -> Option<&StoreReport> {
        self.inner().durable.as_ref().map(|durable| durable.report())
    }

    /// The size of this node's outbox; zero if the node has none.
    pub fn outbox_size(&self) -> OutboxSize {
        let durable = self.inner().durable.as_ref();
        let (pending, dead_letters) = durable.map_or((0, 0), |durable| durable.outbox_size());
        OutboxSize { pending, dead_letters }
    }

    /// Serves a name with a handler. The handler returns the reply, as a body or a [`Reply`]; its
    /// error reaches the caller with code and text. Nodes that serve the same name share its calls
    /// (competing consumers).
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
        Serve::new(self.inner(), name.try_into().map_err(Into::into), boxed(handler))
    }

    /// Takes messages addressed to this node itself, by its id.
    pub fn serve_node<F, R, B>(&self, handler: F) -> Serve
    where
        F: Fn(Call) -> R + std::marker::Send + Sync + 'static,
        R: Future<Output = Result<B, HandlerError>> + std::marker::Send + 'static,
        B: Into<Reply>,
    {
        Serve::new(self.inner(), Ok(ServiceName::node_inbox()), boxed(handler))
    }

    /// The peers with a live link.
    ///
    /// In broker mode the only peer is the broker, with the id [`NodeId::BROKER`].
    pub fn peers(&self) -> Vec<PeerInfo> {
        self.inner().carrier.peers()
    }

    /// The known addresses at which no node could be reached.
    pub fn unreachable(&self) -> Vec<Unreachable> {
        self.inner().carrier.unreachable()
    }

    /// The node's events, such as peers that come and go, and dropped messages. The first call
    /// returns all events since the node's start, so that no early peer is missed; later calls
    /// return events from then on.
    pub fn events(&self) -> Events {
        self.core().reporter.events()
    }

    /// The counters of messages sent, received and dropped so far.
    pub fn counters(&self) -> Counters {
        self.core().reporter.counters.snapshot()
    }

    /// The number of bytes queued here for a peer; 0 for a peer that is not linked.
    pub fn queued_bytes(&self, peer: &NodeId) -> u64 {
        self.inner().carrier.queued_bytes(peer)
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
        self.wait_on(topic, |topic| Condition::Subscribers(topic, count), within).await
    }

    /// Waits until this node's outbox knows at least `count` durable subscriptions to a topic, those
    /// of absent nodes included.
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
        self.wait_on(topic, |topic| Condition::Consumers(topic, count), within).await
    }

    /// Waits until at least `count` durable subscriptions to a topic are known and present: their
    /// nodes are linked, and accept their messages now. Over a broker, as
    /// [`Node::wait_for_consumers`].
    ///
    /// # Errors
    /// [`WaitError`] if the topic can't be parsed or the time runs out.
    pub async fn wait_for_present_consumers<T>(
        &self,
        topic: T,
        count: usize,
        within: Duration,
    ) -> Result<(), WaitError>
    where
        T: TryInto<Topic>,
        T::Error: Into<AddressError>,
    {
        self.wait_on(topic, |topic| Condition::PresentConsumers(topic, count), within).await
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

    /// Waits until at least `count` nodes offer a service, this one included. A sender with
    /// ordering keys should wait for all instances before its first message, so that no keys move.
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
        self.wait_on(name, |name| Condition::Instances(name, count), within).await
    }

    /// Waits until at least `count` peers are up. Over a broker, the broker is the only peer.
    ///
    /// # Errors
    /// [`WaitError::TimedOut`] if the time runs out, [`WaitError::Unsupported`] over a broker for
    /// more than one peer.
    pub async fn wait_for_peers(&self, count: usize, within: Duration) -> Result<(), WaitError> {
        self.wait(Condition::Peers(count), within).await
    }

    /// Waits for a condition on a topic or service that is yet to be parsed.
    async fn wait_on<A, T>(
        &self,
        address: A,
        condition: impl FnOnce(T) -> Condition,
        within: Duration,
    ) -> Result<(), WaitError>
    where
        A: TryInto<T>,
        A::Error: Into<AddressError>,
    {
        let address = address.try_into().map_err(|error| WaitError::Address(error.into()))?;
        self.wait(condition(address), within).await
    }

    async fn wait(&self, condition: Condition, within: Duration) -> Result<(), WaitError> {
        if self.core().has_lost_runtime() {
            return Err(WaitError::RuntimeEnded);
        }
        self.inner().carrier.wait(condition, within).await.map_err(|reason| match reason {
            NotMet::TimedOut => WaitError::TimedOut(within),
            NotMet::Unsupported(lack) => WaitError::Unsupported(lack),
        })
    }

    /// Shuts down: withdraws the services and lets their handlers end, waits until the peers have
    /// confirmed all messages, says goodbye and closes. Takes at most 5 s, and about one more for
    /// the goodbye.
    pub async fn shutdown(&self) -> ShutdownReport {
        self.shutdown_within(DRAIN).await
    }

    /// Shuts down as [`Node::shutdown`] does, with another time limit.
    pub async fn shutdown_within(&self, within: Duration) -> ShutdownReport {
        shutdown::run(self.inner(), within).await
    }
}

/// The size of an outbox. A message counts once for each of its destinations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutboxSize {
    /// The number of unprocessed messages.
    pub pending: u64,
    /// The number of dead letters.
    pub dead_letters: u64,
}

/// The error of subscribing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The pattern can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The broker does not support it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Peers accept no more of one node.
    #[error(
        "this node has {MAX_ANNOUNCED} patterns and services, and its peers accept no more of one \
         node; end some subscriptions, or use fewer patterns with wildcards"
    )]
    TooMany,
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}

/// The error of waiting for a condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The topic or name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The broker does not support it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The time ran out.
    #[error("timed out after {0:?}; check that the other nodes run and are linked")]
    TimedOut(Duration),
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}
