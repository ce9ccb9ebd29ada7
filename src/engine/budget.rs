//! The memory that peers make a node keep, in bytes: one budget for all of them, and a share for
//! each.
//!
//! Half of the budget is for whoever asks first. Beyond that a peer may only grow within its equal
//! share of the other half, so that those who took much stop, those who took little go on, and the
//! whole stays below the budget.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Budget {
    bytes: u64,
    used: AtomicU64,
    shares: AtomicU64,
}

impl Budget {
    pub(crate) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { bytes, used: AtomicU64::new(0), shares: AtomicU64::new(0) })
    }

    pub(crate) fn share(self: &Arc<Self>) -> Share {
        self.shares.fetch_add(1, Ordering::Relaxed);
        Share { budget: self.clone(), used: 0 }
    }
}

/// The bytes that one peer takes from the budget; given back on drop.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    used: u64,
}

/// Changes below this many bytes are not recorded, so that a budget costs next to nothing.
const GRAIN: u64 = 16 * 1024;

impl Share {
    /// Records the bytes that the peer takes now. Returns false if they are more than it may take.
    pub(crate) fn set(&mut self, used: u64) -> bool {
        let Budget { bytes, used: all, shares } = &*self.budget;
        if used.abs_diff(self.used) < GRAIN {
            return true;
        }
        let grows = used > self.used;
        let all = match grows {
            true => all.fetch_add(used - self.used, Ordering::Relaxed) + (used - self.used),
            false => all.fetch_sub(self.used - used, Ordering::Relaxed) - (self.used - used),
        };
        self.used = used;
        let half = bytes / 2;
        !grows || all <= half || used <= half / shares.load(Ordering::Relaxed).max(1)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.used, Ordering::Relaxed);
        self.budget.shares.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn who_takes_much_stops_at_half_and_who_takes_little_goes_on() {
        let budget = Budget::new(64 * MIB);
        let mut greedy: Vec<Share> = (0..3).map(|_| budget.share()).collect();
        let mut honest = budget.share();
        for share in &mut greedy {
            let mut used = 0;
            while share.set(used + MIB) {
                used += MIB;
            }
            share.set(used);
        }
        assert_eq!(greedy[0].used, 32 * MIB, "half is for who asks first");
        assert_eq!(greedy[1].used, 8 * MIB, "then an equal share of the other half");
        assert!(honest.set(8 * MIB));
        assert!(!honest.set(9 * MIB));
        honest.set(8 * MIB);
        assert!(budget.used.load(Ordering::Relaxed) <= 64 * MIB);
        drop(greedy);
        assert!(honest.set(9 * MIB), "what was taken is given back");
        drop(honest);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
        assert_eq!(budget.shares.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_shrinks_is_never_too_much() {
        let budget = Budget::new(4 * MIB);
        let mut share = budget.share();
        let mut other = budget.share();
        assert!(other.set(MIB));
        assert!(!share.set(3 * MIB));
        assert!(share.set(2 * MIB));
        assert!(share.set(0));
    }
}
