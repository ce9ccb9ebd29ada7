//! Admission control: limits on accepted connections and on pending handshakes.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use super::Refusal;
use crate::sync::{Mutex, Rank, lock};

/// The limits on connections of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    pub(super) connections: usize,
    /// Connections whose handshake isn't complete.
    pub(super) pending: usize,
    /// Pending connections from one site.
    pub(super) pending_from_one: usize,
}

/// Counts accepted connections of one kind.
pub(super) struct Admissions {
    most: Most,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    connections: usize,
    pending: usize,
    pending_from: HashMap<IpAddr, usize>,
}

impl Admissions {
    pub(super) fn new(most: Most) -> Arc<Self> {
        Arc::new(Self { most, counts: Mutex::new(Rank::Leaf, Counts::default()) })
    }

    /// Admits a connection from an address, or from a process of this host if `None`.
    pub(super) fn admit(
        self: &Arc<Self>,
        from: Option<IpAddr>,
    ) -> Result<(PendingPermit, ConnectionPermit), Refusal> {
        let from = from.map(site);
        let mut counts = lock(&self.counts);
        if counts.connections >= self.most.connections {
            return Err(Refusal::Connections);
        }
        if counts.pending >= self.most.pending {
            return Err(Refusal::PendingHandshakes);
        }
        if let Some(from) = from {
            let pending = counts.pending_from.entry(from).or_default();
            if *pending >= self.most.pending_from_one {
                return Err(Refusal::PendingFromAddress);
            }
            *pending += 1;
        }
        counts.connections += 1;
        counts.pending += 1;
        Ok((PendingPermit { admissions: self.clone(), from }, ConnectionPermit(self.clone())))
    }
}

/// The block of addresses assigned to one host: an IPv4 address, or the /64 of an IPv6 address
/// (RFC 4291).
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// A slot among the pending handshakes, released on drop.
pub(super) struct PendingPermit {
    admissions: Arc<Admissions>,
    from: Option<IpAddr>,
}

impl Drop for PendingPermit {
    fn drop(&mut self) {
        let mut counts = lock(&self.admissions.counts);
        counts.pending -= 1;
        if let Some(from) = self.from
            && let Some(count) = counts.pending_from.get_mut(&from)
        {
            *count -= 1;
            if *count == 0 {
                counts.pending_from.remove(&from);
            }
        }
    }
}

/// A slot among all accepted connections, released on drop.
pub(super) struct ConnectionPermit(Arc<Admissions>);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        lock(&self.0.counts).connections -= 1;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
mod tests {
    use super::*;

    const MOST: Most = Most { connections: 4, pending: 3, pending_from_one: 1 };

    #[test]
    fn permits_give_their_places_back() {
        let admissions = Admissions::new(MOST);
        let near = Some("10.0.0.1".parse().unwrap());
        let (pending, open) = admissions.admit(near).unwrap();
        assert_eq!(admissions.admit(near).err(), Some(Refusal::PendingFromAddress));
        drop(pending);
        let (_pending, _open) = admissions.admit(near).unwrap();
        drop(open);
        assert_eq!(lock(&admissions.counts).connections, 1);
    }

    #[test]
    fn processes_of_this_host_share_no_site() {
        let admissions = Admissions::new(MOST);
        let _admitted: Vec<_> = (0..3).map(|_| admissions.admit(None).unwrap()).collect();
        assert_eq!(admissions.admit(None).err(), Some(Refusal::PendingHandshakes));
    }
}
