use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;
use crate::tunnel::client_handshake;

const SOON: Duration = Duration::from_secs(20);

async fn broker() -> EmbeddedBroker {
    EmbeddedBroker::start("127.0.0.1:0".parse().unwrap()).await.unwrap()
}

async fn send_bytes(broker: &EmbeddedBroker, bytes: &[u8]) -> TcpStream {
    let mut tcp = TcpStream::connect(broker.addr()).await.unwrap();
    tcp.write_all(bytes).await.unwrap();
    tcp
}

fn frame(more: bool, bytes: &[u8]) -> Vec<u8> {
    let len = (bytes.len() as u64).to_be_bytes();
    [&[2 | u8::from(more)], &len[..], bytes].concat()
}

fn message(frames: &[&[u8]]) -> Vec<u8> {
    let last = frames.len() - 1;
    frames.iter().enumerate().flat_map(|(place, bytes)| frame(place < last, bytes)).collect()
}

fn hello(node: u8) -> Vec<u8> {
    [client_handshake(), message(&[b"H", b"default", &[node; 32]])].concat()
}

/// Waits until the broker has closed the connection.
async fn closed(tcp: &mut TcpStream) {
    let reading = async {
        let mut bytes = [0; 4096];
        while tcp.read(&mut bytes).await.is_ok_and(|len| len > 0) {}
    };
    timeout(SOON, reading).await.expect("the broker closes the connection");
}

/// Reads until the broker has sent these bytes.
async fn heard(tcp: &mut TcpStream, wanted: &[u8]) {
    let reading = async {
        let mut bytes = Vec::new();
        while !bytes.windows(wanted.len()).any(|some| some == wanted) {
            assert!(tcp.read_buf(&mut bytes).await.unwrap() > 0, "{bytes:?}");
        }
    };
    timeout(SOON, reading).await.expect("the broker answers");
}

#[tokio::test]
async fn lengths_of_exabytes_and_endless_parts_end_their_connection_alone() {
    let broker = broker().await;
    let mut good = send_bytes(&broker, &hello(1)).await;
    heard(&mut good, b"peerbus broker").await;

    let claim = [&[2][..], &(1u64 << 45).to_be_bytes()].concat();
    for start in [client_handshake()[..64].to_vec(), client_handshake(), hello(2)] {
        let mut bad = send_bytes(&broker, &[start, claim.clone()].concat()).await;
        closed(&mut bad).await;
    }
    let parts = frame(true, b"").repeat(MAX_FRAMES + 1);
    closed(&mut send_bytes(&broker, &[hello(3), parts].concat()).await).await;
    // A stranger has less room than a node.
    let large = frame(true, &[0; 65 * 1024]);
    closed(&mut send_bytes(&broker, &[client_handshake(), large].concat()).await).await;
    assert_eq!(broker.report().refused, 5);

    good.write_all(&message(&[b"."])).await.unwrap();
    heard(&mut good, b".").await;
    broker.stop().await;
    closed(&mut good).await;
}

#[tokio::test]
async fn a_hello_without_a_valid_mesh_and_node_id_ends_the_connection() {
    let broker = broker().await;
    for (mesh, id) in [(&b"no mesh"[..], &[1; 32][..]), (b"default", &[0; 32]), (b"default", b"")] {
        let bytes = [client_handshake(), message(&[b"H", mesh, id])].concat();
        closed(&mut send_bytes(&broker, &bytes).await).await;
    }
    assert_eq!(broker.report().nodes, 0);
}

#[tokio::test]
async fn a_client_that_reads_no_answers_loses_its_connection() {
    let broker = broker().await;
    let mut deaf = send_bytes(&broker, &hello(1)).await;
    let asks = message(&[b"C", b"nobody", &[0; 16], b"", b""]).repeat(1000);
    let writing = async { while deaf.write_all(&asks).await.is_ok() {} };
    timeout(SOON, writing).await.expect("the broker closes the connection");
}

#[tokio::test]
async fn messages_for_a_client_that_reads_nothing_are_dropped_and_told() {
    let broker = broker().await;
    let mut deaf = send_bytes(&broker, &hello(1)).await;
    deaf.write_all(&message(&[b"S", b"news"])).await.unwrap();
    let mut loud = send_bytes(&broker, &hello(2)).await;
    heard(&mut loud, b"peerbus broker").await;
    let body = vec![0; 1 << 20];
    let publish = message(&[b"P", b"news", b"", &body]);
    // It claims that it took everything, and that is not believed.
    let taken = message(&[b"F", &u64::MAX.to_be_bytes()]);
    while broker.report().dropped == 0 {
        deaf.write_all(&taken).await.unwrap();
        loud.write_all(&publish).await.unwrap();
    }
    // Messages to all nodes are bounded too.
    let before = broker.report().dropped;
    while broker.report().dropped == before {
        loud.write_all(&message(&[b"A", b"", &body])).await.unwrap();
    }
    heard(&mut loud, b"D").await;
}
