//! Ends of connections and links.

use super::{Action, DownReason, Leaving, Mesh, MeshEvent, Phase};
use crate::engine::{FORGOTTEN_AT_ONCE, LinkId, RouteChange, Time};
use crate::wire::Bye;

impl Mesh {
    /// Closes a connection that has not become a link, and reports it to the user.
    pub(super) fn refuse(&mut self, now: Time, link: LinkId, reason: String, for_good: bool) {
        self.refuse_as(now, link, DownReason::Refused(reason), for_good);
    }

    pub(super) fn refuse_as(
        &mut self,
        now: Time,
        link: LinkId,
        reason: DownReason,
        for_good: bool,
    ) {
        let Some(entry) = self.links.get(&link) else {
            return;
        };
        let address = entry.connection.address.clone();
        self.dialer.handle_refused(now, link, reason.to_string(), for_good);
        let report = MeshEvent::Refused { address, reason: reason.to_string() };
        self.actions.push_back(Action::Report(report));
        self.close(now, link, reason);
    }

    pub(super) fn end(&mut self, now: Time, link: LinkId, reason: DownReason) {
        let Some(entry) = self.links.get(&link) else {
            return;
        };
        match (entry.phase, &entry.about) {
            (Phase::Up, Some(_)) => self.end_peer(now, link, reason),
            _ if matches!(reason, DownReason::Violation(_)) => {
                self.refuse_as(now, link, reason, false);
            }
            _ => {
                if reason != DownReason::Bye(Bye::Duplicate) {
                    let text = match &reason {
                        DownReason::Closed => "the connection closed before a hello".to_owned(),
                        other => other.to_string(),
                    };
                    self.dialer.handle_refused(now, link, text, false);
                }
                self.close(now, link, reason);
            }
        }
    }

    pub(super) fn end_peer(&mut self, now: Time, link: LinkId, reason: DownReason) {
        let Some((id, name)) = self.about(link).map(|about| (about.id, about.name.clone())) else {
            return;
        };
        self.peers.remove(&id);
        let newcomer = self.probes.remove(&id).map(|probe| probe.newcomer);
        self.route(link, id, RouteChange::Down);
        let report = MeshEvent::PeerDown { id, name, reason: reason.clone() };
        self.actions.push_back(Action::Report(report));
        self.close(now, link, reason);
        self.dialer.handle_peer_lost(now, id);
        if let Some(newcomer) = newcomer {
            self.accept(now, newcomer);
        }
    }

    pub(super) fn close(&mut self, now: Time, link: LinkId, reason: DownReason) {
        if let Some(entry) = self.links.remove(&link) {
            self.set_deadline(link, entry.phase, None);
            self.actions.push_back(Action::Close { link, reason });
            if let Some(about) = entry.about {
                self.leaving.push_back(Leaving { link, about, _share: entry.share });
                self.forget_some(FORGOTTEN_AT_ONCE);
            }
        }
        self.dialer.handle_ended(now, link);
        self.probes.retain(|_, probe| probe.newcomer != link);
    }

    /// Forgets patterns and services of links that have ended: at most so many, since other tasks
    /// wait meanwhile.
    pub(super) fn forget_some(&mut self, most: usize) {
        for _ in 0..most {
            let Some(leaving) = self.leaving.front_mut() else { return };
            let (link, peer) = (leaving.link, leaving.about.id);
            match leaving.about.forget_one() {
                Some(change) => self.route(link, peer, change),
                None => _ = self.leaving.pop_front(),
            }
        }
    }
}
