//! Received batches: takes them apart, and passes each record to its handler.

use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::task::yield_now;

use super::peer_link::PeerLink;
use super::{MeshCarrier, durable};
use crate::address::Destination;
use crate::core::{Hold, Way, add};
use crate::engine::{
    Connection, DownReason, EventBatchBuilder, Flow, Incoming, OutOfTurn, Path, ReceivedControl,
    ReceivedMessage, Violation, incoming, may_publish,
};
use crate::identity::NodeId;
use crate::link::{Acceptor, Link, Receiver, SLICE};
use crate::message::{Kind, Message, MessageId};
use crate::report::DropReason;
use crate::wire::{
    Announcement, Control, Decoded, INLINE_BODY, Lane, PROTOCOL_VERSION, Totals, WireError, decode,
};

/// Adds each new connection to the mesh. Its reference is weak, since the transports hold it and
/// the mesh holds the transports.
pub(super) struct NodeAcceptor(pub(super) Weak<MeshCarrier>);

impl Acceptor for NodeAcceptor {
    fn handle_connected(&self, link: Arc<dyn Link>, connection: Connection) -> Arc<dyn Receiver> {
        let Some(carrier) = self.0.upgrade() else {
            link.close();
            return Arc::new(NobodyHome);
        };
        let core = &carrier.core;
        // Every transport sets the claimed node.
        let peer = connection.claimed.unwrap_or(NodeId::from_bytes([0; 32]));
        let limits = &carrier.links.limits;
        let share = carrier.links.budget.share();
        let flow = Flow::new(core.now(), core.id, limits, core.config.send_queue, share);
        let grants = carrier.grants(&connection);
        let connection = Connection { grants: grants.clone(), ..connection };
        let link = carrier.links.add(|id| {
            let reporter = core.reporter.clone();
            PeerLink::new(id, peer, grants, flow, link, reporter, core.started())
        });
        core.spawn(link.clone().keep_sending());
        carrier.with_mesh(|mesh, now| mesh.handle_connected(now, link.id, connection));
        Arc::new(LinkReceiver { carrier, way: link.clone(), link })
    }
}

/// The receiver of connections to a node that is gone.
struct NobodyHome;

impl Receiver for NobodyHome {
    fn handle_batch(&self, _: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        None
    }
    fn handle_closed(&self) {}
}

struct LinkReceiver {
    carrier: Arc<MeshCarrier>,
    link: Arc<PeerLink>,
    way: Arc<dyn Way>,
}

/// A fault in a batch that ends its link.
enum Fault {
    Wire(WireError),
    Flow(Violation),
    OutOfTurn,
}

/// The part of a batch's records that was handled.
enum Progress {
    Complete,
    More,
}

/// The records between two looks at the clock.
const RECORDS_A_LOOK: u32 = 16;

/// The changes of a long announcement that are handled at once.
const CHANGES_AT_ONCE: usize = 32;

/// The most bytes of a batch that is handled at once. A longer one waits for its turn, as does the
/// rest of one that takes long.
const SHORT: usize = 16 * 1024;

/// A batch that is being handled.
struct Batch<'a> {
    records: Decoded<'a>,
    events: Events<'a>,
    /// The rest of a long announcement, which comes before the next record.
    announcement: Option<Box<Announcement>>,
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<Violation> for Fault {
    fn from(violation: Violation) -> Self {
        Self::Flow(violation)
    }
}

impl From<OutOfTurn> for Fault {
    fn from(_: OutOfTurn) -> Self {
        Self::OutOfTurn
    }
}

impl Receiver for LinkReceiver {
    fn handle_batch(&self, frames: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        if self.link.has_ended() {
            return None;
        }
        if frames.iter().map(Bytes::len).sum::<usize>() > SHORT {
            return Some(self.take_long(frames).boxed());
        }
        self.take_first(frames).map(|rest| self.take_rest(rest).boxed())
    }

    fn handle_closed(&self) {
        // The node ends with its runtime, which drops this link's task before or after it.
        if self.carrier.core.is_runtime_ending() {
            return;
        }
        let reason = match self.link.peek(Flow::has_overflowed) {
            true => DownReason::Violation("it reads nothing of what it is sent".into()),
            false => DownReason::Closed,
        };
        self.carrier.with_mesh(|mesh, now| mesh.handle_closed(now, self.link.id, reason));
    }
}

impl LinkReceiver {
    fn handle_fault(&self, fault: Fault) {
        let (carrier, link) = (&self.carrier, self.link.id);
        let text = match fault {
            Fault::Wire(WireError::Version(version)) if version > PROTOCOL_VERSION => {
                return carrier
                    .with_mesh(|mesh, now| mesh.handle_newer_version(now, link, version));
            }
            Fault::Wire(error) => error.to_string(),
            Fault::Flow(violation) => violation.to_string(),
            Fault::OutOfTurn => "a message arrived before the link was accepted".into(),
        };
        carrier.with_mesh(|mesh, now| mesh.handle_violation(now, link, text));
    }

