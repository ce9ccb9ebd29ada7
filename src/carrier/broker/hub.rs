//! The embedded broker's decisions: who receives which message. It needs no installed software, and
//! keeps nothing on disk.
//!
//! Each client has one DEALER, so that its messages are read in order: a subscription before the
//! message that it awaits. A message is a list of frames, of which the first is one of the bytes
//! below.
//!
//! | From a node | | To a node | |
//! |---|---|---|---|
//! | `H` | mesh, node id: hello | `W` | title: welcome |
//! | `S` `U` | pattern: subscribe, unsubscribe | `K` | done |
//! | `V` `X` | service: serve, withdraw | | |
//! | `P` | topic, head, body: publish | `P` | topic, head, body |
//! | `C` | service, id, head, body: to one instance | `C` | service, head, body |
//! | `N` | node id, id, head, body: to that node | `N` | head, body |
//! | `A` | head, body: to every node | `A` | head, body |
//! | `F` | count: bytes taken | `R` | id: no receiver |
//! | `.` | ping | `.` | pong |
//! | `B` | goodbye | `D` | count: messages of the node that were dropped |

//!
//! A client has two bounds on the messages for it: those that it has not confirmed with `F`
//! ([`WINDOW`]), and those that its connection has not taken ([`Outlet`]), which a client can't
//! claim away. `A` counts in the second only, since nobody confirms it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::outlet::{Outlet, cost};
use super::server::BrokerReport;
use crate::address::{MeshName, Pattern, ServiceName, Topic};
use crate::engine::PatternTrie;
use crate::identity::NodeId;
use crate::message::{MessageId, unpinned};

/// The most bytes of a node in flight or unread; further messages are dropped.
pub(super) const WINDOW: u64 = 8 * 1024 * 1024;
/// The most bytes of a body.
pub(super) const MAX_BODY: usize = WINDOW as usize;
/// The most bytes that wait for all clients together. Each has an equal share, of at most a window.
const MAX_WAITING: u64 = 256 * 1024 * 1024;
/// The silence after which a client or the broker is gone. A client also has this long to say hello.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// The most patterns, and the most services, of one node.
const MAX_WISHES: usize = 10_000;

/// The clients, and what each wants.
#[derive(Default)]
pub(super) struct Hub {
    clients: HashMap<u64, Client>,
    meshes: HashMap<MeshName, Mesh>,
    /// The number of the newest client.
    newest: u64,
    counts: BrokerReport,
}

/// A connected client.
struct Client {
    outlet: Outlet,
    since: Instant,
    /// The number of its dropped messages that are not reported to it yet.
    untold: u64,
    /// `None` until its hello.
    node: Option<Node>,
}

/// A client after its hello.
struct Node {
    mesh: MeshName,
    id: NodeId,
    patterns: HashSet<Pattern>,
    services: HashSet<ServiceName>,
    /// The number of bytes that it has not taken yet.
    outstanding: u64,
}

/// The nodes, subscriptions and services of one mesh, by the numbers of their clients.
#[derive(Default)]
struct Mesh {
    topics: PatternTrie<()>,
    /// The nodes that serve a name; the first is next.
    services: HashMap<ServiceName, VecDeque<u64>>,
    nodes: HashMap<NodeId, u64>,
}

impl Hub {
    /// Adds a client; returns its number.
    pub(super) fn handle_connected(&mut self, now: Instant, outlet: Outlet) -> u64 {
        self.newest += 1;
        let client = Client { outlet, since: now, untold: 0, node: None };
        self.clients.insert(self.newest, client);
        self.newest
    }

    /// Removes a client.
    pub(super) fn handle_closed(&mut self, client: u64) {
        self.leave(client);
        self.clients.remove(&client);
    }

    pub(super) fn report(&self) -> BrokerReport {
        let nodes = self.clients.values().filter(|client| client.node.is_some()).count() as u64;
        BrokerReport { nodes, ..self.counts }
    }

    /// Returns true if nothing is left of any client.
    #[cfg(fuzzing)]
    pub(super) fn is_empty(&self) -> bool {
        self.clients.is_empty() && self.meshes.is_empty()
    }

