//! The choice of targets to dial, and retries.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use crate::engine::random::Random;
use crate::engine::{Bucket, LinkId, Rate, Time};
use crate::identity::NodeId;
use crate::peer::{Address, Source, Unreachable};

/// A report by discovery: a node may be reachable at these addresses. A hint, not a fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sighting {
    pub(crate) source: Source,
    /// The node's id, if the source knows it.
    pub(crate) id: Option<NodeId>,
    pub(crate) addresses: Vec<Address>,
}

/// The key of a target: the announced node, or the address if the node is unknown.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TargetKey {
    Node(NodeId),
    Address(Address),
}

impl Sighting {
    pub(crate) fn key(&self) -> Option<TargetKey> {
        match (&self.id, self.addresses.first()) {
            (_, None) => None,
            (Some(id), _) => Some(TargetKey::Node(*id)),
            (None, Some(address)) => Some(TargetKey::Address(address.clone())),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting {
        until: Time,
    },
    /// The target's node already has a link.
    Idle,
    Dialing,
    Linked(LinkId),
    /// The target is this node.
    Own,
}

#[derive(Debug)]
struct Target {
    source: Source,
    addresses: Vec<Address>,
    /// The node found there, if known.
    id: Option<NodeId>,
    state: State,
    failures: u32,
    last_error: Option<String>,
    /// The source no longer reports the target: it is removed when its link or attempt ends.
    gone: bool,
}

/// The first backoff between attempts; it doubles, with jitter over its upper half.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// The longest backoff, per tier. Targets from this host and the configuration are few and awaited:
/// one that returns must be found within a second.
const LONGEST_RETRY: [Duration; TIERS] =
    [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(10)];
/// The backoff after a refusal for good reason: another mesh, another protocol.
const REFUSED_RETRY: Duration = Duration::from_secs(60);
/// The delay before the node with the larger id dials an announced node, so that the two do not
/// dial each other at once.
const POLITE_DELAY: Duration = Duration::from_millis(300);
/// The most targets of a tier dialled at once.
const MAX_DIALING: usize = 32;
/// The pause before a retry when a source other than this host and its configuration reports
/// changed addresses. A forger could report changes at any rate.
const MOVED_RETRY: Duration = Duration::from_secs(1);
/// The most addresses kept of a node.
pub(crate) const MAX_ADDRESSES: usize = 8;
/// The tiers of trust in a source, queued and dialled separately: this host and the configuration;
/// announcements on the network, which any host can make; gossip. So a less trusted source never
/// delays a more trusted one.
const TIERS: usize = 3;
/// The most known targets of each tier.
const MAX_KNOWN: [usize; TIERS] = [usize::MAX, 4096, 4096];
/// The number of attempts before a target is removed, if it is known from gossip only or its tier
/// is full.
const ATTEMPTS: u32 = 5;

fn tier(source: Source) -> usize {
    match source {
        Source::Local | Source::Fixed | Source::Inbound => 0,
        Source::Mdns => 1,
        Source::Gossip => 2,
    }
}

/// The dial targets of a node.
#[derive(Debug)]
pub(crate) struct Dialer {
    me: NodeId,
    targets: BTreeMap<TargetKey, Target>,
    /// The waiting targets, by the time at which they are due.
    due: [BTreeSet<(Time, TargetKey)>; TIERS],
    by_link: HashMap<LinkId, TargetKey>,
    by_node: HashMap<NodeId, BTreeSet<TargetKey>>,
    /// The current addresses of the configured names, and the targets that come from these alone.
    names: BTreeMap<Address, Vec<Address>>,
    resolved: BTreeSet<Address>,
    /// The number of targets being dialled, and known, per tier.
    dialing: [usize; TIERS],
    known: [usize; TIERS],
    /// The pace of the tiers that anybody can fill.
    pace: [Option<Bucket>; TIERS],
    random: Random,
}

impl Dialer {
    /// A dialer that dials at most that many addresses per second of the tiers that anybody can
    /// fill: a forger may name the addresses of a third party.
    pub(crate) fn new(me: NodeId, seed: u64, per_second: u32) -> Self {
        let per_second = u64::from(per_second);
        let rate = Rate { burst: 4 * per_second, per_second };
        let pace = || Some(Bucket::new(Time::default(), rate));
        Self {
            me,
            targets: BTreeMap::new(),
            due: Default::default(),
            by_link: HashMap::new(),
            by_node: HashMap::new(),
            names: BTreeMap::new(),
            resolved: BTreeSet::new(),
            dialing: [0; TIERS],
            known: [0; TIERS],
            pace: [None, pace(), pace()],
            random: Random::new(seed),
        }
    }

    pub(crate) fn handle_sighting(&mut self, now: Time, sighting: Sighting) {
        let Some(key) = sighting.key() else { return };
        if sighting.id == Some(self.me) {
            return;
        }
        let Some(target) = self.targets.get_mut(&key) else {
            return self.add(now, key, sighting);
        };
        let (state, before, after) = (target.state, tier(target.source), tier(sighting.source));
        if before != after && self.known[after] >= MAX_KNOWN[after] {
            return;
        }
        target.gone = false;
        if before != after {
            // The target moves to its new tier.
            self.enter(&key, State::Idle);
            self.known[before] -= 1;
            self.known[after] += 1;
        }
        let Some(target) = self.targets.get_mut(&key) else { return };
        target.source = sighting.source;
        let moved = target.addresses != sighting.addresses;
        target.addresses = sighting.addresses;
        target.addresses.truncate(MAX_ADDRESSES);
        match state {
            // New addresses justify a new attempt.
            State::Waiting { .. } if moved && after == 0 => {
                target.failures = 0;
                self.enter(&key, State::Waiting { until: now });
            }
            State::Waiting { until } if moved && target.failures > 0 => {
                self.enter(&key, State::Waiting { until: until.min(now + MOVED_RETRY) });
            }
            state if before != after => self.enter(&key, state),
            _ => {}
        }
    }

    /// Handles the addresses that a configured name currently has. Each is a target of its own, so
    /// that one that leads to this node itself does not stand for the others.
    pub(crate) fn handle_resolved(&mut self, now: Time, name: Address, addresses: Vec<Address>) {
        self.handle_gone(&TargetKey::Address(name.clone()));
        for address in &addresses {
            // Addresses of the configuration are known already, and stay.
            if !self.targets.contains_key(&TargetKey::Address(address.clone())) {
                let addresses = vec![address.clone()];
                self.handle_sighting(now, Sighting { source: Source::Fixed, id: None, addresses });
                self.resolved.insert(address.clone());
            }
        }
        let before = self.names.insert(name, addresses).unwrap_or_default();
        for address in before {
            if !self.names.values().flatten().any(|other| *other == address)
                && self.resolved.remove(&address)
            {
                self.handle_gone(&TargetKey::Address(address));
            }
        }
    }

    /// Returns true if another address of a name that has this one is linked: a host may have
    /// addresses at which nobody listens.
    fn is_linked_by_name(&self, address: &Address, is_linked: &impl Fn(&NodeId) -> bool) -> bool {
        let of_name = self.names.values().filter(|addresses| addresses.contains(address));
        of_name.flatten().any(|other| {
            let target = self.targets.get(&TargetKey::Address(other.clone()));
            target.and_then(|target| target.id.as_ref()).is_some_and(is_linked)
        })
    }

    /// Handles a hint from a peer. Other sources take precedence, and a hint never makes a known
    /// target be dialled earlier.
    pub(crate) fn handle_hint(&mut self, now: Time, id: NodeId, addresses: Vec<Address>) {
        let key = TargetKey::Node(id);
        match self.targets.get_mut(&key) {
            Some(target) if target.source == Source::Gossip => {
                let mut merged = addresses;
                merged.extend(target.addresses.iter().cloned());
                dedup(&mut merged);
                merged.truncate(MAX_ADDRESSES);
                target.addresses = merged;
            }
            Some(_) => {}
            None if id == self.me => {}
            None => {
                self.add(now, key, Sighting { source: Source::Gossip, id: Some(id), addresses })
            }
        }
    }

    fn add(&mut self, now: Time, key: TargetKey, sighting: Sighting) {
        let tier = tier(sighting.source);
        if self.known[tier] >= MAX_KNOWN[tier] {
            return;
        }
        self.known[tier] += 1;
        let wait = match sighting.id {
            Some(id) if self.me > id => POLITE_DELAY,
            _ => Duration::ZERO,
        };
        if let Some(id) = sighting.id {
            self.by_node.entry(id).or_default().insert(key.clone());
        }
        let mut addresses = sighting.addresses;
        addresses.truncate(MAX_ADDRESSES);
        let target = Target {
            source: sighting.source,
            addresses,
            id: sighting.id,
            state: State::Idle,
            failures: 0,
            last_error: None,
            gone: false,
        };
        self.targets.insert(key.clone(), target);
        self.enter(&key, State::Waiting { until: now + wait });
    }

    /// Handles a source's report that a target is gone. A live link is not affected.
    pub(crate) fn handle_gone(&mut self, key: &TargetKey) {
        if let Some(target) = self.targets.get_mut(key) {
            target.gone = true;
            let state = target.state;
            self.enter(key, state);
        }
    }

    pub(crate) fn handle_connected(&mut self, key: &TargetKey, link: LinkId) {
        self.enter(key, State::Linked(link));
    }

    /// Records the node that the handshake identified.
    pub(crate) fn handle_identified(&mut self, link: LinkId, id: NodeId) {
        let Some(key) = self.by_link.get(&link) else { return };
        let Some(target) = self.targets.get_mut(key) else { return };
        if let Some(before) = target.id.replace(id) {
            unlist(&mut self.by_node, before, key);
        }
        self.by_node.entry(id).or_default().insert(key.clone());
    }

    pub(crate) fn handle_success(&mut self, link: LinkId) {
        if let Some(target) = self.by_link.get(&link).and_then(|key| self.targets.get_mut(key)) {
            target.failures = 0;
            target.last_error = None;
        }
    }

    /// Records that a target is this node itself.
    pub(crate) fn handle_own(&mut self, link: LinkId) {
        if let Some(key) = self.by_link.get(&link).cloned() {
            self.enter(&key, State::Own);
        }
    }

    pub(crate) fn handle_dial_failed(&mut self, now: Time, key: &TargetKey, error: String) {
        if self.targets.get(key).is_some_and(|target| target.state == State::Dialing) {
            self.retry(now, key, error, None);
        }
    }

    /// Handles a connection that ended before it became a link.
    pub(crate) fn handle_refused(
        &mut self,
        now: Time,
        link: LinkId,
        error: String,
        for_good: bool,
    ) {
        if let Some(key) = self.by_link.get(&link).cloned() {
            self.retry(now, &key, error, for_good.then_some(REFUSED_RETRY));
        }
    }

    /// Returns true if a hint about a node is the first.
    pub(crate) fn is_new(&self, id: &NodeId) -> bool {
        !self.targets.contains_key(&TargetKey::Node(*id))
    }

    /// Handles the end of a connection: its target may be dialled again, unless it leads to a peer
    /// that has another link.
    pub(crate) fn handle_ended(&mut self, now: Time, link: LinkId) {
        if let Some(key) = self.by_link.get(&link).cloned() {
            let until = now + FIRST_RETRY.mul_f64(self.random.jitter());
            self.enter(&key, State::Waiting { until });
        }
    }

    /// Handles the loss of a peer's link: all targets that lead to the peer are retried soon.
    pub(crate) fn handle_peer_lost(&mut self, now: Time, peer: NodeId) {
        let until = now + FIRST_RETRY.mul_f64(self.random.jitter());
        for key in self.by_node.get(&peer).cloned().unwrap_or_default() {
            if let Some(target) = self.targets.get_mut(&key)
                && matches!(target.state, State::Waiting { .. } | State::Idle)
            {
                target.failures = 0;
                self.enter(&key, State::Waiting { until });
            }
        }
    }

    fn retry(&mut self, now: Time, key: &TargetKey, error: String, wait: Option<Duration>) {
        let jitter = self.random.jitter();
        let Some(target) = self.targets.get_mut(key) else { return };
        let doubled = FIRST_RETRY.saturating_mul(1 << target.failures.min(10));
        target.failures += 1;
        target.last_error = Some(error);
        let tier = tier(target.source);
        if target.failures >= ATTEMPTS
            && (target.source == Source::Gossip || self.known[tier] >= MAX_KNOWN[tier])
        {
            target.gone = true;
        }
        let wait = wait.unwrap_or_else(|| doubled.min(LONGEST_RETRY[tier]).mul_f64(jitter));
        self.enter(key, State::Waiting { until: now + wait });
    }

    /// Sets the state of a target, in all indexes; removes the target if it is gone and idle.
    fn enter(&mut self, key: &TargetKey, state: State) {
        let Some(target) = self.targets.get_mut(key) else { return };
        let tier = tier(target.source);
        match std::mem::replace(&mut target.state, state) {
            State::Waiting { until } => _ = self.due[tier].remove(&(until, key.clone())),
            State::Dialing => self.dialing[tier] -= 1,
            State::Linked(link) => _ = self.by_link.remove(&link),
            State::Idle | State::Own => {}
        }
        match state {
            State::Dialing => self.dialing[tier] += 1,
            State::Linked(link) => _ = self.by_link.insert(link, key.clone()),
            _ if target.gone => self.forget(key),
            State::Waiting { until } => _ = self.due[tier].insert((until, key.clone())),
            State::Idle | State::Own => {}
        }
    }

    fn forget(&mut self, key: &TargetKey) {
        let Some(target) = self.targets.remove(key) else { return };
        if let Some(id) = target.id {
            unlist(&mut self.by_node, id, key);
        }
        self.known[tier(target.source)] -= 1;
    }

    /// Returns the next due target that leads to no node for which `is_linked` is true. The number
    /// of targets dialled at once is bounded.
    pub(crate) fn poll_dial(
        &mut self,
        now: Time,
        is_linked: impl Fn(&NodeId) -> bool,
    ) -> Option<(TargetKey, Vec<Address>)> {
        while let Some((until, key)) = self.next_due()
            && until <= now
        {
            let key = key.clone();
            let target = self.targets.get(&key)?;
            if target.id.as_ref().is_some_and(&is_linked) {
                self.enter(&key, State::Idle);
                continue;
            }
            let (addresses, tier) = (target.addresses.clone(), tier(target.source));
            if let Some(pace) = &mut self.pace[tier] {
                if !pace.take(now, 1) {
                    break;
                }
                pace.owe(addresses.len().saturating_sub(1) as u64);
            }
            self.enter(&key, State::Dialing);
            return Some((key, addresses));
        }
        None
    }

    /// Returns the time at which [`Dialer::poll_dial`] may next return a target.
    pub(crate) fn poll_timeout(&self) -> Option<Time> {
        self.next_due().map(|(until, _)| until)
    }

    fn next_due(&self) -> Option<(Time, &TargetKey)> {
        let tiers = self.due.iter().zip(&self.pace).zip(self.dialing);
        let open = tiers.filter(|(_, dialing)| *dialing < MAX_DIALING);
        let next = open.filter_map(|((due, pace), _)| {
            let (until, key) = due.first()?;
            Some((pace.as_ref().map_or(*until, |pace| pace.ready_at(1).max(*until)), key))
        });
        next.min()
    }

    pub(crate) fn source(&self, link: LinkId) -> Option<Source> {
        Some(self.targets.get(self.by_link.get(&link)?)?.source)
    }

    /// Returns the source that sighted a node, whichever side dialled.
    pub(crate) fn sighted_by(&self, id: &NodeId) -> Option<Source> {
        let key = self.by_node.get(id)?.first()?;
        Some(self.targets.get(key)?.source)
    }

    /// Returns the known targets that failed to answer.
    pub(crate) fn unreachable(&self, is_linked: impl Fn(&NodeId) -> bool) -> Vec<Unreachable> {
        let failed = self.targets.values().filter(|target| target.failures > 0);
        failed
            .filter(|target| !target.id.as_ref().is_some_and(&is_linked))
            .filter(|target| {
                let mut addresses = target.addresses.iter();
                !addresses.any(|address| self.is_linked_by_name(address, &is_linked))
            })
            .filter_map(|target| {
                Some(Unreachable {
                    address: target.addresses.first()?.clone(),
                    id: target.id,
                    source: target.source,
                    failures: target.failures,
                    last_error: target.last_error.clone()?,
                })
            })
            .collect()
    }
}

fn unlist(by_node: &mut HashMap<NodeId, BTreeSet<TargetKey>>, id: NodeId, key: &TargetKey) {
    if let Some(keys) = by_node.get_mut(&id) {
        keys.remove(key);
        if keys.is_empty() {
            by_node.remove(&id);
        }
    }
}

/// Removes duplicates; keeps the first of each.
fn dedup(addresses: &mut Vec<Address>) {
    let mut seen = HashSet::new();
    addresses.retain(|address| seen.insert(address.clone()));
}
