//! A session with the embedded broker: one DEALER. `hub.rs` documents the messages between them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use futures_util::future::{BoxFuture, ready};
use futures_util::{FutureExt, StreamExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout};
use zeromq::{
    DealerRecvHalf, DealerSendHalf, DealerSocket, Socket, SocketEvent, SocketOptions, SocketRecv,
    SocketSend, ZmqError, ZmqMessage,
};

use super::hub::{SILENCE, WINDOW, cost, number, op, text};
use super::session::{
    ANSWER, ConnectError, Connecting, Ending, Failed, Lost, Performed, Session, boxed,
};
use super::{BrokerUrl, Incoming, Me, Outgoing, Via};
use crate::address::{Pattern, Recipient, ServiceName};
use crate::identity::random_bytes;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::wire::Parcel;

/// The interval at which each side sends a sign of life.
const PING: Duration = Duration::from_secs(1);
/// The number of bytes after which the broker is notified that they were taken.
const TELL_TAKEN: u64 = WINDOW / 16;

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
    outgoing: mpsc::UnboundedSender<Vec<Bytes>>,
    /// Notified of each completed command.
    done: tokio::sync::Mutex<mpsc::UnboundedReceiver<()>>,
    ending: Ending,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl EmbeddedSession {
    async fn connect(
        url: &BrokerUrl,
        me: &Me,
        incoming: &Arc<dyn Incoming>,
    ) -> Result<Self, ConnectError> {
        // The crate would retry until its timeout, and not report the reason.
        let probe = timeout(ANSWER, TcpStream::connect((url.host(), url.port()))).await;
        let probe = probe.map_err(|_| ConnectError::passing("timed out after 5 s: no answer"))?;
        drop(probe.map_err(ConnectError::passing)?);
        let mut options = SocketOptions::default();
        let identity = Bytes::copy_from_slice(&random_bytes::<16>());
        options
            .peer_identity(identity.try_into().map_err(|_| ConnectError::passing("no identity"))?);
        options.connect_timeout(ANSWER);
        let mut dealer = DealerSocket::with_options(options);
        let monitor = dealer.monitor();
        let host = match url.host() {
            v6 if v6.contains(':') => format!("[{v6}]"),
            host => host.to_owned(),
        };
        dealer
            .connect(&format!("tcp://{host}:{}", url.port()))
            .await
            .map_err(|error| ConnectError::passing(to_io(error)))?;
        let (mut sender, mut receiver) = dealer.split();
        let mesh = Bytes::copy_from_slice(me.mesh.as_str().as_bytes());
        let hello = vec![op(b"H"), mesh, Bytes::copy_from_slice(me.id.as_bytes())];
        send(&mut sender, hello).await.map_err(ConnectError::passing)?;
        let title = match timeout(ANSWER, receiver.recv()).await {
            Ok(Ok(message)) => match &message.into_vec()[..] {
                [welcome, title] if **welcome == *b"W" => text(title).unwrap_or("?").to_owned(),
                _ => {
                    return Err(ConnectError::for_good("the server is not a `peerbus broker`"));
                }
            },
            Ok(Err(error)) => return Err(ConnectError::passing(to_io(error))),
            Err(_) => return Err(ConnectError::passing("timed out after 5 s: no answer")),
        };
        let (outgoing, commands) = mpsc::unbounded_channel();
        let (tell_done, done) = mpsc::unbounded_channel();
        let ending = Ending::new();
        let reader = Reader {
            incoming: incoming.clone(),
            outgoing: outgoing.clone(),
            done: tell_done,
            taken: 0,
        };
        let tasks = vec![
            tokio::spawn(write(sender, commands, ending.clone())),
            tokio::spawn(reader.run(receiver, monitor, ending.clone())),
        ];
        let done = tokio::sync::Mutex::new(done);
        Ok(Self { title, outgoing, done, ending, tasks: Mutex::new(Rank::Leaf, tasks) })
    }

    fn say(&self, frames: Vec<Bytes>) {
        let _tasks_have_ended = self.outgoing.send(frames);
    }

    /// Sends a command, and waits until the broker has carried it out.
    async fn ask(&self, frames: Vec<Bytes>) -> Result<(), Failed> {
        let mut done = self.done.lock().await;
        self.say(frames);
        match timeout(ANSWER, done.recv()).await {
            Ok(Some(())) => Ok(()),
            Ok(None) => Err(Failed::lost("the connection was closed")),
            Err(_) => Err(Failed::lost("timed out after 5 s: no answer")),
        }
    }

    async fn say_goodbye(&self) {
        self.say(vec![op(b"B")]);
        // The writer ends after it.
        let writer = lock(&self.tasks).drain(..1).next();
        if let Some(writer) = writer {
            let _too_slow = timeout(ANSWER, writer).await;
        }
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
        self.say(frames(message));
        ready(Ok(())).boxed()
    }

    fn subscribe(&self, pattern: Pattern) -> Performed<'_> {
        self.ask(vec![op(b"S"), bytes(pattern.as_str())]).boxed()
    }

    fn unsubscribe(&self, pattern: Pattern) -> Performed<'_> {
        self.say(vec![op(b"U"), bytes(pattern.as_str())]);
        ready(Ok(())).boxed()
    }

    fn serve(&self, name: ServiceName, _concurrency: u32) -> Performed<'_> {
        self.ask(vec![op(b"V"), bytes(name.as_str())]).boxed()
    }

    fn withdraw(&self, name: ServiceName) -> Performed<'_> {
        self.say(vec![op(b"X"), bytes(name.as_str())]);
        ready(Ok(())).boxed()
    }

    fn lost(&self) -> BoxFuture<'_, Lost> {
        self.ending.lost().boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.say_goodbye().boxed()
    }
}