    /// Handles a message of a client; an invalid one is ignored.
    pub(super) fn handle(&mut self, from: u64, frames: &[Bytes]) {
        let Some((operation, fields)) = frames.split_first() else { return };
        if let (b"H", [mesh, id]) = (&operation[..], fields) {
            return self.handle_hello(from, mesh, id);
        }
        let Some(Client { outlet, node: Some(node), .. }) = self.clients.get_mut(&from) else {
            return;
        };
        match (&operation[..], fields) {
            (b"P", [topic, head, body]) => self.publish(from, topic, head, body),
            (b"C", [service, id, head, body]) => {
                self.counts.received += 1;
                let frames = vec![op(b"C"), copy(service), unpinned(head), unpinned(body)];
                let taker = parsed(service).and_then(|name| self.next_instance(from, &name));
                self.pass_or_return(from, taker, id, frames);
            }
            (b"N", [node, id, head, body]) => {
                self.counts.received += 1;
                let frames = vec![op(b"N"), unpinned(head), unpinned(body)];
                let taker = self.mesh(from).and_then(|mesh| mesh.nodes.get(&node_id(node)?));
                let taker = taker.copied();
                self.pass_or_return(from, taker, id, frames);
            }
            (b"A", [head, body]) => self.broadcast(from, head, body),
            (b"S", [pattern]) => self.handle_subscribe(from, pattern),
            (b"U", [pattern]) => self.handle_unsubscribe(from, pattern),
            (b"V", [service]) => self.handle_serve(from, service),
            (b"X", [service]) => self.handle_withdraw(from, service),
            (b"F", [count]) => node.outstanding = node.outstanding.saturating_sub(number(count)),
            (b".", []) => _ = outlet.control(vec![op(b".")]),
            (b"B", []) => {
                outlet.link().close();
                self.leave(from);
            }
            _ => {}
        }
    }

    /// Reports drops, and removes silent clients.
    pub(super) fn handle_tick(&mut self, now: Instant) {
        let mut silent = Vec::new();
        for (number, client) in &mut self.clients {
            let heard = match client.node {
                Some(_) => client.outlet.link().last_heard().unwrap_or(client.since),
                None => client.since,
            };
            if now.saturating_duration_since(heard) > SILENCE {
                silent.push(*number);
            }
            if client.untold > 0 {
                let count = std::mem::take(&mut client.untold).to_be_bytes();
                client.outlet.control(vec![op(b"D"), Bytes::copy_from_slice(&count)]);
            }
        }
        for client in silent {
            if let Some(client) = self.clients.get(&client) {
                client.outlet.link().close();
            }
            self.leave(client);
        }
    }

    fn handle_hello(&mut self, from: u64, mesh: &Bytes, id: &Bytes) {
        self.leave(from);
        let Some(client) = self.clients.get_mut(&from) else { return };
        let (Some(mesh), Some(id)) = (parsed::<MeshName>(mesh), node_id(id)) else {
            return client.outlet.link().close();
        };
        client.node = Some(Node {
            mesh: mesh.clone(),
            id,
            patterns: HashSet::new(),
            services: HashSet::new(),
            outstanding: 0,
        });
        self.meshes.entry(mesh).or_default().nodes.insert(id, from);
        client.outlet.link().admit();
        let title = concat!("peerbus broker ", env!("CARGO_PKG_VERSION"));
        client.outlet.control(vec![op(b"W"), Bytes::from_static(title.as_bytes())]);
    }

    fn publish(&mut self, from: u64, topic: &Bytes, head: &Bytes, body: &Bytes) {
        self.counts.received += 1;
        let Some(parsed) = parsed::<Topic>(topic) else { return };
        let Some(mesh) = self.mesh(from) else { return };
        let takers: Vec<u64> =
            mesh.topics.matches(&parsed).into_iter().map(|(taker, ())| taker).collect();
        if takers.is_empty() {
            return;
        }
        let frames = vec![op(b"P"), copy(topic), unpinned(head), unpinned(body)];
        for taker in takers {
            self.pass(from, taker, frames.clone());
        }
    }

    fn broadcast(&mut self, from: u64, head: &Bytes, body: &Bytes) {
        let Some(mesh) = self.mesh(from) else { return };
        let takers: Vec<u64> = mesh.nodes.values().copied().collect();
        let (frames, share) = (vec![op(b"A"), unpinned(head), unpinned(body)], self.share());
        for taker in takers {
            if let Some(client) = self.clients.get(&taker)
                && !client.outlet.send(frames.clone(), share)
            {
                self.counts.dropped += 1;
            }
        }
    }

    /// Returns the next of the nodes that serve a name.
    fn next_instance(&mut self, asker: u64, service: &ServiceName) -> Option<u64> {
        let mesh = self.clients.get(&asker)?.node.as_ref()?.mesh.clone();
        let instances = self.meshes.get_mut(&mesh)?.services.get_mut(service)?;
        instances.rotate_left(1);
        instances.back().copied()
    }

    fn pass_or_return(&mut self, from: u64, to: Option<u64>, id: &Bytes, frames: Vec<Bytes>) {
        match to {
            Some(to) => self.pass(from, to, frames),
            None => {
                // A reply has no id, and nobody waits for it.
                if let Some(client) = self.clients.get(&from)
                    && id.len() == size_of::<MessageId>()
                {
                    client.outlet.control(vec![op(b"R"), copy(id)]);
                }
            }
        }
    }

