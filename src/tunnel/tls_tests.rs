use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use rustls::SignatureAlgorithm;
use rustls::pki_types::ServerName;
use rustls::sign::Signer;
use tokio::sync::mpsc;

use super::super::zmtp::{greeting, ready};
use super::super::{End, FrontDoor, FrontDoorConfig, GateLimits, Latency, Watch};
use super::*;
use crate::engine::Connection;
use crate::link::{Acceptor, Link, Receiver, new_identity};
use crate::peer::Address;
use crate::trust::MeshKey;

/// Accepts connections, and reports refusals.
struct Doorkeeper {
    connected: mpsc::UnboundedSender<Option<NodeId>>,
    refused: mpsc::UnboundedSender<Refusal>,
}

struct Deaf;

impl Receiver for Deaf {
    fn handle_batch(&self, _: Vec<Bytes>) -> Option<BoxFuture<'_, ()>> {
        None
    }
    fn handle_closed(&self) {}
}

impl Acceptor for Doorkeeper {
    fn handle_connected(&self, _: Arc<dyn Link>, connection: Connection) -> Arc<dyn Receiver> {
        let _test_is_over = self.connected.send(connection.claimed);
        Arc::new(Deaf)
    }
}

impl Watch for Doorkeeper {
    fn handle_refusal(&self, _: Option<Address>, refusal: Refusal) {
        let _test_is_over = self.refused.send(refusal);
    }
}

/// A node's front door, and a dialler that may hold its mesh key.
struct Scene {
    me: Identity,
    tls: Tls,
    addr: SocketAddr,
    connected: mpsc::UnboundedReceiver<Option<NodeId>>,
    refused: mpsc::UnboundedReceiver<Refusal>,
    _door: Arc<FrontDoor>,
}

impl Scene {
    async fn new(key: &MeshKey, mine: &MeshKey) -> Self {
        let (identity, me) = (Identity::ephemeral(), Identity::ephemeral());
        let tls =
            |identity, key: &MeshKey| Tls::new(identity, LetIn::MeshKey(vec![key.clone()].into()));
        let (connected_to, connected) = mpsc::unbounded_channel();
        let (refused_to, refused) = mpsc::unbounded_channel();
        let keeper = Arc::new(Doorkeeper { connected: connected_to, refused: refused_to });
        let config = FrontDoorConfig {
            tls: Some(Arc::new(tls(&identity, key))),
            gate: GateLimits::for_bodies(1 << 20),
            handshake_timeout: Duration::from_secs(20),
            latency: Latency::default(),
            max_pending: 8,
            max_connections: 8,
            loopback_only: true,
        };
        let door =
            Arc::new(FrontDoor::new(config, End::Node(identity.node_id()), keeper.clone(), keeper));
        let addr = door.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        Self { tls: tls(&me, mine), me, addr, connected, refused, _door: door }
    }

