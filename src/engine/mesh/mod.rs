//! Membership: links, and the subscriptions and services of peers.
//!
//! ```text
//!  connected ──▶ Greeting ──hello──▶ Deciding ──accept──▶ Up ──▶ closed
//!                   │                   │ known id, new incarnation: probe the old link
//!                   └─ 5 s without      └─ bye(duplicate)
//! ```
//!
//! Of two nodes, the one with the smaller id decides which connection becomes their only link.

mod about;
mod announcements;
mod endings;
mod gossip;
mod handshake;
mod interests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::address::{MeshName, ServiceName};
use crate::engine::dialer::{Dialer, Sighting, TargetKey};
use crate::engine::{Bucket, Budget, FORGOTTEN_AT_ONCE, LinkId, Rate, RouteChange, Share, Time};
use crate::identity::{Incarnation, NodeId};
use crate::peer::{Address, PeerInfo, ServiceInfo, Source, Unreachable};
use crate::trust::{self, Grants};
use crate::wire::{Bye, Control, Limits};
use about::About;
use gossip::{Gossip, NAMED};
use interests::Interests;
pub(crate) use interests::TooMany;

/// The time after which a connection without a hello is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// The most patterns and services that a node may announce in all.
pub(crate) const MAX_ANNOUNCED: usize = 10_000;
/// The rate of a peer's changes. The protocol allows a burst of 20,000; the rest is for records that
/// were delayed on their way.
const PEER_RATE: Rate = Rate { burst: 3 * MAX_ANNOUNCED as u64, per_second: 1000 };
/// The most addresses in a hello, which must be small.
const MAX_TOLD: usize = 64;
/// The time in which an old link must answer a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// The identity and settings of this node.
#[derive(Debug, Clone)]
pub(crate) struct MeshConfig {
    pub(crate) id: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) mesh: MeshName,
    pub(crate) name: String,
    pub(crate) limits: Limits,
    /// The node exchanges hints about other nodes with its peers.
    pub(crate) gossip: bool,
    /// The node dials no address beyond this host.
    pub(crate) loopback_only: bool,
    /// The limit of dials to addresses that anybody could have named.
    pub(crate) dials_per_second: u32,
    /// The memory for what peers announce.
    pub(crate) budget: Arc<Budget>,
}

/// The origin of a connection, as verified by the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Origin {
    /// A network, loopback included.
    #[default]
    Network,
    /// A process on this host of the same user, by the credentials of its socket.
    SameUser,
    /// This process.
    SameProcess,
}

/// The properties of a connection, before its hello.
#[derive(Debug, Clone, Default)]
pub(crate) struct Connection {
    pub(crate) origin: Origin,
    /// The permissions of the peer.
    pub(crate) grants: Grants,
    /// The id claimed in the connection's own handshake; the hello must agree.
    pub(crate) claimed: Option<NodeId>,
    /// The target that this node dialled; `None` if the peer dialled.
    pub(crate) target: Option<TargetKey>,
    /// The address that this node dialled, or that of the dialling peer. `None` if the peer dialled
    /// over a Unix socket: its end has no name.
    pub(crate) address: Option<Address>,
}

/// The reason for which a link ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DownReason {
    Closed,
    Silent,
    Bye(Bye),
    Replaced,
    Violation(String),
    /// The connection was refused before it became a link.
    Refused(String),
    /// The peer's key is no longer trusted.
    Distrusted,
    ShutDownHere,
}

/// An action for the owner of the mesh. Actions are carried out in order.
#[derive(Debug)]
pub(crate) enum Action {
    Dial {
        target: TargetKey,
        addresses: Vec<Address>,
    },
    /// Queue a control record.
    Send(LinkId, Control),
    /// The peer's hello is accepted: its messages may now be as large as a batch.
    Admit(LinkId),
    /// The peer's limits are known: messages may flow.
    Open {
        link: LinkId,
        limits: Limits,
    },
    /// Close the connection once the queued records are sent.
    Close {
        link: LinkId,
        reason: DownReason,
    },
    /// Apply a change to the routing snapshot.
    Route {
        link: LinkId,
        peer: NodeId,
        change: RouteChange,
    },
    Report(MeshEvent),
}

/// An event for the node's user.
#[derive(Debug, Clone)]
pub(crate) enum MeshEvent {
    PeerUp(Box<PeerInfo>),
    PeerDown {
        id: NodeId,
        name: String,
        reason: DownReason,
    },
    /// A connection ended before it became a link.
    Refused {
        address: Option<Address>,
        reason: String,
    },
    /// A peer denied an action to this node.
    Denied {
        id: NodeId,
        action: trust::Action,
        name: String,
    },
    /// Another live node has this node's identity.
    IdentityConflict {
        address: Option<Address>,
    },
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Waiting for the peer's hello.
    Greeting {
        deadline: Time,
    },
    /// Waiting for the decision: the peer's, or this node's after a probe.
    Deciding {
        deadline: Time,
    },
    Up,
}

