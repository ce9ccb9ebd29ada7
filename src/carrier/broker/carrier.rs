//! The broker as the carrier of a node's messages.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::ask::Ask;
use super::client::{BrokerClient, State};
use super::unpack::{is_for, unpack};
use super::way::BrokerWay;
use super::{Ack, BrokerUrl, Guaranteed, Incoming, Kept, Me, Outgoing, StoreFailure, Via};
use crate::address::{Destination, ServiceName};
use crate::carrier::{Capability, NewGuaranteed, OutboxError, Receipt, Unsupported};
use crate::clock::unix_ms;
use crate::core::{Core, DownCause, Event, Hold, NotStored, Settle, Ticket, Way, add};
use crate::engine::{EventBatch, Path, RequestOutcome, Settlement};
use crate::identity::{Incarnation, NodeId};
use crate::message::{Header, Kind, Message, MessageId};
use crate::peer::{Address, PeerInfo, Source};
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::wire::{
    Delivery, DeliveryId, DeliveryOutcome, Envelope, Parcel, Payload, Stream, Unpacked,
};

/// The time after which a question is repeated.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// The pause before a message is stored again after a lost connection.
const STORE_AGAIN: Duration = Duration::from_millis(20);

/// A permanent refusal by the broker, for example of wrong credentials.
#[derive(Debug)]
pub(crate) struct RefusedByBroker {
    pub(crate) url: BrokerUrl,
    pub(crate) reason: String,
}

pub(crate) struct BrokerCarrier {
    pub(super) core: Arc<Core>,
    way: Arc<BrokerWay>,
    /// The guaranteed messages in handlers here.
    kept: Mutex<HashMap<KeptKey, oneshot::Sender<Ack>>>,
    /// The open questions, with the channels for the nodes that answered yes.
    asking: Mutex<HashMap<MessageId, mpsc::UnboundedSender<NodeId>>>,
    /// The broker's title while it is connected.
    title: Mutex<Option<String>>,
}

/// The key of a kept message: its id, and its durable subscription.
type KeptKey = (MessageId, Option<ServiceName>);

impl BrokerCarrier {
    /// Connects. A broker that can't be reached now is retried until the node ends.
    ///
    /// # Errors
    /// [`RefusedByBroker`] if a retry is of no use.
    pub(crate) async fn connect(
        core: &Arc<Core>,
        url: BrokerUrl,
    ) -> Result<Arc<Self>, RefusedByBroker> {
        let config = &core.config;
        let me = Me {
            id: core.id,
            name: core.name.clone(),
            mesh: config.mesh.clone(),
            max_body: config.max_body,
            ca: config.broker_ca.clone(),
            lease: config.lease,
            retry: config.retry,
        };
        let mut connection = None;
        let carrier = Arc::new_cyclic(|carrier: &Weak<Self>| {
            let gate = Arc::new(Gate(carrier.clone()));
            let (client, task) = BrokerClient::new(url.clone(), me, config.send_queue, gate);
            connection = Some(task);
            Self {
                core: core.clone(),
                way: Arc::new(BrokerWay { core: core.clone(), client }),
                kept: Mutex::new(Rank::Table, HashMap::new()),
                asking: Mutex::new(Rank::Table, HashMap::new()),
                title: Mutex::new(Rank::Table, None),
            }
        });
        if let Some(task) = connection {
            let first = task.connect_first().await;
            let first = first.map_err(|error| RefusedByBroker { url, reason: error.text })?;
            core.spawn(task.run(first));
        }
        Ok(carrier)
    }

    pub(super) fn client(&self) -> &BrokerClient {
        &self.way.client
    }

    pub(super) fn way(&self) -> Arc<dyn Way> {
        self.way.clone()
    }

    pub(super) fn address(&self) -> Address {
        let url = self.client().url();
        let text = format!("{}:{}", url.host(), url.port());
        text.parse().unwrap_or_else(|_| Address::Host(url.host().into(), url.port()))
    }

