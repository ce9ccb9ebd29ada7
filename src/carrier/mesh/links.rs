//! The links of a node: the mesh's membership, the table of links, and the routing snapshot.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use arc_swap::{ArcSwap, Guard};
use smallvec::SmallVec;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::peer_link::PeerLink;
use crate::address::{Recipient, ServiceName};
use crate::core::{Core, Reporter, Way};
use crate::engine::{
    Action, Affinity, Budget, Candidate, Instance, LinkId, Mesh, RouteChange, Routing, Time,
    Timing, choose,
};
use crate::identity::NodeId;
use crate::sync::{Mutex, Rank, lock};
use crate::wire::{Control, Limits};

/// A link in the routing snapshot, also as a [`Way`].
#[derive(Clone)]
pub(super) struct Route {
    pub(super) link: Arc<PeerLink>,
    pub(super) way: Arc<dyn Way>,
}

impl Route {
    fn new(link: Arc<PeerLink>) -> Self {
        Self { way: link.clone(), link }
    }
}

/// The peers' patterns and services, with the links to the peers.
pub(super) type LiveRouting = Routing<Route>;

/// The next routing snapshot, if it differs from the current one.
#[derive(Default)]
pub(super) struct NextRouting(Option<LiveRouting>);

pub(super) struct Links {
    pub(super) timing: Timing,
    pub(super) limits: Limits,
    /// The memory for what peers send and don't take.
    pub(super) budget: Arc<Budget>,
    mesh: Mutex<Mesh>,
    /// The turns of the links whose batches take long: one of the runtime's threads is left to all
    /// others.
    turns: Semaphore,
    table: Mutex<HashMap<LinkId, Arc<PeerLink>>>,
    numbers: AtomicU64,
    routing: ArcSwap<LiveRouting>,
    /// The instances that took the messages of recent ordering keys.
    affinity: Mutex<Affinity>,
    turn: AtomicUsize,
}

/// An instance of a service, and its load by the outbox.
struct Weighed {
    node: NodeId,
    load: (u64, u32),
}

impl Candidate for Weighed {
    fn node(&self) -> NodeId {
        self.node
    }

    fn load(&self) -> (u64, u32) {
        self.load
    }
}

/// An instance that could take a call. Its load is read only if it matters.
enum Instances<'a> {
    Here { node: NodeId, load: (u64, u32) },
    There(&'a Instance<Route>),
}

impl Candidate for Instances<'_> {
    fn node(&self) -> NodeId {
        match self {
            Self::Here { node, .. } => *node,
            Self::There(instance) => instance.peer,
        }
    }

    fn load(&self) -> (u64, u32) {
        match self {
            Self::Here { load, .. } => *load,
            Self::There(instance) => (instance.link.link.unfinished_calls(), instance.concurrency),
        }
    }
}

impl Links {
    pub(super) fn new(mesh: Mesh, timing: Timing, limits: Limits, threads: usize) -> Self {
        Self {
            timing,
            limits,
            budget: mesh.budget().clone(),
            mesh: Mutex::new(Rank::Mesh, mesh),
            turns: Semaphore::new(threads.saturating_sub(1).max(1)),
            table: Mutex::new(Rank::Table, HashMap::new()),
            numbers: AtomicU64::new(1),
            routing: ArcSwap::default(),
            affinity: Mutex::new(Rank::Table, Affinity::default()),
            turn: AtomicUsize::new(0),
        }
    }

