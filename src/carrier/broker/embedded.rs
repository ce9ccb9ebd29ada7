//! A session with the embedded broker: one DEALER. `hub.rs` documents the messages between them.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{interval, timeout};

use super::hub::{MAX_BODY, SILENCE, WINDOW, number, op, parsed, text};
use super::outlet::{Outlet, cost};
use super::session::{
    ANSWER, ConnectError, Connecting, Ending, Failed, Lost, Performed, Session, boxed,
};
use super::{BrokerUrl, Incoming, Me, Outgoing, Via};
use crate::address::{Pattern, Recipient, ServiceName};
use crate::engine::{Connection, TargetKey};
use crate::link::{Acceptor, Link, Receiver};
use crate::message::MessageId;
use crate::peer::Address;
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::tunnel::{End, FrontDoor, FrontDoorConfig, GateLimits, Latency, Refusal, Watch};
use crate::wire::Parcel;

/// The interval at which a node sends a sign of life, which the broker answers.
const PING: Duration = Duration::from_secs(1);
/// The number of bytes after which the broker is notified that they were taken.
const TELL_TAKEN: u64 = WINDOW / 16;
/// The most bytes that wait in the connection. More wait in the client's queue, which counts them.
const MOST_WAITING: u64 = 1024 * 1024;

/// Connects to a broker.
pub(super) fn connect<'a>(
    url: &'a BrokerUrl,
    me: &'a Me,
    incoming: &'a Arc<dyn Incoming>,
) -> Connecting<'a> {
    boxed(EmbeddedSession::connect(url, me, incoming))
}

struct EmbeddedSession {
    title: String,
    shared: Arc<Shared>,
    /// Held while a command waits for its answer.
    asking: tokio::sync::Mutex<watch::Receiver<u64>>,
    pings: JoinHandle<()>,
    /// Owns the connection.
    _door: Arc<FrontDoor>,
}

/// The parts that the session and its connection share.
struct Shared {
    outlet: Outlet,
    ending: Ending,
}

impl EmbeddedSession {
    async fn connect(
        url: &BrokerUrl,
        me: &Me,
        incoming: &Arc<dyn Incoming>,
    ) -> Result<Self, ConnectError> {
        if me.max_body > MAX_BODY {
            return Err(ConnectError::for_good(format!(
                "max_body is {} bytes, and the embedded broker takes at most {MAX_BODY}; lower it",
                me.max_body
            )));
        }
        let (welcomed, welcome) = oneshot::channel();
        let (done, answers) = watch::channel(0);
        let exit = Arc::new(Exit(Mutex::default()));
        *lock(&exit.0) = Some(Beginning { incoming: incoming.clone(), welcomed, done });
        let config = FrontDoorConfig {
            tls: None,
            gate: GateLimits::for_bodies(MAX_BODY as u64),
            handshake_timeout: ANSWER,
            latency: Latency::default(),
            max_pending: 0,
            max_connections: 0,
            loopback_only: false,
        };
        let door = Arc::new(FrontDoor::new(config, End::BrokerClient, exit.clone(), exit));
        let address = match url.host().parse::<IpAddr>() {
            Ok(ip) => Address::Tcp((ip, url.port()).into()),
            Err(_) => Address::Host(url.host().into(), url.port()),
        };
        let target = TargetKey::Address(address.clone());
        let dialled = door.dial(&target, &[address]).await;
        dialled.map_err(ConnectError::passing)?;
        let late = |_| ConnectError::passing("timed out after 5 s: no answer");
        let connected = timeout(ANSWER, async {
            let mesh = Bytes::copy_from_slice(me.mesh.as_str().as_bytes());
            let hello = vec![op(b"H"), mesh, Bytes::copy_from_slice(me.id.as_bytes())];
            let (shared, title) = welcome.await.ok()?;
            shared.outlet.control(hello);
            Some((shared, title.await.ok()?))
        });
        let Some((shared, title)) = connected.await.map_err(late)? else {
            return Err(ConnectError::passing("the broker closed the connection"));
        };
        let Some(title) = title else {
            return Err(ConnectError::for_good("the server is not a `peerbus broker`"));
        };
        let pings = tokio::spawn(keep_alive(shared.clone()));
        let asking = tokio::sync::Mutex::new(answers);
        Ok(Self { title, shared, asking, pings, _door: door })
    }

