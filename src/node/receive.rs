//! What links bring: batches taken apart, and each record given to whom it concerns.

use std::sync::{Arc, Weak};

use bytes::Bytes;

use super::counters::add;
use super::event_batch::{EventBatch, EventBatchBuilder};
use super::peer_link::{Credit, PeerLink};
use super::shared::{RequestOutcome, Shared};
use super::subscription::{Inbox, Lost};
use crate::address::{Destination, Pattern, ServiceName};
use crate::broker::Ticket;
use crate::engine::{Connection, DownReason, Flow, Violation};
use crate::identity::NodeId;
use crate::link::{Acceptor, Link, Receiver};
use crate::message::{Kind, Message, MessageId};
use crate::report::DropReason;
use crate::trust::{Action, Grants};
use crate::wire::{
    Control, Decoded, DeliveryOutcome, Envelope, Failure, INLINE_BODY, Lane, PROTOCOL_VERSION,
    Payload, Record, Totals, WireError, decode,
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
        let grants = shared.grants(&connection);
        let connection = Connection { grants: grants.clone(), ..connection };
        let cell =
            shared.add_cell(|id| PeerLink::new(id, peer, grants, flow, link, shared.started));
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
    cell: Arc<PeerLink>,
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
        let mut events = Events { link: self, run: None };
        let taken = self.take_records(&mut batch, &mut events);
        // What stood before a fault is delivered all the same.
        events.deliver()?;
        taken
    }

    fn take_records(&self, batch: &mut Decoded<'_>, events: &mut Events<'_>) -> Result<(), Fault> {
        let cell = &self.cell;
        while !cell.has_ended() {
            while let Some((id, body)) = batch.next_successor() {
                events.add_successor(id, body)?;
            }
            let Some(record) = batch.next_record()? else { break };
            match record {
                Record::Message(envelope) if cell.is_open() => match envelope.payload {
                    Payload::Event(body) => {
                        events.add(Message::new(cell.peer, envelope.header, body))?;
                    }
                    _ => {
                        events.deliver()?;
                        self.handle_call_or_reply(envelope)?;
                    }
                },
                Record::Control(control) => {
                    events.deliver()?;
                    self.handle_control(control)?;
                }
                Record::Message(_) => return Err(Fault::OutOfTurn),
                Record::Unknown(_) => {}
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
            Control::Answers(_) | Control::Epochs(_) | Control::Inbox(_) if !cell.is_open() => {
                return Err(Fault::OutOfTurn);
            }
            Control::Answers(answers) => shared.handle_answers(cell.peer, answers),
            Control::Epochs(epochs) => shared.handle_epochs(cell, &epochs),
            Control::Inbox(mut info) => {
                let denied = info.subscriptions.extract_if(.., |(_, pattern)| {
                    !cell.grants.permit_all(Action::Subscribe, pattern)
                });
                let denied: Vec<_> =
                    denied.map(|(_, pattern)| (Action::Subscribe, pattern.to_string())).collect();
                if !denied.is_empty() {
                    cell.send_control(Control::denied(denied));
                }
                shared.handle_inbox(cell.peer, *info);
            }
            Control::Cancel(id) => {
                for service in shared.handling() {
                    if let Some(guaranteed) = service.handle_cancel(shared, cell.id, id) {
                        shared.unqueue_delivery(&guaranteed);
                    }
                }
            }
            control => shared.with_mesh(|mesh, now| mesh.handle_control(now, cell.id, control)),
        }
        Ok(())
    }

    fn handle_call_or_reply(&self, envelope: Envelope) -> Result<(), Fault> {
        let (shared, cell) = (&self.shared, &self.cell);
        let (lane, new) = (envelope.lane(), Totals::one(envelope.cost()));
        cell.with_flow(|flow| flow.handle_received(lane, new))?;
        add(&shared.counters.received, 1);
        let credit = Credit::new(cell, lane, new);
        let (header, from) = (envelope.header, cell.peer);
        let permitted = permit(&cell.grants, &header.destination);
        match envelope.payload {
            Payload::Event(_) => unreachable!("events are delivered in runs"),
            Payload::Guaranteed(_, delivery) if !permitted => {
                drop(credit);
                shared.reject_delivery(from, &delivery, NOT_ALLOWED);
            }
            Payload::Guaranteed(body, delivery) => {
                let mut message = Message::new(from, header, body);
                message.delivery = Some(delivery);
                shared.handle_delivery(message, Some(credit));
            }
            Payload::Call(body) if !permitted => {
                let message = Message::new(from, header, body);
                shared.decline(&message, Some(credit), DropReason::NotAllowed);
            }
            Payload::Request(body) if !permitted => {
                let message = Message::request(from, header, body);
                shared.decline(&message, Some(credit), DropReason::NotAllowed);
            }
            Payload::Call(body) => shared.admit(Message::new(from, header, body), Some(credit)),
            Payload::Request(body) => {
                shared.admit(Message::request(from, header, body), Some(credit));
            }
            Payload::Reply(body) => {
                let message = Message::new(from, header, body);
                shared.complete(
                    credit,
                    message.header.correlation_id,
                    RequestOutcome::Reply(message),
                );
            }
            Payload::Failed(failure) => {
                shared.complete(credit, header.correlation_id, RequestOutcome::Failed(failure));
            }
        }
        Ok(())
    }
}

