//! Bridges: they copy chosen topics and services of one mesh or broker to another (the Messaging
//! Bridge of Hohpe and Woolf).

mod echoes;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::address::{AddressError, Pattern, Recipient, ServiceName};
use crate::carrier::{Capability, OutboxError, Unsupported};
use crate::core::{Call, HandlerError, Reply};
use crate::engine::Overflow;
use crate::identity::NodeId;
use crate::message::Message;
use crate::node::{
    Consumer, Draft, Guaranteed, Node, Publish, Request, RequestError, Send, SendError, ServeError,
    Service, SubscribeError, Subscription, To,
};
use crate::opaque::opaque;
use echoes::{Fingerprint, Seen, Sight};

/// The time that an event waits for room on the other side before it is dropped and counted.
const PATIENCE: Duration = Duration::from_secs(1);

/// The error with which a bridge can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// A pattern or name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A service is both exported and imported.
    #[error("the service {0} can't be exported and imported: requests for it would go in circles")]
    BothWays(ServiceName),
    /// A node can't subscribe.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    /// A node can't serve, or have a durable subscription.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A node can't accept guaranteed messages.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
}

/// The configuration of a bridge. [`BridgeBuilder::start`] opens it.
#[must_use = "a bridge is open once it is started"]
pub struct BridgeBuilder {
    inner: Node,
    outer: Node,
    events: Vec<(Way, Result<Pattern, AddressError>)>,
    services: Vec<(Way, Result<ServiceName, AddressError>)>,
    guaranteed: bool,
}

opaque!(BridgeBuilder, |it| inner: it.inner, outer: it.outer);

/// The direction of a crossing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    /// Inner side to outer side.
    Export,
    Import,
}

impl BridgeBuilder {
    /// Publishes the inner side's matching events on the outer side.
    pub fn export<P>(mut self, pattern: P) -> Self
    where
        P: TryInto<Pattern>,
        P::Error: Into<AddressError>,
    {
        self.events.push((Way::Export, pattern.try_into().map_err(Into::into)));
        self
    }

    /// Publishes the outer side's matching events on the inner side.
    pub fn import<P>(mut self, pattern: P) -> Self
    where
        P: TryInto<Pattern>,
        P::Error: Into<AddressError>,
    {
        self.events.push((Way::Import, pattern.try_into().map_err(Into::into)));
        self
    }

    /// Serves a service of the inner side on the outer side.
    pub fn export_service<N>(mut self, name: N) -> Self
    where
        N: TryInto<ServiceName>,
        N::Error: Into<AddressError>,
    {
        self.services.push((Way::Export, name.try_into().map_err(Into::into)));
        self
    }

    /// Serves a service of the outer side on the inner side.
    pub fn import_service<N>(mut self, name: N) -> Self
    where
        N: TryInto<ServiceName>,
        N::Error: Into<AddressError>,
    {
        self.services.push((Way::Import, name.try_into().map_err(Into::into)));
        self
    }

    /// Bridges guaranteed events too, by durable subscriptions of both nodes, with the
    /// requirements of [`Node::consume`]. False by default. Guaranteed messages to services cross
    /// in any case, if the nodes can accept them.
    pub fn guaranteed(mut self, guaranteed: bool) -> Self {
        self.guaranteed = guaranteed;
        self
    }

