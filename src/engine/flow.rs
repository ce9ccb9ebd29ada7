//! A link's flow: what waits to be sent, what the peer has room for, what is unconfirmed.
//!
//! ```text
//!  enqueue ─▶ [ queue of a lane ] ─ credit? ─▶ batch ─▶ sent ──▶ peer
//!                                                        │
//!  confirmed ◀── "consumed" in the preamble of each batch ◀─┘
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::engine::{Queue, Time};
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::wire::{
    BatchEncoder, Control, EncodedBatch, Envelope, EventPack, LANES, Lane, Limits, MAX_BATCH,
    OutgoingEvent, Preamble, Totals,
};

/// Batches that the transport may hold unencoded. Two keep it busy; more would only hide the
/// queue from the one who counts it.
const MAX_IN_FLIGHT: u32 = 2;

/// The largest buffer that is kept for reuse, in bytes.
const MAX_SPARE: usize = MAX_BATCH;

/// Control records that may wait for a peer that doesn't read.
const MAX_CONTROL: usize = 10_000;

/// When silence becomes a heartbeat, a suspicion, a death.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    pub(crate) heartbeat: Duration,
    pub(crate) suspect: Duration,
    pub(crate) dead: Duration,
}

/// What silence says of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Liveness {
    Alive,
    Suspect,
    Dead,
}

/// The peer broke the rules of flow control.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("it took back credit, or confirmed what was not sent")]
    Credit,
    #[error("it sent more than its credit allows")]
    Overrun,
    #[error("it took back drops that it had reported")]
    Drops,
}

/// What was on its way when a link ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkLoss {
    /// Never handed to the transport: these are dropped.
    pub(crate) unsent: u64,
    /// Calls among them, whose callers can be told that nothing was executed.
    pub(crate) unsent_calls: Vec<MessageId>,
    /// Sent and not confirmed: nobody can say.
    pub(crate) in_doubt: u64,
}

/// What a lane has sent, and how much more the peer takes.
#[derive(Debug, Default)]
struct Sent {
    sent: Totals,
    confirmed: Totals,
    /// How many unconfirmed bytes the peer takes.
    window: u64,
}

impl Sent {
    /// How many more bytes the peer takes now.
    fn room(&self) -> u64 {
        self.window - (self.sent.bytes - self.confirmed.bytes).min(self.window)
    }
}

/// Whether a whole batch more than before waits since an event was queued: its publisher had
/// better let others run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Backlog {
    #[default]
    Same,
    Grew,
}

/// Events that wait. They are encoded as they come, since nobody takes one back, so that a pack
/// is a batch as soon as the link is free.
#[derive(Debug)]
struct EventQueue {
    packs: VecDeque<EventPack>,
    queued: Totals,
    limit: u64,
    /// What a pack may cost, so that the peer can have credit for all of it.
    pack_limit: u64,
    /// The buffer of a batch that the transport is done with.
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
    /// How many unconsumed bytes we take.
    window: u64,
}

/// One link's flow control, pure.
#[derive(Debug)]
pub(crate) struct Flow {
    me: NodeId,
    outgoing: [Sent; LANES],
    events: EventQueue,
    calls: Queue<Envelope>,
    replies: Queue<Envelope>,
    guaranteed: Queue<Envelope>,
    /// Whose turn it is to fill a batch: what is guaranteed, or events.
    guaranteed_first: bool,
    incoming: [Incoming; LANES],
    control: VecDeque<Control>,
    in_flight: u32,
    peer_max_body: u64,
    /// An otherwise empty batch is worth sending: a heartbeat, or credit.
    batch_due: bool,
    dropped_here: BTreeMap<DropReason, u64>,
    dropped_here_unreported: bool,
    dropped_there: BTreeMap<DropReason, u64>,
    last_sent: Time,
    last_heard: Time,
    closed: bool,
}