    fn open(&self, frames: Vec<Bytes>) -> Result<Batch<'_>, Fault> {
        let (core, link) = (&self.carrier.core, &self.link);
        let records = decode(frames, &core.id, &link.peer, core.config.max_body)?;
        let now = core.now();
        link.with_flow(|flow| flow.handle_preamble(now, &records.preamble))?;
        if records.preamble.consumed.iter().any(|lane| lane.messages > 0) {
            link.prove();
        }
        let events = Events { receiver: self, batch: None };
        Ok(Batch { records, events, announcement: None })
    }

    /// Handles the first slice of a batch; returns the rest, if there is more.
    fn take_first(&self, frames: Vec<Bytes>) -> Option<Batch<'_>> {
        let taken = self.open(frames).and_then(|mut batch| {
            let progress = self.take_slice(&mut batch)?;
            Ok(matches!(progress, Progress::More).then_some(batch))
        });
        taken.unwrap_or_else(|fault| {
            self.handle_fault(fault);
            None
        })
    }

    /// Handles a long batch: its first slice waits for a turn too.
    async fn take_long(&self, frames: Vec<Bytes>) {
        let turn = self.carrier.links.turn().await;
        let rest = self.take_first(frames);
        drop(turn);
        if let Some(rest) = rest {
            self.take_rest(rest).await;
        }
    }

    /// Handles the rest of a batch, slice by slice.
    async fn take_rest(&self, mut batch: Batch<'_>) {
        loop {
            yield_now().await;
            let _turn = self.carrier.links.turn().await;
            match self.take_slice(&mut batch) {
                Ok(Progress::More) => {}
                Ok(Progress::Complete) => return,
                Err(fault) => return self.handle_fault(fault),
            }
        }
    }

    /// Handles the next records of a batch.
    fn take_slice(&self, batch: &mut Batch<'_>) -> Result<Progress, Fault> {
        let taken = self.take_records(batch);
        // Events that precede a fault are delivered all the same.
        batch.events.deliver()?;
        taken
    }

    fn take_records(&self, batch: &mut Batch<'_>) -> Result<Progress, Fault> {
        let (link, begun) = (&self.link, Instant::now());
        let Batch { records, events, announcement } = batch;
        for number in 1_u32.. {
            if link.has_ended() {
                break;
            }
            if let Some(long) = announcement {
                if !self.take_part(long) {
                    *announcement = None;
                }
                if begun.elapsed() >= SLICE {
                    return Ok(Progress::More);
                }
                continue;
            }
            while let Some((id, body)) = records.next_successor() {
                events.add_successor(id, body)?;
            }
            let Some(record) = records.next_record()? else { break };
            match incoming(record, link.peer, link.is_open(), &link.grants)? {
                Incoming::Event(message) => events.add(message)?,
                Incoming::Message { received, lane, cost } => {
                    events.deliver()?;
                    self.handle_message(received, lane, Totals::one(cost))?;
                }
                Incoming::Control(ReceivedControl::Mesh(Control::Announce(news))) => {
                    events.deliver()?;
                    *announcement = Some(news);
                }
                Incoming::Control(control) => {
                    events.deliver()?;
                    self.handle_control(control)?;
                }
                Incoming::Unknown => {}
            }
            if number % RECORDS_A_LOOK == 0 && begun.elapsed() >= SLICE {
                return Ok(Progress::More);
            }
        }
        Ok(Progress::Complete)
    }

    /// Handles the next changes of an announcement. Returns false after the last.
    fn take_part(&self, news: &mut Box<Announcement>) -> bool {
        let link = self.link.id;
        let part = news.take_part(CHANGES_AT_ONCE);
        let is_part = part.is_some();
        self.carrier.with_mesh(|mesh, now| match part {
            Some(part) => mesh.handle_part(now, link, part),
            None => mesh.handle_control(now, link, Control::Announce(std::mem::take(news))),
        });
        is_part
    }

    fn handle_message(
        &self,
        received: ReceivedMessage,
        lane: Lane,
        new: Totals,
    ) -> Result<(), Fault> {
        let (core, link) = (&self.carrier.core, &self.link);
        link.with_flow(|flow| flow.handle_received(lane, new))?;
        link.prove();
        add(&core.reporter.counters.received, 1);
        let (path, hold) = (Path::Link(link.id), Hold::new(self.way.clone(), lane, new));
        match received {
            ReceivedMessage::Call(mut message) => {
                message.unpin();
                core.with_front(|front, now| front.handle_call(now, path, message, hold));
            }
            ReceivedMessage::RefusedCall(message) => {
                let reason = DropReason::NotAllowed;
                core.with_front(|front, _| front.handle_refused(path, message, hold, reason));
            }
            ReceivedMessage::Outcome(id, outcome) => {
                core.with_front(|front, _| front.handle_outcome(path, id, outcome, hold));
            }
            ReceivedMessage::Delivery(message) => match &self.carrier.durable {
                Some(durable) => durable.handle_delivery(message, hold),
                None => {
                    let answer = durable::no_inbox(&message);
                    drop(hold);
                    link.send_control(Control::Answers(answer.into_iter().collect()));
                }
            },
            ReceivedMessage::RefusedDelivery(answer) => {
                core.reporter.counters.dropped_for_others(DropReason::NotAllowed, 1);
                drop(hold);
                link.send_control(Control::Answers(vec![answer]));
            }
        }
        Ok(())
    }

    fn handle_control(&self, control: ReceivedControl) -> Result<(), Fault> {
        let (carrier, link, durable) = (&self.carrier, &self.link, &self.carrier.durable);
        match (control, durable) {
            (ReceivedControl::DropReport(counts), _) => {
                let news = link.with_flow(|flow| flow.handle_drop_report(&counts))?;
                for (reason, count) in news {
                    carrier.core.reporter.count_drop(link.peer, reason, count);
                }
            }
            (ReceivedControl::Cancel(id), _) => {
                let path = Path::Link(link.id);
                carrier.core.with_front(|front, _| front.handle_cancel(path, id));
            }
            (ReceivedControl::Answers(answers), Some(durable)) => {
                durable.handle_answers(link.peer, answers);
            }
            (ReceivedControl::Epochs(epochs, moment), Some(durable)) => {
                durable.handle_epochs(link, &epochs, moment);
            }
            (ReceivedControl::Inbox(info, denial), durable) => {
                denial.into_iter().for_each(|denial| link.send_control(denial));
                if let Some(durable) = durable {
                    durable.handle_inbox(link, *info);
                }
                carrier.core.routes.notify();
            }
            (ReceivedControl::Mesh(mut control), _) => {
                if let Control::Peers(hints) = &mut control {
                    hints.retain(|hint| carrier.may_link(&hint.id));
                }
                carrier.with_mesh(|mesh, now| mesh.handle_control(now, link.id, control));
            }
            // A node without a store has no messages to which these could refer.
            (ReceivedControl::Answers(_) | ReceivedControl::Epochs(..), None) => {}
        }
        Ok(())
    }
}

