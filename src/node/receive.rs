//! What links bring: batches taken apart, and each record given to whom it concerns.

use std::sync::{Arc, Weak};

use bytes::Bytes;

use super::cell::{Credit, LinkCell};
use super::counters::add;
use super::shared::{Outcome, Shared};
use crate::address::{Destination, ServiceName};
use crate::engine::{Connection, DownReason, Flow, Violation};
use crate::identity::NodeId;
use crate::link::{Acceptor, Link, Receiver};
use crate::message::Message;
use crate::report::DropReason;
use crate::wire::{
    Control, Envelope, Failure, PROTOCOL_VERSION, Payload, Record, WireError, decode,
};

/// Makes a cell for each new connection. The transports hold it and the node holds the
/// transports, so it does not keep the node alive.
pub(crate) struct NodeAcceptor(pub(crate) Weak<Shared>);

impl Acceptor for NodeAcceptor {
    fn handle_connected(&self, link: Arc<dyn Link>, connection: Connection) -> Arc<dyn Receiver> {
        let Some(shared) = self.0.upgrade() else {
            link.close();
            return Arc::new(NobodyHome);
        };
        // Every transport knows what the connection claims to be.
        let peer = connection.claimed.unwrap_or(NodeId::from_bytes([0; 32]));
        let flow = Flow::new(shared.now(), shared.id, &shared.limits, shared.config.send_queue);
        let cell = shared.add_cell(|id| LinkCell::new(id, peer, flow, link, shared.started));
        shared.with_mesh(|mesh, now| mesh.handle_connected(now, cell.id, connection));
        Arc::new(LinkReceiver { shared, cell })
    }
}

/// Stands in for a node that is gone.
struct NobodyHome;

impl Receiver for NobodyHome {
    fn handle_batch(&self, _: Vec<Bytes>) {}
    fn handle_closed(&self) {}
}

struct LinkReceiver {
    shared: Arc<Shared>,
    cell: Arc<LinkCell>,
}

/// What ends a link when a batch is taken apart.
enum Fault {
    Wire(WireError),
    Flow(Violation),
    OutOfTurn,
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

impl Receiver for LinkReceiver {
    fn handle_batch(&self, frames: Vec<Bytes>) {
        let Err(fault) = self.take_apart(frames) else {
            return;
        };
        let link = self.cell.id;
        let text = match fault {
            Fault::Wire(WireError::Version(version)) if version > PROTOCOL_VERSION => {
                return self
                    .shared
                    .with_mesh(|mesh, now| mesh.handle_newer_version(now, link, version));
            }
            Fault::Wire(error) => error.to_string(),
            Fault::Flow(violation) => violation.to_string(),
            Fault::OutOfTurn => "a message before the link was accepted".into(),
        };
        self.shared.counters.refused("protocol");
        self.shared.with_mesh(|mesh, now| mesh.handle_violation(now, link, text));
    }

    fn handle_closed(&self) {
        let link = self.cell.id;
        self.shared.with_mesh(|mesh, now| mesh.handle_closed(now, link, DownReason::Closed));
    }
}

impl LinkReceiver {
    fn take_apart(&self, frames: Vec<Bytes>) -> Result<(), Fault> {
        let (shared, cell) = (&self.shared, &self.cell);
        if cell.has_ended() {
            return Ok(());
        }
        let mut batch = decode(frames, &shared.id, &cell.peer, shared.config.max_body)?;
        let now = cell.now();
        cell.with_flow(|flow| flow.handle_preamble(now, &batch.preamble))?;
        while let Some(record) = batch.next_record()? {
            match record {
                Record::Control(control) => self.handle_control(control)?,
                Record::Message(envelope) if cell.is_open() => self.handle_message(envelope)?,
                Record::Message(_) => return Err(Fault::OutOfTurn),
                Record::Unknown(_) => {}
            }
            if cell.has_ended() {
                break;
            }
        }
        Ok(())
    }

    fn handle_control(&self, control: Control) -> Result<(), Fault> {
        let (shared, cell) = (&self.shared, &self.cell);
        match control {
            Control::Dropped(counts) => {
                let news = cell.with_flow(|flow| flow.handle_drop_report(&counts))?;
                for (reason, count) in news {
                    shared.count_drop(cell.peer, reason, count);
                }
            }
            Control::Cancel(id) => {
                shared
                    .services()
                    .iter()
                    .for_each(|service| service.handle_cancel(shared, cell.id, id));
            }
            control => shared.with_mesh(|mesh, now| mesh.handle_control(now, cell.id, control)),
        }
        Ok(())
    }

