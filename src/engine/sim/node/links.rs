//! What links bring, and what membership decides.

use bytes::Bytes;

use super::{LIMITS, Life, Link, MAX_BODY, Request, SEND_QUEUE, SimHold, SimNode, node_id};
use crate::address::{Destination, Pattern};
use crate::engine::front::CallKey;
use crate::engine::sim::ledger::Ledger;
use crate::engine::sim::rules::Rule;
use crate::engine::{
    Action, Budget, Connection, Delivered, DownReason, EventBatch, Flow, Incoming, LinkId,
    MeshEvent, Path, ReceivedControl, ReceivedMessage, TargetKey, deliver, incoming, may_publish,
};
use crate::message::{Message, MessageId};
use crate::peer::Address;
use crate::report::DropReason;
use crate::trust::Grants;
use crate::wire::{
    Answer, Bye, Control, DeliveryOutcome, Envelope, Lane, Payload, Record, Totals, decode,
};

impl SimNode {
    pub(in super::super) fn handle_connected(
        &mut self,
        link: LinkId,
        target: Option<TargetKey>,
        life: Life,
    ) {
        let peer = node_id(life.node);
        let rule = self.rules.get(&peer).copied().unwrap_or_default();
        let grants = rule.grants();
        let share = Budget::new(u64::MAX).share();
        let flow = Flow::new(self.now.time, self.id, &LIMITS, SEND_QUEUE, share);
        let (open, epochs_told) = (false, false);
        let end = Link { peer, life, flow, grants: grants.clone(), rule, open, epochs_told };
        self.links.insert(link, end);
        let claimed = Some(peer);
        let connection = Connection { grants, claimed, target, ..Connection::default() };
        self.mesh.handle_connected(self.now.time, link, connection);
    }

    pub(in super::super) fn handle_dial_failed(&mut self, target: &TargetKey) {
        self.mesh.handle_dial_failed(self.now.time, target, "unreachable".into());
    }

    pub(in super::super) fn handle_closed(&mut self, link: LinkId) {
        self.mesh.handle_closed(self.now.time, link, DownReason::Closed);
    }

    pub(in super::super) fn handle_released(&mut self, link: LinkId) {
        if let Some(end) = self.links.get_mut(&link) {
            end.flow.handle_released(1);
        }
        self.transmit(link);
    }

    pub(in super::super) fn handle_batch(
        &mut self,
        link: LinkId,
        frames: Vec<Bytes>,
        ledger: &mut Ledger,
    ) {
        let Some(end) = self.links.get_mut(&link) else {
            return;
        };
        let (me, peer) = (self.id, end.peer);
        let mut batch = decode(frames, &me, &peer, MAX_BODY as usize).expect("peers are honest");
        end.flow.handle_preamble(self.now.time, &batch.preamble).expect("peers are honest");
        while let Some(record) = batch.next_record().expect("peers are honest") {
            // A record may end the link, or the process; what follows it is ignored.
            let Some(end) = self.links.get(&link).filter(|_| !self.dead) else {
                return;
            };
            let wanted = judge(&record, end);
            let incoming = incoming(record, peer, end.open, &end.grants).expect("peers are honest");
            if let Some((message, wanted)) = wanted {
                let taken = is_taken(&incoming, &end.grants);
                assert_eq!(taken, wanted, "{message} by {:?}", end.rule);
                if let Incoming::Message { received: ReceivedMessage::RefusedDelivery(_), .. } =
                    &incoming
                {
                    ledger.promises.handle_refused_by_rule(message);
                }
            }
            match incoming {
                Incoming::Event(message) => self.handle_event(link, message, ledger),
                Incoming::Message { received, lane, cost } => {
                    self.handle_message(link, received, lane, Totals::one(cost), ledger);
                }
                Incoming::Control(control) => self.handle_control(link, control, ledger),
                Incoming::Unknown => panic!("an unknown record"),
            }
            self.perform(ledger);
        }
        self.perform(ledger);
    }

