//! The flow control of a link: queued messages, the peer's credit, and unconfirmed messages.
//!
//! ```text
//!  enqueue ─▶ [ queue of a lane ] ─ credit? ─▶ batch ─▶ sent ──▶ peer
//!                                                        │
//!  confirmed ◀── "consumed" in the preamble of each batch ◀─┘
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::address::Destination;
use crate::engine::{Queue, Share, Time};
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::wire::{
    BatchEncoder, Control, EncodedBatch, Envelope, EventPack, InboxInfo, LANES, Lane, Limits,
    MAX_BATCH, OutgoingEvent, Payload, Preamble, Totals,
};

/// The most batches that the transport may hold unencoded. Two keep it busy; more would only hide
/// queued messages from the accounting.
const MAX_IN_FLIGHT: u32 = 2;

/// The largest buffer kept for reuse, in bytes.
const MAX_SPARE: usize = MAX_BATCH;

/// The most bytes of control records queued for a peer that does not read: room for the patterns of
/// a large node and for the answers to a window of guaranteed messages.
const MAX_CONTROL: u64 = 8 << 20;

/// The bytes of a kept message besides those that its credit counts.
const MESSAGE_OVERHEAD: u64 = 512;

/// The silence after which a heartbeat is sent, and a peer becomes suspect or dead.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    pub(crate) heartbeat: Duration,
    pub(crate) suspect: Duration,
    pub(crate) dead: Duration,
}

/// The state of a peer, judged by its silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Liveness {
    Alive,
    Suspect,
    Dead,
}

/// A violation of flow control by the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("credit was taken back, or more was confirmed than sent")]
    Credit,
    #[error("more was sent than the credit allows")]
    Overrun,
    #[error("reported drops were taken back")]
    Drops,
    #[error("it takes more than its share of this node's memory")]
    Share,
}

/// The messages lost with a link.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkLoss {
    /// Messages never passed to the transport: these are dropped.
    pub(crate) unsent: u64,
    /// The calls among them, whose callers can be notified that nothing was executed.
    pub(crate) unsent_calls: Vec<MessageId>,
    /// Messages sent but not confirmed: in doubt.
    pub(crate) in_doubt: u64,
}

/// The sent and confirmed totals of a lane, and the peer's window.
#[derive(Debug, Default)]
struct Sent {
    sent: Totals,
    confirmed: Totals,
    /// The most unconfirmed bytes that the peer accepts.
    window: u64,
}

impl Sent {
    /// Returns the number of bytes that the peer accepts now.
    fn room(&self) -> u64 {
        self.window - (self.sent.bytes - self.confirmed.bytes).min(self.window)
    }
}

/// The growth of the event backlog by an event. If it grew by a whole batch, the publisher should
/// yield.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Backlog {
    #[default]
    Same,
    Grew,
}

/// Queued events. They are encoded on arrival, as none is taken back, so that a pack is a batch as
/// soon as the link is free.
#[derive(Debug)]
struct EventQueue {
    packs: VecDeque<EventPack>,
    queued: Totals,
    limit: u64,
    /// The most cost of a pack, so that the peer can have credit for all of it.
    pack_limit: u64,
    /// The buffer of a batch that the transport has finished with.
    spare: Option<Vec<u8>>,
}

impl EventQueue {
    fn push(&mut self, event: &OutgoingEvent<'_>) -> Result<Backlog, DropReason> {
        if self.queued.messages > 0 && self.queued.bytes + event.cost() > self.limit {
            return Err(DropReason::SlowPeer);
        }
        self.queued += Totals::one(event.cost());
        match self.packs.back_mut() {
            Some(pack) if pack.has_room_for(event, self.pack_limit) => {
                pack.push(event);
                Ok(Backlog::Same)
            }
            before => {
                let grew = before.is_some();
                let mut pack = EventPack::reusing(self.spare.take().unwrap_or_default());
                pack.push(event);
                self.packs.push_back(pack);
                Ok(if grew { Backlog::Grew } else { Backlog::Same })
            }
        }
    }

    fn pop(&mut self) -> Option<EventPack> {
        let pack = self.packs.pop_front()?;
        self.queued.messages -= pack.totals().messages;
        self.queued.bytes -= pack.totals().bytes;
        Some(pack)
    }
}

#[derive(Debug, Default)]
struct Incoming {
    received: Totals,
    consumed: Totals,
    told: Totals,
    /// The most unconsumed bytes that this side accepts.
    window: u64,
}

