//! Subscriptions and services of this node, and their announcement to peers.

use super::{Mesh, service_info};
use crate::address::{Pattern, ServiceName};
use crate::engine::LinkId;
use crate::peer::ServiceInfo;
use crate::wire::{Announcement, Control, Hello};

/// The most bytes of patterns and service names that go into one record.
pub(super) const MAX_LISTED: usize = 32 * 1024;

impl Mesh {
    pub(crate) fn subscribe(&mut self, pattern: &Pattern) {
        let count = self.patterns.entry(pattern.clone()).or_default();
        *count += 1;
        if *count == 1 {
            let subscribed = vec![pattern.clone()];
            self.announce(&Announcement { subscribed, ..Announcement::default() });
        }
    }

    pub(crate) fn unsubscribe(&mut self, pattern: &Pattern) {
        let Some(count) = self.patterns.get_mut(pattern) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.patterns.remove(pattern);
            let unsubscribed = vec![pattern.clone()];
            self.announce(&Announcement { unsubscribed, ..Announcement::default() });
        }
    }

    pub(crate) fn serve(&mut self, name: &ServiceName, concurrency: u32) {
        self.services.insert(name.clone(), concurrency);
        let serving = vec![ServiceInfo { name: name.clone(), concurrency }];
        self.announce(&Announcement { serving, ..Announcement::default() });
    }

    pub(crate) fn withdraw(&mut self, name: &ServiceName) {
        if self.services.remove(name).is_some() {
            let withdrawn = vec![name.clone()];
            self.announce(&Announcement { withdrawn, ..Announcement::default() });
        }
    }

    /// Sends a hello, followed by announcements of what does not fit in it.
    pub(super) fn send_hello(&mut self, link: LinkId) {
        let mut listing = self.listing().into_iter();
        let seq = listing.len() as u64 - 1;
        let first = listing.next().unwrap_or_default();
        let hello = Hello {
            mesh: self.me.mesh.clone(),
            id: self.me.id,
            incarnation: self.me.incarnation,
            name: self.me.name.clone(),
            limits: self.me.limits,
            seq,
            patterns: first.subscribed,
            services: first.serving,
            addresses: self.addresses.clone(),
        };
        if let Some(entry) = self.links.get_mut(&link) {
            entry.announced = Some(0);
        }
        self.send(link, Control::Hello(Box::new(hello)));
        listing.for_each(|rest| self.announce_to(link, rest));
    }

    /// Returns all subscriptions and services of this node, split into at least one part; each fits
    /// in one record.
    fn listing(&self) -> Vec<Announcement> {
        let mut parts = Vec::new();
        let mut part = Announcement::default();
        let mut room = MAX_LISTED;
        let mut make_room = |part: &mut Announcement, len: usize| {
            if len > room {
                parts.push(std::mem::take(part));
                room = MAX_LISTED;
            }
            room -= len;
        };
        for pattern in self.patterns.keys() {
            make_room(&mut part, pattern.as_str().len());
            part.subscribed.push(pattern.clone());
        }
        for service in self.services.iter().map(service_info) {
            make_room(&mut part, service.name.as_str().len());
            part.serving.push(service);
        }
        parts.push(part);
        parts
    }

    /// Announces a change to every peer that has our hello.
    fn announce(&mut self, news: &Announcement) {
        let told = self.links.iter().filter(|(_, link)| link.announced.is_some());
        let told: Vec<LinkId> = told.map(|(id, _)| *id).collect();
        for link in told {
            self.announce_to(link, news.clone());
        }
    }

    fn announce_to(&mut self, link: LinkId, mut news: Announcement) {
        if let Some(seq) = self.links.get_mut(&link).and_then(|link| link.announced.as_mut()) {
            *seq += 1;
            news.seq = *seq;
            self.send(link, Control::Announce(Box::new(news)));
        }
    }
}