    /// Opens the bridge.
    ///
    /// # Errors
    /// [`BridgeError`] if a name or pattern can't be parsed, a node can't accept it, or a service
    /// is both exported and imported.
    pub fn start(self) -> Result<Bridge, BridgeError> {
        let id = self.inner.id();
        let seen = Arc::new(Seen::default());
        let crossing = |way: Way| {
            let (from, to) = match way {
                Way::Export => (&self.inner, &self.outer),
                Way::Import => (&self.outer, &self.inner),
            };
            let (from, to, counts) = (from.clone(), to.clone(), Counts::default());
            Arc::new(Crossing { way, from, to, bridge: id, seen: seen.clone(), counts })
        };
        let (export, import) = (crossing(Way::Export), crossing(Way::Import));
        let crossing = |way: Way| match way {
            Way::Export => export.clone(),
            Way::Import => import.clone(),
        };
        let mut names = HashMap::new();
        let mut bridge = Bridge {
            tasks: JoinSet::new(),
            consumers: Vec::new(),
            services: Vec::new(),
            export: export.clone(),
            import: import.clone(),
        };
        for (way, name) in self.services {
            let name = name?;
            if *names.entry(name.clone()).or_insert(way) != way {
                return Err(BridgeError::BothWays(name));
            }
            // Its calls cross the other way.
            let calls = match way {
                Way::Export => import.clone(),
                Way::Import => export.clone(),
            };
            bridge.services.push(calls.serve(name)?);
        }
        for (way, pattern) in self.events {
            let (crossing, pattern) = (crossing(way), pattern?);
            if self.guaranteed {
                bridge.consumers.push(crossing.clone().consume(pattern.clone())?);
            }
            let events = crossing.from.subscribe_with(pattern, Overflow::DropNewest)?;
            bridge.tasks.spawn(crossing.carry(events));
        }
        Ok(bridge)
    }
}

/// The messages that have crossed a bridge, and those that have not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Crossed {
    /// Events, one-way messages and requests passed to the other side.
    pub passed: u64,
    /// Messages that had crossed this bridge before, or came from the other side. They were not
    /// passed.
    pub echoes: u64,
    /// Events for which the other side had no room, or which it could not accept. The senders of
    /// other messages receive an error.
    pub dropped: u64,
}

/// An open bridge. Dropping it closes it; the nodes live on.
#[must_use = "dropping it closes the bridge"]
pub struct Bridge {
    /// The tasks that carry events. They end when the bridge is dropped.
    tasks: JoinSet<()>,
    consumers: Vec<Consumer>,
    services: Vec<Service>,
    export: Arc<Crossing>,
    import: Arc<Crossing>,
}

opaque!(Bridge, |_it|);

impl Bridge {
    /// The user header with the ids of the bridges that a message has crossed, in order: the ids
    /// of their inner nodes, separated by commas.
    pub const VIA: &str = "peerbus-via";
    /// The user header with the id of the node that sent a message, before any bridge.
    pub const FROM: &str = "peerbus-from";
    /// The user header with the id that a guaranteed message had before any bridge.
    pub const ID: &str = "peerbus-id";

    /// Builds a bridge between the sides of two nodes, which both belong to it: for example
    /// `inner` on a mesh, and `outer` on a broker ([`Config::broker`](crate::Config::broker)) or in
    /// a mesh of another name.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use peerbus::{Bridge, Node};
    ///
    /// let mesh = Node::builder().start().await?;
    /// let broker = Node::builder().broker("nats://localhost:4222").start().await?;
    /// let bridge = Bridge::between(&mesh, &broker)
    ///     .export("orders.>") // the mesh's events, to the broker's subscribers
    ///     .import("prices.>")
    ///     .export_service("stock") // clients of the broker may call the mesh's instances
    ///     .start()?;
    /// # Ok(()) }
    /// ```
    ///
    /// On the other side, the bridge is the sender of a message that crosses: the other side's
    /// rules apply to the bridge, and receivers can authenticate only the bridge. Header, key and
    /// body cross unchanged, and so does the id of an event and of a one-way message. A request has a
    /// new id on the other side; a guaranteed message has one that follows from its sender and
    /// content, so that nobody can use up the id of another's message. The reply address has no
    /// meaning on the other side and is left out. The user headers [`Bridge::FROM`], [`Bridge::ID`]
    /// and [`Bridge::VIA`] name the first sender, the first id and the bridges.
    ///
    /// **No loops.** A message never crosses a bridge twice, however many bridges there are and
    /// however often they restart. Of the last 65,536 messages, one that came from one side is
    /// ignored when another bridge brings it back from the other: the same message in sender, id,
    /// destination, headers and body. A message that no bridge has carried is never taken for another.
    ///
    /// **Guaranteed messages** are stored on the other side before they count as processed on this
    /// side. A bridge that is killed in between receives them again. An outbox and NATS store each
    /// only once ([`Guaranteed::once`](crate::builder::Guaranteed::once)); RabbitMQ can't, and its consumers
    /// then receive one id twice.
    pub fn between(inner: &Node, outer: &Node) -> BridgeBuilder {
        BridgeBuilder {
            inner: inner.clone(),
            outer: outer.clone(),
            events: Vec::new(),
            services: Vec::new(),
            guaranteed: false,
        }
    }

