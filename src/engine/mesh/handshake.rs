//! The handshake of a link: hello, decision, accept; and the announcements after it.

use super::{
    About, Action, Connection, DownReason, HELLO_TIMEOUT, Link, MAX_ANNOUNCED, Mesh, MeshEvent,
    PROBE_TIMEOUT, Phase, Probe,
};
use crate::address::{Pattern, ServiceName};
use crate::engine::{LinkId, RouteChange, TargetKey, Time};
use crate::identity::{Incarnation, NodeId};
use crate::peer::ServiceInfo;
use crate::trust;
use crate::wire::{Announcement, Bye, Control, Hello};

const TOO_MANY: &str = "it announces too much";
const TOO_MUCH_MEMORY: &str = "what it announces takes more than its share of this node's memory";

impl Connection {
    /// Removes the patterns and services that the peer's permissions deny, and returns them.
    fn take_denied(
        &self,
        patterns: &mut Vec<Pattern>,
        services: &mut Vec<ServiceInfo>,
    ) -> Vec<(trust::Action, String)> {
        use trust::Action::{Serve, Subscribe};
        let (grants, inbox) = (&self.grants, ServiceName::node_inbox());
        let patterns = patterns
            .extract_if(.., |pattern| !grants.permit_all(Subscribe, pattern))
            .map(|pattern| (Subscribe, pattern.to_string()));
        let services = services
            .extract_if(.., |it| it.name != inbox && !grants.permit(Serve, it.name.as_str()))
            .map(|service| (Serve, service.name.to_string()));
        patterns.chain(services).collect()
    }
}

