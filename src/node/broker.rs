//! Broker mode as the node sees it: what goes to the client in place of links, and what it brings.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::counters::add;
use super::event_batch::EventBatch;
use super::events::{DownCause, Event};
use super::guaranteed::{NotStored, OutboxError, Receipt};
use super::service_runner::LOCAL;
use super::shared::{RequestOutcome, Shared};
use crate::address::{Destination, Pattern, Recipient, ServiceName, Topic};
use crate::broker::{
    BrokerAck, BrokerClient, BrokerKind, Command, Incoming, Kept, Pace, State, StoreFailure,
    Ticket, Unsupported, Via,
};
use crate::clock::unix_ms;
use crate::engine::LinkId;
use crate::engine::delivery::NewMessage;
use crate::identity::{Incarnation, NodeId};
use crate::message::{Body, Header, Kind, Message, MessageId};
use crate::peer::{Address, PeerInfo, Source, Unreachable};
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::wire::{Delivery, DeliveryId, Envelope, Parcel, Payload, Stream, Unpacked};

/// Stands for the link of what goes by a broker.
pub(super) const BROKER: LinkId = LinkId(u64::MAX);
/// How long answers are waited for before it is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Between two attempts to store a message after a connection was lost.
const STORE_AGAIN: Duration = Duration::from_millis(20);

/// What a node in broker mode has besides what every node has.
pub(crate) struct Brokered {
    pub(crate) client: Arc<BrokerClient>,
    kept: Mutex<Ledger>,
    /// Who waits for answers to a question.
    asking: Mutex<HashMap<MessageId, mpsc::UnboundedSender<NodeId>>>,
    /// What the broker called itself while it was there.
    title: Mutex<Option<String>>,
}

/// The guaranteed messages that are handled here, by numbers of our own.
#[derive(Default)]
struct Ledger {
    next: u64,
    outcomes: HashMap<u64, (MessageId, tokio::sync::oneshot::Sender<BrokerAck>)>,
    ids: HashSet<(MessageId, Option<ServiceName>)>,
}

/// What nodes ask each other over a broker, since that tells nobody who is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Who subscribes to that topic?
    Subscribers(String),
    /// Who has a durable subscription to that topic?
    Consumers(String),
    /// Who serves that name?
    Instances(String),
    /// Who handles that message? Its sender no longer wants it.
    Cancel([u8; 16]),
}

impl Brokered {
    pub(crate) fn new(client: Arc<BrokerClient>) -> Self {
        Self {
            client,
            kept: Mutex::new(Rank::Table, Ledger::default()),
            asking: Mutex::new(Rank::Table, HashMap::default()),
            title: Mutex::new(Rank::Table, None),
        }
    }

    /// What the broker can't do, as an error.
    pub(super) fn lacks(&self, what: &'static str) -> Unsupported {
        Unsupported { broker: self.client.kind(), what }
    }

    /// Whether it keeps guaranteed messages.
    pub(crate) fn can_keep(&self) -> Result<(), Unsupported> {
        match self.client.kind() {
            BrokerKind::Embedded => Err(self.lacks("guaranteed messages")),
            BrokerKind::Nats | BrokerKind::RabbitMq => Ok(()),
        }
    }

    fn address(&self) -> Address {
        let url = self.client.url();
        let text = format!("{}:{}", url.host(), url.port());
        text.parse().unwrap_or_else(|_| Address::Host(url.host().into(), url.port()))
    }

    /// The broker, as the one peer that this node is linked to.
    pub(super) fn peers(&self) -> Vec<PeerInfo> {
        match self.client.state() {
            State::Up { title } => vec![self.info(title)],
            State::Down { .. } | State::Closed => Vec::new(),
        }
    }