    /// Passes a message on if its receiver has room for it. A drop is reported to its sender later.
    fn pass(&mut self, from: u64, to: u64, frames: Vec<Bytes>) {
        let (cost, share) = (cost(&frames), self.share());
        if let Some(Client { outlet, node: Some(node), .. }) = self.clients.get_mut(&to)
            && (node.outstanding == 0 || node.outstanding + cost <= WINDOW)
            && outlet.send(frames, share)
        {
            node.outstanding += cost;
            self.counts.sent += 1;
            outlet.link().prove();
            if let Some(sender) = self.clients.get(&from) {
                sender.outlet.link().prove();
            }
            return;
        }
        self.counts.dropped += 1;
        if let Some(client) = self.clients.get_mut(&from) {
            client.untold += 1;
        }
    }

    /// The most bytes that may wait in the queue of one client.
    fn share(&self) -> u64 {
        WINDOW.min(MAX_WAITING / self.clients.len().max(1) as u64)
    }

    fn handle_subscribe(&mut self, from: u64, pattern: &Bytes) {
        let Some(Client { outlet, node: Some(node), .. }) = self.clients.get_mut(&from) else {
            return;
        };
        if let Some(pattern) = parsed::<Pattern>(pattern)
            && node.patterns.len() < MAX_WISHES
            && node.patterns.insert(pattern.clone())
        {
            let mesh = self.meshes.entry(node.mesh.clone()).or_default();
            mesh.topics.insert(&pattern, from, ());
        }
        outlet.control(vec![op(b"K")]);
    }

    fn handle_unsubscribe(&mut self, from: u64, pattern: &Bytes) {
        let Some(Client { node: Some(node), .. }) = self.clients.get_mut(&from) else { return };
        if let Some(pattern) = parsed::<Pattern>(pattern)
            && node.patterns.remove(&pattern)
            && let Some(mesh) = self.meshes.get_mut(&node.mesh)
        {
            mesh.topics.remove(&pattern, from);
        }
    }

    fn handle_serve(&mut self, from: u64, service: &Bytes) {
        let Some(Client { outlet, node: Some(node), .. }) = self.clients.get_mut(&from) else {
            return;
        };
        if let Some(service) = parsed::<ServiceName>(service)
            && node.services.len() < MAX_WISHES
            && node.services.insert(service.clone())
        {
            let mesh = self.meshes.entry(node.mesh.clone()).or_default();
            mesh.services.entry(service).or_default().push_back(from);
        }
        outlet.control(vec![op(b"K")]);
    }

    fn handle_withdraw(&mut self, from: u64, service: &Bytes) {
        let Some(Client { node: Some(node), .. }) = self.clients.get_mut(&from) else { return };
        if let Some(service) = parsed::<ServiceName>(service)
            && node.services.remove(&service)
            && let Some(mesh) = self.meshes.get_mut(&node.mesh)
        {
            mesh.withdraw(from, &service);
        }
    }

    /// Forgets a client's hello and its wishes.
    fn leave(&mut self, client: u64) {
        let node = self.clients.get_mut(&client).and_then(|client| client.node.take());
        let Some(node) = node else { return };
        let Some(mesh) = self.meshes.get_mut(&node.mesh) else { return };
        for pattern in &node.patterns {
            mesh.topics.remove(pattern, client);
        }
        for service in &node.services {
            mesh.withdraw(client, service);
        }
        if mesh.nodes.get(&node.id) == Some(&client) {
            mesh.nodes.remove(&node.id);
        }
        if mesh.is_empty() {
            self.meshes.remove(&node.mesh);
        }
    }

    fn mesh(&self, client: u64) -> Option<&Mesh> {
        self.meshes.get(&self.clients.get(&client)?.node.as_ref()?.mesh)
    }
}

impl Mesh {
    fn withdraw(&mut self, client: u64, service: &ServiceName) {
        if let Some(instances) = self.services.get_mut(service) {
            instances.retain(|it| *it != client);
            if instances.is_empty() {
                self.services.remove(service);
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.services.is_empty() && self.topics.is_empty()
    }
}

pub(super) fn op(byte: &'static [u8; 1]) -> Bytes {
    Bytes::from_static(byte)
}

pub(super) fn number(bytes: &Bytes) -> u64 {
    <[u8; 8]>::try_from(&bytes[..]).map_or(0, u64::from_be_bytes)
}

pub(super) fn text(bytes: &Bytes) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Parses a name.
pub(super) fn parsed<T: std::str::FromStr>(bytes: &Bytes) -> Option<T> {
    text(bytes)?.parse().ok()
}

fn node_id(bytes: &Bytes) -> Option<NodeId> {
    NodeId::checked(bytes[..].try_into().ok()?).ok()
}

fn copy(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