impl Mesh {
    pub(super) fn handle_hello(&mut self, now: Time, link: LinkId, hello: Hello) {
        let Some(entry) = self.links.get_mut(&link) else {
            return;
        };
        let address = entry.connection.address.clone();
        if hello.mesh != self.me.mesh {
            let text =
                format!("it belongs to mesh {:?}, this node to {:?}", hello.mesh, self.me.mesh);
            self.send(link, Control::Bye(Bye::Mesh));
            return self.refuse(now, link, text, true);
        }
        if hello.patterns.len() + hello.services.len() > MAX_ANNOUNCED {
            return self.handle_violation(now, link, TOO_MANY.into());
        }
        if entry.connection.claimed.is_some_and(|claimed| claimed != hello.id) {
            let text = "its hello names another node than its connection".to_owned();
            return self.handle_violation(now, link, text);
        }
        if hello.id == self.me.id {
            if hello.incarnation == self.me.incarnation {
                // The other end of this connection is also this node, and finds that out from our
                // hello.
                if entry.announced.is_none() {
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
        let id = hello.id;
        let (about, lists) = About::new(hello);
        entry.about = Some(Box::new(about));
        let (denied, entered) = self.enter(link, lists);
        if let Err(text) = entered {
            return self.handle_violation(now, link, text.into());
        }
        let answer = self.links.get(&link).is_some_and(|entry| entry.announced.is_none());
        self.set_phase(link, Phase::Deciding { deadline: now + HELLO_TIMEOUT });
        self.actions.push_back(Action::Admit(link));
        self.dialer.handle_identified(link, id);
        if answer {
            self.send_hello(link);
        }
        self.deny(link, denied);
        self.decide_when_listed(now, link);
    }

    /// Decides once the peer's lists are complete: users may publish to a peer that is up.
    fn decide_when_listed(&mut self, now: Time, link: LinkId) {
        if let Some(about) = self.about(link)
            && about.seq == about.listed_by
            && self.me.id < about.id
        {
            self.decide(now, link, about.id, about.incarnation);
        }
    }

    fn decide(&mut self, now: Time, link: LinkId, id: NodeId, incarnation: Incarnation) {
        let Some(&old) = self.peers.get(&id) else {
            return self.accept(now, link);
        };
        let known = self.about(old).is_some_and(|about| about.incarnation == incarnation);
        if known || self.probes.contains_key(&id) {
            self.send(link, Control::Bye(Bye::Duplicate));
            return self.close(now, link, DownReason::Bye(Bye::Duplicate));
        }
        self.nonce += 1;
        let nonce = self.nonce;
        self.probes.insert(id, Probe { newcomer: link, nonce, deadline: now + PROBE_TIMEOUT });
        self.send(old, Control::Probe(nonce));
    }

    pub(super) fn handle_probe_reply(&mut self, now: Time, link: LinkId, nonce: u64) {
        let Some(id) = self.about(link).map(|about| about.id) else {
            return;
        };
        if self.probes.get(&id).is_none_or(|probe| probe.nonce != nonce) {
            return;
        }
        if let Some(probe) = self.probes.remove(&id) {
            self.send(probe.newcomer, Control::Bye(Bye::IdentityInUse));
            let text = "another live node has its identity".to_owned();
            self.refuse(now, probe.newcomer, text, false);
        }
    }

    pub(super) fn accept(&mut self, now: Time, link: LinkId) {
        let waiting = |link: &Link| matches!(link.phase, Phase::Deciding { .. });
        if self.links.get(&link).is_some_and(waiting) {
            // The peer may answer at once, so the link is opened before the accept is sent.
            self.open(link);
            self.send(link, Control::Accept);
            self.establish(now, link);
        }
    }

    fn open(&mut self, link: LinkId) {
        if let Some(limits) = self.about(link).map(|about| about.limits) {
            self.actions.push_back(Action::Open { link, limits });
        }
    }

    pub(super) fn handle_accept(&mut self, now: Time, link: LinkId) {
        let decider = self.about(link).map(|about| about.id);
        if decider.is_some_and(|id| id < self.me.id) {
            self.open(link);
            self.establish(now, link);
        } else {
            self.handle_violation(now, link, "an accept that was ours to send".into());
        }
    }

    pub(super) fn establish(&mut self, now: Time, link: LinkId) {
        let Some(id) = self.about(link).map(|about| about.id) else {
            return;
        };
        if let Some(old) = self.peers.get(&id).copied() {
            self.end(now, old, DownReason::Replaced);
        }
        self.set_phase(link, Phase::Up);
        self.peers.insert(id, link);
        self.dialer.handle_success(link);
        if let Some(info) = self.peer_info(link) {
            self.route(link, id, RouteChange::Up);
            self.actions.push_back(Action::Report(MeshEvent::PeerUp(Box::new(info))));
        }
        self.introduce(now, link, id);
    }

    /// Handles a part of an announcement: its end follows.
    pub(crate) fn handle_part(&mut self, now: Time, link: LinkId, part: Announcement) {
        match self.links.get(&link).map(|link| link.phase) {
            Some(Phase::Deciding { .. } | Phase::Up) => _ = self.learn(now, link, part),
            _ => self.handle_control(now, link, Control::Announce(Box::new(part))),
        }
    }

    pub(super) fn handle_announcement(&mut self, now: Time, link: LinkId, news: Announcement) {
        let seq = news.seq;
        if self.learn(now, link, news)
            && let Some(entry) = self.links.get_mut(&link)
            && let Some(about) = &mut entry.about
        {
            about.seq = seq;
            if !matches!(entry.phase, Phase::Up) {
                self.decide_when_listed(now, link);
            }
        }
    }

    /// Enters a peer's changes. Returns false if they break the protocol.
    fn learn(&mut self, now: Time, link: LinkId, news: Announcement) -> bool {
        let count = news.len();
        self.forget_some(2 * count);
        let Some(entry) = self.links.get_mut(&link) else {
            return false;
        };
        let Some(about) = &mut entry.about else {
            return false;
        };
        if about.seq.checked_add(1) != Some(news.seq) {
            self.handle_violation(now, link, "an announcement is missing".into());
            return false;
        }
        if !entry.allowance.take(now, count.max(1) as u64) {
            self.handle_violation(now, link, "its announcements change too often".into());
            return false;
        }
        let (denied, entered) = self.enter(link, news);
        self.deny(link, denied);
        if let Err(text) = entered {
            self.handle_violation(now, link, text.into());
        }
        entered.is_ok()
    }

    /// Enters what a peer announces, as far as its rights go. Returns what they deny, and an error if
    /// it is too much.
    fn enter(
        &mut self,
        link: LinkId,
        mut news: Announcement,
    ) -> (Vec<(trust::Action, String)>, Result<(), &'static str>) {
        let Some(entry) = self.links.get_mut(&link) else { return (Vec::new(), Ok(())) };
        let Some(about) = &mut entry.about else { return (Vec::new(), Ok(())) };
        let denied = entry.connection.take_denied(&mut news.subscribed, &mut news.serving);
        let (id, changes) = (about.id, about.learn(news));
        let too_many = about.patterns.len() + about.services.len() > MAX_ANNOUNCED;
        let within_share = entry.share.set(about.bytes);
        changes.into_iter().for_each(|change| self.route(link, id, change));
        let entered = match (too_many, within_share) {
            (true, _) => Err(TOO_MANY),
            (false, false) => Err(TOO_MUCH_MEMORY),
            (false, true) => Ok(()),
        };
        (denied, entered)
    }

    fn deny(&mut self, link: LinkId, denied: Vec<(trust::Action, String)>) {
        if let Some(denial) = Control::denied(denied) {
            self.send(link, denial);
        }
    }

    pub(super) fn handle_denied(&mut self, link: LinkId, denied: Vec<(trust::Action, String)>) {
        let Some(id) = self.about(link).map(|about| about.id) else {
            return;
        };
        for (action, name) in denied {
            let report = MeshEvent::Denied { id, action, name };
            self.actions.push_back(Action::Report(report));
        }
    }

    pub(super) fn handle_bye(&mut self, now: Time, link: LinkId, bye: Bye) {
        let is_up = self.links.get(&link).is_some_and(|link| matches!(link.phase, Phase::Up));
        match &bye {
            _ if is_up => self.end(now, link, DownReason::Bye(bye)),
            // The pair has a link, or is about to, or the other side shuts down: no failure.
            Bye::Duplicate | Bye::Shutdown => self.end(now, link, DownReason::Bye(bye)),
            Bye::Mesh | Bye::Version | Bye::IdentityInUse => {
                self.refuse(now, link, bye.to_string(), true);
            }
            _ => self.refuse(now, link, bye.to_string(), false),
        }
    }
}
