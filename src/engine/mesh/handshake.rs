//! From a connection to a link: hello, decision, accept, and what changes afterwards.

use std::collections::HashSet;

use super::{
    Action, DownReason, HELLO_TIMEOUT, Link, MAX_ANNOUNCED, Mesh, MeshEvent, PROBE_TIMEOUT, Peer,
    Phase, Probe,
};
use crate::address::{Pattern, ServiceName};
use crate::engine::{LinkId, TargetKey, Time};
use crate::identity::{Incarnation, NodeId};
use crate::wire::{Announcement, Bye, Control, Hello};

impl Mesh {
    pub(super) fn handle_hello(&mut self, now: Time, link: LinkId, hello: Box<Hello>) {
        let Some(entry) = self.links.get_mut(&link) else {
            return;
        };
        let address = entry.connection.address.clone();
        if hello.mesh != self.me.mesh {
            let text =
                format!("it is of the mesh {:?}, this node of {:?}", hello.mesh, self.me.mesh);
            self.send(link, Control::Bye(Bye::Mesh));
            return self.refuse(now, link, text, true);
        }
        if hello.patterns.len() + hello.services.len() > MAX_ANNOUNCED {
            return self.handle_violation(now, link, "it announces too much".into());
        }
        if entry.connection.claimed.is_some_and(|claimed| claimed != hello.id) {
            let text = "its hello names another node than its connection".to_owned();
            return self.handle_violation(now, link, text);
        }
        if hello.id == self.me.id {
            if hello.incarnation == self.me.incarnation {
                // The other end of this connection is ours too, and learns it from our hello.
                if !entry.hello_sent {
                    self.send_hello(link);
                }
                self.dialer.handle_own(link);
                return self.close(now, link, DownReason::Replaced);
            }
            self.actions.push_back(Action::Report(MeshEvent::IdentityConflict { address }));
            self.send(link, Control::Bye(Bye::IdentityInUse));
            return self.refuse(now, link, "it has this node's own identity".into(), true);
        }
        if !self.dialing {
            self.send(link, Control::Bye(Bye::Shutdown));
            return self.close(now, link, DownReason::ShutDownHere);
        }
        let expected = match &entry.connection.target {
            Some(TargetKey::Node(id)) => Some(*id),
            _ => None,
        };
        if expected.is_some_and(|id| id != hello.id) {
            let text = "another node than the announced one answered".to_owned();
            return self.handle_violation(now, link, text);
        }
        let (id, incarnation) = (hello.id, hello.incarnation);
        entry.hello = Some(hello);
        entry.phase = Phase::Deciding { deadline: now + HELLO_TIMEOUT };
        let answer = !entry.hello_sent;
        self.dialer.handle_identified(link, id);
        if answer {
            self.send_hello(link);
        }
        if self.me.id < id {
            self.decide(now, link, id, incarnation);
        }
    }

