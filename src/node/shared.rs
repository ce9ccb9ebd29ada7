//! What the handles of a node and its tasks share, and how the engine's actions are performed.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast, oneshot, watch};
use tokio::task::JoinSet;

use super::broker::{BROKER, Brokered};
use super::counters::{LiveCounters, add};
use super::events::Event;
use super::log::{Line, Log};
use super::peer_link::PeerLink;
use super::service_runner::ServiceRunner;
use super::store::Store;
use super::subscription::{Inboxes, Overflow};
use super::transport::Transport;
use crate::address::{Pattern, ServiceName};
use crate::config::Config;
use crate::discovery::Discovered;
use crate::engine::{
    Action, Affinity, Connection, DownReason, LinkId, Mesh, MeshEvent, Origin, Requests, Routing,
    TargetKey, Time, Timing,
};
use crate::identity::{NodeId, random_u64};
use crate::message::{IdSource, Message, MessageId};
use crate::peer::Address;
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::trust::{Access, Grants};
use crate::tunnel::{Refusal, Watch};
use crate::wire::{Failure, Limits};

/// How the links are reached from a routing snapshot.
pub(crate) type LiveRouting = Routing<Arc<PeerLink>>;

/// What became of a request.
#[derive(Debug)]
pub(crate) enum RequestOutcome {
    Reply(Message),
    Failed(Failure),
    DeadlineExceeded,
    PeerLost {
        maybe_executed: bool,
    },
    /// The broker found nobody to give it to.
    Unrouted,
    ShutDown,
}

pub(crate) struct Shared {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) config: Config,
    pub(crate) limits: Limits,
    pub(crate) timing: Timing,
    pub(crate) ids: IdSource,
    pub(crate) started: Instant,
    pub(crate) runtime: Handle,
    /// For guaranteed messages.
    pub(crate) store: Option<Store>,
    mesh: Mutex<Mesh>,
    cells: Mutex<HashMap<LinkId, Arc<PeerLink>>>,
    next_link: AtomicU64,
    pub(crate) routing: ArcSwap<LiveRouting>,
    /// Counts the changes of who subscribes and serves, here and elsewhere.
    pub(crate) routes_version: AtomicU64,
    pub(crate) routes_changed: watch::Sender<()>,
    requests: Mutex<Requests<oneshot::Sender<RequestOutcome>>>,
    pub(crate) inboxes: ArcSwap<Inboxes>,
    inboxes_change: Mutex<()>,
    services: Mutex<BTreeMap<ServiceName, Arc<ServiceRunner>>>,
    /// The durable subscriptions of this node.
    /// All cells that take calls, or have taken some that they have yet to end.
    pub(crate) handlers: Mutex<Vec<Weak<ServiceRunner>>>,
    pub(crate) consumers: Mutex<BTreeMap<ServiceName, (Pattern, Arc<ServiceRunner>)>>,
    pub(crate) turn: AtomicUsize,
    /// What this node's calls to itself hold, in bytes.
    pub(crate) local_bytes: AtomicU64,
    pub(crate) counters: LiveCounters,
    pub(crate) events: broadcast::Sender<Event>,
    pub(super) log: Log,
    /// For the first who asks: what happened before anybody could.
    pub(crate) first_events: Mutex<Option<broadcast::Receiver<Event>>>,
    /// Who took the messages of which ordering keys.
    pub(crate) affinity: Mutex<Affinity>,
    /// Drops and moved keys are told in groups, by a task that this wakes.
    pub(crate) unreported: Notify,
    /// Wakes the driver for an earlier deadline.
    pub(crate) earlier: Notify,
    /// Until when the driver sleeps, in ms since the start.
    pub(crate) armed_ms: AtomicU64,
    pub(crate) transport: OnceLock<Transport>,
    /// In broker mode, what takes the place of links.
    pub(crate) broker: OnceLock<Brokered>,
    /// What is let in over networks, once there is a front door.
    pub(crate) access: OnceLock<Access>,
    pub(crate) tasks: Mutex<JoinSet<()>>,
    pub(crate) stopping: AtomicBool,
}

