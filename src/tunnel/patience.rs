//! A reader's choice between polling and sleeping while it waits for its peer.
//!
//! A reader that sleeps must be woken, which takes 5 µs on one machine and 40 on another, and as
//! much of the processor's time. One that polls has its bytes at once, and pays for as long as it
//! waits. So polling is worth while where bytes come sooner than a wake-up would take (A. Karlin et
//! al., "Empirical studies of competitive spinning for a shared-memory multiprocessor", SOSP 1991),
//! and what came lately tells what will come.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::yield_now;

/// The processor time that a node gives for lower latency.
///
/// While a link waits for its peer, its reader can sleep until bytes arrive, or poll: look again
/// and again, with all other tasks of its thread in between. Polling saves the time of a wake-up,
/// 5 to 50 µs by the machine, on either side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Latency {
    /// Polls for 100 µs after the last bytes in either direction, whatever came of it before.
    Eager,
    /// Polls for no longer than a sleeper waited lately, 100 µs at most, and only where that lately
    /// halved the wait: request after request, or message after message, with a peer that does the
    /// same.
    #[default]
    Balanced,
    /// Always sleeps.
    Frugal,
}

/// The longest time for which a reader polls.
const WINDOW: Duration = Duration::from_micros(100);
/// The longest wait of a sleeper that lets polling be tried: it includes wake-ups on both sides.
const NEAR: Duration = Duration::from_micros(200);
/// The number of such waits in a row after which polling is tried.
const TRIED_AFTER: u32 = 4;
/// The credit of a trial: what polling may lose before it is given up.
const CREDIT: u32 = 16;
/// The number of waits that polling may take while only this side polls: the peer's own trial must
/// fall into them.
const ALONE: u32 = 24;
/// The silence after which both sides begin anew, and so at the same time.
const SILENCE: Duration = Duration::from_millis(50);
/// The waits that must pass after a vain trial before the next one: at first, and at most.
const FIRST_PAUSE: u32 = 512;
const LONGEST_PAUSE: u32 = 8192;

/// A reader's choice, by what it has seen.
#[derive(Debug)]
pub(super) struct Patience {
    latency: Latency,
    /// The moving average of the waits that slept, since they were near.
    slept: Duration,
    state: State,
    /// The waits to pass after the next vain trial.
    pause: u32,
}

#[derive(Debug)]
enum State {
    Sleeping {
        /// The waits that must still pass.
        pause: u32,
        /// The last waits in a row that were near.
        near: u32,
    },
    Polling {
        /// Grows with each wait that was worth it, and shrinks with each in vain.
        credit: u32,
        /// The waits that were shorter, but not by as much as if the peer polled too.
        alone: u32,
    },
}

impl Patience {
    pub(super) fn new(latency: Latency) -> Self {
        let state = State::Sleeping { pause: 0, near: 0 };
        Self { latency, slept: Duration::ZERO, state, pause: FIRST_PAUSE }
    }

    /// The time for which the next wait may poll.
    fn window(&self) -> Duration {
        match (self.latency, &self.state) {
            (Latency::Eager, _) => WINDOW,
            (Latency::Balanced, State::Polling { .. }) => self.slept.min(WINDOW),
            _ => Duration::ZERO,
        }
    }