/// An encoded control record.
#[derive(Debug)]
struct ControlRecord {
    bytes: Box<[u8]>,
    /// The record is a hello, which a batch ends with.
    greets: bool,
}

/// The flow control of one link. Pure.
#[derive(Debug)]
pub(crate) struct Flow {
    me: NodeId,
    outgoing: [Sent; LANES],
    events: EventQueue,
    calls: Queue<Envelope>,
    replies: Queue<Envelope>,
    guaranteed: Queue<Envelope>,
    /// Guaranteed messages precede events in the next batch; the two alternate.
    guaranteed_first: bool,
    incoming: [Incoming; LANES],
    control: Queue<ControlRecord>,
    /// The nonce of the latest probe: one answer suffices for all.
    probed: Option<u64>,
    /// The latest list of durable subscriptions. It follows all queued records.
    inbox: Option<Box<InboxInfo>>,
    /// The queue of control records was full.
    overflowed: bool,
    in_flight: u32,
    peer_max_body: u64,
    /// A batch is worth sending even if empty: as a heartbeat, or for credit.
    batch_due: bool,
    dropped_here: BTreeMap<DropReason, u64>,
    dropped_here_unreported: bool,
    dropped_there: BTreeMap<DropReason, u64>,
    last_sent: Time,
    last_heard: Time,
    /// The bytes that the peer makes this node keep.
    share: Share,
    closed: bool,
}

impl Flow {
    /// Creates a flow that carries only control records until the peer's limits are known.
    pub(crate) fn new(
        now: Time,
        me: NodeId,
        ours: &Limits,
        queue_bytes: u64,
        share: Share,
    ) -> Self {
        let events = EventQueue {
            packs: VecDeque::new(),
            queued: Totals::default(),
            limit: queue_bytes,
            pack_limit: 0,
            spare: None,
        };
        let incoming = |window| Incoming { window, ..Incoming::default() };
        Self {
            me,
            outgoing: Default::default(),
            events,
            calls: Queue::new(queue_bytes),
            replies: Queue::new(queue_bytes),
            guaranteed: Queue::new(queue_bytes),
            guaranteed_first: false,
            incoming: ours.windows.map(incoming),
            control: Queue::new(MAX_CONTROL),
            probed: None,
            inbox: None,
            overflowed: false,
            in_flight: 0,
            peer_max_body: 0,
            batch_due: false,
            dropped_here: BTreeMap::new(),
            dropped_here_unreported: false,
            dropped_there: BTreeMap::new(),
            last_sent: now,
            last_heard: now,
            share,
            closed: false,
        }
    }

    /// Sets the peer's limits.
    pub(crate) fn handle_limits(&mut self, limits: &Limits) {
        self.peer_max_body = limits.max_body;
        for (lane, window) in self.outgoing.iter_mut().zip(limits.windows) {
            lane.window = window;
        }
        self.events.pack_limit = limits.windows[Lane::Events as usize] / 2;
    }

    /// Queues a message, or returns the reason for which it is dropped.
    pub(crate) fn enqueue(&mut self, envelope: Envelope) -> Result<(), DropReason> {
        if let (Payload::Event(body), Destination::Topic(topic)) =
            (&envelope.payload, &envelope.header.destination)
        {
            // Events are queued encoded.
            let me = self.me;
            let event = OutgoingEvent::new(&envelope.header, topic, body, &me);
            return self.enqueue_event(&event).map(drop);
        }
        let (lane, cost) = (envelope.lane(), envelope.cost());
        self.check(lane, envelope.body_len(), cost)?;
        let queue = match lane {
            Lane::Events => return Err(DropReason::Other),
            Lane::Calls => &mut self.calls,
            Lane::Replies => &mut self.replies,
            Lane::Guaranteed => &mut self.guaranteed,
        };
        queue.push(envelope, cost).map_err(|_| DropReason::SlowPeer)?;
        self.record_held();
        Ok(())
    }

    /// Queues an event, or returns the reason for which it is dropped.
    pub(crate) fn enqueue_event(
        &mut self,
        event: &OutgoingEvent<'_>,
    ) -> Result<Backlog, DropReason> {
        self.check(Lane::Events, event.body_len(), event.cost())?;
        let backlog = self.events.push(event)?;
        if backlog == Backlog::Grew {
            self.record_held();
        }
        Ok(backlog)
    }