impl Drop for EmbeddedSession {
    fn drop(&mut self) {
        lock(&self.tasks).iter().for_each(JoinHandle::abort);
    }
}

async fn send(sender: &mut DealerSendHalf, frames: Vec<Bytes>) -> std::io::Result<()> {
    let message = ZmqMessage::try_from(frames).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    sender.send(message).await.map_err(to_io)
}

fn to_io(error: ZmqError) -> std::io::Error {
    match error {
        ZmqError::Network(error) => error,
        other => std::io::Error::other(other.to_string()),
    }
}

async fn write(
    mut sender: DealerSendHalf,
    mut commands: mpsc::UnboundedReceiver<Vec<Bytes>>,
    ending: Ending,
) {
    let mut pings = interval(PING);
    loop {
        let frames = tokio::select! {
            frames = commands.recv() => match frames {
                Some(frames) => frames,
                None => return,
            },
            _ = pings.tick() => vec![op(b".")],
        };
        let is_goodbye = *frames[0] == *b"B";
        if let Err(error) = send(&mut sender, frames).await {
            ending.tell(error);
            return;
        }
        if is_goodbye {
            return;
        }
    }
}

struct Reader {
    incoming: Arc<dyn Incoming>,
    outgoing: mpsc::UnboundedSender<Vec<Bytes>>,
    done: mpsc::UnboundedSender<()>,
    /// The number of taken bytes of which the broker was not notified yet.
    taken: u64,
}

impl Reader {
    async fn run(
        mut self,
        mut receiver: DealerRecvHalf,
        mut monitor: impl Stream<Item = SocketEvent> + Unpin,
        ending: Ending,
    ) {
        let mut pings = interval(PING);
        let mut heard = Instant::now();
        let why = loop {
            tokio::select! {
                biased;
                received = receiver.recv() => match received {
                    Ok(message) => {
                        heard = Instant::now();
                        self.handle(message.into_vec());
                    }
                    Err(error) => break to_io(error).to_string(),
                },
                // At end of file `recv` hangs; only the monitor reports it.
                event = monitor.next() => {
                    if matches!(event, Some(SocketEvent::Disconnected(_)) | None) {
                        break "the connection was closed".to_owned();
                    }
                }
                _ = pings.tick() => {
                    if heard.elapsed() > SILENCE {
                        break "the broker was silent for 5 s".to_owned();
                    }
                }
            }
        };
        ending.tell(why);
    }

    fn handle(&mut self, frames: Vec<Bytes>) {
        let Some(first) = frames.first() else { return };
        if matches!(&first[..], b"P" | b"C" | b"N") {
            self.taken += cost(&frames);
        }
        match (&first[..], &frames[1..]) {
            (b"P", [topic, head, body]) => {
                if let Some(topic) = text(topic).and_then(|text| text.parse().ok()) {
                    self.hand_on(Via::Topic(topic, None), head, body);
                }
            }
            (b"C", [service, head, body]) => {
                if let Some(name) = text(service).and_then(|text| text.parse().ok()) {
                    self.hand_on(Via::Service(name), head, body);
                }
            }
            (b"N", [head, body]) => self.hand_on(Via::Inbox, head, body),
            (b"A", [head, body]) => self.hand_on(Via::All, head, body),
            (b"K", []) => _ = self.done.send(()),
            (b"R", [id]) => {
                if let Ok(id) = <[u8; 16]>::try_from(&id[..]) {
                    self.incoming.handle_unrouted(MessageId::from_bytes(id));
                }
            }
            (b"D", [count]) => self.incoming.handle_dropped(DropReason::SlowPeer, number(count)),
            _ => {}
        }
        if self.taken >= TELL_TAKEN {
            let taken = std::mem::take(&mut self.taken);
            let count = Bytes::copy_from_slice(&taken.to_be_bytes());
            let _writer_has_ended = self.outgoing.send(vec![op(b"F"), count]);
        }
    }

    fn hand_on(&self, via: Via, head: &Bytes, body: &Bytes) {
        let parcel = Parcel { head: head.clone(), body: body.clone() };
        self.incoming.handle_message(via, parcel, None);
    }
}
