//! The conformance tests that every kind of link must pass.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

use super::memory::MemoryNetwork;
use super::{Acceptor, Link, Receiver};
use crate::engine::{Connection, Origin, TargetKey};
use crate::identity::{Identity, NodeId};
use crate::peer::Address;
use crate::trust::{LetIn, MeshKey};
use crate::tunnel::{End, FrontDoor, FrontDoorConfig, GateLimits, Latency, Refusal, Tls, Watch};

const SOON: Duration = Duration::from_secs(20);

enum Arrival {
    Batch(Vec<Bytes>),
    Closed,
}

/// One side of a link under test: its sender, and what it receives.
struct Side {
    link: Arc<dyn Link>,
    connection: Connection,
    arrivals: mpsc::UnboundedReceiver<Arrival>,
}

impl Side {
    fn send(&self, frames: &[&[u8]]) {
        self.link.send(frames.iter().map(|frame| Bytes::copy_from_slice(frame)).collect());
    }

    async fn batch(&mut self) -> Vec<Bytes> {
        match self.next().await {
            Arrival::Batch(frames) => frames,
            Arrival::Closed => panic!("the link closed"),
        }
    }

    async fn next(&mut self) -> Arrival {
        tokio::time::timeout(SOON, self.arrivals.recv()).await.expect("in time").expect("not gone")
    }
}

struct Taker(mpsc::UnboundedSender<Arrival>);

impl Receiver for Taker {
    fn handle_batch(&self, frames: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        let _test_is_over = self.0.send(Arrival::Batch(frames));
        None
    }

    fn handle_closed(&self) {
        let _test_is_over = self.0.send(Arrival::Closed);
    }
}

/// Passes each new connection to the test.
struct Host {
    sides: mpsc::UnboundedSender<Side>,
}

impl Acceptor for Host {
    fn handle_connected(&self, link: Arc<dyn Link>, connection: Connection) -> Arc<dyn Receiver> {
        let (sender, arrivals) = mpsc::unbounded_channel();
        link.admit();
        let _test_is_over = self.sides.send(Side { link, connection, arrivals });
        Arc::new(Taker(sender))
    }
}

fn host() -> (Arc<dyn Acceptor>, Identity, mpsc::UnboundedReceiver<Side>) {
    let (sides, connected) = mpsc::unbounded_channel();
    (Arc::new(Host { sides }), Identity::ephemeral(), connected)
}

struct Nobody;

impl Watch for Nobody {
    fn handle_refusal(&self, address: Option<Address>, refusal: Refusal) {
        panic!("{address:?} was refused: {refusal}");
    }
}

/// A pair of sides, and whatever must outlive them.
struct Pair {
    dialler: Side,
    listener: Side,
    ids: [NodeId; 2],
    _world: Box<dyn std::any::Any>,
}

async fn side(sides: &mut mpsc::UnboundedReceiver<Side>) -> Side {
    tokio::time::timeout(SOON, sides.recv()).await.expect("in time").expect("a connection")
}

async fn over_memory() -> Pair {
    let network = MemoryNetwork::default();
    let (a, a_key, mut a_sides) = host();
    let (b, b_key, mut b_sides) = host();
    let (a_id, b_id) = (a_key.node_id(), b_key.node_id());
    let (a_port, b_port) = (network.join(a_id, &a), network.join(b_id, &b));
    let target = TargetKey::Node(b_id);
    a_port.dial(&target, b_port.number).unwrap();
    let (dialler, listener) = (side(&mut a_sides).await, side(&mut b_sides).await);
    Pair { dialler, listener, ids: [a_id, b_id], _world: Box::new((a_port, b_port, a, b)) }
}

fn door(key: &Identity, let_in: &LetIn, acceptor: Arc<dyn Acceptor>) -> Arc<FrontDoor> {
    let config = FrontDoorConfig {
        tls: match let_in {
            LetIn::Anybody => None,
            let_in => Some(Arc::new(Tls::new(key, let_in.clone()))),
        },
        gate: GateLimits::for_bodies(1024 * 1024),
        handshake_timeout: SOON,
        latency: Latency::default(),
        max_pending: 8,
        max_connections: 8,
        loopback_only: true,
    };
    Arc::new(FrontDoor::new(config, End::Node(key.node_id()), acceptor, Arc::new(Nobody)))
}

async fn through_doors(let_in: LetIn) -> Pair {
    let (a, a_key, mut a_sides) = host();
    let (b, b_key, mut b_sides) = host();
    let (a_id, b_id) = (a_key.node_id(), b_key.node_id());
    let (a_door, b_door) = (door(&a_key, &let_in, a), door(&b_key, &let_in, b));
    let addr = b_door.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    a_door.dial(&TargetKey::Node(b_id), &[Address::Tcp(addr)]).await.unwrap();
    let (dialler, listener) = (side(&mut a_sides).await, side(&mut b_sides).await);
    Pair { dialler, listener, ids: [a_id, b_id], _world: Box::new((a_door, b_door)) }
}

#[cfg(unix)]
async fn over_unix() -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let (a, a_key, mut a_sides) = host();
    let (b, b_key, mut b_sides) = host();
    let (a_id, b_id) = (a_key.node_id(), b_key.node_id());
    // Different mesh keys, so that a link that went through TLS would fail.
    let strangers = || LetIn::MeshKey(vec![MeshKey::generate()].into());
    let (a_door, b_door) = (door(&a_key, &strangers(), a), door(&b_key, &strangers(), b));
    let path = dir.path().join("b");
    b_door.listen_local(&path).unwrap();
    a_door.dial(&TargetKey::Node(b_id), &[Address::Local(path)]).await.unwrap();
    let (dialler, listener) = (side(&mut a_sides).await, side(&mut b_sides).await);
    for side in [&dialler, &listener] {
        assert_eq!(side.connection.origin, Origin::SameUser);
    }
    Pair { dialler, listener, ids: [a_id, b_id], _world: Box::new((a_door, b_door, dir)) }
}

