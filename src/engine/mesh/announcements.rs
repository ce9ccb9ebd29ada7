//! Announcements of this node's subscriptions and services to its peers.

use super::Mesh;
use super::interests::TooMany;
use crate::address::{Pattern, ServiceName};
use crate::engine::{LinkId, Time};
use crate::wire::{Announcement, Control, Hello};

impl Mesh {
    /// Subscribes to a pattern.
    ///
    /// # Errors
    /// [`TooMany`] if peers would not accept that many patterns and services of one node.
    pub(crate) fn subscribe(&mut self, now: Time, pattern: &Pattern) -> Result<(), TooMany> {
        self.interests.subscribe(pattern)?;
        self.announce_due(now);
        Ok(())
    }

    pub(crate) fn unsubscribe(&mut self, now: Time, pattern: &Pattern) {
        self.interests.unsubscribe(pattern);
        self.announce_due(now);
    }

    /// Serves a name.
    ///
    /// # Errors
    /// [`TooMany`] if peers would not accept that many patterns and services of one node.
    pub(crate) fn serve(
        &mut self,
        now: Time,
        name: &ServiceName,
        concurrency: u32,
    ) -> Result<(), TooMany> {
        self.interests.serve(name, concurrency)?;
        self.announce_due(now);
        Ok(())
    }

    pub(crate) fn withdraw(&mut self, now: Time, name: &ServiceName) {
        self.interests.withdraw(name);
        self.announce_due(now);
    }

    /// Sends a hello, followed by announcements of what does not fit in it.
    pub(super) fn send_hello(&mut self, link: LinkId) {
        let mut listing = self.interests.listing().into_iter();
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

    /// Announces the changes that are due to every peer that has our hello.
    pub(super) fn announce_due(&mut self, now: Time) {
        let told = self.links.iter().filter(|(_, link)| link.announced.is_some());
        let told: Vec<LinkId> = told.map(|(id, _)| *id).collect();
        if told.is_empty() {
            return self.interests.make_known();
        }
        while let Some(news) = self.interests.poll_announcement(now) {
            for link in &told {
                self.announce_to(*link, news.clone());
            }
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