    fn decide(&mut self, now: Time, link: LinkId, id: NodeId, incarnation: Incarnation) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return self.accept(now, link);
        };
        let known = self.links.get(&peer.link).and_then(|link| link.hello.as_ref());
        if peer.probe.is_some() || known.is_some_and(|hello| hello.incarnation == incarnation) {
            self.send(link, Control::Bye(Bye::Duplicate));
            return self.close(now, link, DownReason::Bye(Bye::Duplicate));
        }
        self.nonce += 1;
        let (old, nonce) = (peer.link, self.nonce);
        peer.probe = Some(Probe { newcomer: link, nonce, deadline: now + PROBE_TIMEOUT });
        self.send(old, Control::Probe(nonce));
    }

    pub(super) fn handle_probe_reply(&mut self, now: Time, link: LinkId, nonce: u64) {
        let id = self.links.get(&link).and_then(|link| Some(link.hello.as_ref()?.id));
        let Some(peer) = id.and_then(|id| self.peers.get_mut(&id)) else {
            return;
        };
        if peer.probe.as_ref().is_none_or(|probe| probe.nonce != nonce) {
            return;
        }
        if let Some(probe) = peer.probe.take() {
            self.send(probe.newcomer, Control::Bye(Bye::IdentityInUse));
            let text = "another live node has its identity".to_owned();
            self.refuse(now, probe.newcomer, text, false);
        }
    }

    pub(super) fn accept(&mut self, now: Time, link: LinkId) {
        let waiting = |link: &Link| matches!(link.phase, Phase::Deciding { .. });
        if self.links.get(&link).is_some_and(waiting) {
            // The peer may answer at once, so the link is open before it hears of it.
            self.open(link);
            self.send(link, Control::Accept);
            self.establish(now, link);
        }
    }

    fn open(&mut self, link: LinkId) {
        let hello = self.links.get(&link).and_then(|link| link.hello.as_ref());
        if let Some(limits) = hello.map(|hello| hello.limits) {
            self.actions.push_back(Action::Open { link, limits });
        }
    }

    pub(super) fn handle_accept(&mut self, now: Time, link: LinkId) {
        let decider = self.links.get(&link).and_then(|link| Some(link.hello.as_ref()?.id));
        if decider.is_some_and(|id| id < self.me.id) {
            self.open(link);
            self.establish(now, link);
        } else {
            self.handle_violation(now, link, "an accept that was ours to send".into());
        }
    }

    pub(super) fn establish(&mut self, now: Time, link: LinkId) {
        let Some(id) = self.links.get(&link).and_then(|link| Some(link.hello.as_ref()?.id)) else {
            return;
        };
        if let Some(old) = self.peers.get(&id).map(|peer| peer.link) {
            self.end(now, old, DownReason::Replaced);
        }
        if let Some(entry) = self.links.get_mut(&link) {
            entry.phase = Phase::Up;
        }
        self.peers.insert(id, Peer { link, probe: None });
        self.dialer.handle_success(link);
        self.routing_changed = true;
        if let Some(info) = self.peer_info(link) {
            self.actions.push_back(Action::Report(MeshEvent::PeerUp(Box::new(info))));
        }
    }

    pub(super) fn handle_announcement(&mut self, now: Time, link: LinkId, news: &Announcement) {
        let Some(entry) = self.links.get_mut(&link) else {
            return;
        };
        let Some(hello) = entry.hello.as_mut() else {
            return;
        };
        if hello.seq.checked_add(1) != Some(news.seq) {
            return self.handle_violation(now, link, "an announcement is missing".into());
        }
        hello.seq = news.seq;
        let changed: HashSet<&Pattern> = news.unsubscribed.iter().chain(&news.subscribed).collect();
        hello.patterns.retain(|pattern| !changed.contains(pattern));
        hello.patterns.extend(news.subscribed.iter().cloned());
        let serving = news.serving.iter().map(|info| &info.name);
        let changed: HashSet<&ServiceName> = serving.chain(&news.withdrawn).collect();
        hello.services.retain(|info| !changed.contains(&info.name));
        hello.services.extend(news.serving.iter().cloned());
        if hello.patterns.len() + hello.services.len() > MAX_ANNOUNCED {
            return self.handle_violation(now, link, "it announces too much".into());
        }
        self.routing_changed |= matches!(entry.phase, Phase::Up);
    }

    pub(super) fn handle_bye(&mut self, now: Time, link: LinkId, bye: Bye) {
        let is_up = self.links.get(&link).is_some_and(|link| matches!(link.phase, Phase::Up));
        match &bye {
            _ if is_up => self.end(now, link, DownReason::Bye(bye)),
            // The pair has its link, or is about to; nothing failed.
            Bye::Duplicate => self.end(now, link, DownReason::Bye(bye)),
            Bye::Mesh | Bye::Version | Bye::IdentityInUse => {
                self.refuse(now, link, bye.to_string(), true);
            }
            _ => self.refuse(now, link, bye.to_string(), false),
        }
    }
}
