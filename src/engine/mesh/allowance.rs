//! A rate limit for announcements.

use std::time::Duration;

use crate::engine::Time;

/// A token bucket (as in RFC 2697, with one rate). A change costs each peer a copy of some of its
/// routes, and its sender nothing, so a receiver limits the changes of each peer. A sender keeps
/// well within that: its records may be delayed on their way, and then arrive together.
#[derive(Debug)]
pub(super) struct Allowance {
    rate: Rate,
    /// In millionths of a change.
    left: u64,
    /// The time up to which changes were earned.
    since: Time,
}

/// The number of changes at once, and of further ones in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) burst: u64,
    pub(super) a_second: u64,
}

const MILLION: u64 = 1_000_000;

impl Allowance {
    pub(super) fn new(now: Time, rate: Rate) -> Self {
        Self { rate, left: rate.burst * MILLION, since: now }
    }

    /// Takes that many changes; returns false if there are not enough left.
    pub(super) fn take(&mut self, now: Time, changes: u64) -> bool {
        let enough = changes <= self.left(now);
        if enough {
            self.left -= changes * MILLION;
        }
        enough
    }

    /// Returns the number of changes that may be made now.
    pub(super) fn left(&mut self, now: Time) -> u64 {
        let passed = now.since(self.since).as_micros() as u64;
        self.since = self.since + Duration::from_micros(passed);
        let earned = passed.saturating_mul(self.rate.a_second);
        self.left = self.left.saturating_add(earned).min(self.rate.burst * MILLION);
        self.left / MILLION
    }

    /// Returns the time at which that many changes may be made.
    pub(super) fn ready_at(&self, changes: u64) -> Time {
        let missing = (changes * MILLION).saturating_sub(self.left);
        self.since + Duration::from_micros(missing.div_ceil(self.rate.a_second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 20_000, a_second: 900 };

    #[test]
    fn a_burst_is_allowed_and_then_so_many_a_second() {
        let start = Time::default();
        let mut allowance = Allowance::new(start, RATE);
        assert!(allowance.take(start, RATE.burst));
        assert!(!allowance.take(start, 1));
        let later = start + Duration::from_secs(2);
        assert!(allowance.take(later, 2 * RATE.a_second));
        assert!(!allowance.take(later, 1));
        assert!(allowance.take(start + Duration::from_secs(1_000_000), RATE.burst));
    }

    #[test]
    fn frequent_calls_earn_as_much_as_rare_ones() {
        let mut allowance = Allowance::new(Time::default(), RATE);
        assert!(allowance.take(Time::default(), RATE.burst));
        let mut now = Time::default();
        let mut taken = 0;
        while now < Time::after_start(Duration::from_secs(10)) {
            now = now + Duration::from_micros(700);
            taken += u64::from(allowance.take(now, 1));
        }
        assert!((8_990..=9_000).contains(&taken), "{taken}");
    }

    #[test]
    fn the_time_at_which_changes_are_ready_is_exact() {
        let mut allowance = Allowance::new(Time::default(), RATE);
        assert!(allowance.take(Time::default(), RATE.burst - 1));
        let ready = allowance.ready_at(8);
        assert!(
            !allowance.take(Time::after_start(ready.since_start() - Duration::from_micros(2)), 8)
        );
        assert!(allowance.take(ready, 8));
    }
}
