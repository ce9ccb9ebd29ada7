//! A rate limit for a peer's announcements.

use super::MAX_ANNOUNCED;
use crate::engine::Time;

/// The number of changes that a peer may make at once: twice the most that it may have announced.
const BURST: u64 = 2 * MAX_ANNOUNCED as u64;
/// The number of further changes per second.
const A_SECOND: u64 = 1000;

/// A token bucket (as in RFC 2697, with one rate). A change costs each peer a copy of some of its
/// routes, and its sender nothing.
#[derive(Debug)]
pub(super) struct Allowance {
    left: u64,
    since: Time,
}

impl Allowance {
    pub(super) fn new(now: Time) -> Self {
        Self { left: BURST, since: now }
    }

    /// Takes that many changes; returns false if there are not enough left.
    pub(super) fn take(&mut self, now: Time, changes: u64) -> bool {
        let earned = now.since(self.since).as_millis() as u64 * A_SECOND / 1000;
        if earned > 0 {
            self.left = (self.left + earned).min(BURST);
            self.since = now;
        }
        match self.left.checked_sub(changes) {
            Some(left) => self.left = left,
            None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_burst_is_allowed_and_then_so_many_a_second() {
        let start = Time::default();
        let mut allowance = Allowance::new(start);
        assert!(allowance.take(start, BURST));
        assert!(!allowance.take(start, 1));
        let later = start + Duration::from_secs(2);
        assert!(allowance.take(later, 2 * A_SECOND));
        assert!(!allowance.take(later, 1));
        assert!(allowance.take(start + Duration::from_secs(1_000_000), BURST));
    }
}
