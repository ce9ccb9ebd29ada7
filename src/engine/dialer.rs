//! Whom to dial, and when again.

use std::collections::BTreeMap;
use std::time::Duration;

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
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// For a target that refused us for good reason: another mesh, another protocol.
const REFUSED_RETRY: Duration = Duration::from_secs(60);
/// How long the larger id leaves the dialling of an announced node to the smaller one, so that
/// the two don't cross.
const POLITE_DELAY: Duration = Duration::from_millis(300);

/// The targets of one node.
#[derive(Debug)]
pub(crate) struct Dialer {
    me: NodeId,
    targets: BTreeMap<TargetKey, Target>,
    random: u64,
}

impl Dialer {
    pub(crate) fn new(me: NodeId, seed: u64) -> Self {
        Self { me, targets: BTreeMap::new(), random: seed | 1 }
    }

    pub(crate) fn handle_sighting(&mut self, now: Time, sighting: Sighting) {
        let Some(key) = sighting.key() else { return };
        if sighting.id == Some(self.me) {
            return;
        }
        match self.targets.get_mut(&key) {
            Some(target) if target.addresses == sighting.addresses => target.gone = false,
            Some(target) => {
                target.gone = false;
                // New addresses deserve a new attempt at once.
                target.addresses = sighting.addresses;
                target.source = sighting.source;
                if let State::Waiting { .. } = target.state {
                    target.failures = 0;
                    target.state = State::Waiting { until: now };
                }
            }
            None => {
                let wait = match sighting.id {
                    Some(id) if self.me > id => POLITE_DELAY,
                    _ => Duration::ZERO,
                };
                let target = Target {
                    source: sighting.source,
                    addresses: sighting.addresses,
                    id: sighting.id,
                    state: State::Waiting { until: now + wait },
                    failures: 0,
                    last_error: None,
                    gone: false,
                };
                self.targets.insert(key, target);
            }
        }
    }

    /// The source no longer sees it. A live link is none of its business.
    pub(crate) fn handle_gone(&mut self, key: &TargetKey) {
        if let Some(target) = self.targets.get_mut(key) {
            target.gone = true;
        }
        self.forget_gone();
    }

    pub(crate) fn handle_connected(&mut self, key: &TargetKey, link: LinkId) {
        if let Some(target) = self.targets.get_mut(key) {
            target.state = State::Linked(link);
        }
    }

    /// The handshake told who lives there.
    pub(crate) fn handle_identified(&mut self, link: LinkId, id: NodeId) {
        if let Some(target) = self.by_link(link) {
            target.id = Some(id);
        }
    }

    pub(crate) fn handle_success(&mut self, link: LinkId) {
        if let Some(target) = self.by_link(link) {
            target.failures = 0;
            target.last_error = None;
        }
    }

    /// The address is our own.
    pub(crate) fn handle_own(&mut self, link: LinkId) {
        if let Some(target) = self.by_link(link) {
            target.state = State::Own;
        }
    }

    pub(crate) fn handle_dial_failed(&mut self, now: Time, key: &TargetKey, error: String) {
        let jitter = self.jitter();
        if let Some(target) = self.targets.get_mut(key)
            && target.state == State::Dialing
        {
            target.retry(now, jitter, error);
        }
        self.forget_gone();
    }

    /// The connection ended before it became a link.
    pub(crate) fn handle_refused(
        &mut self,
        now: Time,
        link: LinkId,
        error: String,
        for_good: bool,
    ) {
        let jitter = self.jitter();
        if let Some(target) = self.by_link(link) {
            target.retry(now, jitter, error);
            if for_good {
                target.state = State::Waiting { until: now + REFUSED_RETRY };
            }
        }
    }

    /// The connection ended; its target may be dialled again, unless it leads to a peer that
    /// has another link.
    pub(crate) fn handle_ended(&mut self, now: Time, link: LinkId) {
        let until = now + FIRST_RETRY.mul_f64(self.jitter());
        if let Some(target) = self.by_link(link) {
            target.state = State::Waiting { until };
        }
        self.forget_gone();
    }

    /// The peer has no link any more; everything that leads to it is tried again soon.
    pub(crate) fn handle_peer_lost(&mut self, now: Time, peer: NodeId) {
        let until = now + FIRST_RETRY.mul_f64(self.jitter());
        for target in self.targets.values_mut() {
            if target.id == Some(peer) && matches!(target.state, State::Waiting { .. }) {
                target.failures = 0;
                target.state = State::Waiting { until };
            }
        }
    }

    fn forget_gone(&mut self) {
        let busy = |state| matches!(state, State::Dialing | State::Linked(_));
        self.targets.retain(|_, target| !target.gone || busy(target.state));
    }

    fn by_link(&mut self, link: LinkId) -> Option<&mut Target> {
        self.targets.values_mut().find(|target| target.state == State::Linked(link))
    }

    /// The next target that is due and leads to nobody that `is_linked` knows.
    pub(crate) fn poll_dial(
        &mut self,
        now: Time,
        is_linked: impl Fn(&NodeId) -> bool,
    ) -> Option<(TargetKey, Vec<Address>)> {
        let due =
            |target: &Target| matches!(target.state, State::Waiting { until } if until <= now);
        let linked = |target: &Target| target.id.as_ref().is_some_and(&is_linked);
        let (key, target) =
            self.targets.iter_mut().find(|(_, target)| due(target) && !linked(target))?;
        target.state = State::Dialing;
        Some((key.clone(), target.addresses.clone()))
    }

    pub(crate) fn poll_timeout(&self, is_linked: impl Fn(&NodeId) -> bool) -> Option<Time> {
        let waiting = self.targets.values().filter_map(|target| match target.state {
            State::Waiting { until } if !target.id.as_ref().is_some_and(&is_linked) => Some(until),
            _ => None,
        });
        waiting.min()
    }

    pub(crate) fn source(&self, link: LinkId) -> Option<Source> {
        let target = self.targets.values().find(|target| target.state == State::Linked(link))?;
        Some(target.source)
    }

    /// By which means a node was seen, whoever dialled in the end.
    pub(crate) fn sighted_by(&self, id: &NodeId) -> Option<Source> {
        self.targets
            .values()
            .find(|target| target.id.as_ref() == Some(id))
            .map(|target| target.source)
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

    /// A factor between 0.5 and 1 (xorshift64).
    fn jitter(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        0.5 + 0.5 * (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Target {
    fn retry(&mut self, now: Time, jitter: f64, error: String) {
        let doubled = FIRST_RETRY.saturating_mul(1 << self.failures.min(10));
        self.failures += 1;
        self.last_error = Some(error);
        self.state = State::Waiting { until: now + doubled.min(LONGEST_RETRY).mul_f64(jitter) };
    }
}
