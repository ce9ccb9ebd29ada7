//! The attacks: each plays strangers or members that mean harm, as fast as it can, until its process
//! is told to end.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::{interval, sleep, timeout};

use crate::common::wire::{
    ACCEPT, GREETING, PREAMBLE, Record, announcement, batch, batch_of, frame, hello_with, ready,
};

/// All attacks, by name.
pub(crate) const ATTACKS: [&str; 13] = [
    "idle at the door",
    "come and go",
    "idle members",
    "denied durables",
    "denial records",
    "hints",
    "unread calls",
    "cancelled calls",
    "long patterns",
    "flapping",
    "inbox senders",
    "durable floods",
    "epochs",
];

/// What keeps one processor busy, and nothing else.
pub(crate) const SPINNER: &str = "spinner";

/// The attacked node, and a third party that it should not harm.
pub(crate) struct Field {
    pub(crate) node: SocketAddr,
    pub(crate) third_party: Vec<String>,
    struck: AtomicU64,
    began: Notify,
}

impl Field {
    pub(crate) fn new(node: SocketAddr, third_party: Vec<String>) -> Self {
        Self { node, third_party, struck: AtomicU64::new(0), began: Notify::new() }
    }

    /// Attacks until the future is dropped.
    pub(crate) async fn attack(&self, name: &str) {
        match name {
            "idle at the door" => self.idle_at_the_door().await,
            "come and go" => self.come_and_go().await,
            "idle members" => self.idle_members().await,
            "denied durables" => self.denied_durables().await,
            "denial records" => self.denial_records().await,
            "hints" => self.hints().await,
            "unread calls" => self.unread_calls().await,
            "cancelled calls" => self.cancelled_calls().await,
            "long patterns" => self.long_patterns().await,
            "flapping" => self.flapping().await,
            "inbox senders" => self.inbox_senders().await,
            "durable floods" => self.durable_floods().await,
            "epochs" => self.epochs().await,
            SPINNER => self.spin().await,
            other => panic!("no attack is called {other:?}"),
        }
    }

    async fn spin(&self) {
        again(async || {
            self.strike();
            Ok(())
        })
        .await;
    }

    /// Waits for the first strike.
    pub(crate) async fn began(&self) {
        self.began.notified().await;
    }

    /// The number of connections, members or batches so far.
    pub(crate) fn struck(&self) -> u64 {
        self.struck.load(Ordering::Relaxed)
    }

    fn strike(&self) {
        if self.struck.fetch_add(1, Ordering::Relaxed) == 0 {
            self.began.notify_one();
        }
    }

