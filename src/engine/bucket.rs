//! A token bucket (RFC 2697, with one rate): so many at once, and so many more a second.

use std::time::Duration;

use super::Time;

#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    burst: u64,
    a_second: u64,
    /// The tokens left, in thousandths, at `since`; below zero if some are owed.
    left: i64,
    since: Time,
}

impl Bucket {
    /// A full bucket.
    pub(crate) fn new(now: Time, burst: u64, a_second: u64) -> Self {
        Self { burst, a_second, left: thousandths(burst), since: now }
    }

    /// Takes that many tokens; returns false, and takes none, if there are fewer.
    pub(crate) fn take(&mut self, now: Time, count: u64) -> bool {
        let earned = self.a_second.saturating_mul(now.since(self.since).as_millis() as u64);
        if earned > 0 {
            let earned = i64::try_from(earned).unwrap_or(i64::MAX);
            self.left = self.left.saturating_add(earned).min(thousandths(self.burst));
            self.since = now;
        }
        let wanted = thousandths(count);
        if self.left < wanted {
            return false;
        }
        self.left -= wanted;
        true
    }

    /// Takes tokens that are not left yet.
    pub(crate) fn owe(&mut self, count: u64) {
        self.left = self.left.saturating_sub(thousandths(count));
    }

    /// The time from which one token is left.
    pub(crate) fn next(&self) -> Time {
        let missing = u64::try_from(1000 - self.left).unwrap_or_default();
        self.since + Duration::from_millis(missing.div_ceil(self.a_second.max(1)))
    }
}

fn thousandths(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX).saturating_mul(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_allowed_and_then_so_many_a_second() {
        let start = Time::default();
        let at = |ms| start + Duration::from_millis(ms);
        let mut bucket = Bucket::new(start, 10, 4);
        assert!(bucket.take(start, 10));
        assert!(!bucket.take(start, 1));
        assert_eq!(bucket.next(), at(250));
        assert!(!bucket.take(at(249), 1));
        assert!(bucket.take(at(250), 1));
        assert!(bucket.take(at(2250), 8));
        assert!(!bucket.take(at(2250), 1));
        assert!(bucket.take(at(1_000_000), 10));
        bucket.owe(4);
        assert_eq!(bucket.next(), at(1_000_000 + 1250));
        assert!(!bucket.take(at(1_001_249), 1) && bucket.take(at(1_001_250), 1));
        assert_eq!(Bucket::new(start, 1, 1).next(), start);
    }
}
