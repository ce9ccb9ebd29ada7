//! A thousand meshes that find each other by hearsay: no messages, no faults.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::Random;
use crate::engine::{
    Action, Budget, Connection, DownReason, HashMap, LinkId, Mesh, MeshConfig, Sighting, TargetKey,
    Time,
};
use crate::identity::{Incarnation, NodeId};
use crate::peer::{Address, Source};
use crate::wire::{BatchEncoder, Control, Limits, Preamble};

enum Event {
    Start,
    Dialled { target: TargetKey, to: usize },
    Arrive { link: LinkId, control: Control },
    Closed { link: LinkId },
    Wake,
}

/// What a node handed to its links.
#[derive(Debug, Default, Clone, Copy)]
struct Sent {
    records: u64,
    bytes: u64,
}

struct Member {
    mesh: Mesh,
    sent: Sent,
    wakes: Option<Time>,
}

struct Crowd {
    now: Time,
    random: Random,
    members: Vec<Member>,
    /// The other end of each open link is the link with the other lowest bit, at this node.
    ends: HashMap<LinkId, usize>,
    connected: u64,
    queue: BinaryHeap<Reverse<(Time, u64, usize)>>,
    events: HashMap<u64, Event>,
    scheduled: u64,
}

fn id(node: usize) -> NodeId {
    // Spread over all ids, as public keys are.
    let mut random = Random(node as u64);
    let mut bytes = [0; 32];
    bytes.chunks_mut(8).for_each(|part| part.copy_from_slice(&random.next().to_be_bytes()));
    NodeId::from_bytes(bytes)
}

fn address(node: usize) -> Address {
    Address::Tcp(SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + node as u32), 1)))
}

fn node_at(address: &Address) -> usize {
    match address {
        Address::Tcp(SocketAddr::V4(addr)) => (addr.ip().to_bits() - 0x0a00_0000) as usize,
        other => panic!("{other} is nobody's address"),
    }
}

impl Crowd {
    /// Every node knows the first one, and nobody else.
    fn new(nodes: usize) -> Self {
        let member = |node| {
            let config = MeshConfig {
                id: id(node),
                incarnation: Incarnation(1),
                mesh: "crowd".parse().unwrap(),
                name: format!("node {node}"),
                limits: Limits { max_body: 1 << 20, windows: [1 << 22; 4] },
                gossip: true,
                loopback_only: false,
                dials_per_second: 64,
                budget: Budget::new(u64::MAX),
            };
            let mut mesh = Mesh::new(config, node as u64);
            mesh.set_addresses(vec![address(node)]);
            mesh.subscribe(Time::default(), &format!("own.{node}").parse().unwrap()).unwrap();
            mesh.subscribe(Time::default(), &"all.>".parse().unwrap()).unwrap();
            Member { mesh, sent: Sent::default(), wakes: None }
        };
        let mut crowd = Self {
            now: Time::default(),
            random: Random(nodes as u64),
            members: (0..nodes).map(member).collect(),
            ends: HashMap::default(),
            connected: 0,
            queue: BinaryHeap::new(),
            events: HashMap::default(),
            scheduled: 0,
        };
        for node in 0..nodes {
            let within_a_second = crowd.random.below(1_000_000);
            crowd.after(within_a_second, node, Event::Start);
        }
        crowd
    }

    fn after(&mut self, micros: u64, node: usize, event: Event) {
        self.scheduled += 1;
        self.events.insert(self.scheduled, event);
        self.queue.push(Reverse((self.now + Duration::from_micros(micros), self.scheduled, node)));
    }

    fn is_full_mesh(&self) -> bool {
        let others = self.members.len() - 1;
        self.members.iter().all(|member| member.mesh.peer_count() == others)
    }

    /// Runs until all are linked; when that was.
    fn converge(&mut self) -> Duration {
        let mut steps = 0u64;
        while let Some(Reverse((at, number, node))) = self.queue.pop() {
            assert!(at < Time::default() + Duration::from_secs(600), "the mesh does not converge");
            self.now = at;
            let event = self.events.remove(&number).expect("each event is queued once");
            self.handle(node, event);
            steps += 1;
            if steps.is_multiple_of(256) && self.is_full_mesh() {
                break;
            }
        }
        assert!(self.is_full_mesh());
        self.now.since_start()
    }