    /// The messages passed from the inner to the outer side, calls of imported services included.
    pub fn exported(&self) -> Crossed {
        self.export.counts.crossed()
    }

    /// The messages passed from the outer to the inner side, calls of exported services included.
    pub fn imported(&self) -> Crossed {
        self.import.counts.crossed()
    }

    /// Closes the bridge, and waits until the calls and the guaranteed events on it have crossed.
    /// Other events that are still queued for it are dropped.
    ///
    /// # Cancel safety
    /// Dropping the future closes the bridge at once.
    pub async fn close(mut self) {
        self.tasks.shutdown().await;
        for service in self.services.drain(..) {
            service.drain().await;
        }
        for consumer in self.consumers.drain(..) {
            consumer.drain().await;
        }
    }
}

#[derive(Default)]
struct Counts {
    passed: AtomicU64,
    echoes: AtomicU64,
    dropped: AtomicU64,
}

impl Counts {
    fn crossed(&self) -> Crossed {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Crossed {
            passed: read(&self.passed),
            echoes: read(&self.echoes),
            dropped: read(&self.dropped),
        }
    }
}

/// One direction of a bridge.
struct Crossing {
    way: Way,
    from: Node,
    to: Node,
    bridge: NodeId,
    seen: Arc<Seen>,
    counts: Counts,
}

