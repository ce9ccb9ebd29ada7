//! What a service's user writes: handlers, what they are given and how they decline.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::lease::Lease;
use super::runner::CallHandle;
use crate::message::{Body, Message};

/// Why a handler declined a call. Its code and text reach the caller.
///
/// Any error turns into one, with the code `error`, so that `?` works in handlers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerError {
    /// A short name that a program can match, such as `not_found`.
    pub code: String,
    /// A sentence for people.
    pub text: String,
    /// Trying again is of no use.
    pub(super) rejects: bool,
}

impl HandlerError {
    /// An error with a code for programs and a text for people.
    pub fn new(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self { code: code.into(), text: text.into(), rejects: false }
    }

    /// An error that trying again won't mend: a guaranteed message becomes a dead letter at once.
    /// To any other call it is like [`HandlerError::new`].
    pub fn reject(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self { rejects: true, ..Self::new(code, text) }
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}

impl<E: std::error::Error> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::new("error", error.to_string())
    }
}

/// A call as its handler sees it: the message, and what is known of its caller's patience.
#[derive(Debug)]
pub struct Call {
    /// The message.
    pub message: Message,
    pub(super) handle: Arc<CallHandle>,
    pub(super) deadline: Option<Instant>,
    pub(super) lease: Option<Arc<Lease>>,
}

impl Call {
    /// Whether somebody waits for a reply.
    pub fn wants_reply(&self) -> bool {
        self.message.wants_reply
    }

    /// How much longer the reply is of use; `None` if the caller set no limit.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Gives the handler of a guaranteed message its whole lease again, from now: 30 s by default
    /// ([`Config::lease`](crate::Config::lease)). When a lease ends, the handler is ended too, and
    /// the message is delivered again. Other calls have none.
    pub fn extend(&self) {
        if let Some(lease) = &self.lease {
            lease.extend();
        }
    }

    /// Whether the caller gave up, or is gone. Who sent a guaranteed message never does.
    pub fn is_cancelled(&self) -> bool {
        self.handle.is_cancelled()
    }

    /// Waits until the caller gives up or is gone. A handler that ignores it runs to its end;
    /// its reply is then dropped.
    pub async fn cancelled(&self) {
        self.handle.cancelled().await;
    }
}

type HandlerFuture = Pin<Box<dyn Future<Output = Result<Body, HandlerError>> + Send>>;
pub(crate) type Handler = dyn Fn(Call) -> HandlerFuture + Send + Sync;

/// Wraps a user's handler.
pub(crate) fn boxed<F, R, B>(handler: F) -> Arc<Handler>
where
    F: Fn(Call) -> R + Send + Sync + 'static,
    R: Future<Output = Result<B, HandlerError>> + Send + 'static,
    B: Into<Body>,
{
    Arc::new(move |call| {
        let running = handler(call);
        Box::pin(async move { running.await.map(Into::into) })
    })
}