#[derive(Debug)]
struct Link {
    connection: Connection,
    phase: Phase,
    /// The number of announcements sent after our hello; `None` before the hello.
    announced: Option<u64>,
    /// The rate limit of the peer's changes.
    allowance: Bucket,
    /// The rate limit of unknown nodes in its hints.
    hints: Bucket,
    /// The bytes that its announcements take.
    share: Share,
    /// The peer's announced state, once its hello has arrived.
    about: Option<Box<About>>,
}

/// The patterns and services of a link that has ended, which are still to be forgotten.
#[derive(Debug)]
struct Leaving {
    link: LinkId,
    about: Box<About>,
    /// Their bytes, until they are forgotten.
    _share: Share,
}

/// A probe of a peer's old link, on behalf of a new connection.
#[derive(Debug)]
struct Probe {
    newcomer: LinkId,
    nonce: u64,
    deadline: Time,
}

/// A node's view of its mesh. Pure.
#[derive(Debug)]
pub(crate) struct Mesh {
    me: MeshConfig,
    /// The addresses at which others reach this node over a network.
    addresses: Vec<Address>,
    interests: Interests,
    /// Ordered, so that a simulated run can be repeated.
    links: BTreeMap<LinkId, Link>,
    /// The deadlines of connections that are not links yet.
    deadlines: BTreeSet<(Time, LinkId)>,
    peers: BTreeMap<NodeId, LinkId>,
    leaving: VecDeque<Leaving>,
    probes: BTreeMap<NodeId, Probe>,
    dialer: Dialer,
    dialing: bool,
    gossip: Gossip,
    nonce: u64,
    actions: VecDeque<Action>,
}

impl Mesh {
    pub(crate) fn new(me: MeshConfig, seed: u64) -> Self {
        Self {
            addresses: Vec::new(),
            interests: Interests::new(),
            links: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            peers: BTreeMap::new(),
            leaving: VecDeque::new(),
            probes: BTreeMap::new(),
            dialer: Dialer::new(me.id, seed, me.dials_per_second),
            dialing: true,
            gossip: Gossip::new(me.id),
            nonce: 0,
            actions: VecDeque::new(),
            me,
        }
    }

    pub(crate) fn budget(&self) -> &Arc<Budget> {
        &self.me.budget
    }

    /// Sets the addresses at which others reach this node over a network, for future hellos; at most
    /// 64 of them.
    pub(crate) fn set_addresses(&mut self, mut addresses: Vec<Address>) {
        addresses.truncate(MAX_TOLD);
        self.addresses = addresses;
    }

    // Inputs from discovery and links.

    pub(crate) fn handle_sighting(&mut self, now: Time, sighting: Sighting) {
        self.dialer.handle_sighting(now, sighting);
        self.dial_due(now);
    }

    /// Handles the addresses that a configured name currently has: each is a target of its own.
    pub(crate) fn handle_resolved(&mut self, now: Time, name: Address, addresses: Vec<Address>) {
        self.dialer.handle_resolved(now, name, addresses);
        self.dial_due(now);
    }

    pub(crate) fn handle_gone(&mut self, key: &TargetKey) {
        self.dialer.handle_gone(key);
    }

    pub(crate) fn handle_dial_failed(&mut self, now: Time, target: &TargetKey, error: String) {
        self.dialer.handle_dial_failed(now, target, error);
        self.dial_due(now);
    }

    pub(crate) fn handle_connected(&mut self, now: Time, link: LinkId, connection: Connection) {
        if let Some(target) = &connection.target {
            self.dialer.handle_connected(target, link);
        }
        let dialled = connection.target.is_some();
        let deadline = now + HELLO_TIMEOUT;
        let phase = Phase::Greeting { deadline };
        let allowance = Bucket::new(now, PEER_RATE);
        let hints = Bucket::new(now, NAMED);
        let share = self.me.budget.share();
        let fresh =
            Link { connection, phase, announced: None, allowance, hints, share, about: None };
        self.links.insert(link, fresh);
        self.deadlines.insert((deadline, link));
        if dialled {
            self.send_hello(link);
        }
        self.dial_due(now);
    }

