//! The crate's locks: held briefly, taken in one order, and never during a call out of the crate.
//!
//! The holder of a lock may take those below it in [`Rank`], and may call only what queues or
//! wakes: a [`Link`](crate::link::Link)'s methods, tokio's sends and notifications. A handler, a
//! subscriber of `tracing`, a file and another crate's lock are out of bounds: if they block, every
//! thread that wants the lock blocks too.
//!
//! A debug build checks this: taking a lock out of order, or a [`calling_out`] under a lock,
//! panics, and a lock that was held for more than 100 ms is logged. Holders leave no state half
//! changed, so locks ignore poisoning.

use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

/// The order of the locks, the outermost first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// Serialises changes of local subscriptions.
    Subscribing,
    /// [`Mesh`](crate::engine::Mesh): its actions are carried out before another thread's.
    Mesh,
    /// Ended durable subscriptions, while peers are notified.
    EndedConsumers,
    /// [`Outbox`](crate::engine::delivery::Outbox): its actions are carried out in order.
    Outbox,
    /// [`Inbox`](crate::engine::delivery::Inbox), likewise.
    Inbox,
    /// Tables that are locked for a lookup or a change only.
    Table,
    /// The calls of a service.
    Calls,
    /// A link's [`Flow`](crate::engine::Flow): its output is passed on in order.
    Flow,
    /// Locks taken briefly anywhere, under which nothing is called.
    Leaf,
}

/// A mutex with a rank in the order.
#[derive(Debug)]
pub(crate) struct Mutex<T: ?Sized> {
    #[cfg(debug_assertions)]
    rank: Rank,
    inner: std::sync::Mutex<T>,
}

impl<T> Mutex<T> {
    pub(crate) const fn new(rank: Rank, value: T) -> Self {
        #[cfg(not(debug_assertions))]
        let _unchecked = rank;
        Self {
            #[cfg(debug_assertions)]
            rank,
            inner: std::sync::Mutex::new(value),
        }
    }
}

/// The default rank is [`Rank::Leaf`].
impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(Rank::Leaf, T::default())
    }
}

/// Locks a mutex, poisoned or not.
///
/// # Panics
/// In a debug build, if this thread holds a lock that is not above it in the order.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> Guard<'_, T> {
    #[cfg(debug_assertions)]
    let held = checks::Held::new(mutex.rank);
    Guard {
        inner: mutex.inner.lock().unwrap_or_else(PoisonError::into_inner),
        #[cfg(debug_assertions)]
        _held: held,
    }
}

/// Locks a mutex outside the order: its holder takes no other lock, and waits on a condition
/// variable with it.
pub(crate) fn lock_unranked<T: ?Sized>(
    mutex: &std::sync::Mutex<T>,
) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A held lock, released on drop.
#[must_use]
pub(crate) struct Guard<'a, T: ?Sized> {
    // Dropped first: the lock is released before it counts as released.
    inner: std::sync::MutexGuard<'a, T>,
    #[cfg(debug_assertions)]
    _held: checks::Held,
}

impl<T: ?Sized> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Marks a call out of the crate, or the start of a wait.
///
/// # Panics
/// In a debug build, if this thread holds a lock.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn calling_out() {
    #[cfg(debug_assertions)]
    if let Some(rank) = checks::innermost() {
        panic!("a call out of the crate under the lock {rank:?}");
    }
}

/// Returns true if this thread holds a lock of this crate. For the crate's own tests.
#[cfg(debug_assertions)]
#[doc(hidden)]
pub fn holds_lock() -> bool {
    checks::innermost().is_some()
}

#[cfg(debug_assertions)]
mod checks {
    use std::cell::RefCell;
    use std::panic::Location;
    use std::time::{Duration, Instant};

    use super::Rank;

    /// The duration from which a held lock is logged.
    pub(super) const LONG: Duration = Duration::from_millis(100);

    thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
    }

    /// A record of a lock that this thread holds.
    pub(super) struct Held {
        rank: Rank,
        since: Instant,
        at: &'static Location<'static>,
    }

    impl Held {
        #[track_caller]
        pub(super) fn new(rank: Rank) -> Self {
            let above = HELD.with_borrow(|held| held.iter().copied().find(|it| *it >= rank));
            if let Some(above) = above {
                panic!("the lock {rank:?} is taken under {above:?}, which is not above it");
            }
            HELD.with_borrow_mut(|held| held.push(rank));
            Self { rank, since: Instant::now(), at: Location::caller() }
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let is_last = HELD.with_borrow_mut(|held| {
                if let Some(at) = held.iter().rposition(|rank| *rank == self.rank) {
                    held.remove(at);
                }
                held.is_empty()
            });
            // The log must not be written under an outer lock, which would then be held even
            // longer.
            let held_for = self.since.elapsed();
            if is_last && held_for > LONG && !std::thread::panicking() {
                tracing::warn!(lock = ?self.rank, ?held_for, at = %self.at, "a lock was held for long");
            }
        }
    }

    pub(super) fn innermost() -> Option<Rank> {
        HELD.with_borrow(|held| held.last().copied())
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn locks_are_taken_in_their_order_and_released_in_any() {
        let (mesh, flow) = (Mutex::new(Rank::Mesh, 1), Mutex::new(Rank::Flow, 2));
        let outer = lock(&mesh);
        let inner = lock(&flow);
        assert_eq!(*outer + *inner, 3);
        drop(outer);
        assert_eq!(checks::innermost(), Some(Rank::Flow));
        drop(inner);
        calling_out();
    }

    #[test]
    #[should_panic(expected = "the lock Mesh is taken under Flow")]
    fn a_lock_out_of_order_panics() {
        let (mesh, flow) = (Mutex::new(Rank::Mesh, ()), Mutex::new(Rank::Flow, ()));
        let _flow = lock(&flow);
        let _mesh = lock(&mesh);
    }

    #[test]
    #[should_panic(expected = "a call out of the crate under the lock Outbox")]
    fn a_call_out_under_a_lock_panics() {
        let outbox = Mutex::new(Rank::Outbox, ());
        let _outbox = lock(&outbox);
        calling_out();
    }

    /// Counts the log events, separately with and without a lock held.
    #[derive(Default, Clone)]
    struct Counting(std::sync::Arc<[std::sync::atomic::AtomicUsize; 2]>);

    impl tracing::Subscriber for Counting {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            let held = usize::from(checks::innermost().is_some());
            self.0[held].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn a_lock_that_is_held_for_long_is_logged_once_none_is_held() {
        let (mesh, flow) = (Mutex::new(Rank::Mesh, ()), Mutex::new(Rank::Flow, ()));
        let counting = Counting::default();
        tracing::subscriber::with_default(counting.clone(), || {
            drop(lock(&mesh));
            let outer = lock(&mesh);
            let inner = lock(&flow);
            std::thread::sleep(checks::LONG);
            drop(inner);
            drop(outer);
        });
        let logged =
            counting.0.each_ref().map(|count| count.load(std::sync::atomic::Ordering::Relaxed));
        assert_eq!(logged, [1, 0]);
    }

    #[test]
    fn a_panic_under_a_lock_leaves_it_to_others() {
        let calls = Mutex::new(Rank::Calls, 7);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _calls = lock(&calls);
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert_eq!(*lock(&calls), 7);
    }
}
