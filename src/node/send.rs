//! One-way messages: to one of the nodes that serve a name, or to one node.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::Inner;
use super::draft::{Draft, message_setters};
use super::guaranteed::Guaranteed;
use crate::address::{AddressError, Recipient};
use crate::carrier::Unsupported;
use crate::core::{RUNTIME_ENDED_TEXT, Stopped};
use crate::identity::NodeId;
use crate::message::{BodyError, Kind, MessageId};
use crate::opaque::opaque;
use crate::report::DropReason;

/// A one-way message that can't be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The service's name can't be parsed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The message is too large.
    #[error(transparent)]
    TooLarge(#[from] BodyError),
    /// No node takes messages for the recipient. Retry when it is back.
    #[error("no node serves {0}")]
    NoService(Recipient),
    /// The broker does not support it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The message can't be queued for the recipient now.
    #[error("the message was dropped: {0}")]
    Dropped(DropReason),
    /// The node is shutting down.
    #[error("the node is shutting down")]
    ShutDown,
    /// The runtime in which the node was started has ended, and the node with it.
    #[error("{RUNTIME_ENDED_TEXT}")]
    RuntimeEnded,
}

impl From<Stopped> for SendError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::ShutDown => Self::ShutDown,
            Stopped::RuntimeEnded => Self::RuntimeEnded,
        }
    }
}

/// A one-way message that was queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sent {
    /// The message's id.
    pub id: MessageId,
    /// The chosen node; [`NodeId::BROKER`] if a broker chooses.
    pub to: NodeId,
}

/// A one-way message that is sent when this is awaited.
#[must_use = "a message is sent when this is awaited"]
pub struct Send<'a> {
    node: &'a Arc<Inner>,
    recipient: Result<Recipient, AddressError>,
    draft: Draft,
}

opaque!(Send<'_>, |it| recipient: it.recipient);

impl<'a> Send<'a> {
    pub(crate) fn new(
        node: &'a Arc<Inner>,
        recipient: Result<Recipient, AddressError>,
        draft: Draft,
    ) -> Self {
        Self { node, recipient, draft }
    }

    message_setters!();

    /// Sets the time for which the message is worth handling. If it is older when its turn comes,
    /// the receiver drops it, and it is counted here.
    pub fn time_to_live(mut self, ttl: Duration) -> Self {
        self.draft.rare().ttl = Some(ttl);
        self
    }

    /// Sets the node to which an answer should be sent. The answer is a separate message, sent
    /// there by the receiver's handler.
    pub fn reply_to(mut self, node: NodeId) -> Self {
        self.draft.rare().reply_to = Some(node);
        self
    }

    /// Sets the id of the message that this one answers.
    pub fn correlation_id(mut self, id: MessageId) -> Self {
        self.draft.rare().correlation_id = Some(id);
        self
    }

    /// Stores the message here until its receiver has processed it: see [`Guaranteed`]. A message
    /// to a service without instances is queued until there is one.
    pub fn guaranteed(self) -> Guaranteed<'a> {
        let destination = self.recipient.map(Into::into);
        Guaranteed::new(self.node, destination, self.draft)
    }

    async fn run(mut self) -> Result<Sent, SendError> {
        let recipient = self.recipient?;
        let (node, core) = (self.node, &self.node.core);
        self.draft.check(&core.config)?;
        core.check_running()?;
        node.check_key(self.draft.ordering_key())?;
        let way = node.find(&recipient, self.draft.ordering_key()).await;
        let way = way.ok_or_else(|| SendError::NoService(recipient.clone()))?;
        let id = self.draft.id(&core.ids);
        let header = self.draft.header(id, Kind::Command, recipient.into());
        node.hand_over(&way, header, self.draft.body, false).map_err(SendError::Dropped)?;
        Ok(Sent { id, to: way.node() })
    }
}

impl<'a> IntoFuture for Send<'a> {
    type Output = Result<Sent, SendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + std::marker::Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}
