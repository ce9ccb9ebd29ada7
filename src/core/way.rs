//! Ways: the other ends of messages' paths, as the core reaches them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::address::{Destination, Topic};
use crate::engine::{Backlog, Path, Settlement};
use crate::identity::NodeId;
use crate::message::{Header, Kind, MessageId};
use crate::report::DropReason;
use crate::wire::{Envelope, Lane, OutgoingEvent, Payload, Totals};

/// A link to a peer, the connection to a broker, or this node itself.
///
/// None of these methods waits, and all may be called under a lock of this crate.
pub(crate) trait Way: Send + Sync {
    fn path(&self) -> Path;

    /// The node at the other end; [`NodeId::BROKER`] for a broker.
    fn node(&self) -> NodeId;

    /// Queues a call or a request.
    ///
    /// # Errors
    /// The reason for which the call is dropped. The drop is not counted yet.
    fn send(&self, call: Envelope) -> Result<(), DropReason>;

    /// Queues an event.
    ///
    /// # Errors
    /// As for [`Way::send`].
    fn send_event(&self, event: &Publication<'_>) -> Result<Backlog, DropReason>;

    /// Queues an event as soon as there is room for it, up to a deadline.
    fn send_event_within<'a>(
        &'a self,
        event: &'a Publication<'_>,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Backlog, DropReason>>;

    /// Takes a request back: out of the queue, or by notifying the node that handles it.
    fn take_back(&self, id: MessageId);

    /// Gives back the hold of received messages.
    fn give_back(&self, lane: Lane, held: Totals);

    /// Gives back a call's hold and queues its reply, together.
    ///
    /// # Errors
    /// As for [`Way::send`].
    fn answer(&self, lane: Lane, held: Totals, reply: Envelope) -> Result<(), DropReason>;

    /// Reports to the sender that received messages were dropped.
    fn report_drop(&self, reason: DropReason, count: u64);
}

/// A notice owed to the keeper of a message when the message ends.
pub(crate) enum Ticket {
    /// The keeper of a guaranteed message, with which it is settled.
    Kept(Arc<dyn Settle>),
    /// Notifies the broker, by its drop, of a call's end.
    Call(#[expect(dead_code, reason = "its drop is the notice")] oneshot::Sender<()>),
}

/// Settles guaranteed messages.
pub(crate) trait Settle: Send + Sync {
    fn settle(self: Arc<Self>, settlement: Settlement);
}

/// The part of its path that a received message holds, such as a link's credit. Dropping the hold
/// gives it back.
pub(crate) struct Hold {
    way: Arc<dyn Way>,
    lane: Lane,
    held: Totals,
    ticket: Option<Ticket>,
}

impl Hold {
    pub(crate) fn new(way: Arc<dyn Way>, lane: Lane, held: Totals) -> Self {
        Self { way, lane, held, ticket: None }
    }

    /// Creates the hold of a message that no credit bounds.
    pub(crate) fn unbounded(way: Arc<dyn Way>) -> Self {
        Self::new(way, Lane::Calls, Totals::default())
    }

    pub(crate) fn with_ticket(mut self, ticket: Option<Ticket>) -> Self {
        self.ticket = ticket;
        self
    }

    pub(crate) fn way(&self) -> &Arc<dyn Way> {
        &self.way
    }

    pub(crate) fn path(&self) -> Path {
        self.way.path()
    }

    /// Gives the hold back and sends the reply, in one batch.
    pub(crate) fn answer(mut self, reply: Envelope) -> Result<(), DropReason> {
        let held = std::mem::take(&mut self.held);
        self.way.answer(self.lane, held, reply)
    }

    /// Gives the hold back and settles a guaranteed message.
    pub(crate) fn settle(mut self, settlement: Settlement) {
        let ticket = self.ticket.take();
        drop(self);
        if let Some(Ticket::Kept(keeper)) = ticket {
            keeper.settle(settlement);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // `answer` leaves nothing to give back.
        if self.held.messages > 0 {
            self.way.give_back(self.lane, self.held);
        }
    }
}

/// An event of this node that is sent to several others.
pub(crate) struct Publication<'a> {
    pub(crate) topic: &'a Topic,
    pub(crate) id: MessageId,
    /// `None` if it would hold only the id and the topic.
    pub(crate) header: Option<&'a Header>,
    pub(crate) body: &'a Bytes,
    /// Encoded once for all links.
    pub(crate) encoded: OutgoingEvent<'a>,
}

impl Publication<'_> {
    /// Returns the event as a message of its own.
    pub(crate) fn envelope(&self) -> Envelope {
        let plain = || Header::new(self.id, Kind::Event, Destination::Topic(self.topic.clone()));
        let header = self.header.cloned().unwrap_or_else(plain);
        Envelope { header, payload: Payload::Event(self.body.clone()) }
    }
}
