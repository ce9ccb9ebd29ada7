//! The mesh carrier: links to all discovered peers, and guaranteed messages by outbox and inbox.
//!
//! ```text
//!   discovery ──▶ Mesh ──▶ dial ──▶ Transport ──▶ PeerLink ◀── records ── receive
//!                  │ Routing                         │ Flow                  │
//!                  ▼                                 ▼                       ▼
//!              choose, subscribers                 Core ◀─────────────── Durable: outbox, inbox
//! ```

mod driver;
pub(crate) mod durable;
mod links;
mod peer_link;
mod receive;
mod sockets;
mod transport;

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{
    CannotKeep, Capability, Carrier, Choice, Condition, NewGuaranteed, NotMet, OutboxError,
    Submission, Unsupported, Wish, WishEnd,
};
use crate::address::{Recipient, Topic};
use crate::core::{Alarm, Core, Event, Line, Pulse, Way, add};
use crate::discovery::Discovered;
use crate::engine::{
    Action, Connection, DownReason, Flow, LinkId, Mesh, MeshEvent, Origin, Sighting, TargetKey,
    Time, Timing, TooMany,
};
use crate::identity::NodeId;
use crate::link::Acceptor;
use crate::link::memory::MemoryNetwork;
use crate::peer::{Address, PeerInfo, Source, Unreachable};
use crate::report::DropReason;
use crate::trust::{Access, Grants};
use crate::wire::Limits;
use durable::Durable;
pub(crate) use durable::store;
use links::{Links, NextRouting};
use receive::NodeAcceptor;
pub(crate) use sockets::SocketError;
use transport::Transport;

/// The interval at which peers are asked for confirmations during a shutdown.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// The time that peers have to close their links after the goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

pub(crate) struct MeshCarrier {
    core: Arc<Core>,
    links: Arc<Links>,
    durable: Option<Arc<Durable>>,
    transport: Transport,
    /// The rights of network peers, if this node uses sockets.
    access: Option<Access>,
    /// Wakes the driver for an earlier deadline.
    alarm: Arc<Alarm>,
    /// Notices that the driver does not run.
    pulse: Arc<Pulse>,
}

/// The parts of a new mesh carrier.
pub(crate) struct MeshParts {
    pub(crate) mesh: Mesh,
    pub(crate) limits: Limits,
    /// The open store, if the node has one.
    pub(crate) store: Option<durable::store::Store>,
}

impl MeshCarrier {
    /// Creates a mesh over links within this process.
    pub(crate) fn over_memory(
        core: &Arc<Core>,
        parts: MeshParts,
        network: &MemoryNetwork,
    ) -> Arc<Self> {
        let mut others = Vec::new();
        let carrier = Self::new(core, parts, |carrier| {
            let acceptor: Arc<dyn Acceptor> = Arc::new(NodeAcceptor(carrier.clone()));
            let port = network.join(core.id, &acceptor);
            others = network.others(port.number);
            (Transport::Memory { port, _acceptor: acceptor }, None)
        });
        carrier.begin();
        for address in others {
            let sighting = Sighting { source: Source::Fixed, id: None, addresses: vec![address] };
            carrier.handle_discovered(Discovered::Seen(sighting));
        }
        carrier
    }

    fn new(
        core: &Arc<Core>,
        parts: MeshParts,
        transport: impl FnOnce(&Weak<Self>) -> (Transport, Option<Access>),
    ) -> Arc<Self> {
        let MeshParts { mesh, limits, store } = parts;
        let timing = Timing {
            heartbeat: core.config.heartbeat,
            suspect: core.config.suspect_after,
            dead: core.config.dead_after,
        };
        let threads = core.runtime.metrics().num_workers();
        let links = Arc::new(Links::new(mesh, timing, limits, threads));
        let alarm = Arc::new(Alarm::default());
        let durable = store.map(|store| Durable::new(core, &links, &alarm, store));
        Arc::new_cyclic(|carrier| {
            let (transport, access) = transport(carrier);
            let driven = carrier.clone();
            let pulse = Pulse::new(core.runtime.clone(), move || {
                driven.upgrade().iter().for_each(driver::handle_timeouts);
            });
            Self { core: core.clone(), links, durable, transport, access, alarm, pulse }
        })
    }

    /// Starts the tasks of the mesh.
    fn begin(self: &Arc<Self>) {
        if let Some(durable) = &self.durable {
            durable.begin();
        }
        self.core.spawn(driver::run(self.clone()));
    }

    // The mesh.

    /// Passes an input to the mesh, then carries out its actions before any other input.
    fn with_mesh<R>(self: &Arc<Self>, input: impl FnOnce(&mut Mesh, Time) -> R) -> R {
        let (result, next) =
            self.links.with_mesh(&self.core, input, |action, next| self.perform(action, next));
        if let Some(at) = next {
            self.alarm.wake_by(at);
        }
        result
    }