    /// Waits for a link's turn to handle a part of a long batch. Turns come in the order in which
    /// they are asked for.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.turns.acquire().await.ok()
    }

    // The table.

    pub(super) fn add(&self, make: impl FnOnce(LinkId) -> Arc<PeerLink>) -> Arc<PeerLink> {
        let id = LinkId(self.numbers.fetch_add(1, Ordering::Relaxed));
        let link = make(id);
        lock(&self.table).insert(id, link.clone());
        link
    }

    pub(super) fn get(&self, link: LinkId) -> Option<Arc<PeerLink>> {
        lock(&self.table).get(&link).cloned()
    }

    pub(super) fn remove(&self, link: LinkId) -> Option<Arc<PeerLink>> {
        lock(&self.table).remove(&link)
    }

    pub(super) fn all(&self) -> Vec<Arc<PeerLink>> {
        lock(&self.table).values().cloned().collect()
    }

    // Routing.

    pub(super) fn routing(&self) -> Guard<Arc<LiveRouting>> {
        self.routing.load()
    }

    /// Passes an input to the mesh, then carries out its actions before any other input, so that
    /// records leave in the order in which they were decided. Also returns the mesh's next
    /// timeout.
    pub(super) fn with_mesh<R>(
        &self,
        core: &Core,
        input: impl FnOnce(&mut Mesh, Time) -> R,
        mut perform: impl FnMut(Action, &mut NextRouting),
    ) -> (R, Option<Time>) {
        let mut mesh = lock(&self.mesh);
        let result = input(&mut mesh, core.now());
        let mut next = NextRouting::default();
        while let Some(action) = mesh.poll_action() {
            perform(action, &mut next);
        }
        self.publish(core, &mut next);
        (result, mesh.poll_timeout())
    }

    /// Applies a change to the next snapshot.
    pub(super) fn apply(
        &self,
        next: &mut NextRouting,
        link: LinkId,
        peer: NodeId,
        change: RouteChange,
    ) {
        let next = next.0.get_or_insert_with(|| Routing::clone(&self.routing.load()));
        next.apply(peer, link, || self.get(link).map(Route::new), change);
    }

    /// Replaces the snapshot, if there were changes.
    pub(super) fn publish(&self, core: &Core, next: &mut NextRouting) {
        if let Some(next) = next.0.take() {
            self.routing.store(Arc::new(next));
            core.routes.notify();
        }
    }

    pub(super) fn mesh_timeout(&self) -> Option<Time> {
        lock(&self.mesh).poll_timeout()
    }

    /// Queues a control record for a peer, if it is linked.
    pub(super) fn send_control(&self, peer: &NodeId, control: Control) {
        if let Some(route) = self.routing.load().link(peer) {
            route.link.send_control(control);
        }
    }

    // The choice among instances.

    /// Chooses the instance that takes a call; this node may be one.
    pub(super) fn choose(
        &self,
        core: &Core,
        recipient: &Recipient,
        key: Option<&str>,
    ) -> Option<Arc<dyn Way>> {
        let routing = self.routing.load();
        match recipient {
            Recipient::Node(node) => {
                let inbox = ServiceName::node_inbox();
                if *node == core.id {
                    return core.look(|front| front.load(&inbox)).map(|_| core.local().clone());
                }
                Some(routing.instance(&inbox, node)?.link.way.clone())
            }
            Recipient::Service(name) => {
                let here = core.look(|front| front.load(name));
                let here = here.map(|load| Instances::Here { node: core.id, load });
                let there = routing.instances(name).map(Instances::There);
                let all: SmallVec<[_; 4]> = there.chain(here).collect();
                let chosen = choose(&all, key, self.turn.fetch_add(1, Ordering::Relaxed))?;
                if let Some(key) = key {
                    self.note_taker(&core.reporter, name, key, chosen.node());
                }
                Some(match chosen {
                    Instances::Here { .. } => core.local().clone(),
                    Instances::There(instance) => instance.link.way.clone(),
                })
            }
        }
    }

    /// Chooses the instance that takes a guaranteed message, by the outbox's own loads. `load`
    /// returns `None` for an instance that may not take it.
    pub(super) fn choose_by(
        &self,
        core: &Core,
        name: &ServiceName,
        key: Option<&str>,
        load: &dyn Fn(&NodeId) -> Option<u64>,
    ) -> Option<NodeId> {
        let routing = self.routing.load();
        let there = routing.instances(name).map(|it| (it.peer, it.concurrency));
        let here = core.look(|front| front.load(name)).map(|(_, n)| (core.id, n));
        let weigh = |(node, concurrency)| Some(Weighed { node, load: (load(&node)?, concurrency) });
        let all: SmallVec<[_; 4]> = there.chain(here).filter_map(weigh).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        choose(&all, key, turn).map(Weighed::node)
    }

    /// Records the instance that takes a key's message; counts and reports a moved key.
    fn note_taker(&self, reporter: &Reporter, service: &ServiceName, key: &str, taker: NodeId) {
        let moved_from = lock(&self.affinity).note(service, key, taker);
        if let Some(from) = moved_from {
            reporter.count_moved_key(service, from, taker);
        }
    }
}