    fn handle_control(&mut self, link: LinkId, control: ReceivedControl, ledger: &mut Ledger) {
        let end = self.links.get_mut(&link).expect("it is there");
        let peer = end.peer;
        match control {
            ReceivedControl::DropReport(counts) => {
                let news = end.flow.handle_drop_report(&counts).expect("peers are honest");
                for (reason, count) in news {
                    ledger.dropped(self.life, reason, count);
                }
            }
            ReceivedControl::Cancel(id) => {
                let path = Path::Link(link);
                self.taken_back.insert(CallKey { path, id });
                self.front.handle_cancel(path, id);
            }
            ReceivedControl::Mesh(control) => {
                self.mesh.handle_control(self.now.time, link, control);
            }
            ReceivedControl::Answers(answers) => {
                if let Some(store) = &mut self.store {
                    for answer in answers {
                        store.outbox.handle_answer(self.now, peer, answer);
                    }
                }
            }
            ReceivedControl::Epochs(epochs, moment) => {
                let first = !std::mem::replace(&mut end.epochs_told, true);
                if let Some(store) = &mut self.store {
                    store.inbox.handle_epochs(peer, &epochs, moment);
                    if first {
                        self.announce_inbox(peer);
                    }
                }
            }
            ReceivedControl::Inbox(info, denial) => {
                let (rule, grants) = (end.rule, end.grants.clone());
                let allowed = |pattern: &Pattern| rule.lets_subscribe(pattern.as_str());
                let mut taken = info.subscriptions.iter().map(|(_, pattern)| pattern);
                assert!(taken.all(allowed), "it was not allowed");
                assert!(rule != Rule::All || denial.is_none(), "it was allowed");
                if let Some(denial) = denial {
                    ledger.seen.add("inboxes that a rule kept subscriptions of", 1);
                    end.flow.enqueue_control(&denial);
                    self.transmit(link);
                }
                if let Some(store) = &mut self.store {
                    store.outbox.handle_inbox(self.now, peer, *info, &grants);
                }
                self.routes_changed = true;
            }
        }
    }

    fn handle_message(
        &mut self,
        link: LinkId,
        received: ReceivedMessage,
        lane: Lane,
        held: Totals,
        ledger: &mut Ledger,
    ) {
        let end = self.links.get_mut(&link).expect("it is there");
        end.flow.handle_received(lane, held).expect("peers are honest");
        let path = Path::Link(link);
        let hold = SimHold { path, lane, held, returned: self.returned.clone() };
        match received {
            ReceivedMessage::Call(message) => {
                self.front.handle_call(self.now.time, path, message, hold);
            }
            ReceivedMessage::RefusedCall(message) => {
                self.front.handle_refused(path, message, hold, DropReason::NotAllowed);
            }
            ReceivedMessage::Outcome(id, outcome) => {
                self.front.handle_outcome(path, id, outcome, hold);
            }
            ReceivedMessage::Delivery(message) if self.store.is_some() => {
                self.handle_delivery(message, hold, ledger);
            }
            ReceivedMessage::Delivery(_) => panic!("nobody sends one to a node without an inbox"),
            ReceivedMessage::RefusedDelivery(answer) => self.answer_over(link, hold, answer),
        }
    }

    fn answer_over(&mut self, link: LinkId, hold: SimHold, answer: Answer) {
        drop(hold);
        if let Some(end) = self.links.get_mut(&link) {
            end.flow.enqueue_control(&Control::Answers(vec![answer]));
        }
        self.transmit(link);
    }

    fn handle_event(&mut self, link: LinkId, message: Message, ledger: &mut Ledger) {
        let end = self.links.get_mut(&link).expect("it is there");
        let new = Totals::one(message.cost());
        end.flow.handle_received(Lane::Events, new).expect("peers are honest");
        let Destination::Topic(topic) = message.header.destination.clone() else { panic!() };
        let (path, lane) = (Path::Link(link), Lane::Events);
        let hold = |held| Some(SimHold { path, lane, held, returned: self.returned.clone() });
        if !may_publish(&end.grants, topic.as_str()) {
            ledger.seen.add("messages that a rule refused", 1);
            end.flow.handle_dropped(DropReason::NotAllowed, 1);
            drop(hold(new));
            return;
        }
        let sink = self.subscription.pattern.matches(&topic).then_some(&self.subscription);
        let mut dropped = Vec::new();
        let batch = EventBatch::single(topic, message);
        deliver(batch, sink.as_slice(), &hold, &mut |outcome| match outcome {
            Delivered::NoSubscriber(hold, count) => {
                dropped.extend(hold.map(|it| (it.path, DropReason::NoSubscriber, count)));
            }
            Delivered::Pushed(_, lost) => dropped.extend(
                lost.into_iter()
                    .filter_map(|it| Some((it.hold.as_ref()?.path, it.reason, it.count))),
            ),
        });
        for (path, reason, count) in dropped {
            if let Some(end) = self.end(path) {
                end.flow.handle_dropped(reason, count);
            } else {
                // Its sender counts it as in doubt.
                ledger.seen.add("queued calls that were lost with their link", count);
            }
        }
        if !self.subscriber_busy {
            self.take_later();
        }
    }