    /// Returns the rights of a peer: all of them for a process of the same user.
    fn grants(&self, connection: &Connection) -> Grants {
        match connection.origin {
            Origin::SameUser | Origin::SameProcess => Grants::Everything,
            Origin::Network => match (&connection.claimed, &self.access) {
                (Some(id), Some(access)) => access.grants(id),
                _ => Grants::nothing(),
            },
        }
    }

    /// Returns false for a node whose key is not trusted: dialling it would be in vain.
    fn may_link(&self, id: &NodeId) -> bool {
        self.access.as_ref().is_none_or(|access| access.may_link(id))
    }

    fn perform(self: &Arc<Self>, action: Action, next: &mut NextRouting) {
        match action {
            Action::Dial { target, addresses } => self.dial(target, addresses),
            Action::Send(link, control) => {
                if let Some(link) = self.links.get(link) {
                    link.send_control(control);
                }
            }
            Action::Admit(link) => {
                if let Some(link) = self.links.get(link) {
                    link.admit();
                }
            }
            Action::Open { link, limits } => {
                if let Some(link) = self.links.get(link) {
                    link.with_flow(|flow| flow.handle_limits(&limits));
                    link.set_open();
                    add(&self.core.reporter.counters.links, 1);
                }
            }
            Action::Close { link, reason } => self.close_link(link, &reason),
            Action::Route { link, peer, change } => self.links.apply(next, link, peer, change),
            Action::Report(event) => {
                // A user who is notified that a peer is up can publish to it.
                self.links.publish(&self.core, next);
                self.report(event);
            }
        }
    }

    fn dial(self: &Arc<Self>, target: TargetKey, addresses: Vec<Address>) {
        let carrier = self.clone();
        self.core.spawn(async move {
            if let Err(error) = carrier.transport.dial(&target, &addresses).await {
                tracing::debug!(address = ?addresses.first(), %error, "dialling failed");
                let text = error.to_string();
                carrier.with_mesh(|mesh, now| mesh.handle_dial_failed(now, &target, text));
            }
        });
    }

    fn close_link(&self, id: LinkId, reason: &DownReason) {
        let Some(link) = self.links.remove(id) else { return };
        let loss = link.with_flow(Flow::close);
        let reporter = &self.core.reporter;
        if matches!(reason, DownReason::Violation(_)) {
            reporter.counters.refused("protocol");
        }
        reporter.log(Line::LinkClosed { peer: link.peer, reason: reason.to_string() });
        self.core.lose_link(id, link.peer, &loss);
        link.close();
    }

    fn report(&self, event: MeshEvent) {
        let event = Event::from(event);
        match (&event, &self.durable) {
            (Event::PeerUp(peer), Some(durable)) => durable.handle_link_up(peer.id),
            (Event::PeerDown { id, .. }, Some(durable)) => durable.handle_link_down(*id),
            (Event::Denied { .. }, _) => {
                self.core.reporter.counters.refused(DropReason::NotAllowed.as_str());
            }
            _ => {}
        }
        self.core.reporter.report(event);
    }

    fn handle_discovered(self: &Arc<Self>, discovered: Discovered) {
        self.with_mesh(|mesh, now| match discovered {
            Discovered::Seen(sighting) => mesh.handle_sighting(now, sighting),
            Discovered::Resolved { name, addresses } => {
                mesh.handle_resolved(now, name, addresses);
            }
            Discovered::Gone(key) => mesh.handle_gone(&key),
        });
    }

    /// Closes the sockets and the store; returns the number of guaranteed messages that are left.
    async fn close_files(&self) -> u64 {
        self.transport.close().await;
        match &self.durable {
            Some(durable) => durable.close().await,
            None => 0,
        }
    }

