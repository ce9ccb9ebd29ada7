//! A plain ZeroMQ client in another language joins an open mesh.
//!
//! Requires a Python with pyzmq and msgpack; `PEERBUS_PYTHON` names one, and `.ci/with-python`
//! creates one. Without it, the test prints that it is skipped, and passes.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use common::{Host, SOON, soon};
use peerbus::{Call, EmbeddedBroker, Node, Trust};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[tokio::test]
async fn a_plain_zeromq_client_subscribes_publishes_serves_and_asks_over_tcp() {
    let host = Host::new();
    let node = host.tcp_config("node").trust(Trust::Open { anywhere: false });
    let node = node.start().await.unwrap();
    let address = node.listening()[0].to_string();
    a_plain_zeromq_client_takes_part(node, address).await;
}

#[tokio::test]
async fn a_plain_zeromq_client_takes_part_over_the_unix_socket_of_a_node_that_encrypts() {
    let host = Host::new();
    let node = host.node("node").await;
    let mut sockets = std::fs::read_dir(host.path().join("default")).unwrap();
    let address = format!("ipc://{}", sockets.next().unwrap().unwrap().path().display());
    a_plain_zeromq_client_takes_part(node, address).await;
}

#[tokio::test]
async fn a_client_whose_library_sends_pings_stays_connected_to_a_node() {
    let host = Host::new();
    let node = host.tcp_config("node").trust(Trust::Open { anywhere: false });
    let node = node.start().await.unwrap();
    stays_alive("node", &node.listening()[0].to_string()).await;
}

#[tokio::test]
async fn a_client_whose_library_sends_pings_stays_connected_over_a_unix_socket() {
    let host = Host::new();
    let _node = host.node("node").await;
    let mut sockets = std::fs::read_dir(host.path().join("default")).unwrap();
    let address = format!("ipc://{}", sockets.next().unwrap().unwrap().path().display());
    stays_alive("node", &address).await;
}

#[tokio::test]
async fn a_client_whose_library_sends_pings_stays_connected_to_the_embedded_broker() {
    let broker = EmbeddedBroker::start("127.0.0.1:0".parse().unwrap()).await.unwrap();
    stays_alive("broker", &format!("tcp://{}", broker.addr())).await;
    assert_eq!(broker.report().refused, 0);
}

async fn stays_alive(kind: &str, address: &str) {
    let Some(python) = python() else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/heartbeats.py");
    let mut client = Command::new(python);
    client.args(["-B", script, kind, address]).stderr(Stdio::inherit());
    let said = tokio::task::spawn_blocking(move || client.output());
    let said = String::from_utf8(soon(said).await.unwrap().unwrap().stdout).unwrap();
    assert!(said.ends_with("alive\n"), "{said}");
}

/// Returns the path of a Python with the two packages, if there is one.
fn python() -> Option<String> {
    let python = std::env::var("PEERBUS_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_both = Command::new(&python).args(["-c", "import zmq, msgpack"]).output();
    if !has_both.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: no Python with pyzmq and msgpack (.ci/with-python makes one)");
        return None;
    }
    Some(python)
}

async fn a_plain_zeromq_client_takes_part(node: Node, address: String) {
    let Some(python) = python() else { return };
    let echo = |call: Call| async { Ok(call.message.body) };
    let _service = node.serve("echo", echo).start().unwrap();
    let mut heard = node.subscribe("heard.*").unwrap();

    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/plain_zeromq_client.py");
    let mut client = Command::new(python);
    client.args([script, &address]).stdout(Stdio::piped());
    let mut client = Running(client.spawn().unwrap());
    let mut said = BufReader::new(client.0.stdout.take().unwrap()).lines();

    node.wait_for_service("double", SOON).await.unwrap();
    assert_eq!(node.peers()[0].name, "python");
    assert_eq!(node.request("double", "21").await.unwrap().text(), "42");
    let long = "x".repeat(5000); // in a frame of its own
    for body in ["two hands clapping", &long] {
        node.publish("news.today", body).await.unwrap();
        let message = soon(heard.recv()).await.unwrap();
        assert_eq!(message.text(), format!("I heard {body}"));
    }
    let asked = tokio::task::spawn_blocking(move || {
        said.any(|line| line.unwrap() == "echo: hello from Python")
    });
    assert!(soon(asked).await.unwrap());
    assert_eq!(node.shutdown().await.undelivered, 0);
    assert!(
        !soon(tokio::task::spawn_blocking(move || client.0.wait()))
            .await
            .unwrap()
            .unwrap()
            .success()
    );
}