    /// Handles a control record that concerns the mesh.
    pub(crate) fn handle_control(&mut self, now: Time, link: LinkId, control: Control) {
        match (control, self.links.get(&link).map(|link| &link.phase)) {
            // Records that arrive on an ended link are ignored.
            (_, None) => {}
            (Control::Hello(hello), Some(Phase::Greeting { .. })) => {
                self.handle_hello(now, link, *hello);
            }
            (Control::Accept, Some(Phase::Deciding { .. })) => self.handle_accept(now, link),
            (Control::Announce(announcement), Some(Phase::Deciding { .. } | Phase::Up)) => {
                self.handle_announcement(now, link, *announcement);
            }
            (Control::Denied(denied), Some(Phase::Deciding { .. } | Phase::Up)) => {
                self.handle_denied(link, denied);
            }
            (Control::Peers(hints), Some(Phase::Up)) => self.handle_hints(now, link, hints),
            (Control::Bye(bye), Some(_)) => self.handle_bye(now, link, bye),
            (Control::Probe(nonce), Some(Phase::Up)) => self.send(link, Control::ProbeReply(nonce)),
            (Control::ProbeReply(nonce), Some(Phase::Up)) => {
                self.handle_probe_reply(now, link, nonce)
            }
            (control, Some(_)) => {
                let kind = match control {
                    Control::Hello(_) => "a second hello",
                    Control::Accept => "an accept out of turn",
                    Control::Announce(_) => "an announcement before its hello",
                    _ => "a record out of turn",
                };
                self.handle_violation(now, link, kind.into());
            }
        }
    }

    /// Ends the link of a peer that broke the protocol, with the reason.
    pub(crate) fn handle_violation(&mut self, now: Time, link: LinkId, text: String) {
        self.send(link, Control::Bye(Bye::Violation(text.clone())));
        self.end(now, link, DownReason::Violation(text));
    }

    /// Ends a connection to a peer that speaks a newer protocol.
    pub(crate) fn handle_newer_version(&mut self, now: Time, link: LinkId, version: u64) {
        self.send(link, Control::Bye(Bye::Version));
        let text = format!("the peer speaks protocol version {version}");
        match self.links.get(&link).map(|link| link.phase) {
            // The peer has routes and a place in the outbox, which must be removed.
            Some(Phase::Up) => self.end(now, link, DownReason::Refused(text)),
            _ => self.refuse(now, link, text, true),
        }
    }