    async fn dial(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Opens TLS without the introduction.
    async fn bare(&self) -> (TlsStream<TcpStream>, Opened) {
        let name = ServerName::try_from("peerbus").unwrap();
        let tls = self.tls.connector.connect(name, self.dial().await).await.unwrap();
        let opened = Opened::of(tls.get_ref().1).unwrap();
        (TlsStream::from(tls), opened)
    }
}

#[tokio::test]
async fn a_node_is_who_its_key_says_and_nobody_else() {
    let key = MeshKey::generate();
    let mut scene = Scene::new(&key, &key).await;
    let other = NodeId::from_bytes([7; 32]);
    for (claimed, let_in) in [(scene.me.node_id(), true), (other, false)] {
        let Ok((mut stream, _)) = scene.tls.open(scene.dial().await, true).await else { panic!() };
        stream.write_all(&greeting()).await.unwrap();
        stream.write_all(&ready(b"ROUTER", &new_identity(&claimed))).await.unwrap();
        stream.flush().await.unwrap();
        match let_in {
            true => assert_eq!(scene.connected.recv().await, Some(Some(claimed))),
            false => assert_eq!(scene.refused.recv().await, Some(Refusal::Impostor)),
        }
    }
}

/// Signs without a private key, as anyone can for this key of small order.
#[derive(Debug)]
struct AnyonesKey;

impl AnyonesKey {
    const ID: NodeId = {
        let mut bytes = [0; 32];
        bytes[0] = 1;
        NodeId::from_bytes(bytes)
    };
}

impl SigningKey for AnyonesKey {
    fn choose_scheme(&self, _: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        Some(Box::new(Self))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl Signer for AnyonesKey {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, Error> {
        Ok([*Self::ID.as_bytes(), [0; 32]].concat())
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

#[tokio::test]
async fn a_key_for_which_anyone_can_sign_is_refused_even_with_the_mesh_key() {
    let key = MeshKey::generate();
    let mut scene = Scene::new(&key, &key).await;
    let let_in = LetIn::MeshKey(Arc::new(vec![key]));
    let anyone = Tls::with_key(AnyonesKey::ID, Arc::new(AnyonesKey), let_in);
    assert!(anyone.open(scene.dial().await, true).await.is_err());
    assert_eq!(scene.refused.recv().await, Some(Refusal::WeakKey));
}

#[tokio::test]
async fn a_proof_that_is_handed_back_proves_nothing() {
    let mut scene = Scene::new(&MeshKey::generate(), &MeshKey::generate()).await;
    let (mut stream, _) = scene.bare().await;
    let mut theirs = [0; MAGIC.len() + 1 + PROOF_LEN];
    stream.read_exact(&mut theirs).await.unwrap();
    assert!(theirs.starts_with(MAGIC));
    stream.write_all(&theirs).await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(scene.refused.recv().await, Some(Refusal::MeshKey));
    // The peer receives this verdict, and nothing else.
    let mut verdict = Vec::new();
    let _reset = stream.read_to_end(&mut verdict).await;
    assert_eq!(verdict, [Verdict::NoMeshKey as u8]);
}

#[tokio::test]
async fn an_introduction_that_makes_no_sense_is_cut() {
    let key = MeshKey::generate();
    let mut scene = Scene::new(&key, &key).await;
    let many = [MAGIC, &[MAX_PROOFS as u8 + 1]].concat();
    for bytes in [b"GET / HTTP/1.1\r\n".to_vec(), many] {
        let (mut stream, _) = scene.bare().await;
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(scene.refused.recv().await, Some(Refusal::Introduction));
    }
    let (stream, _) = scene.bare().await;
    drop(stream);
    assert_eq!(scene.refused.recv().await, Some(Refusal::EndedEarly));
}

#[tokio::test]
async fn a_proof_holds_for_its_own_connection() {
    let key = MeshKey::generate();
    let mut scene = Scene::new(&key, &key).await;
    let (_, first) = scene.bare().await;
    let (mut stream, second) = scene.bare().await;
    assert_ne!(first.exported, second.exported);
    let proof = key.prove(Role::Dialler, &first.exported);
    stream.write_all(&[MAGIC, &[1], &proof[..]].concat()).await.unwrap();
    stream.flush().await.unwrap();
    let refusals = [scene.refused.recv().await, scene.refused.recv().await];
    assert!(refusals.contains(&Some(Refusal::MeshKey)), "{refusals:?}");
}

/// Measures the CPU time of a full handshake, both sides together:
/// `cargo test --release --lib handshake_costs -- --ignored --nocapture`
#[cfg(unix)]
#[tokio::test]
#[ignore = "it measures, and tests nothing"]
async fn what_a_handshake_costs() {
    use rustix::time::{ClockId, clock_gettime};
    let cpu = || {
        let spent = clock_gettime(ClockId::ProcessCPUTime);
        spent.tv_sec as f64 * 1000.0 + spent.tv_nsec as f64 / 1e6
    };
    let key = MeshKey::generate();
    let mut scene = Scene::new(&key, &key).await;
    let mut rounds = Vec::new();
    for _ in 0..15 {
        let before = cpu();
        for _ in 0..50 {
            let Ok((mut stream, _)) = scene.tls.open(scene.dial().await, true).await else {
                panic!()
            };
            stream.write_all(&greeting()).await.unwrap();
            stream.write_all(&ready(b"ROUTER", &new_identity(&scene.me.node_id()))).await.unwrap();
            stream.flush().await.unwrap();
            scene.connected.recv().await.unwrap();
        }
        rounds.push((cpu() - before) / 50.0);
    }
    rounds.sort_by(f64::total_cmp);
    println!("{:.3} ms of CPU for both sides of a handshake, the median of 15 rounds", rounds[7]);
}
