//! Handlers, their calls, replies and errors.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::iter::successors;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::lease::Lease;
use super::runner::CallHandle;
use crate::message::{Body, DecodeError, EncodeError, Extra, Message};
use crate::text::Line;

/// The error with which a handler declined a call. Its code and text reach the caller.
///
/// `?` converts an error of your own, if you implement `From` for it. Any other error is converted
/// by [`HandlerError::from_error`]:
///
/// ```
/// use peerbus::{Call, HandlerError};
///
/// enum OrderError {
///     SoldOut,
///     Closed,
/// }
///
/// impl From<OrderError> for HandlerError {
///     fn from(error: OrderError) -> Self {
///         match error {
///             OrderError::SoldOut => Self::new("sold_out", "no apples are left"),
///             OrderError::Closed => Self::reject("closed", "the shop is closed for good"),
///         }
///     }
/// }
///
/// fn take(count: u32) -> Result<u32, OrderError> {
///     # let (open, left) = (true, 17_u32);
///     match open {
///         true => left.checked_sub(count).ok_or(OrderError::SoldOut),
///         false => Err(OrderError::Closed),
///     }
/// }
///
/// async fn order(call: Call) -> Result<String, HandlerError> {
///     let count = call.message.text().parse().map_err(HandlerError::from_error)?;
///     let left = take(count)?;
///     Ok(left.to_string())
/// }
/// ```
///
/// This crate itself uses these codes: `error`, `decode` and `encode` in the conversions below;
/// `panic` if the handler panicked; `lease` if it took longer than
/// [`Config::lease`](crate::Config::lease); `too_large` if its reply is over a limit; and, if no
/// handler ran, a [`DropReason`](crate::DropReason) such as `no_service`, `not_allowed` or
/// `expired`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerError {
    /// A short name for programs, such as `not_found`.
    pub code: String,
    /// A text for people.
    pub text: String,
    /// A retry is of no use.
    pub(super) rejects: bool,
}

impl HandlerError {
    /// Creates an error with a code for programs and a text for people.
    pub fn new(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self { code: code.into(), text: text.into(), rejects: false }
    }

    /// Creates a permanent error: a guaranteed message becomes a dead letter at once, without
    /// retries. For any other call, equivalent to [`HandlerError::new`].
    pub fn reject(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self { rejects: true, ..Self::new(code, text) }
    }

    /// Converts any error, with the code `error`. The text joins those of the error and of its
    /// sources: `a: b: c`. A guaranteed message is retried.
    ///
    /// Pass a boxed error, or one of `anyhow`, by reference:
    /// `.map_err(|error| HandlerError::from_error(&*error))`.
    pub fn from_error(error: impl Error) -> Self {
        Self::new("error", with_sources(&error))
    }
}

/// Formats an error and its sources in one line. A source that an error includes is not repeated.
fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    for source in successors(error.source(), |source| (**source).source()) {
        let source = source.to_string();
        if !text.ends_with(&source) {
            text.push_str(": ");
            text.push_str(&source);
        }
    }
    text
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Line(&self.code), Line(&self.text))
    }
}

impl Error for HandlerError {}

/// The code is `decode`, and the text is the error's. A guaranteed message is rejected permanently,
/// since its body would be the same in a retry.
impl From<DecodeError> for HandlerError {
    fn from(error: DecodeError) -> Self {
        Self::reject("decode", with_sources(&error))
    }
}

/// The code is `encode`, and the text is the error's. A guaranteed message is retried.
impl From<EncodeError> for HandlerError {
    fn from(error: EncodeError) -> Self {
        Self::new("encode", with_sources(&error))
    }
}

/// A handler's reply: a body, and optionally a content type and headers. A handler that needs only
/// a body returns that, as any type that converts into a [`Body`].
///
/// Headers and content type take at most 64 KiB together. Only the reply to a request is sent; the
/// reply to a one-way or guaranteed message is dropped.
///
/// ```
/// use peerbus::{Call, HandlerError, Reply};
///
/// async fn menu(_: Call) -> Result<Reply, HandlerError> {
///     Ok(Reply::new("[\"apples\"]").content_type("application/json").header("version", "3"))
/// }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    pub(super) body: Body,
    pub(super) extra: Option<Box<Extra>>,
}