    fn check(&self, lane: Lane, body_len: usize, cost: u64) -> Result<(), DropReason> {
        if self.closed {
            return Err(DropReason::LinkLost);
        }
        if body_len as u64 > self.peer_max_body || cost > self.outgoing[lane as usize].window {
            return Err(DropReason::TooLarge);
        }
        Ok(())
    }

    /// Queues a control record, encoded, so that its size is exact. A peer for which there is no
    /// room has overflowed: it causes records and reads none, and its link must end.
    pub(crate) fn enqueue_control(&mut self, control: &Control) {
        if self.closed || self.overflowed {
            return;
        }
        // One answer suffices for all probes.
        if let Control::ProbeReply(nonce) = control {
            self.probed = Some(*nonce);
            return;
        }
        if let Control::Inbox(info) = control {
            let mut info = info.clone();
            if let Some(before) = self.inbox.take() {
                info.supersede(*before);
            }
            self.inbox = Some(info);
            return;
        }
        let record = ControlRecord {
            bytes: control.encode().into_boxed_slice(),
            greets: matches!(control, Control::Hello(_)),
        };
        let cost = record.bytes.len() + size_of::<ControlRecord>();
        self.overflowed = self.control.push(record, cost as u64).is_err() || !self.record_held();
    }

    /// Returns true if the peer causes control records and does not read them.
    pub(crate) fn has_overflowed(&self) -> bool {
        self.overflowed
    }

    /// Removes a call that has not been passed to the transport yet.
    pub(crate) fn take_back(&mut self, id: MessageId) -> bool {
        self.calls.take(|call| call.header.id == id).is_some()
    }

    /// Returns the next batch for the transport; `None` if nothing can be sent now.
    pub(crate) fn poll_transmit(&mut self, now: Time) -> Option<EncodedBatch> {
        if !self.can_transmit() {
            return None;
        }
        let consumed = self.incoming.each_ref().map(|lane| lane.consumed);
        for (lane, consumed) in self.incoming.iter_mut().zip(consumed) {
            lane.told = consumed;
        }
        let mut batch = BatchEncoder::new(&self.me, Preamble { consumed });
        if std::mem::take(&mut self.dropped_here_unreported) {
            let counts = self.dropped_here.iter();
            let counts = counts.map(|(reason, count)| (reason.as_str().to_owned(), *count));
            batch.push_control(&Control::Dropped(counts.collect()));
        }
        if let Some(nonce) = self.probed.take() {
            batch.push_control(&Control::ProbeReply(nonce));
        }
        let mut greets = false;
        while !batch.is_full()
            && !greets
            && let Some(record) = self.control.pop()
        {
            greets = record.greets;
            batch.push_encoded(&record.bytes);
        }
        if !greets
            && self.control.len() == 0
            && let Some(inbox) = self.inbox.take()
        {
            batch.push_control(&Control::Inbox(inbox));
        }
        // A batch with a hello must be small, so nothing follows the hello.
        if !greets {
            // Replies first, as callers await them.
            let [_, calls, replies, guaranteed] = &mut self.outgoing;
            fill(&mut batch, &mut self.replies, replies);
            fill(&mut batch, &mut self.calls, calls);
            let guaranteed_first = self.guaranteed_first;
            if guaranteed_first {
                fill(&mut batch, &mut self.guaranteed, guaranteed);
            }
            if self.sendable_events().is_some_and(|pack| batch.has_room_for_events(pack))
                && let Some(pack) = self.events.pop()
            {
                self.outgoing[Lane::Events as usize].sent += pack.totals();
                batch.push_events(pack);
            }
            if !guaranteed_first {
                let lane = &mut self.outgoing[Lane::Guaranteed as usize];
                fill(&mut batch, &mut self.guaranteed, lane);
            }
            self.guaranteed_first = !guaranteed_first;
        }
        self.batch_due = false;
        self.last_sent = now;
        self.in_flight += 1;
        let batch = batch.finish();
        self.record_held();
        Some(batch)
    }

    /// Returns true if [`Flow::poll_transmit`] has a batch; cheaper than reading the clock.
    pub(crate) fn can_transmit(&self) -> bool {
        !self.closed && self.in_flight < MAX_IN_FLIGHT && self.has_something_to_send()
    }

