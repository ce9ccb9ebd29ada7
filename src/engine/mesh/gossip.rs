//! Gossip: peers exchange the addresses of other nodes, so that one reachable peer joins a node to
//! the whole mesh, across subnets that multicast does not cross.
//!
//! All gossip consists of hints, and each node sends only hints about peers that it is linked to
//! itself. When a link comes up, both ends send each other hints about some peers, and some peers a
//! hint about the new one. Later, every node sends hints to one peer after the other, at growing
//! intervals, to make up for missed hints. A record of hints has a fixed size, so the traffic of
//! a node grows with the number of its links. The subjects of hints go round all peers in the order
//! of their ids, starting from the node's own id, so that different nodes send hints about
//! different peers.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::time::Duration;

use super::{Connection, Mesh, Origin};
use crate::engine::dialer::MAX_ADDRESSES;
use crate::engine::{LinkId, Rate, Time};
use crate::identity::NodeId;
use crate::peer::Address;
use crate::wire::{Control, Hint, MAX_HINTS};

/// The first and the longest pause before a node sends hints to the next peer. After a new peer the
/// pause starts anew; it doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// The unknown nodes that a peer may name at once, and per second; further hints are ignored.
pub(super) const NAMED: Rate = Rate { burst: 64, per_second: 8 };
/// The number of peers that get a hint about a new one.
const TOLD_OF_NEW: usize = 3;

/// The progress of a node's gossip.
#[derive(Debug)]
pub(super) struct Gossip {
    /// The last peer that was the subject of a hint.
    of: NodeId,
    /// The last peer that got hints.
    to: NodeId,
    /// The time at which the next peer gets hints, and the pause after that.
    next: Time,
    pause: Duration,
}

impl Gossip {
    pub(super) fn new(me: NodeId) -> Self {
        Self { of: me, to: me, next: Time::default(), pause: FIRST_PAUSE }
    }
}

impl Mesh {
    /// Sends a new peer hints about some others, and some others a hint about the new peer.
    pub(super) fn introduce(&mut self, now: Time, link: LinkId, id: NodeId) {
        if !self.me.gossip {
            return;
        }
        if self.gossip.pause > FIRST_PAUSE || self.peers.len() == 2 {
            self.gossip.pause = FIRST_PAUSE;
            self.gossip.next = now + FIRST_PAUSE;
        }
        self.tell(link, id);
        let Some(hint) = self.hint(link) else { return };
        for _ in 0..TOLD_OF_NEW.min(self.peers.len() - 1) {
            if let Some((to, link)) = self.next_listener()
                && to != id
            {
                self.send(link, Control::Peers(vec![hint.clone()]));
            }
        }
    }

    /// Sends hints to the next peer, if due.
    pub(super) fn gossip_due(&mut self, now: Time) {
        if self.gossip_at().is_none_or(|at| at > now) {
            return;
        }
        self.gossip.next = now + self.gossip.pause;
        self.gossip.pause = (2 * self.gossip.pause).min(LONGEST_PAUSE);
        if let Some((id, link)) = self.next_listener() {
            self.tell(link, id);
        }
    }

    pub(super) fn gossip_at(&self) -> Option<Time> {
        (self.me.gossip && self.dialing && self.peers.len() > 1).then_some(self.gossip.next)
    }

    fn tell(&mut self, link: LinkId, id: NodeId) {
        let mut hints = Vec::new();
        for (other, over) in after(&self.peers, self.gossip.of).take(MAX_HINTS) {
            self.gossip.of = other;
            if other != id {
                hints.extend(self.hint(over));
            }
        }
        if !hints.is_empty() {
            self.send(link, Control::Peers(hints));
        }
    }

    fn next_listener(&mut self) -> Option<(NodeId, LinkId)> {
        let next = after(&self.peers, self.gossip.to).next()?;
        self.gossip.to = next.0;
        Some(next)
    }

    /// Returns a hint about a peer: its announced addresses, and the one that this node dialled.
    fn hint(&self, link: LinkId) -> Option<Hint> {
        let entry = self.links.get(&link)?;
        let about = entry.about.as_ref()?;
        let mut addresses = about.addresses.clone();
        if entry.connection.target.is_some()
            && let Some(address) = &entry.connection.address
            && may_be_told(address)
            && !addresses.contains(address)
        {
            addresses.insert(0, address.clone());
        }
        addresses.truncate(MAX_ADDRESSES);
        (!addresses.is_empty()).then_some(Hint { id: about.id, addresses })
    }

    /// Handles hints from a peer.
    pub(super) fn handle_hints(&mut self, now: Time, link: LinkId, hints: Vec<Hint>) {
        if !self.me.gossip || !self.dialing {
            return;
        }
        let Some(entry) = self.links.get_mut(&link) else { return };
        if entry.connection.grants.allow_nothing() {
            return;
        }
        let from_here = entry.connection.is_of_this_host();
        for Hint { id, mut addresses } in hints.into_iter().take(MAX_HINTS) {
            if self.peers.contains_key(&id) {
                continue;
            }
            if self.dialer.is_new(&id) && !entry.hints.take(now, 1) {
                continue;
            }
            // Loopback and local addresses have another meaning for a peer on another host.
            addresses.retain(|address| match is_of_this_host(address) {
                true => from_here,
                false => may_be_told(address) && !self.me.loopback_only,
            });
            addresses.truncate(MAX_ADDRESSES);
            if !addresses.is_empty() {
                self.dialer.handle_hint(now, id, addresses);
            }
        }
        self.dial_due(now);
    }
}

/// Iterates over the whole map once, beginning after `last`.
fn after(peers: &BTreeMap<NodeId, LinkId>, last: NodeId) -> impl Iterator<Item = (NodeId, LinkId)> {
    let behind = peers.range((Excluded(last), Unbounded));
    behind.chain(peers.range(..=last)).map(|(id, link)| (*id, *link))
}

impl Connection {
    fn is_of_this_host(&self) -> bool {
        match self.origin {
            Origin::SameUser => true,
            Origin::Network => self.address.as_ref().is_some_and(is_of_this_host),
            Origin::SameProcess => false,
        }
    }
}

fn is_of_this_host(address: &Address) -> bool {
    match address {
        Address::Local(_) => true,
        Address::Tcp(address) => address.ip().to_canonical().is_loopback(),
        Address::Host(..) | Address::Memory(_) => false,
    }
}

/// Returns true if an address has the same meaning elsewhere, and leads to one node.
fn may_be_told(address: &Address) -> bool {
    match address {
        Address::Tcp(address) => {
            let ip = address.ip().to_canonical();
            let one = !ip.is_unspecified() && !ip.is_multicast() && address.port() != 0;
            one && match ip {
                std::net::IpAddr::V4(v4) => !v4.is_broadcast() && !v4.is_link_local(),
                std::net::IpAddr::V6(v6) => !v6.is_unicast_link_local(),
            }
        }
        Address::Host(host, port) => host != "localhost" && !host.contains('%') && *port != 0,
        Address::Local(_) | Address::Memory(_) => false,
    }
}
