//! What happens to a node, as a stream.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use futures_util::StreamExt;
use futures_util::stream::unfold;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::address::ServiceName;
use crate::engine::delivery::DeadLetterReason;
use crate::engine::{DownReason, MeshEvent};
use crate::identity::NodeId;
use crate::opaque::opaque;
use crate::peer::{Address, PeerInfo};
use crate::report::DropReason;
use crate::trust::Action;

/// Something that a user or an operator may want to know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A peer can be talked to.
    PeerUp(Box<PeerInfo>),
    /// A peer can no longer be talked to.
    PeerDown {
        /// Who it was.
        id: NodeId,
        /// Its human name.
        name: String,
        /// Why.
        reason: DownCause,
    },
    /// Messages of ours were dropped. Drops for one peer and reason within 100 ms are told
    /// together.
    Dropped {
        /// For whom they were; this node's own id, if it is a subscription or service here.
        peer: NodeId,
        /// Why.
        reason: DropReason,
        /// How many.
        count: u64,
    },
    /// Messages with an ordering key went to another instance of their service than those before
    /// them, because one came or went; so what was sent before may still be handled there. Moves
    /// within 100 ms are told together.
    KeysMoved {
        /// The service.
        service: ServiceName,
        /// Who took the keys' messages until then.
        from: NodeId,
        /// Who takes them now.
        to: NodeId,
        /// How many keys moved.
        count: u64,
    },
    /// A guaranteed message won't be sent again by itself: it waits in the outbox.
    DeadLetter {
        /// Its number in the outbox.
        number: u64,
        /// Why.
        reason: DeadLetterReason,
    },
    /// A peer has lost the store of its inbox: what it had processed, it may process again.
    InboxLost {
        /// Who.
        peer: NodeId,
    },
    /// Guaranteed messages have waited for a peer for long
    /// ([`Config::gone_after`](crate::Config::gone_after)): it may be gone for good.
    PeerGone {
        /// Who.
        peer: NodeId,
        /// How many messages wait for it.
        messages: u64,
    },
    /// A peer's rules don't let this node do something: it won't send what this node subscribes
    /// to, or send to a service that this node offers.
    Denied {
        /// Whose rules.
        peer: NodeId,
        /// What.
        action: Action,
        /// With what: a pattern or a service.
        name: String,
    },
    /// A connection was refused or cut.
    Refused {
        /// Where it came from or led to.
        address: Option<Address>,
        /// Why.
        reason: String,
    },
    /// Another live node has this node's identity. The two will fight over every peer.
    IdentityConflict {
        /// Where it is.
        address: Option<Address>,
    },
}

/// Why a peer is down.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownCause {
    /// It said goodbye.
    Left,
    /// Its connection closed without a goodbye: it crashed, or the network did.
    Lost,
    /// Nothing was heard of it for too long.
    Silent,
    /// Another connection took the place of this one.
    Replaced,
    /// One side broke the protocol.
    Protocol(String),
    /// Its key is not trusted any more, or ours not by it.
    Distrusted,
    /// This node shuts down.
    ShutDownHere,
}

impl fmt::Display for DownCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("it said goodbye"),
            Self::Lost => f.write_str("its connection closed without a goodbye"),
            Self::Silent => f.write_str("nothing was heard of it for too long"),
            Self::Replaced => f.write_str("another connection took the place of this one"),
            Self::Protocol(text) => f.write_str(text),
            Self::Distrusted => f.write_str("a key is not trusted any more"),
            Self::ShutDownHere => f.write_str("this node shuts down"),
        }
    }
}

impl From<DownReason> for DownCause {
    fn from(reason: DownReason) -> Self {
        match reason {
            DownReason::Closed => Self::Lost,
            DownReason::Silent => Self::Silent,
            DownReason::Bye(crate::wire::Bye::Shutdown) => Self::Left,
            DownReason::Distrusted | DownReason::Bye(crate::wire::Bye::Distrusted) => {
                Self::Distrusted
            }
            DownReason::Replaced => Self::Replaced,
            DownReason::ShutDownHere => Self::ShutDownHere,
            reason @ (DownReason::Bye(_) | DownReason::Refused(_) | DownReason::Violation(_)) => {
                Self::Protocol(reason.to_string())
            }
        }
    }
}

impl From<MeshEvent> for Event {
    fn from(event: MeshEvent) -> Self {
        match event {
            MeshEvent::PeerUp(info) => Self::PeerUp(info),
            MeshEvent::PeerDown { id, name, reason } => {
                Self::PeerDown { id, name, reason: reason.into() }
            }
            MeshEvent::Denied { id, action, name } => Self::Denied { peer: id, action, name },
            MeshEvent::Refused { address, reason } => Self::Refused { address, reason },
            MeshEvent::IdentityConflict { address } => Self::IdentityConflict { address },
        }
    }
}

/// The events of a node, from [`Node::events`](crate::Node::events), as a [`Stream`] that ends when
/// the node is gone.
///
/// Up to 1,024 wait; who is slower than that misses the oldest, and [`Events::missed`] counts
/// them.
pub struct Events {
    /// Each event, or how many were missed before the next.
    received: Pin<Box<dyn Stream<Item = Result<Event, u64>> + Send + Sync>>,
    missed: u64,
}

impl Events {
    pub(crate) fn new(receiver: broadcast::Receiver<Event>) -> Self {
        let received = unfold(receiver, async |mut receiver| {
            let next = match receiver.recv().await {
                Ok(event) => Ok(event),
                Err(RecvError::Lagged(missed)) => Err(missed),
                Err(RecvError::Closed) => return None,
            };
            Some((next, receiver))
        });
        Self { received: Box::pin(received.fuse()), missed: 0 }
    }

    /// The next event; `None` when the node is gone.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll(context)).await
    }

    /// How many events were missed for being slow.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            match ready!(self.received.as_mut().poll_next(context)) {
                Some(Ok(event)) => return Poll::Ready(Some(event)),
                Some(Err(missed)) => self.missed += missed,
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll(context)
    }
}

opaque!(Events, |it| missed: it.missed);

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn it_is_a_stream_that_counts_what_it_misses_and_then_ends() {
        let (told, receiver) = broadcast::channel(2);
        let mut events = Events::new(receiver);
        assert!(events.recv().now_or_never().is_none(), "nothing has happened yet");
        for number in 0..5 {
            told.send(Event::DeadLetter { number, reason: DeadLetterReason::TooLarge }).unwrap();
        }
        drop(told);
        let mut heard = Vec::new();
        while let Some(Event::DeadLetter { number, .. }) = events.next().await {
            heard.push(number);
        }
        assert_eq!((heard, events.missed()), (vec![3, 4], 3));
        assert!(events.recv().await.is_none(), "and stays at its end");
    }
}