/// The events of a received batch, gathered into batches by topic.
struct Events<'a> {
    receiver: &'a LinkReceiver,
    batch: Option<EventBatchBuilder>,
}

impl Events<'_> {
    /// Adds a plain event on the topic of the previous one.
    fn add_successor(&mut self, id: MessageId, body: &[u8]) -> Result<(), Fault> {
        if self.batch.as_ref().is_some_and(|batch| batch.is_full(body.len())) {
            self.deliver()?;
        }
        let batch = self.batch.as_mut().ok_or(WireError::Inheritance)?;
        batch.add_plain(id, body);
        Ok(())
    }

    fn add(&mut self, message: Message) -> Result<(), Fault> {
        let Destination::Topic(topic) = &message.header.destination else {
            return Err(WireError::Unexpected("an event without a topic").into());
        };
        let same = |batch: &EventBatchBuilder| {
            batch.topic() == topic && !batch.is_full(message.body.len())
        };
        if !self.batch.as_ref().is_some_and(same) {
            self.deliver()?;
            self.batch = Some(EventBatchBuilder::new(message.from, topic.clone()));
        }
        if let Some(batch) = &mut self.batch {
            match message.header.is_plain(Kind::Event) && message.body.len() <= INLINE_BODY {
                true => batch.add_plain(message.header.id, &message.body),
                false => batch.add(message),
            }
        }
        Ok(())
    }

    /// Delivers the events gathered so far.
    fn deliver(&mut self) -> Result<(), Fault> {
        let Some(batch) = self.batch.as_mut().and_then(EventBatchBuilder::finish) else {
            return Ok(());
        };
        let LinkReceiver { carrier, link, way } = self.receiver;
        let (core, new) = (&carrier.core, batch.totals());
        link.with_flow(|flow| flow.handle_received(Lane::Events, new))?;
        link.prove();
        add(&core.reporter.counters.received, new.messages);
        let path = Path::Link(link.id);
        let hold = |held| Some(Hold::new(way.clone(), Lane::Events, held));
        match may_publish(&link.grants, batch.topic().as_str()) {
            true => _ = core.deliver(batch, path, None, &hold),
            false => {
                let reason = DropReason::NotAllowed;
                core.drop_received(path, hold(new).as_ref(), reason, new.messages);
            }
        }
        Ok(())
    }
}