const NOT_ALLOWED: &str = "the node's rules don't allow it";

/// Whether a peer may send what is for this destination.
fn permit(grants: &Grants, destination: &Destination) -> bool {
    match destination {
        Destination::Topic(topic) => grants.permit(Action::Publish, topic.as_str()),
        Destination::Service(name) => grants.permit(Action::Send, name.as_str()),
        Destination::Node(_) => grants.permit_node(),
    }
}

/// The events of a batch, on their way into runs.
struct Events<'a> {
    link: &'a LinkReceiver,
    run: Option<EventBatchBuilder>,
}

impl Events<'_> {
    /// Adds a plain event on the topic of the last.
    fn add_successor(&mut self, id: MessageId, body: &[u8]) -> Result<(), Fault> {
        if self.run.as_ref().is_some_and(|run| run.is_full(body.len())) {
            self.deliver()?;
        }
        let run = self.run.as_mut().ok_or(WireError::Inheritance)?;
        run.add_plain(id, body);
        Ok(())
    }

    fn add(&mut self, message: Message) -> Result<(), Fault> {
        let Destination::Topic(topic) = &message.header.destination else {
            return Err(WireError::Unexpected("an event without a topic").into());
        };
        let same =
            |run: &EventBatchBuilder| run.topic() == topic && !run.is_full(message.body.len());
        if !self.run.as_ref().is_some_and(same) {
            self.deliver()?;
            self.run = Some(EventBatchBuilder::new(message.from, topic.clone()));
        }
        if let Some(run) = &mut self.run {
            match message.header.is_plain(Kind::Event) && message.body.len() <= INLINE_BODY {
                true => run.add_plain(message.header.id, &message.body),
                false => run.add(message),
            }
        }
        Ok(())
    }

    /// Delivers what has gathered.
    fn deliver(&mut self) -> Result<(), Fault> {
        let Some(run) = self.run.as_mut().and_then(EventBatchBuilder::finish) else {
            return Ok(());
        };
        let LinkReceiver { shared, cell } = self.link;
        let new = run.totals();
        cell.with_flow(|flow| flow.handle_received(Lane::Events, new))?;
        add(&shared.counters.received, new.messages);
        match cell.grants.permit(Action::Publish, run.topic().as_str()) {
            true => _ = shared.deliver(run, Some(cell), None),
            false => {
                let credit = Credit::new(cell, Lane::Events, new);
                shared.drop_received(Some(&credit), DropReason::NotAllowed, new.messages);
            }
        }
        Ok(())
    }
}

