//! Admission control: limits on accepted connections, and who makes room at a limit.
//!
//! ```text
//!  accept ─▶ pending ──handshake──▶ open ──a message──▶ proven
//!              │ full: the oldest      │ full: any that is not proven
//!              ▼ of the heaviest       ▼ of the heaviest
//! ```
//!
//! A newcomer is never turned away because others stand idle at the door: at a limit, the site with
//! the most connections gives one up, within the site the address with the most. Sites that had a
//! proven connection are known: strangers make room for them first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use super::Refusal;
use crate::sync::{Mutex, Rank, lock};

/// The limits on connections of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    /// Connections after their handshake.
    pub(super) open: usize,
    /// Connections in their handshake.
    pub(super) pending: usize,
}

/// The number of known sites; the one that was proven first is forgotten first.
const MOST_KNOWN: usize = 1024;

/// Counts accepted connections of one kind.
pub(super) struct Admissions {
    most: Most,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    numbers: u64,
    pending: Pool,
    open: Pool,
    known: Known,
}

/// Connections by site and address, in the order of their arrival.
#[derive(Default)]
struct Pool {
    count: usize,
    sites: HashMap<Option<IpAddr>, Site>,
}

#[derive(Default)]
struct Site {
    count: usize,
    addresses: HashMap<Option<IpAddr>, BTreeMap<u64, Entry>>,
}

struct Entry {
    standing: Arc<Standing>,
    /// Told if the connection must make room.
    evict: oneshot::Sender<()>,
}

/// What a connection has shown so far.
pub(super) struct Standing {
    admissions: Arc<Admissions>,
    from: Option<IpAddr>,
    proven: AtomicBool,
}

impl Standing {
    /// Records that the connection carried a message: it makes room for no other, and its site is
    /// known.
    pub(super) fn prove(&self) {
        if !self.is_proven() && !self.proven.swap(true, Ordering::Relaxed) {
            lock(&self.admissions.table).known.insert(site(self.from));
        }
    }

    fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }
}

/// The connection that makes room, of those that may.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Oldest,
    /// Any unproven one, so that a flood of newcomers mostly replaces itself.
    AnyUnproven,
    Any,
}

impl Victim {
    fn among(self, entries: &BTreeMap<u64, Entry>, newcomer: u64) -> Option<u64> {
        let others = entries.iter().filter(|(number, _)| **number != newcomer);
        match self {
            Self::Oldest => others.map(|(number, _)| *number).next(),
            Self::AnyUnproven | Self::Any => {
                let may_go = |entry: &Entry| self == Self::Any || !entry.standing.is_proven();
                let candidates = others.filter(|(_, entry)| may_go(entry));
                let candidates: Vec<u64> = candidates.map(|(number, _)| *number).collect();
                let drawn = RandomState::new().hash_one(newcomer) as usize;
                candidates.get(drawn.checked_rem(candidates.len())?).copied()
            }
        }
    }
}

/// A set of sites, bounded.
#[derive(Default)]
struct Known {
    sites: HashSet<Option<IpAddr>>,
    in_order: VecDeque<Option<IpAddr>>,
}

impl Known {
    fn insert(&mut self, site: Option<IpAddr>) {
        if self.sites.insert(site) {
            self.in_order.push_back(site);
        }
        if self.in_order.len() > MOST_KNOWN
            && let Some(first) = self.in_order.pop_front()
        {
            self.sites.remove(&first);
        }
    }
}

impl Pool {
    fn insert(&mut self, from: Option<IpAddr>, number: u64, entry: Entry) {
        let site = self.sites.entry(site(from)).or_default();
        site.addresses.entry(from).or_default().insert(number, entry);
        site.count += 1;
        self.count += 1;
    }

    fn remove(&mut self, from: Option<IpAddr>, number: u64) -> Option<Entry> {
        let key = site(from);
        let site = self.sites.get_mut(&key)?;
        let entries = site.addresses.get_mut(&from)?;
        let entry = entries.remove(&number)?;
        if entries.is_empty() {
            site.addresses.remove(&from);
        }
        site.count -= 1;
        if site.count == 0 {
            self.sites.remove(&key);
        }
        self.count -= 1;
        Some(entry)
    }