    /// Sends a control message of this side.
    fn tell(&self, frames: Vec<Bytes>) -> Result<(), Failed> {
        match self.shared.outlet.control(frames) {
            true => Ok(()),
            false => Err(Failed::lost("the broker reads nothing")),
        }
    }

    /// Sends a command, and waits until the broker has carried it out.
    async fn ask(&self, frames: Vec<Bytes>) -> Result<(), Failed> {
        let mut answers = self.asking.lock().await;
        answers.borrow_and_update();
        self.tell(frames)?;
        match timeout(ANSWER, answers.changed()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Failed::lost("the connection was closed")),
            Err(_) => Err(Failed::lost("timed out after 5 s: no answer")),
        }
    }

    /// Sends a message once the connection has room for it.
    async fn send_in_turn(&self, frames: Vec<Bytes>) -> Result<(), Failed> {
        tokio::select! {
            biased;
            () = self.shared.outlet.send_in_turn(frames, MOST_WAITING) => Ok(()),
            lost = self.shared.ending.lost() => Err(Failed::Lost(lost)),
        }
    }

    async fn say_goodbye(&self) {
        let closing = async {
            // After all messages.
            self.shared.outlet.send_in_turn(vec![op(b"B")], 0).await;
            self.shared.outlet.link().close();
            self.shared.ending.lost().await
        };
        let _too_slow = timeout(ANSWER, closing).await;
    }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn frames(message: Outgoing) -> Vec<Bytes> {
    let id = |id: MessageId| Bytes::copy_from_slice(&id.to_bytes());
    match message {
        Outgoing::Publish(topic, Parcel { head, body }) => {
            vec![op(b"P"), bytes(topic.as_str()), head, body]
        }
        Outgoing::Call(Recipient::Service(name), call, _, Parcel { head, body }) => {
            vec![op(b"C"), bytes(name.as_str()), id(call), head, body]
        }
        Outgoing::Call(Recipient::Node(node), call, _, Parcel { head, body }) => {
            vec![op(b"N"), Bytes::copy_from_slice(node.as_bytes()), id(call), head, body]
        }
        Outgoing::Reply(node, Parcel { head, body }) => {
            vec![op(b"N"), Bytes::copy_from_slice(node.as_bytes()), Bytes::new(), head, body]
        }
        Outgoing::Broadcast(Parcel { head, body }) => vec![op(b"A"), head, body],
    }
}

impl Session for EmbeddedSession {
    fn title(&self) -> String {
        self.title.clone()
    }

    fn send(&self, message: Outgoing) -> Performed<'_> {
        self.send_in_turn(frames(message)).boxed()
    }

    fn subscribe(&self, pattern: Pattern) -> Performed<'_> {
        self.ask(vec![op(b"S"), bytes(pattern.as_str())]).boxed()
    }

    fn unsubscribe(&self, pattern: Pattern) -> Performed<'_> {
        ready(self.tell(vec![op(b"U"), bytes(pattern.as_str())])).boxed()
    }

    fn serve(&self, name: ServiceName, _concurrency: u32) -> Performed<'_> {
        self.ask(vec![op(b"V"), bytes(name.as_str())]).boxed()
    }

    fn withdraw(&self, name: ServiceName) -> Performed<'_> {
        ready(self.tell(vec![op(b"X"), bytes(name.as_str())])).boxed()
    }

    fn lost(&self) -> BoxFuture<'_, Lost> {
        self.shared.ending.lost().boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.say_goodbye().boxed()
    }
}

impl Drop for EmbeddedSession {
    fn drop(&mut self) {
        self.pings.abort();
    }
}

/// Sends signs of life, and ends the connection to a silent broker.
async fn keep_alive(shared: Arc<Shared>) {
    let mut pings = interval(PING);
    loop {
        pings.tick().await;
        let link = shared.outlet.link();
        let is_silent = |heard: Instant| heard.elapsed() > SILENCE;
        if link.last_heard().is_some_and(is_silent) || !shared.outlet.control(vec![op(b".")]) {
            shared.ending.tell("the broker was silent for 5 s");
            link.close();
            return;
        }
    }
}

/// The parts of a session whose connection is not up yet.
struct Beginning {
    incoming: Arc<dyn Incoming>,
    welcomed: oneshot::Sender<Welcome>,
    done: watch::Sender<u64>,
}