    pub(super) fn info(&self, name: String) -> PeerInfo {
        PeerInfo {
            id: NodeId::BROKER,
            incarnation: Incarnation(0),
            name,
            source: Source::Fixed,
            address: Some(self.address()),
            patterns: Vec::new(),
            services: Vec::new(),
            suspect_for: None,
        }
    }

    /// Has the broker keep a message. While it is unknown whether the broker has it, the message
    /// is sent again with the same id, until the request deadline.
    pub(super) async fn store_one(
        self: Arc<Self>,
        message: NewGuaranteed,
    ) -> Result<Receipt, OutboxError> {
        let NewGuaranteed { envelope, expires_at, not_before, .. } = message;
        let envelope = Arc::unwrap_or_clone(envelope);
        let (id, to) = (envelope.header.id, envelope.header.destination.clone());
        let parcel = Parcel::pack(envelope, &self.core.id, expires_at, not_before);
        let deadline = Instant::now() + self.core.config.request_deadline;
        let client = self.client();
        // The message was sent, and may have arrived.
        let mut may_turn_up = false;
        let failed =
            |reason: String, may_turn_up| OutboxError::NotStored(NotStored { reason, may_turn_up });
        loop {
            if !client.wait_until_up(deadline).await {
                let why = match client.state() {
                    State::Down { error } => format!("the broker can't be reached: {error}"),
                    State::Up { .. } | State::Closed => "the broker can't be reached".into(),
                };
                return Err(failed(why, may_turn_up));
            }
            let (stored, confirmed) = oneshot::channel();
            let (to, parcel) = (to.clone(), parcel.clone());
            let len = parcel.len();
            let message = Guaranteed { id, to, parcel, expires_at, stored };
            let queued = client.wait_for_room(len, deadline).await && client.store(message).is_ok();
            let confirmed = match queued {
                true => timeout_at(deadline, confirmed).await,
                false => Ok(Ok(Err(StoreFailure::Lost))),
            };
            match confirmed {
                Ok(Ok(Ok(()))) => {
                    add(&self.core.reporter.counters.stored, 1);
                    let (carrier, capability) =
                        (client.url().kind().as_str(), Capability::ProcessedReceipts);
                    return Ok(Receipt::of_broker(id, Unsupported { carrier, capability }));
                }
                Ok(Ok(Err(StoreFailure::Refused(error)))) => {
                    return Err(failed(error, may_turn_up));
                }
                Ok(Ok(Err(StoreFailure::Lost)) | Err(_)) => {
                    may_turn_up |= queued;
                    sleep(STORE_AGAIN).await;
                }
                Err(_) => return Err(failed("timed out: the broker did not confirm".into(), true)),
            }
        }
    }

    /// Waits until n nodes, this one included, have answered yes.
    pub(super) async fn wait_for_answers(&self, ask: &Ask, count: usize, within: Duration) -> bool {
        let (yes, mut answers) = mpsc::unbounded_channel();
        let id = self.core.ids.next_now();
        lock(&self.asking).insert(id, yes);
        let asking = async {
            let mut seen = HashSet::new();
            while seen.len() < count {
                self.way.ask(id, ask);
                let more = async {
                    while let Some(node) = answers.recv().await {
                        seen.insert(node);
                        if seen.len() >= count {
                            return;
                        }
                    }
                };
                let _ask_again = timeout(ASK_AGAIN, more).await;
            }
        };
        let heard = timeout(within, asking).await;
        lock(&self.asking).remove(&id);
        heard.is_ok()
    }

