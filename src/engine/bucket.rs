//! A rate limit.

use std::time::Duration;

use super::Time;

/// The number of tokens at once, and of further ones per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) burst: u64,
    pub(crate) per_second: u64,
}

/// A token bucket (as in RFC 2697, with one rate).
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    rate: Rate,
    /// The tokens left, in millionths; below zero if some are owed.
    left: i64,
    /// The time up to which tokens were earned.
    since: Time,
}

impl Bucket {
    /// A full bucket.
    pub(crate) fn new(now: Time, rate: Rate) -> Self {
        Self { rate, left: millionths(rate.burst), since: now }
    }

    /// Takes that many tokens; returns false, and takes none, if there are fewer.
    pub(crate) fn take(&mut self, now: Time, count: u64) -> bool {
        let enough = count <= self.left(now);
        if enough {
            self.owe(count);
        }
        enough
    }

    /// Takes tokens that may not be left yet.
    pub(crate) fn owe(&mut self, count: u64) {
        self.left = self.left.saturating_sub(millionths(count));
    }

    /// Returns the number of tokens that are left.
    pub(crate) fn left(&mut self, now: Time) -> u64 {
        let passed = now.since(self.since).as_micros() as u64;
        self.since = self.since + Duration::from_micros(passed);
        let earned = passed.saturating_mul(self.rate.per_second);
        let earned = i64::try_from(earned).unwrap_or(i64::MAX);
        self.left = self.left.saturating_add(earned).min(millionths(self.rate.burst));
        u64::try_from(self.left / MILLION).unwrap_or(0)
    }

    /// Returns the time from which that many tokens are left.
    pub(crate) fn ready_at(&self, count: u64) -> Time {
        let missing = millionths(count).saturating_sub(self.left).max(0) as u64;
        self.since + Duration::from_micros(missing.div_ceil(self.rate.per_second.max(1)))
    }
}

const MILLION: i64 = 1_000_000;

fn millionths(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX).saturating_mul(MILLION)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 20_000, per_second: 900 };

    #[test]
    fn a_burst_is_allowed_and_then_so_many_per_second() {
        let start = Time::default();
        let mut bucket = Bucket::new(start, RATE);
        assert!(bucket.take(start, RATE.burst));
        assert!(!bucket.take(start, 1));
        let later = start + Duration::from_secs(2);
        assert!(bucket.take(later, 2 * RATE.per_second));
        assert!(!bucket.take(later, 1));
        assert!(bucket.take(start + Duration::from_secs(1_000_000), RATE.burst));
    }

    #[test]
    fn frequent_calls_earn_as_much_as_rare_ones() {
        let mut bucket = Bucket::new(Time::default(), RATE);
        assert!(bucket.take(Time::default(), RATE.burst));
        let mut now = Time::default();
        let mut taken = 0;
        while now < Time::after_start(Duration::from_secs(10)) {
            now = now + Duration::from_micros(700);
            taken += u64::from(bucket.take(now, 1));
        }
        assert!((8_990..=9_000).contains(&taken), "{taken}");
    }

    #[test]
    fn the_time_at_which_tokens_are_left_is_exact() {
        let mut bucket = Bucket::new(Time::default(), RATE);
        assert!(bucket.take(Time::default(), RATE.burst - 1));
        let ready = bucket.ready_at(8);
        assert!(!bucket.take(Time::after_start(ready.since_start() - Duration::from_micros(2)), 8));
        assert!(bucket.take(ready, 8));
    }

    #[test]
    fn what_is_owed_is_earned_first() {
        let at = |ms| Time::after_start(Duration::from_millis(ms));
        let mut bucket = Bucket::new(at(0), Rate { burst: 10, per_second: 4 });
        assert!(bucket.take(at(0), 10));
        bucket.owe(4);
        assert_eq!(bucket.ready_at(1), at(1250));
        assert!(!bucket.take(at(1249), 1));
        assert!(bucket.take(at(1250), 1));
    }
}
