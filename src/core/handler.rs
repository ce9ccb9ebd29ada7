//! What a service's user writes: handlers, what they are given, reply, and how they decline.

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

/// Why a handler declined a call. Its code and text reach the caller.
///
/// `?` takes an error of your own, if that says which code it has. Any other one crosses by
/// [`HandlerError::from_error`]:
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
/// These codes come from this crate: `error`, `decode` and `encode` by the conversions below;
/// `panic` if the handler panicked; `lease` if it took longer than
/// [`Config::lease`](crate::Config::lease); `too_large` if its reply is over a limit; and, if no
/// handler ran, a [`DropReason`](crate::DropReason) such as `no_service`, `not_allowed` or `expired`.
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

    /// Any error, with the code `error`. The text is the error's own and those of its sources:
    /// `a: b: c`. A guaranteed message is tried again.
    ///
    /// A boxed error, or one of `anyhow`, is passed by reference:
    /// `.map_err(|error| HandlerError::from_error(&*error))`.
    pub fn from_error(error: impl Error) -> Self {
        Self::new("error", with_sources(&error))
    }
}

/// An error and its sources in one line. Some say their source themselves; nothing is said twice.
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
        write!(f, "{}: {}", self.code, self.text)
    }
}

impl Error for HandlerError {}

/// The code is `decode`, and the text says why. A guaranteed message is rejected for good: its body
/// will be no different the next time.
impl From<DecodeError> for HandlerError {
    fn from(error: DecodeError) -> Self {
        Self::reject("decode", with_sources(&error))
    }
}

/// The code is `encode`, and the text says why. A guaranteed message is tried again.
impl From<EncodeError> for HandlerError {
    fn from(error: EncodeError) -> Self {
        Self::new("encode", with_sources(&error))
    }
}

/// A handler's reply: a body, and what is to be said of it. A handler that has nothing to say of its
/// body returns just that, as anything that a [`Body`] is made from.
///
/// Headers and content type have 64 KiB together. Only the reply to a request goes anywhere; of a
/// one-way or guaranteed message it is dropped.
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
    /// A reply with nothing but a body, whose content type is that of the body: none, or the one
    /// that [`Body::encode`] names.
    pub fn new(body: impl Into<Body>) -> Self {
        Self { body: body.into(), extra: None }
    }

    /// A reply that was received, to be passed on.
    pub(crate) fn copy_of(message: Message) -> Self {
        Self { body: message.body.into(), extra: message.header.extra }
    }

    /// Names the body's media type, in place of the one that it has.
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

    /// What is sent of it.
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