    fn handle_ask(&self, from: NodeId, id: MessageId, body: &[u8]) {
        let client = self.client();
        let yes = match rmp_serde::from_slice(body) {
            Ok(Ask::Subscribers(topic)) => topic.parse().is_ok_and(|it| client.has_subscribed(&it)),
            Ok(Ask::Consumers(topic)) => topic.parse().is_ok_and(|it| client.has_consumed(&it)),
            Ok(Ask::Instances(name)) => name.parse().is_ok_and(|it| client.has_served(&it)),
            Ok(Ask::Cancel(id)) => {
                let id = MessageId::from_bytes(id);
                self.core.with_front(|front, _| front.handle_cancel(Path::Broker, id));
                false
            }
            Err(_) => false,
        };
        if yes {
            let answer = self.core.ids.next_now();
            let mut header = Header::new(answer, Kind::Document, Destination::Node(from));
            header.correlation_id = Some(id);
            let payload = Payload::Reply(bytes::Bytes::new());
            let parcel = self.way.parcel(Envelope { header, payload });
            match client.send(Outgoing::Reply(from, parcel)) {
                Ok(()) => add(&self.core.reporter.counters.queued, 1),
                Err(reason) => self.core.reporter.count_drop(NodeId::BROKER, reason, 1),
            }
        }
    }

    fn handle_message(
        &self,
        via: Via,
        from: NodeId,
        Envelope { header, payload }: Envelope,
        ticket: Option<oneshot::Sender<()>>,
    ) {
        let core = &self.core;
        let for_here = is_for(core, &via, &header);
        match (via, payload) {
            (Via::Topic(topic, only), Payload::Event(body)) if for_here => {
                add(&core.reporter.counters.received, 1);
                let mut message = Message::new(from, header, body);
                message.unpin();
                let batch = EventBatch::single(topic, message);
                core.deliver(batch, Path::Broker, only.as_ref(), &|_| None);
            }
            (Via::All, Payload::Request(body)) => self.handle_ask(from, header.id, &body),
            (Via::Service(_) | Via::Inbox, Payload::Call(body)) if for_here => {
                self.handle_call(Message::new(from, header, body), ticket.map(Ticket::Call));
            }
            (Via::Service(_) | Via::Inbox, Payload::Request(body)) if for_here => {
                self.handle_call(Message::request(from, header, body), ticket.map(Ticket::Call));
            }
            (Via::Inbox, Payload::Reply(body)) => {
                let id = header.correlation_id;
                let asker = id.and_then(|id| lock(&self.asking).get(&id).cloned());
                match asker {
                    Some(asker) => _ = asker.send(from),
                    None => {
                        let reply = Box::new(Message::new(from, header, body));
                        self.handle_outcome(id, RequestOutcome::Reply(reply));
                    }
                }
            }
            (Via::Inbox, Payload::Failed(failure)) => {
                self.handle_outcome(header.correlation_id, RequestOutcome::Failed(failure));
            }
            _ => core.reporter.counters.refused("protocol"),
        }
    }

    fn handle_call(&self, message: Message, ticket: Option<Ticket>) {
        add(&self.core.reporter.counters.received, 1);
        let mut message = Box::new(message);
        message.unpin();
        let hold = Hold::unbounded(self.way()).with_ticket(ticket);
        self.core.with_front(|front, now| front.handle_call(now, Path::Broker, message, hold));
    }

    fn handle_outcome(&self, id: Option<MessageId>, outcome: RequestOutcome) {
        let hold = Hold::unbounded(self.way());
        self.core.with_front(|front, _| front.handle_outcome(Path::Broker, id, outcome, hold));
    }