    /// Records the time that the last wait took, and the silence of the peer in which it fell.
    fn handle_waited(&mut self, waited: Duration, silence: Duration) {
        if self.latency != Latency::Balanced {
            return;
        }
        if silence >= SILENCE {
            self.state = State::Sleeping { pause: 0, near: 0 };
            return;
        }
        match &mut self.state {
            State::Sleeping { pause, near } => {
                *pause = pause.saturating_sub(1);
                (*near, self.slept) = match (*near, waited <= NEAR) {
                    (_, false) => (0, self.slept),
                    (0, true) => (1, waited),
                    (near, true) => (near + 1, (self.slept * 7 + waited) / 8),
                };
                if *pause == 0 && *near >= TRIED_AFTER {
                    self.state = State::Polling { credit: CREDIT, alone: 0 };
                }
            }
            State::Polling { credit, alone } => {
                // Polling takes as much of the processor as a wait is long, and saves a wake-up on
                // either side: about half of what a sleeper waits, if the peer polls too.
                if waited <= self.slept * 11 / 20 {
                    (*credit, *alone) = ((*credit + 1).min(CREDIT), alone.saturating_sub(1));
                } else if waited <= self.slept.min(WINDOW) {
                    *alone += 1;
                } else {
                    *credit = credit.saturating_sub(2);
                }
                if *alone == 0 && *credit == CREDIT {
                    self.pause = FIRST_PAUSE;
                }
                if *credit == 0 || *alone > ALONE {
                    self.state = State::Sleeping { pause: self.pause, near: 0 };
                    self.pause = (2 * self.pause).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Waits for bytes as long as it takes.
    pub(super) async fn wait<T>(&mut self, bytes: impl Future<Output = T>, sent: &Sent) -> T {
        if self.latency == Latency::Frugal {
            return bytes.await;
        }
        let (mut bytes, begun, window) = (pin!(bytes), sent.now(), self.window());
        let waited = || sent.now().saturating_sub(begun.max(sent.last()));
        let read = poll_fn(|cx| {
            let read = bytes.as_mut().poll(cx);
            if read.is_pending() && waited() < window {
                // The task is polled again once all others had their turn.
                let _pending = pin!(yield_now()).poll(cx);
            }
            read
        });
        let read = read.await;
        self.handle_waited(waited(), sent.now() - begun);
        read
    }
}

/// The time at which bytes were last sent to the peer, for the reader in the same task.
pub(super) struct Sent {
    started: Instant,
    after_nanos: AtomicU64,
}

impl Sent {
    pub(super) fn new(started: Instant) -> Self {
        Self { started, after_nanos: AtomicU64::new(0) }
    }

    /// Records that bytes were sent.
    pub(super) fn note(&self) {
        self.after_nanos.store(self.now().as_nanos() as u64, Ordering::Relaxed);
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn last(&self) -> Duration {
        Duration::from_nanos(self.after_nanos.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets that many waits pass; returns how many of them polled.
    fn polled(patience: &mut Patience, waits: u32, micros: impl Fn(bool) -> u64) -> u32 {
        let mut polled = 0;
        for _ in 0..waits {
            let polls = !patience.window().is_zero();
            polled += u32::from(polls);
            let waited = Duration::from_micros(micros(polls));
            patience.handle_waited(waited, waited);
        }
        polled
    }

    #[test]
    fn request_after_request_is_polled_for() {
        // By what a wake-up costs: 5 µs, or 20.
        for (slept, seen) in [(14, 5), (60, 20)] {
            let mut patience = Patience::new(Latency::Balanced);
            let back_to_back = |polls| if polls { seen } else { slept };
            assert_eq!(polled(&mut patience, 1000, back_to_back), 1000 - TRIED_AFTER);
            // A pause ends it soon, and it comes back.
            polled(&mut patience, CREDIT, |_| 1000);
            assert_eq!(patience.window(), Duration::ZERO);
            assert!(polled(&mut patience, 1000, back_to_back) > 400);
            // After a silence it comes back at once, at both sides.
            polled(&mut patience, 1, |_| 1_000_000);
            assert_eq!(polled(&mut patience, 1000, back_to_back), 1000 - TRIED_AFTER);
        }
    }

    #[test]
    fn what_comes_too_late_is_hardly_polled_for() {
        // With a pause between requests, the server sees the first; the client, whose server
        // sleeps, one of the others.
        for (slept, seen) in [(1000, 1000), (130, 110), (60, 40), (14, 9)] {
            let mut patience = Patience::new(Latency::Balanced);
            let vain = polled(&mut patience, 100_000, |polls| if polls { seen } else { slept });
            assert!(vain < 1_000, "{vain} of 100,000 waits of {slept} µs");
        }
    }

    #[test]
    fn the_eager_always_poll_and_the_frugal_never() {
        let (mut eager, mut frugal) =
            (Patience::new(Latency::Eager), Patience::new(Latency::Frugal));
        assert_eq!(polled(&mut eager, 100, |_| 1000), 100);
        assert_eq!(polled(&mut frugal, 100, |_| 1), 0);
    }
}