    /// Evicts a connection other than `newcomer`, of the heaviest address of the heaviest site that
    /// has one; those of `known` sites are last. Returns false if there is none.
    fn make_room(&mut self, newcomer: u64, known: &Known, victim: Victim) -> bool {
        let in_site = |site: &Site| {
            let addresses = site.addresses.iter();
            let candidates = addresses.filter_map(|(from, entries)| {
                Some((entries.len(), Reverse(victim.among(entries, newcomer)?), *from))
            });
            candidates.max_by_key(|(weight, number, _)| (*weight, *number))
        };
        let candidates = self.sites.iter().filter_map(|(key, site)| {
            let (_, number, from) = in_site(site)?;
            let is_stranger = !known.sites.contains(key);
            Some(((is_stranger, site.count, number), from))
        });
        let Some(((.., Reverse(number)), from)) = candidates.max_by_key(|(order, _)| *order) else {
            return false;
        };
        self.evict(from, number)
    }

    /// Evicts any connection of another address that has more than `half` of all. Returns false if
    /// none has.
    fn take_from_half(&mut self, half: usize, newcomer: Option<IpAddr>, number: u64) -> bool {
        let mut addresses = self.sites.values().flat_map(|site| &site.addresses);
        let victim = addresses.find(|(from, entries)| **from != newcomer && entries.len() > half);
        let victim =
            victim.and_then(|(from, entries)| Some((*from, Victim::Any.among(entries, number)?)));
        victim.is_some_and(|(from, number)| self.evict(from, number))
    }

    fn evict(&mut self, from: Option<IpAddr>, number: u64) -> bool {
        let entry = self.remove(from, number);
        entry.map(|entry| entry.evict.send(())).is_some()
    }
}

impl Admissions {
    pub(super) fn new(most: Most) -> Arc<Self> {
        Arc::new(Self { most, table: Mutex::new(Rank::Leaf, Table::default()) })
    }

    /// Admits a connection to its handshake. It comes from an address, or from a process of this
    /// host if `None`.
    ///
    /// The receiver is told if the connection must make room for another.
    pub(super) fn admit(self: &Arc<Self>, from: Option<IpAddr>) -> (Place, oneshot::Receiver<()>) {
        let from = from.map(|address| address.to_canonical());
        let (evict, evicted) = oneshot::channel();
        let admissions = self.clone();
        let standing = Arc::new(Standing { admissions, from, proven: AtomicBool::new(false) });
        let mut table = lock(&self.table);
        let Table { numbers, pending, known, .. } = &mut *table;
        *numbers += 1;
        let number = *numbers;
        pending.insert(from, number, Entry { standing: standing.clone(), evict });
        if pending.count > self.most.pending {
            pending.make_room(number, known, Victim::Oldest);
        }
        (Place { number, standing }, evicted)
    }
}

/// The block of addresses assigned to one host: an IPv4 address, or the /64 of an IPv6 address
/// (RFC 4291).
fn site(from: Option<IpAddr>) -> Option<IpAddr> {
    from.map(|address| match address {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    })
}

/// The place of a connection among the pending ones or the open ones, released on drop.
pub(super) struct Place {
    number: u64,
    standing: Arc<Standing>,
}

impl Place {
    /// Moves the connection, whose handshake is complete, to the open ones.
    ///
    /// # Errors
    /// [`Refusal::Connections`] if all places are taken by proven connections, and no other address
    /// has more than half of them.
    pub(super) fn open(&self) -> Result<(), Refusal> {
        let Standing { admissions, from, .. } = &*self.standing;
        let mut table = lock(&admissions.table);
        let Table { pending, open, known, .. } = &mut *table;
        let Some(entry) = pending.remove(*from, self.number) else {
            return Err(Refusal::MadeRoom);
        };
        open.insert(*from, self.number, entry);
        if open.count > admissions.most.open
            && !open.make_room(self.number, known, Victim::AnyUnproven)
            && !open.take_from_half(admissions.most.open / 2, *from, self.number)
        {
            open.remove(*from, self.number);
            return Err(Refusal::Connections);
        }
        Ok(())
    }

    pub(super) fn standing(&self) -> Arc<Standing> {
        self.standing.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Standing { admissions, from, .. } = &*self.standing;
        let mut table = lock(&admissions.table);
        table.pending.remove(*from, self.number);
        table.open.remove(*from, self.number);
    }
}

#[cfg(test)]
#[path = "admissions_tests.rs"]
mod tests;