    fn handle_kept(self: &Arc<Self>, via: &Via, parcel: Parcel, kept: Kept) {
        let Kept { subscription, attempt, redelivered, ack } = kept;
        let Some(Unpacked { from, envelope, expires_at, not_before }) =
            unpack(&self.core, via, parcel)
        else {
            let unreadable = DeliveryOutcome::Rejected("the message can't be read".into());
            let _gone = ack.send(Ack::Ended(unreadable));
            return;
        };
        let now = unix_ms();
        if expires_at.is_some_and(|at| at <= now) {
            let _gone = ack.send(Ack::Ended(DeliveryOutcome::Expired));
            return;
        }
        if let Some(wait) = not_before.and_then(|at| at.checked_sub(now)).filter(|wait| *wait > 0) {
            let _gone = ack.send(Ack::Later(Duration::from_millis(wait)));
            return;
        }
        let (Payload::Event(body) | Payload::Call(body)) = envelope.payload else {
            let other = DeliveryOutcome::Rejected("not an event or a one-way message".into());
            let _gone = ack.send(Ack::Ended(other));
            return;
        };
        match lock(&self.kept).entry((envelope.header.id, subscription.clone())) {
            Entry::Vacant(entry) => _ = entry.insert(ack),
            // After a lost connection, a broker redelivers messages that are still being handled.
            Entry::Occupied(_) => return,
        }
        let mut message = Message::new(from, envelope.header, body);
        let id = DeliveryId { stream: Stream { epoch: 0, subscription }, seq: 0 };
        message.delivery = Some(Arc::new(Delivery { id, floor: 0, attempt, redelivered }));
        self.handle_call(message, Some(Ticket::Kept(self.clone())));
    }

    fn handle_state(&self, state: &State) {
        let core = &self.core;
        let event = match state {
            State::Up { title } => {
                *lock(&self.title) = Some(title.clone());
                add(&core.reporter.counters.links, 1);
                tracing::info!(broker = %self.client().url(), title, "the broker is connected");
                Event::PeerUp(Box::new(self.info(title.clone())))
            }
            State::Down { error } => {
                core.with_front(|front, _| front.handle_broker_lost());
                match lock(&self.title).take() {
                    Some(name) => {
                        Event::PeerDown { id: NodeId::BROKER, name, reason: DownCause::Lost }
                    }
                    None => {
                        let (address, reason) = (Some(self.address()), error.clone());
                        Event::Refused { address, reason, count: 1 }
                    }
                }
            }
            State::Closed => {
                let Some(name) = lock(&self.title).take() else { return };
                Event::PeerDown { id: NodeId::BROKER, name, reason: DownCause::ShutDownHere }
            }
        };
        core.routes.notify();
        core.reporter.report_unlogged(event);
    }
}

impl Settle for BrokerCarrier {
    fn settle(self: Arc<Self>, settlement: Settlement) {
        let subscription = settlement.delivery.id.stream.subscription.clone();
        let ack = lock(&self.kept).remove(&(settlement.id, subscription));
        if let (Some(ack), Some(outcome)) = (ack, settlement.outcome) {
            let _connection_lost = ack.send(Ack::Ended(outcome));
        }
    }
}

/// The receiver of a session's messages. It holds the node weakly, since sessions hold it.
struct Gate(Weak<BrokerCarrier>);

impl Gate {
    fn with(&self, act: impl FnOnce(&Arc<BrokerCarrier>)) {
        if let Some(carrier) = self.0.upgrade() {
            act(&carrier);
        }
    }
}

impl Incoming for Gate {
    fn handle_message(&self, via: Via, parcel: Parcel, ticket: Option<oneshot::Sender<()>>) {
        self.with(|carrier| {
            if let Some(Unpacked { from, envelope, .. }) = unpack(&carrier.core, &via, parcel) {
                carrier.handle_message(via, from, envelope, ticket);
            }
        });
    }

    fn handle_kept(&self, via: Via, parcel: Parcel, kept: Kept) {
        self.with(|carrier| carrier.handle_kept(&via, parcel, kept));
    }

    fn handle_unrouted(&self, id: MessageId) {
        self.with(|carrier| {
            if !carrier.core.with_front(|front, _| front.handle_unrouted(id)) {
                carrier.core.reporter.count_drop(NodeId::BROKER, DropReason::NoService, 1);
            }
        });
    }

    fn handle_state(&self, state: &State) {
        self.with(|carrier| carrier.handle_state(state));
    }

    fn handle_dropped(&self, reason: DropReason, count: u64) {
        self.with(|carrier| carrier.core.reporter.count_drop(NodeId::BROKER, reason, count));
    }
}