    fn has_something_to_send(&self) -> bool {
        self.batch_due
            || self.dropped_here_unreported
            || self.probed.is_some()
            || self.inbox.is_some()
            || self.control.len() > 0
            || self.sendable_events().is_some()
            || sendable(&self.calls, &self.outgoing[Lane::Calls as usize]).is_some()
            || sendable(&self.replies, &self.outgoing[Lane::Replies as usize]).is_some()
            || sendable(&self.guaranteed, &self.outgoing[Lane::Guaranteed as usize]).is_some()
    }

    /// Returns the next pack of events, if the peer has credit for all of it.
    fn sendable_events(&self) -> Option<&EventPack> {
        let room = self.outgoing[Lane::Events as usize].room();
        self.events.packs.front().filter(|pack| pack.totals().bytes <= room)
    }

    /// Records that the transport has encoded that many batches.
    pub(crate) fn handle_released(&mut self, batches: u32) {
        self.in_flight = self.in_flight.saturating_sub(batches);
    }

    /// Records that bytes arrived from the peer.
    pub(crate) fn handle_alive(&mut self, at: Time) {
        self.last_heard = self.last_heard.max(at);
    }

    /// Records that this node did not run for that long: the silence was not the peer's.
    pub(crate) fn handle_pause(&mut self, now: Time, pause: Duration) {
        self.handle_alive((self.last_heard + pause).min(now));
    }

    /// Handles the preamble of an arriving batch.
    ///
    /// # Errors
    /// [`Violation`] if its credit decreases or exceeds what was sent.
    pub(crate) fn handle_preamble(
        &mut self,
        now: Time,
        preamble: &Preamble,
    ) -> Result<(), Violation> {
        self.handle_alive(now);
        for (lane, consumed) in self.outgoing.iter_mut().zip(preamble.consumed) {
            let forward = consumed.messages >= lane.confirmed.messages
                && consumed.bytes >= lane.confirmed.bytes;
            let sent = consumed.messages <= lane.sent.messages && consumed.bytes <= lane.sent.bytes;
            if !(forward && sent) {
                return Err(Violation::Credit);
            }
            lane.confirmed = consumed;
        }
        Ok(())
    }

    /// Counts messages that arrived and are to be consumed.
    ///
    /// # Errors
    /// [`Violation`] if the peer had no credit for them.
    pub(crate) fn handle_received(&mut self, lane: Lane, new: Totals) -> Result<(), Violation> {
        let lane = &mut self.incoming[lane as usize];
        lane.received += new;
        if lane.received.bytes - lane.consumed.bytes > lane.window {
            return Err(Violation::Overrun);
        }
        if self.record_held() { Ok(()) } else { Err(Violation::Share) }
    }

    /// Records the bytes that are kept for the peer: queued for it, or received from it and not
    /// consumed. Returns false if they are more than its share.
    fn record_held(&mut self) -> bool {
        let unconsumed = self.incoming.iter().map(|lane| {
            let messages = lane.received.messages - lane.consumed.messages;
            lane.received.bytes - lane.consumed.bytes + messages * MESSAGE_OVERHEAD
        });
        let queued = self.calls.len() + self.replies.len() + self.guaranteed.len();
        let queued = self.queued_bytes() + queued as u64 * MESSAGE_OVERHEAD;
        self.share.set(self.control.bytes() + queued + unconsumed.sum::<u64>())
    }

    /// Counts consumed messages: an event when every matching subscription has taken or dropped it,
    /// a call when its handler has ended, a reply when its caller has received it.
    pub(crate) fn handle_consumed(&mut self, lane: Lane, done: Totals) {
        let incoming = &mut self.incoming[lane as usize];
        incoming.consumed += done;
        // The end of a call is reported at once: the caller chooses among instances by it.
        let unreported = incoming.consumed.bytes - incoming.told.bytes;
        if lane == Lane::Calls || unreported >= incoming.window / 4 {
            self.batch_due = true;
        }
        self.record_held();
    }

    /// Counts received messages that were dropped. They count as consumed too.
    pub(crate) fn handle_dropped(&mut self, reason: DropReason, count: u64) {
        *self.dropped_here.entry(reason).or_default() += count;
        self.dropped_here_unreported = true;
    }