    fn handle(&mut self, node: usize, event: Event) {
        let now = self.now;
        match event {
            Event::Start => {
                let addresses = vec![address(0)];
                let seed = Sighting { source: Source::Fixed, id: None, addresses };
                self.members[node].mesh.handle_sighting(now, seed);
            }
            Event::Wake => {
                self.members[node].wakes = None;
                self.members[node].mesh.handle_timeout(now);
            }
            Event::Dialled { target, to } => {
                let (near, far) = (LinkId(self.connected << 1), LinkId(self.connected << 1 | 1));
                self.connected += 1;
                self.ends.extend([(near, node), (far, to)]);
                let connection = |peer, target| {
                    let address = Some(address(peer));
                    Connection { claimed: Some(id(peer)), target, address, ..Connection::default() }
                };
                self.members[to].mesh.handle_connected(now, far, connection(node, None));
                self.members[node].mesh.handle_connected(now, near, connection(to, Some(target)));
                self.perform(to);
            }
            Event::Arrive { link, control } => {
                self.members[node].mesh.handle_control(now, link, control);
            }
            Event::Closed { link } => {
                self.members[node].mesh.handle_closed(now, link, DownReason::Closed);
            }
        }
        self.perform(node);
    }

    fn perform(&mut self, node: usize) {
        while let Some(action) = self.members[node].mesh.poll_action() {
            match action {
                Action::Dial { target, addresses } => {
                    let (to, after) = (node_at(&addresses[0]), self.random.between(100, 2_000));
                    self.after(after, node, Event::Dialled { target, to });
                }
                Action::Send(link, control) => self.send(node, link, control),
                Action::Close { link, .. } => {
                    let far = LinkId(link.0 ^ 1);
                    self.ends.remove(&link);
                    if let Some(other) = self.ends.get(&far).copied() {
                        self.after(600, other, Event::Closed { link: far });
                    }
                }
                Action::Admit(_)
                | Action::Open { .. }
                | Action::Report(_)
                | Action::Route { .. } => {}
            }
        }
        let member = &mut self.members[node];
        if let Some(at) = member.mesh.poll_timeout()
            && member.wakes.is_none_or(|known| known > at)
        {
            member.wakes = Some(at);
            let wait = at.since(self.now).as_micros() as u64 + 1;
            self.after(wait, node, Event::Wake);
        }
    }

    fn send(&mut self, node: usize, link: LinkId, control: Control) {
        let me = id(node);
        let mut batch = BatchEncoder::new(&me, Preamble::default());
        batch.push_control(&control);
        let sent = &mut self.members[node].sent;
        sent.records += 1;
        sent.bytes += batch.finish().head.len() as u64;
        let far = LinkId(link.0 ^ 1);
        if let Some(other) = self.ends.get(&far).copied() {
            // The same delay for all keeps the order.
            self.after(500, other, Event::Arrive { link: far, control });
        }
    }

    /// What a node sent, on average.
    fn sent_per_node(&self) -> Sent {
        let nodes = self.members.len() as u64;
        let total = |part: fn(&Sent) -> u64| {
            self.members.iter().map(|member| part(&member.sent)).sum::<u64>() / nodes
        };
        Sent { records: total(|sent| sent.records), bytes: total(|sent| sent.bytes) }
    }
}

#[test]
fn a_thousand_nodes_that_know_one_form_a_full_mesh_at_a_cost_in_proportion() {
    let mut per_peer = Vec::new();
    for nodes in [125, 1000] {
        let mut crowd = Crowd::new(nodes);
        let took = crowd.converge();
        let sent = crowd.sent_per_node();
        println!(
            "{nodes} nodes: a full mesh after {took:?}; a node sent {} records, {} bytes",
            sent.records, sent.bytes
        );
        let peers = nodes as u64 - 1;
        per_peer.push((sent.records as f64 / peers as f64, sent.bytes as f64 / peers as f64));
    }
    let [(records, bytes), (more_records, more_bytes)] = per_peer[..] else { panic!() };
    assert!(more_records < 1.1 * records, "records grow faster than the mesh: {per_peer:?}");
    assert!(more_bytes < 1.1 * bytes, "bytes grow faster than the mesh: {per_peer:?}");
}

#[test]
fn a_change_costs_one_record_a_peer_however_large_the_mesh() {
    for nodes in [10, 40] {
        let mut crowd = Crowd::new(nodes);
        crowd.converge();
        let before = crowd.members[3].sent;
        let now = crowd.now;
        crowd.members[3].mesh.subscribe(now, &"news.today".parse().unwrap()).unwrap();
        crowd.perform(3);
        let after = crowd.members[3].sent;
        let peers = nodes as u64 - 1;
        assert_eq!(after.records - before.records, peers);
        assert_eq!((after.bytes - before.bytes) % peers, 0);
        assert!((after.bytes - before.bytes) / peers < 64, "it tells of more than the change");
    }
}