impl Crossing {
    /// The draft to send on the other side; `None` if the message must not cross. A message that
    /// comes again from the same side is sent again, unless it is an event that two patterns match.
    ///
    /// Whoever writes a header of a message decides on that message alone. So a forged
    /// [`Bridge::VIA`] keeps only its own message from crossing.
    fn admit(&self, message: &Message) -> Option<Draft> {
        let extra = message.header.extra.as_deref();
        let headers = extra.map_or(&[][..], |extra| &extra.headers);
        let header = |name: &str| headers.iter().find(|(found, _)| found == name);
        let via = header(Bridge::VIA).map_or("", |(_, via)| via);
        let bridge = self.bridge.to_string();
        let fingerprint = Fingerprint::of(message);
        let sight = self.seen.look(fingerprint, self.way, message.from, !via.is_empty());
        if sight == Sight::Echo || via.split(',').any(|id| id == bridge) {
            self.counts.echoes.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        if sight == Sight::Again && message.topic().is_some() && message.delivery.is_none() {
            return None;
        }
        let mut draft = Draft::copy_of(message);
        let via = if via.is_empty() { bridge } else { format!("{via},{bridge}") };
        draft.set_header(Bridge::VIA, via);
        if header(Bridge::FROM).is_none() {
            draft.set_header(Bridge::FROM, message.from.to_string());
        }
        if message.delivery.is_some() {
            if header(Bridge::ID).is_none() {
                draft.set_header(Bridge::ID, message.header.id.to_string());
            }
            draft.set_id(fingerprint.id(message.header.id));
        }
        Some(draft)
    }

    fn count_passed(&self) {
        self.counts.passed.fetch_add(1, Ordering::Relaxed);
    }

    async fn carry(self: Arc<Self>, mut events: Subscription) {
        while let Some(message) = events.recv().await {
            let Some(topic) = message.topic().cloned() else { continue };
            let Some(draft) = self.admit(&message) else { continue };
            let event = Publish::new(self.to.inner(), Ok(To::Topic(topic)), draft);
            match event.within(PATIENCE).await {
                Ok(report) if report.dropped.is_empty() => self.count_passed(),
                Ok(_) | Err(_) => _ = self.counts.dropped.fetch_add(1, Ordering::Relaxed),
            }
        }
    }

    /// Subscribes durably to events.
    fn consume(self: Arc<Self>, pattern: Pattern) -> Result<Consumer, BridgeError> {
        self.can_keep()?;
        let from = self.from.clone();
        // The name depends on the pattern alone, so that it is the same after a restart.
        let name = format!("bridge-{:08x}", crc32c::crc32c(pattern.as_str().as_bytes()));
        let handler = move |call: Call| {
            let crossing = self.clone();
            async move {
                match crossing.admit(&call.message) {
                    Some(draft) => crossing.keep(&call.message, draft).await,
                    None => Ok(()),
                }
            }
        };
        Ok(from.consume(name, pattern, handler).start()?)
    }

    /// Returns an error if the other side can't keep guaranteed messages.
    fn can_keep(&self) -> Result<(), BridgeError> {
        Ok(self.to.inner().carrier.check_store().map_err(ServeError::from)?)
    }

    /// Stores a message on the other side.
    async fn keep(&self, message: &Message, draft: Draft) -> Result<(), HandlerError> {
        let destination = message.header.destination.clone();
        let id = Fingerprint::of(message).id(message.header.id);
        let kept = Guaranteed::new(self.to.inner(), Ok(destination), draft);
        let kept = match self.to.inner().carrier.require(Capability::Once) {
            Ok(()) => kept.once(id),
            Err(_) => kept,
        };
        match kept.await {
            Ok(_receipt) => {
                self.count_passed();
                Ok(())
            }
            // A retry would change nothing.
            Err(error @ (OutboxError::Unsupported(_) | OutboxError::TooLarge(_))) => {
                Err(HandlerError::reject("bridge", error.to_string()))
            }
            Err(error) => Err(HandlerError::new("bridge", error.to_string())),
        }
    }

    /// Accepts calls to a service of the other side.
    fn serve(self: Arc<Self>, name: ServiceName) -> Result<Service, BridgeError> {
        let from = self.from.clone();
        let served = name.clone();
        let handler = move |call: Call| {
            let (crossing, name) = (self.clone(), served.clone());
            async move { crossing.call(call, name).await }
        };
        Ok(from.serve(name, handler).start()?)
    }

    /// Forwards a call to an instance on the other side, and returns its reply.
    async fn call(&self, call: Call, name: ServiceName) -> Result<Reply, HandlerError> {
        let Some(draft) = self.admit(&call.message) else {
            return Err(HandlerError::reject("bridge", "the call has crossed this bridge before"));
        };
        let (node, recipient) = (self.to.inner(), Ok(Recipient::Service(name)));
        if call.message.delivery.is_some() {
            self.keep(&call.message, draft).await?;
            return Ok(Reply::default());
        }
        if !call.wants_reply() {
            let sent = Send::new(node, recipient, draft).await;
            return match sent {
                Ok(_) => {
                    self.count_passed();
                    Ok(Reply::default())
                }
                Err(error @ SendError::NoService(_)) => {
                    Err(HandlerError::new("no_service", error.to_string()))
                }
                Err(error) => Err(HandlerError::new("bridge", error.to_string())),
            };
        }
        let mut request = Request::new(node, recipient, draft);
        if let Some(left) = call.time_left() {
            request = request.deadline(left);
        }
        let reply = tokio::select! {
            reply = request => reply,
            // A dropped request is cancelled.
            () = call.cancelled() => return Err(HandlerError::new("cancelled", "the caller gave up")),
        };
        match reply {
            Ok(message) => {
                self.count_passed();
                Ok(Reply::copy_of(message))
            }
            Err(RequestError::Handler(declined)) => Err(declined),
            Err(error @ RequestError::NoService(_)) => {
                Err(HandlerError::new("no_service", error.to_string()))
            }
            Err(error) => Err(HandlerError::new("bridge", error.to_string())),
        }
    }
}