    /// Handles the peer's report of dropped messages. Returns the new drops.
    ///
    /// # Errors
    /// [`Violation`] if a count decreases.
    pub(crate) fn handle_drop_report(
        &mut self,
        counts: &[(String, u64)],
    ) -> Result<Vec<(DropReason, u64)>, Violation> {
        // Reasons unknown to this version share one, so their counts are summed first.
        let mut totals = BTreeMap::<DropReason, u64>::new();
        for (reason, count) in counts {
            let total = totals.entry(DropReason::from_wire(reason)).or_default();
            *total = total.saturating_add(*count);
        }
        let mut news = Vec::new();
        for (reason, total) in totals {
            let known = self.dropped_there.insert(reason, total).unwrap_or_default();
            match total.checked_sub(known).ok_or(Violation::Drops)? {
                0 => {}
                new => news.push((reason, new)),
            }
        }
        Ok(news)
    }

    /// Checks how long nothing was sent or received.
    pub(crate) fn handle_timeout(&mut self, now: Time, timing: &Timing) -> Liveness {
        if now.since(self.last_sent) >= timing.heartbeat {
            self.batch_due = true;
            self.events.spare = None;
        }
        match now.since(self.last_heard) {
            silence if silence >= timing.dead => Liveness::Dead,
            silence if silence >= timing.suspect => Liveness::Suspect,
            _ => Liveness::Alive,
        }
    }

    /// Returns the time of the next call of [`Flow::handle_timeout`].
    pub(crate) fn poll_timeout(&self, now: Time, timing: &Timing) -> Time {
        let suspect = self.last_heard + timing.suspect;
        let silence = if suspect > now { suspect } else { self.last_heard + timing.dead };
        // A due heartbeat that can't be sent waits for the transport, not for the clock.
        if self.batch_due { silence } else { silence.min(self.last_sent + timing.heartbeat) }
    }

    pub(crate) fn last_heard(&self) -> Time {
        self.last_heard
    }

    /// Returns the number of our calls that the peer has not finished.
    pub(crate) fn unfinished_calls(&self) -> u64 {
        let calls = &self.outgoing[Lane::Calls as usize];
        self.calls.len() as u64 + calls.sent.messages - calls.confirmed.messages
    }

    /// Returns true if all queued messages were sent and confirmed.
    pub(crate) fn is_settled(&self) -> bool {
        self.queued_bytes() == 0 && self.outgoing.iter().all(|lane| lane.sent == lane.confirmed)
    }

    /// Returns true if waiting publishers may continue: half of the queue is free.
    pub(crate) fn has_room_for_events(&self) -> bool {
        self.closed || self.events.queued.bytes <= self.events.limit / 2
    }

    /// Returns the number of queued bytes.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.events.queued.bytes
            + self.calls.bytes()
            + self.replies.bytes()
            + self.guaranteed.bytes()
    }

    /// Returns the buffer of a batch that the transport has finished with, for reuse.
    pub(crate) fn recycle(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() <= MAX_SPARE {
            self.events.spare = Some(buffer);
        }
    }

    pub(crate) fn has_pending(&self) -> bool {
        self.has_something_to_send()
    }

    /// Ends the flow. Later messages are refused.
    pub(crate) fn close(&mut self) -> LinkLoss {
        let mut lost = LinkLoss::default();
        if std::mem::replace(&mut self.closed, true) {
            return lost;
        }
        drop(self.control.drain());
        (self.probed, self.inbox) = (None, None);
        // Guaranteed messages are in the outbox, and sent again.
        drop(self.guaranteed.drain());
        for lane in &self.outgoing[..Lane::Guaranteed as usize] {
            lost.in_doubt += lane.sent.messages - lane.confirmed.messages;
        }
        let queued = self.calls.len() + self.replies.len();
        lost.unsent = self.events.queued.messages + queued as u64;
        lost.unsent_calls.extend(self.calls.drain().map(|call| call.header.id));
        drop(self.replies.drain());
        while self.events.pop().is_some() {}
        self.events.spare = None;
        self.record_held();
        lost
    }
}

/// Adds messages while there is room and credit.
fn fill(batch: &mut BatchEncoder<'_>, queue: &mut Queue<Envelope>, lane: &mut Sent) {
    while let Some(next) = sendable(queue, lane)
        && batch.has_room_for(next)
        && let Some(envelope) = queue.pop()
    {
        lane.sent += Totals::one(envelope.cost());
        batch.push(&envelope);
    }
}

/// Returns the next message of a lane, if the peer has credit for it.
fn sendable<'a>(queue: &'a Queue<Envelope>, lane: &Sent) -> Option<&'a Envelope> {
    queue.front().filter(|next| next.cost() <= lane.room())
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
