//! Leases: how long the handler of a guaranteed message may take.

use std::future::Future;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::sync::lock;

/// As good as for ever; a clock can count to it.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The time that a handler has, unless it asks for more.
#[derive(Debug)]
pub(crate) struct Lease {
    length: Duration,
    until: Mutex<Instant>,
}

impl Lease {
    pub(crate) fn new(length: Duration) -> Self {
        let length = length.min(LONGEST);
        Self { length, until: Mutex::new(Instant::now() + length) }
    }

    pub(crate) fn extend(&self) {
        *lock(&self.until) = Instant::now() + self.length;
    }

    /// Runs a handler to its end; `None` if its lease ends before, and the handler with it.
    pub(crate) async fn hold<T>(&self, handler: impl Future<Output = T>) -> Option<T> {
        let mut handler = std::pin::pin!(handler);
        loop {
            let until = *lock(&self.until);
            tokio::select! {
                biased;
                result = &mut handler => return Some(result),
                () = sleep_until(until) => {}
            }
            if *lock(&self.until) <= Instant::now() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn a_lease_ends_a_handler_that_hangs_and_not_one_that_extends_it() {
        Lease::new(Duration::MAX).extend();
        let lease = Lease::new(Duration::from_secs(30));
        assert_eq!(lease.hold(std::future::pending::<()>()).await, None);
        let lease = Lease::new(Duration::from_secs(30));
        let slow = async {
            for _ in 0..5 {
                sleep(Duration::from_secs(20)).await;
                lease.extend();
            }
        };
        assert_eq!(lease.hold(slow).await, Some(()));
    }
}
