//! Requests: calls whose caller waits for the reply.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Inner;
use super::draft::{Draft, message_setters};
use crate::address::{AddressError, Recipient};
use crate::carrier::Unsupported;
use crate::core::{Core, HandlerError, RUNTIME_ENDED_TEXT, Stopped, add};
use crate::engine::RequestOutcome;
use crate::message::{BodyError, Kind, Message, MessageId};
use crate::opaque::opaque;
use crate::report::DropReason;

/// The time after its deadline at which a request ends in any case.
const OVERDUE: Duration = Duration::from_secs(1);

/// A request that got no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The service's name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The request is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// No node takes messages for the recipient.
    #[error("no node serves {0}")]
    NoService(Recipient),
    /// The broker does not support it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The request could not be queued; it was not executed.
    #[error("the request was dropped: {0}")]
    Dropped(DropReason),
    /// The handler declined, with its own code and text.
    #[error("the handler declined: {0}")]
    Handler(HandlerError),
    /// No reply arrived in time. The request may or may not have been executed.
    #[error("no reply within {0:?}")]
    DeadlineExceeded(Duration),
    /// The chosen node was lost. The request is not retried elsewhere automatically: that is the
    /// caller's choice.
    #[error("the peer was lost{}", if *.maybe_executed { "; the request may have been executed" } else { " before the request was sent" })]
    PeerLost {
        /// True if the request may have been executed.
        maybe_executed: bool,
    },
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}

impl From<Stopped> for RequestError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::ShutDown => Self::ShutDown,
            Stopped::RuntimeEnded => Self::RuntimeEnded,
        }
    }
}

/// A request that is sent when this is awaited. Dropping the future takes the request back: out of
/// the queue, or by notifying its handler that it is cancelled.
#[must_use = "a request is sent when this is awaited"]
pub struct Request<'a> {
    node: &'a Arc<Inner>,
    recipient: Result<Recipient, AddressError>,
    draft: Draft,
    deadline: Duration,
}

opaque!(Request<'_>, |it| recipient: it.recipient, deadline: it.deadline);

impl<'a> Request<'a> {
    pub(crate) fn new(
        node: &'a Arc<Inner>,
        recipient: Result<Recipient, AddressError>,
        draft: Draft,
    ) -> Self {
        Self { node, recipient, draft, deadline: node.core.config.request_deadline }
    }

    message_setters!();

    /// Sets the time to wait for the reply: 10 s by default
    /// ([`Config::request_deadline`](crate::Config::request_deadline)). The time spent waiting for
    /// an instance of the service counts.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    async fn run(mut self) -> Result<Message, RequestError> {
        let recipient = self.recipient?;
        let (node, core) = (self.node, &self.node.core);
        self.draft.check(&core.config)?;
        core.check_running()?;
        node.check_key(self.draft.ordering_key())?;
        let begun = core.now();
        let found = node.find(&recipient, self.draft.ordering_key());
        let way = timeout(self.deadline, found).await.ok().flatten();
        let way = way.ok_or_else(|| RequestError::NoService(recipient.clone()))?;
        let id = core.ids.next_now();
        let mut header = self.draft.header(id, Kind::Command, recipient.clone().into());
        header.reply_to = Some(core.id);
        header.time_to_live = Some(self.deadline.saturating_sub(core.now().since(begun)));
        let (waiter, outcome) = oneshot::channel();
        core.open_request(id, begun + self.deadline, &way, waiter);
        let mut pending = Pending { core, id, ended: false };
        add(&core.reporter.counters.requests, 1);
        if let Err(reason) = node.hand_over(&way, header, self.draft.body, true) {
            pending.ended = core.with_front(|front, _| front.close_request(id));
            return Err(match reason {
                DropReason::LinkLost => RequestError::PeerLost { maybe_executed: false },
                reason => RequestError::Dropped(reason),
            });
        }
        // The node's own tasks keep the deadline, unless nobody runs the runtime they are in.
        let Ok(outcome) = timeout(self.deadline.saturating_add(OVERDUE), outcome).await else {
            return Err(RequestError::DeadlineExceeded(self.deadline));
        };
        pending.ended = true;
        match outcome {
            Ok(RequestOutcome::Reply(message)) => Ok(*message),
            Ok(RequestOutcome::Failed(failure)) => {
                Err(RequestError::Handler(HandlerError::new(failure.code, failure.text)))
            }
            Ok(RequestOutcome::Unrouted) => Err(RequestError::NoService(recipient)),
            Ok(RequestOutcome::DeadlineExceeded) => {
                Err(RequestError::DeadlineExceeded(self.deadline))
            }
            Ok(RequestOutcome::PeerLost { maybe_executed }) => {
                Err(RequestError::PeerLost { maybe_executed })
            }
            Ok(RequestOutcome::ShutDown) | Err(_) => {
                Err(core.check_running().err().unwrap_or(Stopped::ShutDown).into())
            }
        }
    }
}

impl<'a> IntoFuture for Request<'a> {
    type Output = Result<Message, RequestError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + std::marker::Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

/// Takes a request back when its future is dropped.
struct Pending<'a> {
    core: &'a Arc<Core>,
    id: MessageId,
    ended: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.core.with_front(|front, _| front.handle_abandoned(self.id));
        }
    }
}