impl Flow {
    /// A flow that carries control records only, until the peer's limits are known.
    pub(crate) fn new(now: Time, me: NodeId, ours: &Limits, queue_bytes: u64) -> Self {
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
            control: VecDeque::new(),
            in_flight: 0,
            peer_max_body: 0,
            batch_due: false,
            dropped_here: BTreeMap::new(),
            dropped_here_unreported: false,
            dropped_there: BTreeMap::new(),
            last_sent: now,
            last_heard: now,
            closed: false,
        }
    }

    /// The peer said how much it takes.
    pub(crate) fn handle_limits(&mut self, limits: &Limits) {
        self.peer_max_body = limits.max_body;
        for (lane, window) in self.outgoing.iter_mut().zip(limits.windows) {
            lane.window = window;
        }
        self.events.pack_limit = limits.windows[Lane::Events as usize] / 2;
    }

    /// Queues a message, or says why it is dropped.
    pub(crate) fn enqueue(&mut self, envelope: Envelope) -> Result<(), DropReason> {
        let (lane, cost) = (envelope.lane(), envelope.cost());
        self.check(lane, envelope.body_len(), cost)?;
        let queue = match lane {
            Lane::Events => unreachable!("events are queued encoded"),
            Lane::Calls => &mut self.calls,
            Lane::Replies => &mut self.replies,
            Lane::Guaranteed => &mut self.guaranteed,
        };
        queue.push(envelope, cost).map_err(|_| DropReason::SlowPeer)
    }

    /// Queues an event, or says why it is dropped.
    pub(crate) fn enqueue_event(
        &mut self,
        event: &OutgoingEvent<'_>,
    ) -> Result<Backlog, DropReason> {
        self.check(Lane::Events, event.body_len(), event.cost())?;
        self.events.push(event)
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

    pub(crate) fn enqueue_control(&mut self, control: Control) {
        if self.closed {
            return;
        }
        // However many probes wait, one answer says how far this side is.
        if matches!(control, Control::ProbeReply(_)) {
            self.control.retain(|waiting| !matches!(waiting, Control::ProbeReply(_)));
        }
        self.control.push_back(control);
    }

    /// Takes back a call that has not been handed to the transport yet.
    pub(crate) fn take_back(&mut self, id: MessageId) -> bool {
        self.calls.take(|call| call.header.id == id).is_some()
    }

    /// The next batch for the transport; `None` if nothing can go now.
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
        let mut greets = false;
        while !batch.is_full()
            && !greets
            && let Some(control) = self.control.pop_front()
        {
            greets = matches!(control, Control::Hello(_));
            batch.push_control(&control);
        }
        // What has a hello in it has to be small, so nothing follows it.
        if !greets {
            // Replies first, since somebody waits for them.
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
        Some(batch.finish())
    }

    /// Whether [`Flow::poll_transmit`] has something to give; cheaper than a look at the clock.
    pub(crate) fn can_transmit(&self) -> bool {
        !self.closed && self.in_flight < MAX_IN_FLIGHT && self.has_something_to_send()
    }

    fn has_something_to_send(&self) -> bool {
        self.batch_due
            || self.dropped_here_unreported
            || !self.control.is_empty()
            || self.sendable_events().is_some()
            || sendable(&self.calls, &self.outgoing[Lane::Calls as usize]).is_some()
            || sendable(&self.replies, &self.outgoing[Lane::Replies as usize]).is_some()
            || sendable(&self.guaranteed, &self.outgoing[Lane::Guaranteed as usize]).is_some()
    }

    /// The next events, if the peer has credit for all of them.
    fn sendable_events(&self) -> Option<&EventPack> {
        let room = self.outgoing[Lane::Events as usize].room();
        self.events.packs.front().filter(|pack| pack.totals().bytes <= room)
    }

    /// The transport has encoded `batches` of those it was handed.
    pub(crate) fn handle_released(&mut self, batches: u32) {
        self.in_flight = self.in_flight.saturating_sub(batches);
    }

    /// Bytes came from the peer, whatever they say.
    pub(crate) fn handle_alive(&mut self, at: Time) {
        self.last_heard = self.last_heard.max(at);
    }

    /// A batch arrived.
    ///
    /// # Errors
    /// [`Violation`] if its credit goes backwards or beyond what was sent.
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

    /// Messages arrived and wait to be consumed.
    ///
    /// # Errors
    /// [`Violation`] if the peer had no credit for them.
    pub(crate) fn handle_received(&mut self, lane: Lane, new: Totals) -> Result<(), Violation> {
        let lane = &mut self.incoming[lane as usize];
        lane.received += new;
        if lane.received.bytes - lane.consumed.bytes > lane.window {
            return Err(Violation::Overrun);
        }
        Ok(())
    }

    /// Received messages were consumed: an event when every matching subscription took or
    /// dropped it, a call when its handler ended, a reply when its caller has it.
    pub(crate) fn handle_consumed(&mut self, lane: Lane, done: Totals) {
        let incoming = &mut self.incoming[lane as usize];
        incoming.consumed += done;
        // The end of a call is told at once: the caller chooses among instances by it.
        let unreported = incoming.consumed.bytes - incoming.told.bytes;
        if lane == Lane::Calls || unreported >= incoming.window / 4 {
            self.batch_due = true;
        }
    }

    /// A received message was dropped; it counts as consumed as well.
    pub(crate) fn handle_dropped(&mut self, reason: DropReason, count: u64) {
        *self.dropped_here.entry(reason).or_default() += count;
        self.dropped_here_unreported = true;
    }

    /// The peer reported what it dropped. Returns what is new.
    ///
    /// # Errors
    /// [`Violation`] if a count went backwards.
    pub(crate) fn handle_drop_report(
        &mut self,
        counts: &[(String, u64)],
    ) -> Result<Vec<(DropReason, u64)>, Violation> {
        // Reasons unknown to this version share one, so they are added up first.
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

    /// Looks at how long nothing was sent or heard.
    pub(crate) fn handle_timeout(&mut self, now: Time, timing: &Timing) -> Liveness {
        if now.since(self.last_sent) >= timing.heartbeat {
            self.batch_due = true;
            self.events.spare = None;
        }
        if self.control.len() > MAX_CONTROL {
            // It sends and doesn't read; what it is told would pile up.
            return Liveness::Dead;
        }
        match now.since(self.last_heard) {
            silence if silence >= timing.dead => Liveness::Dead,
            silence if silence >= timing.suspect => Liveness::Suspect,
            _ => Liveness::Alive,
        }
    }

    /// When [`Flow::handle_timeout`] has something to do next.
    pub(crate) fn poll_timeout(&self, now: Time, timing: &Timing) -> Time {
        let suspect = self.last_heard + timing.suspect;
        let silence = if suspect > now { suspect } else { self.last_heard + timing.dead };
        // A heartbeat that is due, but can't go, waits for the transport and not for the clock.
        if self.batch_due { silence } else { silence.min(self.last_sent + timing.heartbeat) }
    }

    pub(crate) fn last_heard(&self) -> Time {
        self.last_heard
    }

    /// Our calls that the peer has not finished.
    pub(crate) fn unfinished_calls(&self) -> u64 {
        let calls = &self.outgoing[Lane::Calls as usize];
        self.calls.len() as u64 + calls.sent.messages - calls.confirmed.messages
    }

    /// Whether all that was queued was sent and confirmed.
    pub(crate) fn is_settled(&self) -> bool {
        self.queued_bytes() == 0 && self.outgoing.iter().all(|lane| lane.sent == lane.confirmed)
    }

    /// Whether publishers who wait may go on: half of the queue is free.
    pub(crate) fn has_room_for_events(&self) -> bool {
        self.closed || self.events.queued.bytes <= self.events.limit / 2
    }

    /// What waits in the queues, in bytes.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.events.queued.bytes
            + self.calls.bytes()
            + self.replies.bytes()
            + self.guaranteed.bytes()
    }

    /// Gives back the buffer of a batch that the transport is done with.
    pub(crate) fn recycle(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() <= MAX_SPARE {
            self.events.spare = Some(buffer);
        }
    }

    pub(crate) fn has_pending(&self) -> bool {
        self.has_something_to_send()
    }

    /// The link ended. What comes after is refused.
    pub(crate) fn close(&mut self) -> LinkLoss {
        let mut lost = LinkLoss::default();
        if std::mem::replace(&mut self.closed, true) {
            return lost;
        }
        self.control.clear();
        // What is guaranteed is in its outbox, and sent again.
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
        lost
    }
}

/// Adds what there is room and credit for.
fn fill(batch: &mut BatchEncoder<'_>, queue: &mut Queue<Envelope>, lane: &mut Sent) {
    while let Some(next) = sendable(queue, lane)
        && batch.has_room_for(next)
        && let Some(envelope) = queue.pop()
    {
        lane.sent += Totals::one(envelope.cost());
        batch.push(&envelope);
    }
}

/// The next message of a lane, if the peer has credit for it.
fn sendable<'a>(queue: &'a Queue<Envelope>, lane: &Sent) -> Option<&'a Envelope> {
    queue.front().filter(|next| next.cost() <= lane.room())
}