impl Reply {
    /// Creates a reply with a body only. Its content type is that of the body: none, or the one set
    /// by [`Body::encode`].
    pub fn new(body: impl Into<Body>) -> Self {
        Self { body: body.into(), extra: None }
    }

    /// Copies a received reply, to pass it on.
    pub(crate) fn copy_of(message: Message) -> Self {
        Self { body: message.body.into(), extra: message.header.extra }
    }

    /// Sets the body's media type, in place of its own.
    pub fn content_type(mut self, media_type: impl Into<String>) -> Self {
        self.extra().content_type = Some(media_type.into());
        self
    }

    /// Adds a user header.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.extra().headers.push((name.into(), value.into()));
        self
    }

    fn extra(&mut self) -> &mut Extra {
        self.extra.get_or_insert_default()
    }

    /// Returns the parts that are sent.
    pub(super) fn into_parts(mut self) -> (Bytes, Option<Box<Extra>>) {
        if let Some(media_type) = self.body.content_type {
            self.extra().content_type.get_or_insert_with(|| media_type.to_owned());
        }
        (self.body.bytes, self.extra)
    }
}

impl<B: Into<Body>> From<B> for Reply {
    fn from(body: B) -> Self {
        Self::new(body)
    }
}

/// A call, as its handler receives it: the message, its deadline and its cancellation.
#[derive(Debug)]
pub struct Call {
    /// The message.
    pub message: Message,
    pub(super) handle: Arc<CallHandle>,
    pub(super) deadline: Option<Instant>,
    pub(super) lease: Option<Arc<Lease>>,
}

impl Call {
    /// Returns true if the caller waits for a reply.
    pub fn wants_reply(&self) -> bool {
        self.message.wants_reply
    }

    /// Returns the time until the call's deadline; `None` if the caller set none.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Renews the lease of a guaranteed message's handler, from now: 30 s by default
    /// ([`Config::lease`](crate::Config::lease)). When a lease ends, the handler is ended, and the
    /// message is delivered again. Other calls have no lease.
    pub fn extend(&self) {
        if let Some(lease) = &self.lease {
            lease.extend();
        }
    }

    /// Returns true if the caller gave up or is gone. Never true for a guaranteed message.
    pub fn is_cancelled(&self) -> bool {
        self.handle.is_cancelled()
    }

    /// Waits until the caller gives up or is gone. A handler that ignores this runs to its end, and
    /// its reply is dropped.
    pub async fn cancelled(&self) {
        self.handle.cancelled().await;
    }
}

type HandlerFuture = Pin<Box<dyn Future<Output = Result<Reply, HandlerError>> + Send>>;
pub(crate) type Handler = dyn Fn(Call) -> HandlerFuture + Send + Sync;

/// Wraps a user's handler.
pub(crate) fn boxed<F, R, B>(handler: F) -> Arc<Handler>
where
    F: Fn(Call) -> R + Send + Sync + 'static,
    R: Future<Output = Result<B, HandlerError>> + Send + 'static,
    B: Into<Reply>,
{
    Arc::new(move |call| {
        let running = handler(call);
        Box::pin(async move { running.await.map(Into::into) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layer(text: &'static str, source: Option<Layer>) -> Layer {
        Layer { text, source: source.map(Box::new) }
    }

    #[test]
    fn an_error_is_told_with_all_its_sources_and_nothing_twice() {
        let error = layer("a", Some(layer("b", Some(layer("c", None)))));
        let told = HandlerError::from_error(&error);
        assert_eq!((told.code.as_str(), told.text.as_str()), ("error", "a: b: c"));
        let error = layer("a: b", Some(layer("b", None)));
        assert_eq!(HandlerError::from_error(&error).text, "a: b");
        let boxed: Box<dyn Error + Send + Sync> = Box::new(error);
        assert_eq!(HandlerError::from_error(&*boxed).text, "a: b");
    }
}
