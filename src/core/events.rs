//! The events of a node, as a stream.

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
use crate::engine::delivery::{DeadLetterReason, Lapse};
use crate::engine::{DownReason, MeshEvent};
use crate::identity::NodeId;
use crate::opaque::opaque;
use crate::peer::{Address, PeerInfo};
use crate::report::DropReason;
use crate::trust::Action;

/// An event that may concern a user or an operator.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A peer is linked.
    PeerUp(Box<PeerInfo>),
    /// A peer is no longer linked.
    PeerDown {
        /// The peer's id.
        id: NodeId,
        /// The peer's human name.
        name: String,
        /// The reason.
        reason: DownCause,
    },
    /// Messages of this node were dropped. Drops for one peer and reason within 100 ms are
    /// reported together.
    Dropped {
        /// The receiver of the messages; this node's own id for a subscription or service here.
        peer: NodeId,
        /// The reason.
        reason: DropReason,
        /// The number of messages.
        count: u64,
    },
    /// Messages with an ordering key went to another instance of their service than earlier ones,
    /// because an instance came or went. The earlier instance may still be handling messages with
    /// that key. Moves within 100 ms are reported together.
    KeysMoved {
        /// The service.
        service: ServiceName,
        /// The instance that took the keys' messages until then.
        from: NodeId,
        /// The instance that takes them now.
        to: NodeId,
        /// The number of moved keys.
        count: u64,
    },
    /// A guaranteed message became a dead letter: it stays in the outbox, and is not sent again by
    /// itself.
    DeadLetter {
        /// The message's number in the outbox.
        number: u64,
        /// The reason.
        reason: DeadLetterReason,
    },
    /// A peer lost the store of its inbox: it may process messages again.
    InboxLost {
        /// The peer.
        peer: NodeId,
    },
    /// A peer has processed messages of a later state of this node's outbox: the outbox was restored
    /// from an older copy, or it runs in two places. The messages stored so far may be processed
    /// there again, with [`is_redelivered`](crate::Message::is_redelivered).
    OutboxIsOlder {
        /// The peer.
        peer: NodeId,
    },
    /// This node's outbox ended a durable subscription of a peer, and dropped the messages that it
    /// kept for it.
    SubscriptionLapsed {
        /// The peer.
        peer: NodeId,
        /// The name of the subscription.
        name: ServiceName,
        /// The reason.
        reason: Lapse,
        /// The number of dropped messages.
        messages: u64,
    },
    /// This node's inbox is full. It forgot senders, whose duplicates may run again, with
    /// [`is_redelivered`](crate::Message::is_redelivered); or it refused messages, which are
    /// retried. Reported at most once a second.
    InboxFull {
        /// The last sender for which there was no room.
        newcomer: NodeId,
        /// The number of forgotten senders.
        forgotten: u64,
        /// The number of refused messages.
        refused: u64,
    },
    /// Guaranteed messages have been queued for an absent peer for longer than
    /// [`Config::gone_after`](crate::Config::gone_after): it may be gone permanently.
    PeerGone {
        /// The peer.
        peer: NodeId,
        /// The number of messages queued for it.
        messages: u64,
    },
    /// A peer's rules deny an action of this node: the peer sends no events to a subscription of
    /// this node, or no messages to a service of this node.
    Denied {
        /// The peer with the rules.
        peer: NodeId,
        /// The denied action.
        action: Action,
        /// The pattern or the service.
        name: String,
        /// The number of denials since the last such event. At most 16 names are reported in a
        /// second; further ones share an event.
        count: u64,
    },
    /// Connections were refused or cut. Those from one address for one reason are reported
    /// together, once a second; beyond 16 such groups a second, further ones share an event.
    Refused {
        /// The remote address of the first, if known.
        address: Option<Address>,
        /// The reason.
        reason: String,
        /// The number of connections.
        count: u64,
    },
    /// This node did not run: a handler blocked all threads of its runtime, or the process or the
    /// machine was stopped or asleep. Peers may have dropped it meanwhile; it doesn't count the time
    /// against them.
    Paused {
        /// The time for which it did not run, at least 1 s.
        duration: std::time::Duration,
    },
    /// Another live node has this node's identity. The two compete for every peer.
    IdentityConflict {
        /// The other node's address, if known.
        address: Option<Address>,
    },
}

/// The reason for which a peer is down.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownCause {
    /// The peer said goodbye.
    Left,
    /// The connection closed without a goodbye: the peer crashed, or the network failed.
    Lost,
    /// The peer was silent for too long.
    Silent,
    /// Another connection replaced this one.
    Replaced,
    /// A side broke the protocol.
    Protocol(String),
    /// The peer's key is no longer trusted, or this node's key no longer by the peer.
    Distrusted,
    /// This node is shutting down.
    ShutDownHere,
}

impl fmt::Display for DownCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("the peer said goodbye"),
            Self::Lost => f.write_str("the connection closed without a goodbye"),
            Self::Silent => f.write_str("the peer was silent for too long"),
            Self::Replaced => f.write_str("another connection replaced this one"),
            Self::Protocol(text) => f.write_str(text),
            Self::Distrusted => f.write_str("a key is no longer trusted"),
            Self::ShutDownHere => f.write_str("this node is shutting down"),
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
            MeshEvent::Denied { id, action, name } => {
                Self::Denied { peer: id, action, name, count: 1 }
            }
            MeshEvent::Refused { address, reason } => Self::Refused { address, reason, count: 1 },
            MeshEvent::IdentityConflict { address } => Self::IdentityConflict { address },
        }
    }
}

/// The events of a node, from [`Node::events`](crate::Node::events), as a [`Stream`] that ends when
/// the node is gone.
///
/// Up to 1,024 events are queued. A slower reader misses the oldest, which [`Events::missed`]
/// counts.
pub struct Events {
    /// Each event, or the number of events missed before the next.
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

    /// Receives the next event; `None` when the node is gone.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll(context)).await
    }

    /// The number of events missed because this reader was too slow.
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
