//! What a peer announced about itself.

use std::collections::{BTreeMap, BTreeSet};

use crate::address::{Pattern, ServiceName};
use crate::engine::RouteChange;
use crate::engine::dialer::MAX_ADDRESSES;
use crate::identity::{Incarnation, NodeId};
use crate::peer::Address;
use crate::wire::{Announcement, Hello, Limits};

/// A peer's hello, kept up to date by its announcements.
#[derive(Debug)]
pub(super) struct About {
    pub(super) id: NodeId,
    pub(super) incarnation: Incarnation,
    pub(super) name: String,
    pub(super) limits: Limits,
    pub(super) addresses: Vec<Address>,
    /// The number of its last announcement, and of the one that completes its lists.
    pub(super) seq: u64,
    pub(super) listed_by: u64,
    pub(super) patterns: BTreeSet<Pattern>,
    pub(super) services: BTreeMap<ServiceName, u32>,
    /// The estimated bytes of those, here and in the routing snapshot.
    pub(super) bytes: u64,
}

impl About {
    /// Creates the record of a node from its hello; returns the hello's lists, which are still to be
    /// entered.
    pub(super) fn new(hello: Hello) -> (Self, Announcement) {
        let about = Self {
            id: hello.id,
            incarnation: hello.incarnation,
            name: hello.name,
            limits: hello.limits,
            addresses: hello.addresses.into_iter().take(MAX_ADDRESSES).collect(),
            seq: 0,
            listed_by: hello.seq,
            patterns: BTreeSet::new(),
            services: BTreeMap::new(),
            bytes: 0,
        };
        let (subscribed, serving) = (hello.patterns, hello.services);
        (about, Announcement { subscribed, serving, ..Announcement::default() })
    }

    /// Enters changes; returns those that change something.
    pub(super) fn learn(&mut self, news: Announcement) -> Vec<RouteChange> {
        let mut changes = Vec::with_capacity(news.len());
        for pattern in news.unsubscribed {
            if self.patterns.remove(&pattern) {
                self.bytes -= kept_for(pattern.as_str());
                changes.push(RouteChange::Unsubscribed(pattern));
            }
        }
        for pattern in news.subscribed {
            if self.patterns.insert(pattern.clone()) {
                self.bytes += kept_for(pattern.as_str());
                changes.push(RouteChange::Subscribed(pattern));
            }
        }
        for name in news.withdrawn {
            if self.services.remove(&name).is_some() {
                self.bytes -= kept_for(name.as_str());
                changes.push(RouteChange::Withdrawn(name));
            }
        }
        for service in news.serving {
            if self.services.insert(service.name.clone(), service.concurrency).is_none() {
                self.bytes += kept_for(service.name.as_str());
            }
            changes.push(RouteChange::Serving(service));
        }
        changes
    }

    /// Takes one of its patterns or services.
    pub(super) fn forget_one(&mut self) -> Option<RouteChange> {
        let pattern = self.patterns.pop_first().map(RouteChange::Unsubscribed);
        pattern.or_else(|| self.services.pop_first().map(|(name, _)| RouteChange::Withdrawn(name)))
    }
}

/// The estimated memory of an announced name: its tokens in the routing trie, and its text twice.
fn kept_for(name: &str) -> u64 {
    let tokens = 1 + name.bytes().filter(|byte| *byte == b'.').count();
    (256 + 2 * name.len() + 176 * tokens) as u64
}