/// A connection that is up, and the broker's title, once it has answered: `None` if it is no broker.
type Welcome = (Arc<Shared>, oneshot::Receiver<Option<String>>);

/// Takes the one connection that is dialled.
struct Exit(Mutex<Option<Beginning>>);

impl Acceptor for Exit {
    fn handle_connected(&self, link: Arc<dyn Link>, _: Connection) -> Arc<dyn Receiver> {
        let (outlet, ending) = (Outlet::new(link), Ending::new());
        let shared = Arc::new(Shared { outlet, ending });
        let Some(Beginning { incoming, welcomed, done }) = lock(&self.0).take() else {
            shared.outlet.link().close();
            return Arc::new(Nobody);
        };
        let (answer, title) = oneshot::channel();
        let _gave_up = welcomed.send((shared.clone(), title));
        let answer = Mutex::new(Rank::Leaf, Some(answer));
        Arc::new(Reader { incoming, shared, answer, done, taken: AtomicU64::new(0) })
    }
}

impl Watch for Exit {
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal) {
        let broker = address.as_ref().map(tracing::field::display);
        tracing::warn!(broker, %refusal, "the connection to the broker was cut");
    }
}

/// Receives nothing.
struct Nobody;

impl Receiver for Nobody {
    fn handle_batch(&self, _: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        None
    }
    fn handle_closed(&self) {}
}

/// Receives the broker's messages.
struct Reader {
    incoming: Arc<dyn Incoming>,
    shared: Arc<Shared>,
    /// Taken by the first message.
    answer: Mutex<Option<oneshot::Sender<Option<String>>>>,
    /// The number of completed commands.
    done: watch::Sender<u64>,
    /// The number of taken bytes of which the broker was not notified yet.
    taken: AtomicU64,
}

impl Receiver for Reader {
    fn handle_batch(&self, frames: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        let answer = lock(&self.answer).take();
        match answer {
            Some(answer) => {
                let title = match &frames[..] {
                    [welcome, title] if **welcome == *b"W" => text(title).map(str::to_owned),
                    _ => None,
                };
                self.shared.outlet.link().admit();
                let _gave_up = answer.send(title);
            }
            None => self.handle(&frames),
        }
        None
    }

    fn handle_closed(&self) {
        self.shared.ending.tell("the connection was closed");
    }
}

impl Reader {
    fn handle(&self, frames: &[Bytes]) {
        let Some(first) = frames.first() else { return };
        match (&first[..], &frames[1..]) {
            (b"P", [topic, head, body]) => {
                if let Some(topic) = parsed(topic) {
                    self.hand_on(Via::Topic(topic, None), head, body);
                }
            }
            (b"C", [service, head, body]) => {
                if let Some(name) = parsed(service) {
                    self.hand_on(Via::Service(name), head, body);
                }
            }
            (b"N", [head, body]) => self.hand_on(Via::Inbox, head, body),
            (b"A", [head, body]) => self.hand_on(Via::All, head, body),
            (b"K", []) => self.done.send_modify(|done| *done += 1),
            (b"R", [id]) => {
                if let Ok(id) = <[u8; 16]>::try_from(&id[..]) {
                    self.incoming.handle_unrouted(MessageId::from_bytes(id));
                }
            }
            (b"D", [count]) => self.incoming.handle_dropped(DropReason::SlowPeer, number(count)),
            _ => {}
        }
        if matches!(&first[..], b"P" | b"C" | b"N") {
            self.count_taken(cost(frames));
        }
    }

    fn hand_on(&self, via: Via, head: &Bytes, body: &Bytes) {
        let parcel = Parcel { head: head.clone(), body: body.clone() };
        self.incoming.handle_message(via, parcel, None);
    }

    /// Notifies the broker now and then of the bytes that were taken.
    fn count_taken(&self, cost: u64) {
        // One task reads.
        let taken = self.taken.load(Ordering::Relaxed) + cost;
        let told = taken >= TELL_TAKEN;
        self.taken.store(if told { 0 } else { taken }, Ordering::Relaxed);
        if told {
            let count = Bytes::copy_from_slice(&taken.to_be_bytes());
            self.shared.outlet.control(vec![op(b"F"), count]);
        }
    }
}