impl Shared {
    pub(crate) fn new(
        id: NodeId,
        name: String,
        config: Config,
        limits: Limits,
        mesh: Mesh,
        started: Instant,
        store: Option<Store>,
    ) -> Self {
        let timing = Timing {
            heartbeat: config.heartbeat,
            suspect: config.suspect_after,
            dead: config.dead_after,
        };
        let (events, first_events) = broadcast::channel(1024);
        Self {
            id,
            name,
            config,
            limits,
            timing,
            ids: IdSource::new(random_u64() >> 22),
            started,
            runtime: Handle::current(),
            store,
            mesh: Mutex::new(Rank::Mesh, mesh),
            cells: Mutex::new(Rank::Table, HashMap::new()),
            next_link: AtomicU64::new(1),
            routing: ArcSwap::default(),
            routes_version: AtomicU64::new(0),
            routes_changed: watch::Sender::new(()),
            requests: Mutex::new(Rank::Table, Requests::default()),
            inboxes: ArcSwap::default(),
            inboxes_change: Mutex::new(Rank::Subscribing, ()),
            services: Mutex::new(Rank::Table, BTreeMap::new()),
            handlers: Mutex::new(Rank::Table, Vec::new()),
            consumers: Mutex::new(Rank::Table, BTreeMap::new()),
            turn: AtomicUsize::new(0),
            local_bytes: AtomicU64::new(0),
            counters: LiveCounters::default(),
            events,
            log: Log::default(),
            first_events: Mutex::new(Rank::Leaf, Some(first_events)),
            affinity: Mutex::new(Rank::Table, Affinity::default()),
            unreported: Notify::new(),
            earlier: Notify::new(),
            armed_ms: AtomicU64::new(0),
            transport: OnceLock::new(),
            broker: OnceLock::new(),
            access: OnceLock::new(),
            tasks: Mutex::new(Rank::Leaf, JoinSet::new()),
            stopping: AtomicBool::new(false),
        }
    }