async fn over_tcp() -> Pair {
    through_doors(LetIn::Anybody).await
}

async fn over_tls() -> Pair {
    through_doors(LetIn::MeshKey(vec![MeshKey::generate()].into())).await
}

/// Runs the suite over each kind of link.
macro_rules! suite {
    ($($kind:ident => $make:ident),*) => {$(
        mod $kind {
            #[tokio::test]
            async fn both_sides_know_who_is_there() {
                super::both_sides_know_who_is_there(super::$make().await).await;
            }
            #[tokio::test]
            async fn batches_arrive_whole_and_in_order() {
                super::batches_arrive_whole_and_in_order(super::$make().await).await;
            }
            #[tokio::test]
            async fn a_batch_is_let_go_of_once_it_is_encoded() {
                super::a_batch_is_let_go_of_once_it_is_encoded(super::$make().await).await;
            }
            #[tokio::test]
            async fn what_was_sent_before_a_close_arrives_and_both_sides_are_told() {
                super::closing(super::$make().await, true).await;
                super::closing(super::$make().await, false).await;
            }
        }
    )*};
}

suite!(memory => over_memory, tcp => over_tcp, tls => over_tls);
#[cfg(unix)]
suite!(unix => over_unix);

async fn both_sides_know_who_is_there(pair: Pair) {
    assert_eq!(pair.dialler.connection.claimed, Some(pair.ids[1]));
    assert_eq!(pair.listener.connection.claimed, Some(pair.ids[0]));
    assert!(pair.dialler.connection.target.is_some());
    assert!(pair.listener.connection.target.is_none());
}

async fn batches_arrive_whole_and_in_order(mut pair: Pair) {
    let long = vec![9; 200_000];
    for number in 0..500_u32 {
        let number = number.to_be_bytes();
        pair.dialler.send(&[&number, b"", &long[..(number[3] as usize) * 100]]);
        pair.listener.send(&[&number]);
    }
    pair.dialler.send(&[&long]);
    for number in 0..500_u32 {
        let bytes = number.to_be_bytes();
        let frames = pair.listener.batch().await;
        assert_eq!(frames.len(), 3);
        assert_eq!((&frames[0][..], frames[1].len()), (&bytes[..], 0));
        assert_eq!(frames[2].len(), (bytes[3] as usize) * 100);
        assert_eq!(pair.dialler.batch().await, [Bytes::copy_from_slice(&bytes)]);
    }
    assert_eq!(pair.listener.batch().await, [Bytes::from(long)]);
}

/// Reports its own drop.
struct Tracked(Vec<u8>, Mutex<Option<oneshot::Sender<()>>>);

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Some(sender) = self.1.get_mut().unwrap().take() {
            let _test_is_over = sender.send(());
        }
    }
}

async fn a_batch_is_let_go_of_once_it_is_encoded(mut pair: Pair) {
    let (sender, dropped) = oneshot::channel();
    let owner = Tracked(b"held".to_vec(), Mutex::new(Some(sender)));
    pair.dialler.link.send(vec![Bytes::from_owner(owner)]);
    tokio::time::timeout(SOON, dropped).await.expect("in time").unwrap();
    assert_eq!(pair.listener.batch().await, [Bytes::from("held")]);
}

async fn closing(mut pair: Pair, by_dialler: bool) {
    let (near, far) = match by_dialler {
        true => (&mut pair.dialler, &mut pair.listener),
        false => (&mut pair.listener, &mut pair.dialler),
    };
    near.send(&[b"last words"]);
    near.link.close();
    near.send(&[b"too late"]);
    assert_eq!(far.batch().await, [Bytes::from("last words")]);
    assert!(matches!(far.next().await, Arrival::Closed));
    assert!(matches!(near.next().await, Arrival::Closed));
}

/// The front door speaks standard ZMTP: the bare `zeromq` crate can talk to it.
#[tokio::test]
async fn a_plain_zeromq_dealer_can_talk_to_the_front_door() {
    use zeromq::{DealerSocket, Socket, SocketOptions, SocketRecv, SocketSend, ZmqMessage};
    let (acceptor, id, mut sides) = host();
    let door = door(&id, &LetIn::Anybody, acceptor);
    let addr = door.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let mut options = SocketOptions::default();
    let me = super::new_identity(&NodeId::from_bytes([7; 32]));
    options.peer_identity(me.try_into().unwrap());
    let mut dealer = DealerSocket::with_options(options);
    dealer.connect(&format!("tcp://{addr}")).await.unwrap();
    let mut side = side(&mut sides).await;
    assert_eq!(side.connection.claimed, Some(NodeId::from_bytes([7; 32])));
    let long = Bytes::from(vec![3; 70_000]);
    let frames = vec![Bytes::from("one"), Bytes::new(), long.clone()];
    dealer.send(ZmqMessage::try_from(frames.clone()).unwrap()).await.unwrap();
    assert_eq!(side.batch().await, frames);
    side.link.send(vec![Bytes::from("two"), long.clone()]);
    let reply = tokio::time::timeout(SOON, dealer.recv()).await.unwrap().unwrap();
    assert_eq!(reply.into_vec(), [Bytes::from("two"), long]);
}
