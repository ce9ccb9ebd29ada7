//! How far a guaranteed message is, between those who store and deliver it and the one who waits
//! for it.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::guaranteed::NotStored;
use crate::engine::delivery::Fate;
use crate::sync::{Mutex, Rank, lock};

#[derive(Debug, Default)]
struct State {
    stored: Option<Result<(), NotStored>>,
    done: Option<Result<(), Fate>>,
    /// Nobody tells any more.
    abandoned: bool,
    waiter: Option<Waker>,
}

/// Tells how far the message is. Who waits is told too when this is dropped.
#[derive(Debug)]
pub(super) struct Teller(Arc<Mutex<State>>);

/// Waits for it.
#[derive(Debug)]
pub(super) struct Progress(Arc<Mutex<State>>);

impl Progress {
    pub(super) fn new() -> (Teller, Self) {
        let state = Arc::new(Mutex::new(Rank::Leaf, State::default()));
        (Teller(state.clone()), Self(state))
    }

    /// Whether it was stored; `None` if nobody will tell.
    pub(super) fn poll_stored(&self, context: &Context<'_>) -> Poll<Option<Result<(), NotStored>>> {
        self.poll(context, |state| state.stored.clone())
    }

    /// What became of it in the end; `None` if nobody will tell.
    pub(super) fn poll_done(&self, context: &Context<'_>) -> Poll<Option<Result<(), Fate>>> {
        self.poll(context, |state| state.done.take())
    }

    fn poll<T>(
        &self,
        context: &Context<'_>,
        look: impl FnOnce(&mut State) -> Option<T>,
    ) -> Poll<Option<T>> {
        let mut state = lock(&self.0);
        match look(&mut state) {
            Some(told) => Poll::Ready(Some(told)),
            None if state.abandoned => Poll::Ready(None),
            None => {
                state.waiter = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Teller {
    pub(super) fn tell_stored(&self, result: Result<(), NotStored>) {
        self.tell(|state| state.stored = Some(result));
    }

    pub(super) fn tell_done(self, result: Result<(), Fate>) {
        self.tell(|state| state.done = Some(result));
    }

    fn tell(&self, news: impl FnOnce(&mut State)) {
        let mut state = lock(&self.0);
        news(&mut state);
        let waiter = state.waiter.take();
        drop(state);
        waiter.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.tell(|state| state.abandoned = true);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn who_waits_hears_of_each_step_and_of_the_end_of_the_teller() {
        let (teller, progress) = Progress::new();
        let waits = tokio::spawn(async move {
            let stored = poll_fn(|context| progress.poll_stored(context)).await;
            (stored, poll_fn(|context| progress.poll_done(context)).await)
        });
        tokio::task::yield_now().await;
        teller.tell_stored(Ok(()));
        tokio::task::yield_now().await;
        teller.tell_done(Ok(()));
        assert_eq!(waits.await.unwrap(), (Some(Ok(())), Some(Ok(()))));
        let (teller, progress) = Progress::new();
        let waits = tokio::spawn(poll_fn(move |context| progress.poll_done(context)));
        tokio::task::yield_now().await;
        drop(teller);
        assert_eq!(waits.await.unwrap(), None);
    }
}
