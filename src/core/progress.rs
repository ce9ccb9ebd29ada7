//! The progress of a guaranteed message, from the code that stores and delivers it to its sender.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::engine::delivery::DeadLetterReason;
use crate::sync::{Mutex, Rank, lock};

/// A message that was not stored, or perhaps was.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotStored {
    /// The text of the system's or the broker's error.
    pub reason: String,
    /// True if the message may be delivered all the same: it was written, and the disk failed
    /// before the sync, so that it may be present after a restart; or it was sent to the broker,
    /// which may have it. Sent again, it may arrive twice, unless both have the same id (`once`).
    /// If false, nothing of the message was kept, and it will not be delivered.
    pub may_turn_up: bool,
}

impl fmt::Display for NotStored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if self.may_turn_up {
            f.write_str("; it may be delivered all the same")?;
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    stored: Option<Result<(), NotStored>>,
    done: Option<Result<(), DeadLetterReason>>,
    /// The sender was dropped: no more progress is reported.
    abandoned: bool,
    waiter: Option<Waker>,
}

/// Reports the progress of a message. Its drop wakes the waiting task too.
#[derive(Debug)]
pub(crate) struct ProgressSender(Arc<Mutex<State>>);

/// Receives the progress of a message.
#[derive(Debug)]
pub(crate) struct Progress(Arc<Mutex<State>>);

impl Progress {
    pub(crate) fn new() -> (ProgressSender, Self) {
        let state = Arc::new(Mutex::new(Rank::Leaf, State::default()));
        (ProgressSender(state.clone()), Self(state))
    }

    /// Polls for the result of storing the message; `None` if none will be reported.
    pub(crate) fn poll_stored(&self, context: &Context<'_>) -> Poll<Option<Result<(), NotStored>>> {
        self.poll(context, |state| state.stored.clone())
    }

    /// Polls for the message's outcome; `None` if none will be reported.
    pub(crate) fn poll_done(
        &self,
        context: &Context<'_>,
    ) -> Poll<Option<Result<(), DeadLetterReason>>> {
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

impl ProgressSender {
    pub(crate) fn notify_stored(&self, result: Result<(), NotStored>) {
        self.tell(|state| state.stored = Some(result));
    }

    pub(crate) fn notify_done(self, result: Result<(), DeadLetterReason>) {
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

impl Drop for ProgressSender {
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
        let (sender, progress) = Progress::new();
        let waits = tokio::spawn(async move {
            let stored = poll_fn(|context| progress.poll_stored(context)).await;
            (stored, poll_fn(|context| progress.poll_done(context)).await)
        });
        tokio::task::yield_now().await;
        sender.notify_stored(Ok(()));
        tokio::task::yield_now().await;
        sender.notify_done(Ok(()));
        assert_eq!(waits.await.unwrap(), (Some(Ok(())), Some(Ok(()))));
        let (sender, progress) = Progress::new();
        let waits = tokio::spawn(poll_fn(move |context| progress.poll_done(context)));
        tokio::task::yield_now().await;
        drop(sender);
        assert_eq!(waits.await.unwrap(), None);
    }
}