    /// Ends links over a network to nodes that are no longer `trusted`.
    pub(crate) fn handle_trust_changed(&mut self, now: Time, trusted: impl Fn(&NodeId) -> bool) {
        let distrusted = |link: &Link| {
            link.connection.origin == Origin::Network
                && link.connection.claimed.is_some_and(|id| id != self.me.id && !trusted(&id))
        };
        let links = self.links.iter().filter(|(_, link)| distrusted(link));
        for link in links.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.send(link, Control::Bye(Bye::Distrusted));
            self.end(now, link, DownReason::Distrusted);
        }
    }

    /// Handles a connection that was closed, or silent for too long.
    pub(crate) fn handle_closed(&mut self, now: Time, link: LinkId, reason: DownReason) {
        self.end(now, link, reason);
    }

    pub(crate) fn handle_timeout(&mut self, now: Time) {
        let late = self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now);
        for link in late.map(|(_, link)| *link).collect::<Vec<_>>() {
            if !self.is_probing_for(link) {
                self.refuse(now, link, "no hello within 5 s".into(), false);
            }
        }
        let done = self.probes.iter().filter(|(_, probe)| probe.deadline <= now);
        for (id, newcomer) in done.map(|(id, probe)| (*id, probe.newcomer)).collect::<Vec<_>>() {
            self.probes.remove(&id);
            self.accept(now, newcomer);
        }
        self.forget_some(FORGOTTEN_AT_ONCE);
        self.gossip_due(now);
        self.announce_due(now);
        self.dial_due(now);
    }

    /// Records that this node did not run for that long, in which no peer could meet a deadline.
    pub(crate) fn handle_pause(&mut self, pause: Duration) {
        let late: Vec<LinkId> = self.deadlines.iter().map(|(_, link)| *link).collect();
        for link in late {
            let phase = self.links.get(&link).map(|entry| entry.phase.later(pause));
            if let Some(phase) = phase {
                self.set_phase(link, phase);
            }
        }
        for probe in self.probes.values_mut() {
            probe.deadline = probe.deadline + pause;
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Time> {
        let links = self.deadlines.first().map(|(deadline, _)| *deadline);
        let probes = self.probes.values().map(|probe| probe.deadline).min();
        let dials = self.dialing.then(|| self.dialer.poll_timeout()).flatten();
        let news = self.interests.poll_timeout();
        let leaving = (!self.leaving.is_empty()).then(Time::default);
        [links, probes, dials, self.gossip_at(), news, leaving].into_iter().flatten().min()
    }

    pub(crate) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    // Inputs from the node's user.

    /// Stops making new links; existing ones stay.
    pub(crate) fn stop_linking(&mut self) {
        self.dialing = false;
    }

    /// Sends every peer a bye.
    pub(crate) fn say_goodbye(&mut self) {
        let links: Vec<LinkId> = self.peers.values().copied().collect();
        for link in links {
            self.send(link, Control::Bye(Bye::Shutdown));
        }
    }

    /// Asks every peer to confirm at once what it has consumed.
    pub(crate) fn probe_all(&mut self) {
        let links: Vec<LinkId> = self.peers.values().copied().collect();
        for link in links {
            self.send(link, Control::Probe(0));
        }
    }

    pub(crate) fn peers(&self) -> Vec<PeerInfo> {
        self.peers.values().filter_map(|link| self.peer_info(*link)).collect()
    }

    /// Closes all connections.
    pub(crate) fn close_all(&mut self, now: Time) {
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        for link in links {
            self.handle_closed(now, link, DownReason::ShutDownHere);
        }
    }

    pub(crate) fn unreachable(&self) -> Vec<Unreachable> {
        self.dialer.unreachable(|id| self.is_linked(id))
    }

    #[cfg(test)]
    pub(crate) fn peer_count(&self) -> usize {
        self.peers.len()
    }

    pub(crate) fn is_linked(&self, id: &NodeId) -> bool {
        self.peers.contains_key(id)
    }

    // Helpers.

    fn dial_due(&mut self, now: Time) {
        if !self.dialing {
            return;
        }
        let peers = &self.peers;
        while let Some((target, addresses)) =
            self.dialer.poll_dial(now, |id| peers.contains_key(id))
        {
            self.actions.push_back(Action::Dial { target, addresses });
        }
    }

    fn is_probing_for(&self, link: LinkId) -> bool {
        self.probes.values().any(|probe| probe.newcomer == link)
    }

    fn set_phase(&mut self, link: LinkId, phase: Phase) {
        if let Some(entry) = self.links.get_mut(&link) {
            let before = std::mem::replace(&mut entry.phase, phase);
            self.set_deadline(link, before, Some(phase));
        }
    }

    fn set_deadline(&mut self, link: LinkId, before: Phase, now: Option<Phase>) {
        if let Some(deadline) = before.deadline() {
            self.deadlines.remove(&(deadline, link));
        }
        if let Some(deadline) = now.and_then(Phase::deadline) {
            self.deadlines.insert((deadline, link));
        }
    }

    fn about(&self, link: LinkId) -> Option<&About> {
        self.links.get(&link)?.about.as_deref()
    }

    fn route(&mut self, link: LinkId, peer: NodeId, change: RouteChange) {
        self.actions.push_back(Action::Route { link, peer, change });
    }

    fn send(&mut self, link: LinkId, control: Control) {
        self.actions.push_back(Action::Send(link, control));
    }

    fn peer_info(&self, link: LinkId) -> Option<PeerInfo> {
        let entry = self.links.get(&link)?;
        let about = entry.about.as_ref()?;
        let local = entry.connection.origin == Origin::SameUser;
        let source = self
            .dialer
            .source(link)
            .or(local.then_some(Source::Local))
            .or_else(|| self.dialer.sighted_by(&about.id))
            .unwrap_or(Source::Inbound);
        Some(PeerInfo {
            id: about.id,
            incarnation: about.incarnation,
            name: about.name.clone(),
            source,
            address: entry.connection.address.clone(),
            patterns: about.patterns.iter().cloned().collect(),
            services: about.services.iter().map(service_info).collect(),
            suspect_for: None,
        })
    }
}

fn service_info((name, concurrency): (&ServiceName, &u32)) -> ServiceInfo {
    ServiceInfo { name: name.clone(), concurrency: *concurrency }
}

impl Phase {
    fn later(self, by: Duration) -> Self {
        match self {
            Self::Greeting { deadline } => Self::Greeting { deadline: deadline + by },
            Self::Deciding { deadline } => Self::Deciding { deadline: deadline + by },
            Self::Up => Self::Up,
        }
    }

    fn deadline(self) -> Option<Time> {
        match self {
            Self::Greeting { deadline } | Self::Deciding { deadline } => Some(deadline),
            Self::Up => None,
        }
    }
}

impl std::fmt::Display for DownReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection closed"),
            Self::Silent => f.write_str("no bytes arrived from the peer for too long"),
            Self::Bye(bye) => bye.fmt(f),
            Self::Replaced => f.write_str("a new link replaced this one"),
            Self::Refused(text) => f.write_str(text),
            Self::Violation(text) => write!(f, "the peer broke the protocol: {text}"),
            Self::Distrusted => f.write_str("the peer's key is no longer trusted"),
            Self::ShutDownHere => f.write_str("this node is shutting down"),
        }
    }
}

#[cfg(test)]
mod tests;