    fn handle_message(&self, envelope: Envelope) -> Result<(), Fault> {
        let (shared, cell) = (&self.shared, &self.cell);
        let (lane, cost) = (envelope.lane(), envelope.cost());
        cell.with_flow(|flow| flow.handle_received(lane, cost))?;
        add(&shared.counters.received, 1);
        let credit = Credit::new(cell, lane, cost);
        let (header, from) = (envelope.header, cell.peer);
        match envelope.payload {
            Payload::Event(body) => {
                shared.deliver(&Message::new(from, header, body), cost, Some(credit));
            }
            Payload::Call(body) => shared.admit(Message::new(from, header, body), Some(credit)),
            Payload::Request(body) => {
                shared.admit(Message::request(from, header, body), Some(credit));
            }
            Payload::Reply(body) => {
                let message = Message::new(from, header, body);
                shared.complete(credit, message.header.correlation_id, Outcome::Reply(message));
            }
            Payload::Failed(failure) => {
                shared.complete(credit, header.correlation_id, Outcome::Failed(failure));
            }
        }
        Ok(())
    }
}

impl Shared {
    /// Gives an event to the local subscriptions. Whether all of them took it.
    pub(crate) fn deliver(&self, message: &Message, cost: u64, credit: Option<Credit>) -> bool {
        let Some(topic) = message.topic() else {
            return false;
        };
        let inboxes = self.inboxes.load();
        let matching = inboxes.matching(topic);
        if matching.is_empty() {
            self.drop_received(credit.as_ref(), DropReason::NoSubscriber);
            return false;
        }
        let credit = credit.map(Arc::new);
        let mut all = true;
        for inbox in matching {
            if inbox.push(message, cost, credit.clone()) {
                add(&self.counters.delivered, 1);
            } else {
                self.drop_received(credit.as_deref(), DropReason::SlowSubscriber);
                all = false;
            }
        }
        all
    }

    /// Gives a call to the service that it is for.
    pub(crate) fn admit(self: &Arc<Self>, mut message: Message, credit: Option<Credit>) {
        message.unpin();
        let name = match &message.header.destination {
            Destination::Service(name) => name.clone(),
            Destination::Node(node) if *node == self.id => ServiceName::node_inbox(),
            Destination::Node(_) | Destination::Topic(_) => {
                return self.decline(&message, credit, DropReason::NoService);
            }
        };
        match self.service(&name) {
            Some(service) => service.handle_call(self, message, credit),
            None => self.decline(&message, credit, DropReason::NoService),
        }
    }

    /// Turns a call down, so that its caller hears of it one way or the other.
    pub(crate) fn decline(
        self: &Arc<Self>,
        message: &Message,
        credit: Option<Credit>,
        reason: DropReason,
    ) {
        if message.wants_reply && reason != DropReason::Cancelled {
            let text = match reason {
                DropReason::NoService => "the node no longer serves it",
                DropReason::Expired => "its time ran out while it waited",
                _ => "it was not run",
            };
            let failure = Failure { code: reason.as_str().into(), text: text.into() };
            self.reply(message, credit, Payload::Failed(failure));
        } else {
            self.drop_received(credit.as_ref(), reason);
        }
    }

    pub(crate) fn drop_received(&self, credit: Option<&Credit>, reason: DropReason) {
        match credit {
            Some(credit) => {
                self.counters.dropped_for_others(reason);
                credit.report_drop(reason);
            }
            None => self.count_drop(self.id, reason, 1),
        }
    }

    fn complete(&self, credit: Credit, id: Option<crate::message::MessageId>, outcome: Outcome) {
        let link = credit.cell().id;
        match id.and_then(|id| self.end_request_over(id, link)) {
            Some(waiter) => {
                // Consumed before its caller wakes: what the caller sends next tells so.
                drop(credit);
                let _caller_left = waiter.send(outcome);
            }
            None => self.drop_received(Some(&credit), DropReason::Late),
        }
    }
}
