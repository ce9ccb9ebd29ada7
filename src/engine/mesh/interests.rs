//! The subscriptions and services of this node: as they are, and as its peers know them.
//!
//! Peers cut a node that announces too much or too often, so both limits are kept here. A change
//! within the rate is announced at once. Further ones wait, and what is undone meanwhile is never
//! announced: of a subscription that comes and goes, peers hear nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::{MAX_ANNOUNCED, service_info};
use crate::address::{Pattern, ServiceName};
use crate::engine::{Bucket, Rate, Time};
use crate::wire::Announcement;

/// The most bytes of patterns and service names that go into one record.
pub(super) const MAX_LISTED: usize = 32 * 1024;

/// The rate of this node's changes: half of a peer's burst is for the lists after a hello, and the
/// rest covers the changes that a stalled connection delivers together.
const RATE: Rate = Rate { burst: MAX_ANNOUNCED as u64 / 2, per_second: 800 };

/// The number of waiting changes that are announced together.
const TOGETHER: u64 = 8;

/// A subscription or service beyond the limit of what peers accept from one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany;

/// A pattern or a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Interest {
    Pattern(Pattern),
    Service(ServiceName),
}

impl Interest {
    fn len(&self) -> usize {
        match self {
            Self::Pattern(pattern) => pattern.as_str().len(),
            Self::Service(name) => name.as_str().len(),
        }
    }
}

/// Patterns, and services with their concurrency.
#[derive(Debug, Default)]
struct Known {
    patterns: BTreeSet<Pattern>,
    services: BTreeMap<ServiceName, u32>,
}

#[derive(Debug)]
pub(super) struct Interests {
    /// The number of local subscriptions to each pattern.
    patterns: BTreeMap<Pattern, usize>,
    services: BTreeMap<ServiceName, u32>,
    /// The state that the peers know.
    known: Known,
    /// The changes that the peers do not know yet, in their order. Ends are announced before
    /// beginnings, so that the peers never know of too much.
    ended: BTreeMap<u64, Interest>,
    begun: BTreeMap<u64, Interest>,
    numbers: BTreeMap<Interest, u64>,
    last_number: u64,
    allowance: Bucket,
}

impl Interests {
    pub(super) fn new() -> Self {
        Self {
            patterns: BTreeMap::new(),
            services: BTreeMap::new(),
            known: Known::default(),
            ended: BTreeMap::new(),
            begun: BTreeMap::new(),
            numbers: BTreeMap::new(),
            last_number: 0,
            allowance: Bucket::new(Time::default(), RATE),
        }
    }

    pub(super) fn subscribe(&mut self, pattern: &Pattern) -> Result<(), TooMany> {
        if let Some(count) = self.patterns.get_mut(pattern) {
            *count += 1;
            return Ok(());
        }
        self.check_room()?;
        self.patterns.insert(pattern.clone(), 1);
        self.note(Interest::Pattern(pattern.clone()));
        Ok(())
    }

    pub(super) fn unsubscribe(&mut self, pattern: &Pattern) {
        let Some(count) = self.patterns.get_mut(pattern) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.patterns.remove(pattern);
            self.note(Interest::Pattern(pattern.clone()));
        }
    }

    pub(super) fn serve(&mut self, name: &ServiceName, concurrency: u32) -> Result<(), TooMany> {
        if !self.services.contains_key(name) {
            self.check_room()?;
        }
        self.services.insert(name.clone(), concurrency);
        self.note(Interest::Service(name.clone()));
        Ok(())
    }

    pub(super) fn withdraw(&mut self, name: &ServiceName) {
        if self.services.remove(name).is_some() {
            self.note(Interest::Service(name.clone()));
        }
    }

    fn check_room(&self) -> Result<(), TooMany> {
        match self.patterns.len() + self.services.len() < MAX_ANNOUNCED {
            true => Ok(()),
            false => Err(TooMany),
        }
    }

    /// Enters a change into the waiting ones, or removes it from them if peers know no better.
    fn note(&mut self, interest: Interest) {
        if let Some(number) = self.numbers.remove(&interest) {
            self.ended.remove(&number);
            self.begun.remove(&number);
        }
        let (is_known, has_ended) = match &interest {
            Interest::Pattern(pattern) => {
                let (known, now) = (&self.known.patterns, &self.patterns);
                let is_here = now.contains_key(pattern);
                (known.contains(pattern) == is_here, !is_here)
            }
            Interest::Service(name) => {
                let (known, now) = (&self.known.services, self.services.get(name));
                (known.get(name) == now, now.is_none())
            }
        };
        if is_known {
            return;
        }
        self.last_number += 1;
        self.numbers.insert(interest.clone(), self.last_number);
        let waiting = if has_ended { &mut self.ended } else { &mut self.begun };
        waiting.insert(self.last_number, interest);
    }

    /// Makes all waiting changes known: there is no peer yet that would have to be notified.
    pub(super) fn make_known(&mut self) {
        while self.take_next(u64::MAX, usize::MAX).is_some() {}
    }

    /// Returns the next record of changes; `None` while there are none, or they must wait.
    pub(super) fn poll_announcement(&mut self, now: Time) -> Option<Announcement> {
        let left = self.allowance.left(now);
        if left < self.together() {
            return None;
        }
        let (news, changes) = self.take_next(left, MAX_LISTED)?;
        let _known_to_be_left = self.allowance.take(now, changes);
        Some(news)
    }

    /// Returns the time at which waiting changes may be announced.
    pub(super) fn poll_timeout(&self) -> Option<Time> {
        (!self.numbers.is_empty()).then(|| self.allowance.ready_at(self.together()))
    }

    fn together(&self) -> u64 {
        (self.numbers.len() as u64).min(TOGETHER)
    }

    /// Takes at most that many waiting changes, and so many bytes of them.
    fn take_next(&mut self, most: u64, mut room: usize) -> Option<(Announcement, u64)> {
        let (mut news, mut changes) = (Announcement::default(), 0);
        while changes < most
            && let Some(next) = self.ended.first_entry().or_else(|| self.begun.first_entry())
            && next.get().len() <= room
        {
            let interest = next.remove();
            room -= interest.len();
            changes += 1;
            self.numbers.remove(&interest);
            self.tell(interest, &mut news);
        }
        (changes > 0).then_some((news, changes))
    }

    fn tell(&mut self, interest: Interest, news: &mut Announcement) {
        match interest {
            Interest::Pattern(pattern) if self.patterns.contains_key(&pattern) => {
                self.known.patterns.insert(pattern.clone());
                news.subscribed.push(pattern);
            }
            Interest::Pattern(pattern) => {
                self.known.patterns.remove(&pattern);
                news.unsubscribed.push(pattern);
            }
            Interest::Service(name) => match self.services.get(&name) {
                Some(concurrency) => {
                    self.known.services.insert(name.clone(), *concurrency);
                    news.serving.push(service_info((&name, concurrency)));
                }
                None => {
                    self.known.services.remove(&name);
                    news.withdrawn.push(name);
                }
            },
        }
    }

    /// Returns the state that the peers know, split into at least one part; each fits in one
    /// record.
    pub(super) fn listing(&self) -> Vec<Announcement> {
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
        for pattern in &self.known.patterns {
            make_room(&mut part, pattern.as_str().len());
            part.subscribed.push(pattern.clone());
        }
        for service in self.known.services.iter().map(service_info) {
            make_room(&mut part, service.name.as_str().len());
            part.serving.push(service);
        }
        parts.push(part);
        parts
    }
}