    pub(crate) fn now(&self) -> Time {
        Time::after_start(self.started.elapsed())
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Spawns a task that ends with the node.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    // The mesh.

    /// Tells the mesh something, then performs what it decided before anyone else can, so that
    /// records leave in the order in which they were decided on.
    pub(crate) fn with_mesh<R>(self: &Arc<Self>, tell: impl FnOnce(&mut Mesh, Time) -> R) -> R {
        let mut mesh = lock(&self.mesh);
        let result = tell(&mut mesh, self.now());
        let mut routing = None;
        while let Some(action) = mesh.poll_action() {
            match action {
                Action::Route { link, peer, change } => {
                    let next = || Routing::clone(&self.routing.load());
                    if let Some(cell) = self.cell(link) {
                        routing.get_or_insert_with(next).apply(peer, link, &cell, change);
                    }
                }
                Action::Report(event) => {
                    // Who hears that a peer is up can publish to it.
                    self.set_routing(routing.take());
                    self.report(event);
                }
                action => self.perform(action),
            }
        }
        self.set_routing(routing);
        if let Some(at) = mesh.poll_timeout() {
            self.wake_by(at);
        }
        result
    }

    /// What a peer may do: everything, if it is a process of the same user.
    pub(crate) fn grants(&self, connection: &Connection) -> Grants {
        match connection.origin {
            Origin::SameUser | Origin::SameProcess => Grants::Everything,
            Origin::Network => match (&connection.claimed, self.access.get()) {
                (Some(id), Some(access)) => access.grants(id),
                _ => Grants::nothing(),
            },
        }
    }

    /// When the mesh has to look at the clock.
    pub(crate) fn mesh_timeout(&self) -> Option<Time> {
        lock(&self.mesh).poll_timeout()
    }

    fn perform(self: &Arc<Self>, action: Action) {
        match action {
            Action::Dial { target, addresses } => self.dial(target, addresses),
            Action::Send(link, control) => {
                if let Some(cell) = self.cell(link) {
                    cell.send_control(control);
                }
            }
            Action::Admit(link) => {
                if let Some(cell) = self.cell(link) {
                    cell.admit();
                }
            }
            Action::Open { link, limits } => {
                if let Some(cell) = self.cell(link) {
                    cell.with_flow(|flow| flow.handle_limits(&limits));
                    cell.set_open();
                    add(&self.counters.links, 1);
                }
            }
            Action::Close { link, reason } => self.close_link(link, &reason),
            Action::Route { .. } | Action::Report(_) => unreachable!("with_mesh sees to them"),
        }
    }

    fn set_routing(&self, routing: Option<LiveRouting>) {
        if let Some(routing) = routing {
            self.routing.store(Arc::new(routing));
            self.notify_routes_changed();
        }
    }

    /// Who subscribes or serves, here or elsewhere, is not what it was.
    pub(super) fn notify_routes_changed(&self) {
        self.routes_version.fetch_add(1, Ordering::Release);
        self.routes_changed.send_replace(());
    }

    fn dial(self: &Arc<Self>, target: TargetKey, addresses: Vec<Address>) {
        let shared = self.clone();
        self.spawn(async move {
            let Some(transport) = shared.transport.get() else {
                return;
            };
            if let Err(error) = transport.dial(&target, &addresses).await {
                tracing::debug!(address = ?addresses.first(), %error, "dialling failed");
                let text = error.to_string();
                shared.with_mesh(|mesh, now| mesh.handle_dial_failed(now, &target, text));
            }
        });
    }

    fn close_link(self: &Arc<Self>, link: LinkId, reason: &DownReason) {
        let Some(cell) = lock(&self.cells).remove(&link) else {
            return;
        };
        let lost = cell.with_flow(crate::engine::Flow::close);
        self.count_drop(cell.peer, DropReason::LinkLost, lost.unsent);
        add(&self.counters.in_doubt, lost.in_doubt);
        if matches!(reason, DownReason::Violation(_)) {
            self.counters.refused("protocol");
        }
        self.log.push(Line::LinkClosed { peer: cell.peer, reason: reason.to_string() });
        for (id, waiter) in lock(&self.requests).handle_link_lost(link) {
            let maybe_executed = !lost.unsent_calls.contains(&id);
            let _caller_left = waiter.send(RequestOutcome::PeerLost { maybe_executed });
        }
        for service in self.handling() {
            service.handle_link_lost(self, link);
        }
        cell.close();
    }

    fn report(self: &Arc<Self>, event: MeshEvent) {
        let event = Event::from(event);
        match &event {
            Event::PeerUp(peer) => self.handle_delivery_link_up(peer.id),
            Event::PeerDown { id, .. } => {
                self.with_outbox(|outbox, now| outbox.handle_link_down(now, *id));
            }
            Event::Denied { .. } => self.counters.refused(DropReason::NotAllowed.as_str()),
            _ => {}
        }
        self.tell(event);
    }

    /// Tells who watches, and the log.
    pub(super) fn tell(&self, event: Event) {
        self.log.push(Line::Event(event.clone()));
        let _nobody_watches = self.events.send(event);
    }

    // Links.

    pub(crate) fn add_cell(&self, make: impl FnOnce(LinkId) -> PeerLink) -> Arc<PeerLink> {
        let id = LinkId(self.next_link.fetch_add(1, Ordering::Relaxed));
        let cell = Arc::new(make(id));
        lock(&self.cells).insert(id, cell.clone());
        self.spawn(cell.clone().keep_sending());
        cell
    }

    fn cell(&self, link: LinkId) -> Option<Arc<PeerLink>> {
        lock(&self.cells).get(&link).cloned()
    }

    pub(crate) fn cells(&self) -> Vec<Arc<PeerLink>> {
        lock(&self.cells).values().cloned().collect()
    }

    /// Counts a drop of ours, and sees to it that it is told.
    pub(crate) fn count_drop(&self, peer: NodeId, reason: DropReason, count: u64) {
        if self.counters.dropped(peer, reason, count) {
            self.unreported.notify_one();
        }
    }

    /// Makes sure that the driver looks at the clock by then.
    pub(crate) fn wake_by(&self, at: Time) {
        let at = at.since_start().as_millis() as u64;
        if at < self.armed_ms.load(Ordering::Acquire) {
            self.earlier.notify_one();
        }
    }

    // Requests.

    pub(crate) fn open_request(
        &self,
        id: MessageId,
        deadline: Time,
        link: Option<LinkId>,
        waiter: oneshot::Sender<RequestOutcome>,
    ) {
        lock(&self.requests).insert(id, deadline, link, waiter);
        self.wake_by(deadline);
    }

    pub(crate) fn end_request(
        &self,
        id: MessageId,
    ) -> Option<(oneshot::Sender<RequestOutcome>, Option<LinkId>)> {
        lock(&self.requests).remove(id)
    }

    /// Ends a request whose reply came over `link`, if that is where it went.
    pub(crate) fn end_request_over(
        &self,
        id: MessageId,
        link: LinkId,
    ) -> Option<oneshot::Sender<RequestOutcome>> {
        let mut requests = lock(&self.requests);
        if requests.link(id)? != Some(link) {
            return None;
        }
        requests.remove(id).map(|(waiter, _)| waiter)
    }

    /// The requests that went over a link that is lost may have been executed.
    pub(super) fn fail_requests_over(&self, link: LinkId) {
        for (_, waiter) in lock(&self.requests).handle_link_lost(link) {
            let _caller_left = waiter.send(RequestOutcome::PeerLost { maybe_executed: true });
        }
    }

    /// Takes a request back: from the queue, or from its handler's attention.
    pub(crate) fn cancel_call(&self, id: MessageId, link: Option<LinkId>) {
        match link {
            Some(BROKER) => {
                if let Some(broker) = self.broker() {
                    self.cancel_by_broker(broker, id);
                }
            }
            Some(link) => {
                if let Some(cell) = self.cell(link)
                    && cell.cancel(id)
                {
                    self.count_drop(cell.peer, DropReason::Cancelled, 1);
                }
            }
            None => self.handling().iter().for_each(|service| {
                _ = service.handle_cancel(self, super::service_runner::LOCAL, id)
            }),
        }
    }

    pub(crate) fn expire_requests(&self) {
        let late = lock(&self.requests).handle_timeout(self.now());
        for (id, waiter, link) in late {
            let _caller_left = waiter.send(RequestOutcome::DeadlineExceeded);
            self.cancel_call(id, link);
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        lock(&self.requests).poll_timeout()
    }

    pub(crate) fn fail_all_requests(&self) {
        let forever = Time::after_start(std::time::Duration::MAX);
        for (_, waiter, _) in lock(&self.requests).handle_timeout(forever) {
            let _caller_left = waiter.send(RequestOutcome::ShutDown);
        }
    }

    // Subscriptions and services.

    pub(crate) fn subscribe(
        self: &Arc<Self>,
        pattern: &Pattern,
        overflow: Overflow,
    ) -> super::Subscription {
        let change = lock(&self.inboxes_change);
        let mut inboxes = Inboxes::clone(&self.inboxes.load());
        let (number, inbox) = inboxes.add(pattern, overflow, self.config.subscription_queue);
        self.inboxes.store(Arc::new(inboxes));
        self.notify_routes_changed();
        drop(change);
        match self.broker() {
            Some(broker) => broker.client.subscribe(pattern),
            None => self.with_mesh(|mesh, _| mesh.subscribe(pattern)),
        }
        if self.is_stopping() {
            inbox.close();
        }
        super::Subscription::new(self, number, inbox)
    }

    pub(crate) fn unsubscribe(self: &Arc<Self>, number: u64, pattern: &Pattern) {
        match self.broker() {
            Some(broker) => broker.client.unsubscribe(pattern),
            None => self.with_mesh(|mesh, _| mesh.unsubscribe(pattern)),
        }
        let _change = lock(&self.inboxes_change);
        let mut inboxes = Inboxes::clone(&self.inboxes.load());
        inboxes.remove(pattern, number);
        self.inboxes.store(Arc::new(inboxes));
        self.notify_routes_changed();
    }

    pub(crate) fn service(&self, name: &ServiceName) -> Option<Arc<ServiceRunner>> {
        lock(&self.services).get(name).cloned()
    }

    pub(crate) fn services(&self) -> Vec<Arc<ServiceRunner>> {
        lock(&self.services).values().cloned().collect()
    }

    /// Offers a service, unless the node does so already.
    pub(crate) fn add_service(self: &Arc<Self>, service: &Arc<ServiceRunner>) -> bool {
        let mut services = lock(&self.services);
        if services.contains_key(&service.name) {
            return false;
        }
        services.insert(service.name.clone(), service.clone());
        drop(services);
        self.add_handler(service);
        match self.broker() {
            Some(broker) => broker.client.serve(&service.name, service.concurrency),
            None => self.with_mesh(|mesh, _| mesh.serve(&service.name, service.concurrency)),
        }
        self.notify_routes_changed();
        true
    }

    pub(crate) fn withdraw(self: &Arc<Self>, name: &ServiceName) {
        match self.broker() {
            Some(broker) => broker.client.withdraw(name),
            None => self.with_mesh(|mesh, _| mesh.withdraw(name)),
        }
    }

    pub(crate) fn remove_service(&self, name: &ServiceName) {
        lock(&self.services).remove(name);
    }

    pub(crate) fn handle_discovered(self: &Arc<Self>, discovered: Discovered) {
        self.with_mesh(|mesh, now| match discovered {
            Discovered::Seen(sighting) => mesh.handle_sighting(now, sighting),
            Discovered::Gone(key) => mesh.handle_gone(&key),
        });
    }
}

/// Counts what the front door turned away.
pub(crate) struct DoorWatch(pub(crate) Weak<Shared>);

impl Watch for DoorWatch {
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal) {
        if let Some(shared) = self.0.upgrade() {
            shared.counters.refused(refusal.as_str());
            let from = address.as_ref().map(tracing::field::display);
            tracing::debug!(address = from, %refusal, "the front door cut a connection");
            let event = Event::Refused { address, reason: refusal.to_string() };
            let _nobody_watches = shared.events.send(event);
        }
    }
}