    /// This end of a path, if that is a link that lasts.
    pub(super) fn end(&mut self, path: Path) -> Option<&mut Link> {
        let Path::Link(link) = path else { return None };
        self.links.get_mut(&link)
    }

    pub(super) fn perform_action(&mut self, action: Action, ledger: &mut Ledger) {
        match action {
            Action::Dial { target, addresses } => {
                let Address::Memory(address) = addresses[0] else { panic!() };
                self.requests.push_back(Request::Dial { target, address: address as usize });
            }
            Action::Send(link, control) => {
                if let Some(end) = self.links.get_mut(&link) {
                    end.flow.enqueue_control(&control);
                }
                self.transmit(link);
            }
            Action::Open { link, limits } => {
                if let Some(end) = self.links.get_mut(&link) {
                    end.flow.handle_limits(&limits);
                    end.open = true;
                }
            }
            Action::Close { link, reason } => {
                match reason {
                    DownReason::Bye(Bye::Duplicate) => ledger.seen.add("duplicate links", 1),
                    DownReason::Replaced => {
                        ledger.seen.add("links replaced by a new incarnation's", 1);
                    }
                    DownReason::Distrusted => {
                        ledger.seen.add("links that ended since a rule changed", 1);
                    }
                    DownReason::Violation(text) => panic!("peers are honest: {text}"),
                    _ => {}
                }
                self.transmit(link);
                self.requests.push_back(Request::Close(link));
                if let Some(mut end) = self.links.remove(&link) {
                    let loss = end.flow.close();
                    let mut more = self.front.handle_link_lost(link, end.peer, &loss);
                    while more {
                        more = self.front.forget_lost();
                    }
                }
            }
            Action::Report(MeshEvent::IdentityConflict { .. }) => panic!("ids are unique here"),
            Action::Report(MeshEvent::PeerUp(peer)) => self.handle_link_up(peer.id, ledger),
            Action::Report(MeshEvent::PeerDown { id, .. }) => {
                if let Some(store) = &mut self.store {
                    store.outbox.handle_link_down(self.now, id);
                    store.inbox.handle_link_down(id);
                }
            }
            Action::Admit(_) | Action::Report(_) => {}
            Action::Route { link, peer, change } => {
                self.routing.apply(peer, link, || Some(link), change);
                self.routes_changed = true;
            }
        }
    }
}

/// A message, and whether it is to be taken, by the rule alone.
fn judge(record: &Record, end: &Link) -> Option<(MessageId, bool)> {
    let Record::Message(Envelope { header, payload }) = record else { return None };
    let outcome = matches!(payload, Payload::Reply(_) | Payload::Failed(_));
    (!outcome).then(|| (header.id, end.rule.lets_send(&header.destination)))
}

/// Whether the engine takes a message.
fn is_taken(incoming: &Incoming, grants: &Grants) -> bool {
    match incoming {
        Incoming::Event(message) => match &message.header.destination {
            Destination::Topic(topic) => may_publish(grants, topic.as_str()),
            _ => false,
        },
        Incoming::Message { received, .. } => match received {
            ReceivedMessage::Call(_) | ReceivedMessage::Delivery(_) => true,
            ReceivedMessage::RefusedDelivery(answer) => {
                !matches!(answer.outcome, DeliveryOutcome::Rejected(_))
            }
            ReceivedMessage::RefusedCall(_) | ReceivedMessage::Outcome(..) => false,
        },
        Incoming::Control(_) | Incoming::Unknown => false,
    }
}