    fn info(&self, name: String) -> PeerInfo {
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

    pub(super) fn unreachable(&self) -> Vec<Unreachable> {
        let State::Down { error } = self.client.state() else { return Vec::new() };
        vec![Unreachable {
            address: self.address(),
            id: Some(NodeId::BROKER),
            source: Source::Fixed,
            failures: 1,
            last_error: error,
        }]
    }
}

impl Shared {
    pub(crate) fn broker(&self) -> Option<&Brokered> {
        self.broker.get()
    }

    /// Publishes an event by the broker.
    pub(super) async fn publish_by_broker(
        &self,
        broker: &Brokered,
        topic: &Topic,
        envelope: Envelope,
        pace: Pace,
    ) -> Result<(), DropReason> {
        let parcel = Parcel::pack(envelope, &self.id, None, None);
        broker.client.send_at(Command::Publish(topic.clone(), parcel), pace).await
    }

    /// Sends a call or a request by the broker.
    pub(super) fn call_by_broker(
        &self,
        broker: &Brokered,
        header: Header,
        body: Body,
        wants_reply: bool,
    ) -> Result<(), DropReason> {
        let to = match &header.destination {
            Destination::Service(name) => Recipient::Service(name.clone()),
            Destination::Node(node) => Recipient::Node(*node),
            Destination::Topic(_) => return Err(DropReason::NoService),
        };
        let (id, ttl) = (header.id, header.time_to_live);
        let payload = match wants_reply {
            true => Payload::Request(body.bytes),
            false => Payload::Call(body.bytes),
        };
        let parcel = Parcel::pack(Envelope { header, payload }, &self.id, None, None);
        broker.client.send(Command::Call(to, id, ttl, parcel))?;
        add(&self.counters.queued, 1);
        Ok(())
    }

    pub(super) fn reply_by_broker(&self, broker: &Brokered, to: NodeId, envelope: Envelope) {
        let parcel = Parcel::pack(envelope, &self.id, None, None);
        match broker.client.send(Command::Reply(to, parcel)) {
            Ok(()) => add(&self.counters.queued, 1),
            Err(reason) => self.count_drop(NodeId::BROKER, reason, 1),
        }
    }

    /// Has the broker keep a message. One that it may or may not have got is sent again, under
    /// its id, until the time for a request is over.
    pub(super) async fn store_by_broker(
        &self,
        broker: &Brokered,
        message: NewMessage,
    ) -> Result<Receipt, OutboxError> {
        let NewMessage { envelope, expires_at, not_before, .. } = message;
        let envelope = Arc::unwrap_or_clone(envelope);
        let (id, to) = (envelope.header.id, envelope.header.destination.clone());
        let parcel = Parcel::pack(envelope, &self.id, expires_at, not_before);
        let deadline = Instant::now() + self.config.request_deadline;
        let client = &broker.client;
        // It was sent, and nobody knows whether it came.
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
            let (stored, confirmed) = tokio::sync::oneshot::channel();
            let (to, parcel) = (to.clone(), parcel.clone());
            let message = crate::broker::Guaranteed { id, to, parcel, expires_at, stored };
            let command = Command::Store(Box::new(message));
            let confirmed = match client.send_at(command, Pace::Until(deadline)).await {
                Ok(()) => timeout_at(deadline, confirmed).await,
                Err(_) => Ok(Ok(Err(StoreFailure::Lost))),
            };
            match confirmed {
                Ok(Ok(Ok(()))) => {
                    add(&self.counters.stored, 1);
                    return Ok(Receipt::of_broker(id, client.kind()));
                }
                Ok(Ok(Err(StoreFailure::Refused(error)))) => {
                    return Err(failed(error, may_turn_up));
                }
                Ok(Ok(Err(StoreFailure::Lost)) | Err(_)) => {
                    may_turn_up = true;
                    sleep(STORE_AGAIN).await;
                }
                Err(_) => return Err(failed("the broker did not confirm in time".into(), true)),
            }
        }
    }

