//! The handles of a node: the calls of its user.

mod calls;
mod consumer;
mod draft;
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
use std::sync::Arc;
use std::time::Duration;

use crate::address::{AddressError, IntoRecipient, Pattern, ServiceName, Topic};
use crate::carrier::mesh::durable::Durable;
use crate::carrier::mesh::store::StoreReport;
use crate::carrier::{Capability, Carrier, Condition, NotMet, Unsupported, Wish, WishEnd};
use crate::config::Config;
use crate::core::{Call, Core, Events, HandlerError, Reply, Subscriber, boxed};
use crate::engine::Overflow;
use crate::identity::NodeId;
use crate::message::{Body, Message};
use crate::opaque::opaque;
use crate::peer::{PeerInfo, Unreachable};
use crate::report::Counters;

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
}

impl Inner {
    fn subscribe(self: &Arc<Self>, pattern: &Pattern, overflow: Overflow) -> Subscription {
        let core = &self.core;
        let limit = core.config.subscription_queue;
        let subscriber = core.subscriptions.add(pattern, overflow, limit);
        core.routes.notify();
        self.carrier.wish(Wish::Subscribe(pattern.clone()));
        if core.is_stopping() {
            subscriber.close();
        }
        Subscription::new(self, subscriber)
    }

    fn unsubscribe(&self, subscriber: &Subscriber) {
        let wish = Wish::Subscribe(subscriber.pattern().clone());
        self.carrier.end_wish(wish, WishEnd::Forget);
        self.core.subscriptions.remove(subscriber);
        self.core.routes.notify();
    }

    /// Ends the requests and subscriptions of the user.
    fn end_calls(&self) {
        self.core.with_front(|front, _| front.handle_shut_down());
        self.core.subscriptions.close_all();
    }
}

/// Ends a node with its last handle.
struct Life(Arc<Inner>);

impl Drop for Life {
    fn drop(&mut self) {
        let Self(node) = self;
        node.core.stop();
        node.core.abort_tasks();
        node.end_calls();
        node.core.with_front(|front, _| _ = front.abort_all());
        node.carrier.abandon();
    }
}

impl Node {
    /// A configuration with the defaults, to be changed and started.
    pub fn builder() -> Config {
        Config::default()
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.life.0
    }

    fn core(&self) -> &Arc<Core> {
        &self.inner().core
    }

    /// Whether it shuts down, or has.
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

    /// The TCP addresses that it listens on, with their ports.
    pub fn listening(&self) -> &[SocketAddr] {
        &self.inner().listening
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
        let to = topic.try_into().map(To::Topic).map_err(Into::into);
        Publish::new(self.inner(), to, Draft::new(body.into()))
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
        if overflow == Overflow::HoldBack {
            self.inner().carrier.require(Capability::HoldBack)?;
        }
        Ok(self.inner().subscribe(&pattern, overflow))
    }

    /// Begins a transaction: guaranteed messages that are stored together or not at all.
    pub fn transaction(&self) -> Transaction<'_> {
        Transaction { node: self.inner(), messages: Vec::new() }
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
        let (name, pattern) = (name.try_into(), pattern.try_into());
        let (name, pattern) = (name.map_err(Into::into), pattern.map_err(Into::into));
        Consume::new(self.inner(), name, pattern, boxed(handler))
    }

    /// Has this node's outbox forget a durable subscription of a node that is gone for good, with
    /// the messages that it keeps for it: how many, or `None` if it knows no such subscription.
    /// The receipts of those messages take it as processed.
    ///
    /// If that node still has it, it is remembered again, for what is published from then on,
    /// when the two next link.
    pub fn forget_subscription(&self, node: &NodeId, name: &ServiceName) -> Option<u64> {
        let durable = self.inner().durable.as_ref()?;
        durable.with_outbox(|outbox, _| outbox.handle_unsubscribed(*node, name))
    }

    /// What was found in the store when the node started; `None` if it has none.
    pub fn store_report(&self) -> Option<&StoreReport> {
        self.inner().durable.as_ref().map(|durable| durable.report())
    }

    /// How much this node's outbox keeps; nothing if it has none.
    pub fn outbox_size(&self) -> OutboxSize {
        let durable = self.inner().durable.as_ref();
        let (pending, dead_letters) = durable.map_or((0, 0), |durable| durable.outbox_size());
        OutboxSize { pending, dead_letters }
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
        Serve::new(self.inner(), name.try_into().map_err(Into::into), boxed(handler))
    }

    /// Takes messages that are addressed to this node itself, by its id.
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
    /// In broker mode that is the broker, with the id [`NodeId::BROKER`].
    pub fn peers(&self) -> Vec<PeerInfo> {
        self.inner().carrier.peers()
    }

    /// The addresses that are known, but behind which nobody could be reached.
    pub fn unreachable(&self) -> Vec<Unreachable> {
        self.inner().carrier.unreachable()
    }

    /// What happens: peers that come and go, messages that are dropped. The first call returns
    /// all since the node's start, so that no early peer is missed; later calls what happens
    /// from then on.
    pub fn events(&self) -> Events {
        self.core().reporter.events()
    }

    /// All that was sent, received and dropped so far.
    pub fn counters(&self) -> Counters {
        self.core().reporter.counters.snapshot()
    }

    /// The bytes that wait here for a peer to take them; none for one that is not linked.
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
        let topic = topic.try_into().map_err(|error| WaitError::Address(error.into()))?;
        self.wait(Condition::Subscribers(topic, count), within).await
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
        self.wait(Condition::Consumers(topic, count), within).await
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
        self.wait(Condition::Instances(name, count), within).await
    }

    /// Waits until at least `count` peers are up. Over a broker, that is the only one.
    ///
    /// # Errors
    /// [`WaitError::TimedOut`] if the time runs out, [`WaitError::Unsupported`] if a broker is
    /// asked for more than itself.
    pub async fn wait_for_peers(&self, count: usize, within: Duration) -> Result<(), WaitError> {
        self.wait(Condition::Peers(count), within).await
    }

    async fn wait(&self, condition: Condition, within: Duration) -> Result<(), WaitError> {
        self.inner().carrier.wait(condition, within).await.map_err(|reason| match reason {
            NotMet::TimedOut => WaitError::TimedOut(within),
            NotMet::Unsupported(lack) => WaitError::Unsupported(lack),
        })
    }

    /// Shuts down: withdraws the services and lets their handlers end, waits until the peers
    /// have confirmed what they were sent, says goodbye, closes. Takes 5 s for that at most, and
    /// about one more to say goodbye.
    pub async fn shutdown(&self) -> ShutdownReport {
        self.shutdown_within(DRAIN).await
    }

    /// [`Node::shutdown`] with another limit.
    pub async fn shutdown_within(&self, within: Duration) -> ShutdownReport {
        shutdown::run(self.inner(), within).await
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
