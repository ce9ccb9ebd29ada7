//! Whom to dial, and when again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use crate::engine::random::Random;
use crate::engine::{LinkId, Time};
use crate::identity::NodeId;
use crate::peer::{Address, Source, Unreachable};

/// What discovery reports: a node may be reachable at these addresses. A hint, never a fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sighting {
    pub(crate) source: Source,
    /// Who it is, where the source knows.
    pub(crate) id: Option<NodeId>,
    pub(crate) addresses: Vec<Address>,
}

/// What a target is known by: the node that was announced, or the address where nothing else is
/// known.
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
    /// Its node has a link already.
    Idle,
    Dialing,
    Linked(LinkId),
    /// It is ourselves.
    Own,
}

#[derive(Debug)]
struct Target {
    source: Source,
    addresses: Vec<Address>,
    /// Who was found there.
    id: Option<NodeId>,
    state: State,
    failures: u32,
    last_error: Option<String>,
    /// Its source no longer sees it: it is forgotten when its link or attempt ends.
    gone: bool,
}

/// Backoff between attempts: doubling, with jitter over its upper half.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Where it ends, in each tier. What this host and the configuration name is few, and somebody
/// waits for it: one that comes back shall be found within a second.
const LONGEST_RETRY: [Duration; TIERS] =
    [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(10)];
/// For a target that refused us for good reason: another mesh, another protocol.
const REFUSED_RETRY: Duration = Duration::from_secs(60);
/// How long the larger id leaves the dialling of an announced node to the smaller one, so that
/// the two don't cross.
const POLITE_DELAY: Duration = Duration::from_millis(300);
/// How many targets of a tier are dialled at once.
const MAX_DIALING: usize = 32;
/// How soon a target is tried again when others than this host and its configuration say that
/// its addresses have changed. Who forges that can do so as often as it likes.
const MOVED_RETRY: Duration = Duration::from_secs(1);
/// The most addresses that are kept of a node.
pub(crate) const MAX_ADDRESSES: usize = 8;
/// Those that wait and those that are dialled, apart by how far their source is believed: what
/// this host and the configuration say, what anybody on the network may announce, what peers have
/// told. So the later never stand in the way of the earlier.
const TIERS: usize = 3;
/// The most targets that are known in each tier.
const MAX_KNOWN: [usize; TIERS] = [usize::MAX, 4096, 4096];
/// How often a target is tried before it is forgotten, if it is known from hearsay only, or its
/// tier is full.
const ATTEMPTS: u32 = 5;

fn tier(source: Source) -> usize {
    match source {
        Source::Local | Source::Fixed | Source::Inbound => 0,
        Source::Mdns => 1,
        Source::Gossip => 2,
    }
}

/// The targets of one node.
#[derive(Debug)]
pub(crate) struct Dialer {
    me: NodeId,
    targets: BTreeMap<TargetKey, Target>,
    /// Those that wait, by when they are due.
    due: [BTreeSet<(Time, TargetKey)>; TIERS],
    by_link: HashMap<LinkId, TargetKey>,
    by_node: HashMap<NodeId, BTreeSet<TargetKey>>,
    /// How many are being dialled, and how many are known.
    dialing: [usize; TIERS],
    known: [usize; TIERS],
    random: Random,
}

impl Dialer {
    pub(crate) fn new(me: NodeId, seed: u64) -> Self {
        Self {
            me,
            targets: BTreeMap::new(),
            due: Default::default(),
            by_link: HashMap::new(),
            by_node: HashMap::new(),
            dialing: [0; TIERS],
            known: [0; TIERS],
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
            // It takes its place among the others.
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
            // New addresses deserve a new attempt.
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

    /// A peer told where a node may be. What other sources say of it counts more, and what is
    /// told makes nothing known be dialled earlier.
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

    /// The source no longer sees it. A live link is none of its business.
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

    /// The handshake told who lives there.
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

    /// The address is our own.
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

    /// The connection ended before it became a link.
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

    /// The connection ended; its target may be dialled again, unless it leads to a peer that
    /// has another link.
    pub(crate) fn handle_ended(&mut self, now: Time, link: LinkId) {
        if let Some(key) = self.by_link.get(&link).cloned() {
            let until = now + FIRST_RETRY.mul_f64(self.random.jitter());
            self.enter(&key, State::Waiting { until });
        }
    }

    /// The peer has no link any more; everything that leads to it is tried again soon.
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

    /// Puts a target into a state, in all indexes; forgets it if it is gone and at rest.
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

    /// The next target that is due and leads to nobody that `is_linked` knows. Only so many are
    /// dialled at once.
    pub(crate) fn poll_dial(
        &mut self,
        now: Time,
        is_linked: impl Fn(&NodeId) -> bool,
    ) -> Option<(TargetKey, Vec<Address>)> {
        while let Some((until, key)) = self.next_due()
            && *until <= now
        {
            let key = key.clone();
            let target = self.targets.get(&key)?;
            if target.id.as_ref().is_some_and(&is_linked) {
                self.enter(&key, State::Idle);
                continue;
            }
            let addresses = target.addresses.clone();
            self.enter(&key, State::Dialing);
            return Some((key, addresses));
        }
        None
    }

    /// When [`Dialer::poll_dial`] may have something next.
    pub(crate) fn poll_timeout(&self) -> Option<Time> {
        self.next_due().map(|(until, _)| *until)
    }

    fn next_due(&self) -> Option<&(Time, TargetKey)> {
        let tiers = self.due.iter().zip(self.dialing);
        let open = tiers.filter(|(_, dialing)| *dialing < MAX_DIALING);
        open.filter_map(|(due, _)| due.first()).min()
    }

    pub(crate) fn source(&self, link: LinkId) -> Option<Source> {
        Some(self.targets.get(self.by_link.get(&link)?)?.source)
    }

    /// By which means a node was seen, whoever dialled in the end.
    pub(crate) fn sighted_by(&self, id: &NodeId) -> Option<Source> {
        let key = self.by_node.get(id)?.first()?;
        Some(self.targets.get(key)?.source)
    }

    /// What is known, but failed to answer.
    pub(crate) fn unreachable(&self, is_linked: impl Fn(&NodeId) -> bool) -> Vec<Unreachable> {
        let failed = self.targets.values().filter(|target| target.failures > 0);
        failed
            .filter(|target| !target.id.as_ref().is_some_and(&is_linked))
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

/// Keeps the first of equals.
fn dedup(addresses: &mut Vec<Address>) {
    let mut seen = HashSet::new();
    addresses.retain(|address| seen.insert(address.clone()));
}