    /// Waits until so many nodes, this one included, have said yes.
    pub(super) async fn ask_by_broker(
        &self,
        broker: &Brokered,
        ask: &Ask,
        count: usize,
        within: Duration,
    ) -> bool {
        let (told, mut answers) = mpsc::unbounded_channel();
        let id = self.ids.next_now();
        lock(&broker.asking).insert(id, told);
        let asking = async {
            let mut seen = HashSet::new();
            while seen.len() < count {
                self.tell_by_broker(broker, id, ask);
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
        lock(&broker.asking).remove(&id);
        heard.is_ok()
    }

    fn tell_by_broker(&self, broker: &Brokered, id: MessageId, ask: &Ask) {
        let mut header = Header::new(id, Kind::Command, Destination::Node(NodeId::BROKER));
        header.reply_to = Some(self.id);
        let body = rmp_serde::to_vec(ask).unwrap_or_default();
        let envelope = Envelope { header, payload: Payload::Request(body.into()) };
        let parcel = Parcel::pack(envelope, &self.id, None, None);
        let _asked_again = broker.client.send(Command::Tell(parcel));
    }

    /// Tells whoever handles a call that its caller no longer wants it.
    pub(super) fn cancel_by_broker(&self, broker: &Brokered, id: MessageId) {
        self.tell_by_broker(broker, self.ids.next_now(), &Ask::Cancel(id.to_bytes()));
    }

    fn handle_ask(self: &Arc<Self>, broker: &Brokered, from: NodeId, id: MessageId, body: &[u8]) {
        let client = &broker.client;
        let yes = match rmp_serde::from_slice(body) {
            Ok(Ask::Subscribers(topic)) => topic.parse().is_ok_and(|it| client.has_subscribed(&it)),
            Ok(Ask::Consumers(topic)) => topic.parse().is_ok_and(|it| client.has_consumed(&it)),
            Ok(Ask::Instances(name)) => name.parse().is_ok_and(|it| client.has_served(&it)),
            Ok(Ask::Cancel(id)) => {
                let id = MessageId::from_bytes(id);
                for service in self.handling() {
                    service.handle_cancel(self, LOCAL, id);
                }
                false
            }
            Err(_) => false,
        };
        if yes {
            let answer = self.ids.next_now();
            let mut header = Header::new(answer, Kind::Document, Destination::Node(from));
            header.correlation_id = Some(id);
            let payload = Payload::Reply(bytes::Bytes::new());
            self.reply_by_broker(broker, from, Envelope { header, payload });
        }
    }

    fn handle_from_broker(
        self: &Arc<Self>,
        broker: &Brokered,
        via: Via,
        from: NodeId,
        Envelope { header, payload }: Envelope,
        ticket: Option<Ticket>,
    ) {
        match (via, payload) {
            (Via::Topic(topic, only), Payload::Event(body))
                if header.destination == Destination::Topic(topic.clone()) =>
            {
                add(&self.counters.received, 1);
                self.deliver_from_broker(topic, Message::new(from, header, body), only.as_ref());
            }
            (Via::All, Payload::Request(body)) => self.handle_ask(broker, from, header.id, &body),
            (via @ (Via::Service(_) | Via::Inbox), Payload::Call(body))
                if self.is_for(&via, &header) =>
            {
                self.admit_from_broker(Message::new(from, header, body), ticket);
            }
            (via @ (Via::Service(_) | Via::Inbox), Payload::Request(body))
                if self.is_for(&via, &header) =>
            {
                self.admit_from_broker(Message::request(from, header, body), ticket);
            }
            (Via::Inbox, Payload::Reply(body)) => {
                let Some(id) = header.correlation_id else { return };
                let asker = lock(&broker.asking).get(&id).cloned();
                match asker {
                    Some(asker) => _ = asker.send(from),
                    None => {
                        let reply = Message::new(from, header, body);
                        self.complete_from_broker(id, RequestOutcome::Reply(reply));
                    }
                }
            }
            (Via::Inbox, Payload::Failed(failure)) => {
                if let Some(id) = header.correlation_id {
                    self.complete_from_broker(id, RequestOutcome::Failed(failure));
                }
            }
            _ => self.counters.refused("protocol"),
        }
    }

    fn is_for(&self, via: &Via, header: &Header) -> bool {
        match (via, &header.destination) {
            (Via::Service(name), Destination::Service(meant)) => name == meant,
            (Via::Inbox, Destination::Node(node)) => *node == self.id,
            _ => false,
        }
    }

    fn deliver_from_broker(&self, topic: Topic, mut message: Message, only: Option<&Pattern>) {
        message.unpin();
        self.deliver(EventBatch::single(topic, message), None, only);
    }

    fn admit_from_broker(self: &Arc<Self>, message: Message, ticket: Option<Ticket>) {
        add(&self.counters.received, 1);
        let held = self.local_bytes.load(std::sync::atomic::Ordering::Relaxed);
        match held > 0 && held + message.cost() > self.config.window {
            true => self.decline(&message, None, DropReason::SlowPeer),
            false => self.admit_with(message, None, ticket),
        }
    }

    fn complete_from_broker(&self, id: MessageId, outcome: RequestOutcome) {
        match self.end_request_over(id, BROKER) {
            Some(waiter) => _ = waiter.send(outcome),
            None => self.counters.dropped_for_others(DropReason::Late, 1),
        }
    }

    fn handle_kept(self: &Arc<Self>, broker: &Brokered, via: Via, parcel: Parcel, kept: Kept) {
        let Some(Unpacked { from, envelope, expires_at, not_before }) = self.unpack(&via, parcel)
        else {
            let _gone = kept.outcome.send(BrokerAck::Rejected("it can't be read".into()));
            return;
        };
        let now = unix_ms();
        if expires_at.is_some_and(|at| at <= now) {
            let _gone = kept.outcome.send(BrokerAck::Expired);
            return;
        }
        if let Some(wait) = not_before.and_then(|at| at.checked_sub(now)).filter(|wait| *wait > 0) {
            let _gone = kept.outcome.send(BrokerAck::Later(Duration::from_millis(wait)));
            return;
        }
        let (Payload::Event(body) | Payload::Call(body)) = envelope.payload else { return };
        let Kept { subscription, attempt, redelivered, outcome } = kept;
        let mut ledger = lock(&broker.kept);
        // A broker that lost its connection sends again what is still being handled.
        if !ledger.ids.insert((envelope.header.id, subscription.clone())) {
            return;
        }
        ledger.next += 1;
        let seq = ledger.next;
        ledger.outcomes.insert(seq, (envelope.header.id, outcome));
        drop(ledger);
        let mut message = Message::new(from, envelope.header, body);
        let id = DeliveryId { stream: Stream { epoch: 0, subscription }, seq };
        message.delivery = Some(Arc::new(Delivery { id, floor: 0, attempt, redelivered }));
        add(&self.counters.received, 1);
        self.admit_with(message, None, None);
    }

    /// The handler of a guaranteed message ended, or it has none; `None` if it is to come again.
    pub(super) fn settle_by_broker(
        &self,
        broker: &Brokered,
        id: &DeliveryId,
        outcome: Option<crate::wire::DeliveryOutcome>,
    ) {
        let mut ledger = lock(&broker.kept);
        let Some((message, told)) = ledger.outcomes.remove(&id.seq) else { return };
        ledger.ids.remove(&(message, id.stream.subscription.clone()));
        drop(ledger);
        use crate::wire::DeliveryOutcome as Ended;
        let outcome = match outcome {
            Some(Ended::Processed) => BrokerAck::Processed,
            Some(Ended::Failed(text)) => BrokerAck::Failed(text),
            Some(Ended::Rejected(text)) => BrokerAck::Rejected(text),
            Some(Ended::Expired) => BrokerAck::Expired,
            Some(Ended::Refused | Ended::NoInbox) | None => BrokerAck::Refused,
        };
        let _connection_lost = told.send(outcome);
    }

    /// What a parcel holds. One without a head comes from another program.
    fn unpack(&self, via: &Via, parcel: Parcel) -> Option<Unpacked> {
        if parcel.head.is_empty() {
            let (destination, kind) = match via {
                Via::Topic(topic, _) => (Destination::Topic(topic.clone()), Kind::Event),
                Via::Service(name) => (Destination::Service(name.clone()), Kind::Command),
                Via::Inbox => (Destination::Node(self.id), Kind::Command),
                Via::All => return None,
            };
            let header = Header::new(self.ids.next_now(), kind, destination);
            let payload = match kind {
                Kind::Event => Payload::Event(parcel.body),
                Kind::Command | Kind::Document => Payload::Call(parcel.body),
            };
            let (from, envelope) = (NodeId::BROKER, Envelope { header, payload });
            return Some(Unpacked { from, envelope, expires_at: None, not_before: None });
        }
        let unpacked = parcel.unpack(&self.id, self.config.max_body);
        if let Err(error) = &unpacked {
            tracing::debug!(%error, "a message that can't be read came from the broker");
            self.counters.refused("protocol");
        }
        unpacked.ok()
    }

    fn handle_broker_state(self: &Arc<Self>, broker: &Brokered, state: &State) {
        let event = match state {
            State::Up { title } => {
                *lock(&broker.title) = Some(title.clone());
                add(&self.counters.links, 1);
                tracing::info!(broker = %broker.client.url(), title, "the broker is there");
                Event::PeerUp(Box::new(broker.info(title.clone())))
            }
            State::Down { error } => {
                self.fail_requests_over(BROKER);
                match lock(&broker.title).take() {
                    Some(name) => {
                        Event::PeerDown { id: NodeId::BROKER, name, reason: DownCause::Lost }
                    }
                    None => {
                        let (address, reason) = (Some(broker.address()), error.clone());
                        Event::Refused { address, reason }
                    }
                }
            }
            State::Closed => {
                let Some(name) = lock(&broker.title).take() else { return };
                Event::PeerDown { id: NodeId::BROKER, name, reason: DownCause::ShutDownHere }
            }
        };
        self.notify_routes_changed();
        let _nobody_watches = self.events.send(event);
    }
}

/// The way in. Sessions hold it, and it does not keep the node alive.
pub(crate) struct BrokerGate(pub(crate) Weak<Shared>);

impl BrokerGate {
    fn with(&self, act: impl FnOnce(&Arc<Shared>, &Brokered)) {
        if let Some(shared) = self.0.upgrade()
            && let Some(broker) = shared.broker()
        {
            act(&shared, broker);
        }
    }
}

impl Incoming for BrokerGate {
    fn handle_message(&self, via: Via, parcel: Parcel, ticket: Option<Ticket>) {
        self.with(|shared, broker| {
            if let Some(Unpacked { from, envelope, .. }) = shared.unpack(&via, parcel) {
                shared.handle_from_broker(broker, via, from, envelope, ticket);
            }
        });
    }

    fn handle_kept(&self, via: Via, parcel: Parcel, kept: Kept) {
        self.with(|shared, broker| shared.handle_kept(broker, via, parcel, kept));
    }

    fn handle_unrouted(&self, id: MessageId) {
        self.with(|shared, _| match shared.end_request_over(id, BROKER) {
            Some(waiter) => _ = waiter.send(RequestOutcome::Unrouted),
            None => shared.count_drop(NodeId::BROKER, DropReason::NoService, 1),
        });
    }

    fn handle_state(&self, state: &State) {
        self.with(|shared, broker| shared.handle_broker_state(broker, state));
    }

    fn handle_dropped(&self, reason: DropReason, count: u64) {
        self.with(|shared, _| shared.count_drop(NodeId::BROKER, reason, count));
    }
}
