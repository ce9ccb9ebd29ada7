//! Leases: the time limits of the handlers of guaranteed messages.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::sync::{Mutex, Rank, lock};

/// The longest lease: practically forever, but representable by a clock.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The time limit of a handler, which it may extend.
#[derive(Debug)]
pub(crate) struct Lease {
    length: Duration,
    until: Mutex<Instant>,
}

impl Lease {
    pub(crate) fn new(length: Duration) -> Self {
        let length = length.min(LONGEST);
        Self { length, until: Mutex::new(Rank::Leaf, Instant::now() + length) }
    }

    pub(crate) fn extend(&self) {
        *lock(&self.until) = Instant::now() + self.length;
    }

    /// Runs a handler to its end; `None` if its lease ends first, which ends the handler.
    pub(crate) async fn hold<T>(&self, handler: impl Future<Output = T>) -> Option<T> {
        let mut handler = std::pin::pin!(handler);
        // Most handlers end before a timer is needed.
        let mut timer: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|context| {
            if let Poll::Ready(result) = handler.as_mut().poll(context) {
                return Poll::Ready(Some(result));
            }
            loop {
                let until = *lock(&self.until);
                // A handler that is always ready uses up the budget, so that the timer never fires.
                if until <= Instant::now() {
                    return Poll::Ready(None);
                }
                let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(until)));
                if timer.deadline() != until {
                    timer.as_mut().reset(until);
                }
                ready!(timer.as_mut().poll(context));
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::consume_budget;
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

    #[tokio::test]
    async fn a_lease_ends_a_handler_that_is_always_busy() {
        let busy = async {
            loop {
                consume_budget().await;
            }
        };
        let lease = Lease::new(Duration::from_millis(1));
        assert_eq!(lease.hold::<()>(busy).await, None);
    }
}