    async fn connect_from(&self, from: [u8; 4]) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::from(from), 0).into())?;
        socket.connect(self.node).await
    }

    /// A member with a new id.
    async fn join(&self) -> io::Result<Member> {
        Member::join(TcpStream::connect(self.node).await?, &[]).await
    }

    /// A member that leaves little room for what it does not read.
    async fn join_deaf(&self) -> io::Result<Member> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(4096)?;
        Member::join(socket.connect(self.node).await?, &[]).await
    }

    /// Connections that say nothing, renewed when they are cut.
    async fn idle_at_the_door(&self) {
        crowd(128, async |number| {
            let mut stream = self.connect_from([127, 0, 9, 1 + number as u8 % 16]).await?;
            self.strike();
            stream.read_to_end(&mut Vec::new()).await?;
            Ok(())
        })
        .await;
    }

    /// Strangers that connect, say one byte and leave.
    async fn come_and_go(&self) {
        crowd(16, async |number| {
            // No address runs out of ports: those of closed connections rest for a minute.
            let [.., host] = random().to_be_bytes();
            let mut stream = self.connect_from([127, 0, 10 + number as u8, host]).await?;
            stream.write_all(b"x").await?;
            self.strike();
            Ok(())
        })
        .await;
    }

    /// Members that only show that they live.
    async fn idle_members(&self) {
        crowd(1000, async |_| {
            let mut member = self.join().await?;
            self.strike();
            member.live().await
        })
        .await;
    }

    /// Durable subscriptions that the rules deny, by the 190,000, from a member that reads nothing.
    async fn denied_durables(&self) {
        let long = (0..256).map(|n| (format!("n{n}"), format!("{}{n}", "x".repeat(250))));
        let short = std::iter::repeat_n(("n".to_owned(), ">".to_owned()), 190_000);
        let flood = batch(&PREAMBLE, inbox(1, &long.chain(short).collect::<Vec<_>>()).as_ref());
        again(async || {
            let mut member = self.join_deaf().await?;
            loop {
                member.stream.write_all(&flood).await?;
                self.strike();
            }
        })
        .await;
    }

    /// Records that tell the node what is denied to it.
    async fn denial_records(&self) {
        let record = Record::new(2, 13).list(0..256, |record, number| {
            record.array(2).uint(1).str(&format!("denied.{number}"))
        });
        let flood = batch_of(&PREAMBLE, vec![record; 8]);
        again(async || self.join().await?.flood(&flood, || self.strike()).await).await;
    }

    /// Members that come again and again, each with the third party's addresses as its own, and as
    /// those of nodes that don't exist.
    async fn hints(&self) {
        again(async || {
            let stream = TcpStream::connect(self.node).await?;
            let mut member = Member::join(stream, &self.third_party).await?;
            for _ in 0..64 {
                let record = Record::new(2, 9).list(0..16, |record, _| {
                    record.array(2).bin(&new_id()).strings(&self.third_party)
                });
                member.say(&record).await?;
                self.strike();
            }
            Ok(())
        })
        .await;
    }

    /// Empty calls that fill the window, from members that don't read the replies.
    async fn unread_calls(&self) {
        crowd(8, async |_| {
            let mut member = self.join_deaf().await?;
            for _ in 0..WINDOW / CALL / 1024 {
                member.stream.write_all(&batch_of(&PREAMBLE, (0..1024).map(|_| call()))).await?;
                self.strike();
            }
            for _ in 0..3 {
                member.stream.write_all(&frame(false, &PREAMBLE)).await?;
                sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        })
        .await;
    }

    /// Calls that are cancelled in the batch that brings them.
    async fn cancelled_calls(&self) {
        again(async || {
            let Member { stream } = self.join().await?;
            let (mut reading, mut writing) = stream.into_split();
            let (consumed, more) = (AtomicU64::new(0), Notify::new());
            let read = async {
                loop {
                    let (preamble, _) = read_batch(&mut reading).await?;
                    consumed.store(consumed_calls(&preamble), Ordering::Relaxed);
                    more.notify_one();
                }
            };
            let write = async {
                let mut sent = 0;
                loop {
                    while sent + 512 * CALL > consumed.load(Ordering::Relaxed) + WINDOW {
                        more.notified().await;
                    }
                    let calls = (0..512).flat_map(|_| {
                        let id = message_id();
                        [call_with(&id), Record::new(2, 5).bin(&id)]
                    });
                    writing.write_all(&batch_of(&PREAMBLE, calls)).await?;
                    sent += 512 * CALL;
                    self.strike();
                }
            };
            tokio::select! { ended = read => ended, ended = write => ended }
        })
        .await;
    }

    /// As many members as find room, with as many subscriptions as are allowed, as long as patterns
    /// can be.
    async fn long_patterns(&self) {
        crowd(200, async |_| {
            let mut member = self.join().await?;
            let own = random();
            for seq in 1..=10 {
                let pattern = |n| format!("open.{own:x}.{seq}.{n}.{}", "x".repeat(210));
                let patterns: Vec<String> = (0..999).map(pattern).collect();
                member.say(announcement(seq, &patterns, &[])).await?;
                self.strike();
            }
            member.live().await
        })
        .await;
    }

    /// Subscriptions that come and go.
    async fn flapping(&self) {
        let one = ["open.flap".to_owned()];
        again(async || {
            let member = self.join().await?;
            let (mut reading, mut writing) = member.stream.into_split();
            let write = async {
                for seq in 1.. {
                    let change = match seq % 2 {
                        1 => announcement(seq, &one, &[]),
                        _ => announcement(seq, &[], &one),
                    };
                    writing.write_all(&batch(&PREAMBLE, &change)).await?;
                    self.strike();
                }
                Ok(())
            };
            tokio::select! { ended = write => ended, ended = drain(&mut reading) => ended }
        })
        .await;
    }

    /// Ids that send one guaranteed message each, to a service that nobody serves.
    async fn inbox_senders(&self) {
        crowd(4, async |_| {
            let mut member = self.join().await?;
            let message = Record::new(13, 21).bin(&message_id()).str("nobody").bin(b"").nils(8);
            member.say(message.array(5).uint(1).uint(1).uint(0).uint(1).bool(false)).await?;
            self.strike();
            member.answered(&[0x92, 10]).await
        })
        .await;
    }

    /// Ids that make as many durable subscriptions as are allowed, and leave for good.
    async fn durable_floods(&self) {
        let names: Vec<_> = (0..256).map(|n| (format!("s{n}"), "open.>".to_owned())).collect();
        crowd(4, async |_| {
            let mut member = self.join().await?;
            member.say(inbox(random(), &names)).await?;
            self.strike();
            member.say(Record::new(2, 7).uint(1)).await?;
            member.answered(&[0x92, 8]).await
        })
        .await;
    }

    /// Records that name tens of thousands of epochs of an outbox.
    async fn epochs(&self) {
        let record = Record::new(2, 11).list(0..25_000, |record, _| record.uint(random()));
        let flood = batch(&PREAMBLE, record.as_ref());
        again(async || self.join().await?.flood(&flood, || self.strike()).await).await;
    }
}

/// Repeats an attack for ever, whether it ends or the node cuts it.
async fn again(attack: impl AsyncFn() -> io::Result<()>) {
    loop {
        let _cut = attack().await;
        tokio::task::yield_now().await;
    }
}