    /// Waits until no link is left.
    async fn unlinked(&self) {
        let mut changes = self.core.routes.subscribe();
        while self.links.routing().peers() > 0 {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn holds(&self, condition: &Condition) -> bool {
        match condition {
            Condition::Subscribers(topic, count) => {
                let here = self.core.subscriptions.load().has_match(topic);
                self.links.routing().subscribers(topic).len() + usize::from(here) >= *count
            }
            Condition::Consumers(topic, count) => {
                self.durable.as_ref().map_or(0, |durable| durable.count_consumers(topic)) >= *count
            }
            Condition::PresentConsumers(topic, count) => {
                self.durable.as_ref().map_or(0, |durable| durable.count_present_consumers(topic))
                    >= *count
            }
            Condition::Instances(name, count) => {
                let here = self.core.look(|front| front.load(name)).is_some();
                self.links.routing().instances(name).count() + usize::from(here) >= *count
            }
            Condition::Peers(count) => self.links.routing().peers() >= *count,
        }
    }
}

/// The carrier, as the node owns it. The mesh carrier is shared with its tasks.
pub(crate) struct MeshHandle(pub(crate) Arc<MeshCarrier>);

impl Carrier for MeshHandle {
    fn require(&self, _: Capability) -> Result<(), Unsupported> {
        Ok(())
    }

    fn check_store(&self) -> Result<(), CannotKeep> {
        self.0.durable.as_ref().map(drop).ok_or(CannotKeep::NoStore)
    }

    fn check_consumer(&self) -> Result<(), CannotKeep> {
        self.check_store()
    }

    fn wish(&self, wish: Wish) -> Result<(), TooMany> {
        let Self(carrier) = self;
        match wish {
            Wish::Subscribe(pattern) => {
                carrier.with_mesh(|mesh, now| mesh.subscribe(now, &pattern))
            }
            Wish::Serve(name, n) => carrier.with_mesh(|mesh, now| mesh.serve(now, &name, n)),
            Wish::Consume(name, ..) => match &carrier.durable {
                Some(durable) => durable.handle_consumer_began(&name),
                None => Ok(()),
            },
        }
    }

    fn end_wish(&self, wish: Wish, end: WishEnd) {
        let Self(carrier) = self;
        match wish {
            Wish::Subscribe(pattern) => {
                carrier.with_mesh(|mesh, now| mesh.unsubscribe(now, &pattern));
            }
            Wish::Serve(name, _) => carrier.with_mesh(|mesh, now| mesh.withdraw(now, &name)),
            Wish::Consume(name, ..) => {
                if let Some(durable) = &carrier.durable {
                    durable.handle_consumer_ended(&name, end);
                }
            }
        }
    }

    fn subscribers(&self, topic: &Topic, each: &mut dyn FnMut(&Arc<dyn Way>)) -> bool {
        let routing = self.0.links.routing();
        routing.subscribers(topic).iter().for_each(|(_, route)| each(&route.way));
        true
    }

    fn choose(&self, recipient: &Recipient, key: Option<&str>) -> Choice {
        let Self(carrier) = self;
        match carrier.links.choose(&carrier.core, recipient, key) {
            Some(way) => Choice::Found(way),
            None if carrier.core.config.fail_fast && carrier.links.routing().peers() > 0 => {
                Choice::Nobody
            }
            None => Choice::Later { otherwise: None },
        }
    }

    fn store(&self, messages: SmallVec<[NewGuaranteed; 1]>) -> Result<Submission, OutboxError> {
        self.0.durable.as_ref().ok_or(OutboxError::NoOutbox)?.submit(messages)
    }

    fn wait<'a>(
        &'a self,
        condition: Condition,
        within: Duration,
    ) -> BoxFuture<'a, Result<(), NotMet>> {
        let waiting = async move {
            let mut changes = self.0.core.routes.subscribe();
            let wait =
                async { while !self.0.holds(&condition) && changes.changed().await.is_ok() {} };
            timeout(within, wait).await.map_err(|_| NotMet::TimedOut)
        };
        waiting.boxed()
    }

    fn peers(&self) -> Vec<PeerInfo> {
        let Self(carrier) = self;
        let mut peers = carrier.with_mesh(|mesh, _| mesh.peers());
        let routing = carrier.links.routing();
        for peer in &mut peers {
            if let Some(route) = routing.link(&peer.id) {
                let silence = carrier.core.now().since(route.link.peek(Flow::last_heard));
                let suspect = silence >= carrier.links.timing.suspect;
                peer.suspect_for = suspect.then_some(silence);
            }
        }
        peers
    }

    fn unreachable(&self) -> Vec<Unreachable> {
        self.0.with_mesh(|mesh, _| mesh.unreachable())
    }

    fn queued_bytes(&self, peer: &NodeId) -> u64 {
        let routing = self.0.links.routing();
        routing.link(peer).map_or(0, |route| route.link.peek(Flow::queued_bytes))
    }

    fn stop_linking(&self) {
        self.0.with_mesh(|mesh, _| mesh.stop_linking());
    }

    fn settle(&self) -> BoxFuture<'_, ()> {
        let Self(carrier) = self;
        let is_settled = || {
            carrier.links.all().iter().all(|link| link.peek(Flow::is_settled))
                && carrier.durable.as_ref().is_none_or(|durable| durable.inbox_is_idle())
        };
        let settling = async move {
            while !is_settled() {
                carrier.with_mesh(|mesh, _| mesh.probe_all());
                sleep(ASK_EVERY).await;
            }
        };
        settling.boxed()
    }

    fn close(&self, _: Instant) -> BoxFuture<'_, u64> {
        let Self(carrier) = self;
        let closing = async move {
            carrier.with_mesh(|mesh, _| mesh.say_goodbye());
            // Peers close their link when they have read the goodbye.
            let _too_slow = timeout_at(Instant::now() + GOODBYE, carrier.unlinked()).await;
            carrier.with_mesh(|mesh, now| mesh.close_all(now));
            carrier.core.end_tasks().await;
            carrier.close_files().await
        };
        closing.boxed()
    }

    fn abandon(&self) {
        let carrier = self.0.clone();
        carrier.with_mesh(|mesh, now| mesh.close_all(now));
        if let Some(durable) = &carrier.durable {
            durable.abandon();
        }
        self.0.core.runtime.spawn(async move {
            carrier.close_files().await;
            carrier.core.reporter.write_log();
        });
    }
}

impl MeshHandle {
    pub(crate) fn durable(&self) -> Option<&Arc<Durable>> {
        self.0.durable.as_ref()
    }
}