impl Shared {
    /// Gives events, and the credit that they hold of the link that they came over, to the local
    /// subscriptions, or those with one pattern; how many deliveries of them were lost.
    pub(crate) fn deliver(
        &self,
        mut run: EventBatch,
        over: Option<&Arc<PeerLink>>,
        only: Option<&Pattern>,
    ) -> u64 {
        let inboxes = self.inboxes.load();
        let mut matching = inboxes.matching(run.topic());
        if let Some(only) = only {
            matching.retain(|(_, inbox)| inbox.pattern() == only);
        }
        let held = run.totals();
        if held.messages > 1 && matching.iter().any(|(_, inbox)| inbox.splits_runs()) {
            return run.split().map(|single| self.deliver(single, over, only)).sum();
        }
        let credit = over.map(|cell| Credit::new(cell, Lane::Events, held));
        let Some(((_, last), others)) = matching.split_last() else {
            self.drop_received(credit.as_ref(), DropReason::NoSubscriber, held.messages);
            return held.messages;
        };
        run.credit = credit.map(Arc::new);
        let mut lost = 0;
        for (_, inbox) in others {
            lost += self.give(inbox, run.clone());
        }
        lost + self.give(last, run)
    }

    fn give(&self, inbox: &Inbox, run: EventBatch) -> u64 {
        let (came, mut gone, mut lost) = (run.totals().messages, 0, 0);
        for Lost { credit, reason, count, earlier } in inbox.push(run) {
            self.drop_received(credit.as_deref(), reason, count);
            gone += count;
            lost += if earlier { 0 } else { count };
        }
        self.counters.delivered(came, gone);
        lost
    }

    /// Gives a call to the service that it is for.
    pub(crate) fn admit(self: &Arc<Self>, message: Message, credit: Option<Credit>) {
        self.admit_with(message, credit, None);
    }

    /// The same for a call of which a broker wants to know when it is handled.
    pub(super) fn admit_with(
        self: &Arc<Self>,
        mut message: Message,
        credit: Option<Credit>,
        ticket: Option<Ticket>,
    ) {
        message.unpin();
        let subscription =
            message.delivery.as_ref().and_then(|it| it.id.stream.subscription.as_ref());
        let service = match (&message.header.destination, subscription) {
            (Destination::Topic(topic), Some(subscription)) => self
                .consumer(subscription)
                .filter(|(pattern, _)| pattern.matches(topic))
                .map(|it| it.1),
            (Destination::Service(name), None) => self.service(name),
            (Destination::Node(node), None) if *node == self.id => {
                self.service(&ServiceName::node_inbox())
            }
            (Destination::Node(_) | Destination::Topic(_), None) | (_, Some(_)) => None,
        };
        match service {
            Some(service) => service.handle_call(self, message, credit, ticket),
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
        if message.delivery.is_some() {
            drop(credit);
            self.end_delivery(
                message,
                match reason {
                    DropReason::Expired => DeliveryOutcome::Expired,
                    _ => DeliveryOutcome::Refused,
                },
            );
        } else if message.wants_reply && reason != DropReason::Cancelled {
            let text = match reason {
                DropReason::NoService => "the node no longer serves it",
                DropReason::NotAllowed => NOT_ALLOWED,
                DropReason::Expired => "its time ran out while it waited",
                _ => "it was not run",
            };
            let failure = Failure { code: reason.as_str().into(), text: text.into() };
            self.reply(message, credit, Payload::Failed(failure));
        } else {
            self.drop_received(credit.as_ref(), reason, 1);
        }
    }

    pub(crate) fn drop_received(&self, credit: Option<&Credit>, reason: DropReason, count: u64) {
        match credit {
            Some(credit) => {
                self.counters.dropped_for_others(reason, count);
                credit.report_drop(reason, count);
            }
            None if self.broker().is_some() => self.counters.dropped_for_others(reason, count),
            None => self.count_drop(self.id, reason, count),
        }
    }

    fn complete(
        &self,
        credit: Credit,
        id: Option<crate::message::MessageId>,
        outcome: RequestOutcome,
    ) {
        let link = credit.cell().id;
        match id.and_then(|id| self.end_request_over(id, link)) {
            Some(waiter) => {
                // Consumed before its caller wakes: what the caller sends next tells so.
                drop(credit);
                let _caller_left = waiter.send(outcome);
            }
            None => self.drop_received(Some(&credit), DropReason::Late, 1),
        }
    }
}