/// Repeats an attack for ever, so many times at once.
async fn crowd(count: usize, attack: impl AsyncFn(usize) -> io::Result<()>) {
    let attack = &attack;
    join_all((0..count).map(|number| async move { again(async || attack(number).await).await }))
        .await;
}

/// The node's window for calls, in bytes, and the cost of an empty call.
const WINDOW: u64 = 4 << 20;
const CALL: u64 = 128;

/// `[20, id, "echo", body, kind, correlation, reply_to]`
fn call_with(id: &[u8; 16]) -> Record {
    Record::new(7, 20).bin(id).str("echo").bin(b"").nils(2).bool(true)
}

fn call() -> Record {
    call_with(&message_id())
}

/// `[12, epoch, [[name, pattern], …], []]`
fn inbox(epoch: u64, durable: &[(String, String)]) -> Record {
    let record = Record::new(4, 12).uint(epoch);
    record.list(durable, |record, (name, pattern)| record.array(2).str(name).str(pattern)).array(0)
}

fn random() -> u64 {
    RandomState::new().hash_one(0)
}

fn message_id() -> [u8; 16] {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&random().to_be_bytes());
    id[8..].copy_from_slice(&random().to_be_bytes());
    id
}

/// A new node id, smaller than that of the attacked node, so that its owner decides on links.
fn new_id() -> [u8; 32] {
    let mut id = [0; 32];
    id[16..].copy_from_slice(&message_id());
    id
}

/// A link to the attacked node.
struct Member {
    stream: TcpStream,
}

impl Member {
    async fn join(stream: TcpStream, addresses: &[String]) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let mut member = Self { stream };
        let id = new_id();
        let identity = [&id[..], &message_id()].concat();
        member.stream.write_all(&[&GREETING[..], &ready(&identity)].concat()).await?;
        member.say(hello_with("default", id, &[], addresses)).await?;
        member.stream.read_exact(&mut [0; 64]).await?;
        // READY, then the node's hello.
        read_frame(&mut member.stream).await?;
        read_batch(&mut member.stream).await?;
        member.say(ACCEPT).await?;
        Ok(member)
    }

    async fn say(&mut self, record: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(&batch(&PREAMBLE, record.as_ref())).await
    }

    /// Reads until a record begins like this, or for half a second.
    async fn answered(&mut self, head: &[u8]) -> io::Result<()> {
        let read = async {
            loop {
                let (_, records) = read_batch(&mut self.stream).await?;
                if records.get(4..).is_some_and(|first| first.starts_with(head)) {
                    return Ok(());
                }
            }
        };
        timeout(Duration::from_millis(500), read).await.unwrap_or(Ok(()))
    }

    /// Reads, and shows a sign of life each second.
    async fn live(&mut self) -> io::Result<()> {
        let (mut reading, mut writing) = self.stream.split();
        let beat = async {
            let mut ticks = interval(Duration::from_secs(1));
            loop {
                ticks.tick().await;
                writing.write_all(&frame(false, &PREAMBLE)).await?;
            }
        };
        tokio::select! { ended = beat => ended, ended = drain(&mut reading) => ended }
    }

    /// Reads, and writes the same bytes for ever.
    async fn flood(&mut self, bytes: &[u8], strike: impl Fn()) -> io::Result<()> {
        let (mut reading, mut writing) = self.stream.split();
        let write = async {
            loop {
                writing.write_all(bytes).await?;
                strike();
            }
        };
        tokio::select! { ended = write => ended, ended = drain(&mut reading) => ended }
    }
}

/// Reads what comes until the connection ends.
async fn drain(reading: &mut (impl AsyncReadExt + Unpin)) -> io::Result<()> {
    let mut chunk = vec![0; 16 * 1024];
    while reading.read(&mut chunk).await? > 0 {}
    Ok(())
}

/// One frame, and whether another of its message follows.
async fn read_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<(Vec<u8>, bool)> {
    let flags = stream.read_u8().await?;
    let len = match flags & 2 {
        0 => u64::from(stream.read_u8().await?),
        _ => stream.read_u64().await?,
    };
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).await?;
    Ok((body, flags & 1 > 0))
}

/// The preamble and the records of the next batch.
async fn read_batch(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (preamble, mut more) = read_frame(stream).await?;
    let mut records = None;
    while more {
        let frame = read_frame(stream).await?;
        more = frame.1;
        records.get_or_insert(frame.0);
    }
    Ok((preamble, records.unwrap_or_default()))
}

/// The bytes of calls that the node consumed: `[version, events, bytes, calls, bytes, …]`.
fn consumed_calls(mut preamble: &[u8]) -> u64 {
    rmp::decode::read_array_len(&mut preamble).unwrap();
    let totals = [(); 5].map(|()| rmp::decode::read_int(&mut preamble).unwrap());
    totals[4]
}
