//! Broken links, over the in-memory network, where they break on demand.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{SOON, soon, wait_for};
use peerbus::{Body, Call, DownCause, Event, HandlerError, MemoryNetwork, Node, RequestError};
use tokio::sync::Notify;

async fn pair(network: &MemoryNetwork) -> (Node, Node) {
    let alice = Node::builder().name("alice").memory(network).start().await.unwrap();
    let bob = Node::builder().name("bob").memory(network).start().await.unwrap();
    alice.wait_for_peers(1, SOON).await.unwrap();
    bob.wait_for_peers(1, SOON).await.unwrap();
    (alice, bob)
}

#[tokio::test]
async fn a_request_whose_link_breaks_fails_at_once_and_says_that_it_may_have_run() {
    let network = MemoryNetwork::default();
    let (alice, bob) = pair(&network).await;
    let (begun, cancelled) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begin, cancel) = (begun.clone(), cancelled.clone());
    let handler = move |call: Call| {
        let (begin, cancel) = (begin.clone(), cancel.clone());
        async move {
            begin.notify_one();
            call.cancelled().await;
            cancel.notify_one();
            Ok(Body::empty())
        }
    };
    let _service = bob.serve("slow", handler).start().unwrap();
    alice.wait_for_service("slow", SOON).await.unwrap();
    let caller = alice.clone();
    let request = tokio::spawn(async move { caller.request("slow", "").await });
    soon(begun.notified()).await;
    network.cut(&bob.id());
    let error = soon(request).await.unwrap().unwrap_err();
    assert!(matches!(error, RequestError::PeerLost { maybe_executed: true }), "{error}");
    soon(cancelled.notified()).await;
    assert_eq!(alice.counters().in_doubt, 1);
}

#[tokio::test]
async fn nodes_meet_again_after_a_cut_and_go_on() {
    let network = MemoryNetwork::default();
    let (alice, bob) = pair(&network).await;
    let mut news = bob.subscribe("news").unwrap();
    alice.wait_for_subscribers("news", 1, SOON).await.unwrap();
    for round in 0..5 {
        let mut events = alice.events();
        network.cut(&bob.id());
        let reason = wait_for(&mut events, |event| match event {
            Event::PeerDown { reason, .. } => Some(reason),
            _ => None,
        });
        assert_eq!(reason.await, DownCause::Lost);
        wait_for(&mut events, |event| matches!(event, Event::PeerUp(_)).then_some(())).await;
        let report = alice.publish("news", round.to_string()).await.unwrap();
        assert_eq!(report.queued, 1);
        assert_eq!(soon(news.recv()).await.unwrap().text(), round.to_string());
    }
}

#[tokio::test]
async fn a_handler_that_never_ends_keeps_only_its_own_place() {
    let network = MemoryNetwork::default();
    let (alice, bob) = pair(&network).await;
    let handler = |call: Call| async move {
        if call.message.text() == "hang" {
            std::future::pending::<()>().await;
        }
        Ok::<_, HandlerError>(call.message.body)
    };
    let _service = bob.serve("mixed", handler).concurrency(2).start().unwrap();
    alice.wait_for_service("mixed", SOON).await.unwrap();
    let deadline = std::time::Duration::from_millis(20);
    let hung = alice.request("mixed", "hang").deadline(deadline).await.unwrap_err();
    assert!(matches!(hung, RequestError::DeadlineExceeded(_)), "{hung}");
    for _ in 0..10 {
        assert_eq!(alice.request("mixed", "quick").await.unwrap().text(), "quick");
    }
    let report = soon(bob.shutdown_within(deadline)).await;
    assert_eq!(report.aborted, 1);
}

#[tokio::test]
async fn a_node_that_is_dropped_without_goodbye_is_noticed() {
    let network = MemoryNetwork::default();
    let (alice, bob) = pair(&network).await;
    let mut events = alice.events();
    drop(bob);
    wait_for(&mut events, |event| matches!(event, Event::PeerDown { .. }).then_some(())).await;
    assert!(alice.peers().is_empty());
}

#[tokio::test(start_paused = true)]
async fn on_a_memory_network_a_deadline_in_virtual_time_takes_no_time() {
    let network = MemoryNetwork::default();
    let start = |name| Node::builder().name(name).memory(&network).start();
    let (alice, bob) = (start("alice").await.unwrap(), start("bob").await.unwrap());
    alice.wait_for_peers(1, Duration::from_secs(60)).await.unwrap();
    let _service = bob
        .serve("slow", |_| std::future::pending::<Result<Body, HandlerError>>())
        .start()
        .unwrap();
    alice.wait_for_service("slow", Duration::from_secs(60)).await.unwrap();
    let (real, virtually) = (std::time::Instant::now(), tokio::time::Instant::now());
    let deadline = Duration::from_secs(3600);
    let late = alice.request("slow", "now").deadline(deadline).await;
    assert!(matches!(late, Err(RequestError::DeadlineExceeded(_))), "{late:?}");
    assert!(virtually.elapsed() >= deadline && real.elapsed() < deadline, "{:?}", real.elapsed());
    // The link has lived through it: heartbeats keep the same time.
    assert_eq!(alice.peers().len(), 1);
    bob.shutdown_within(Duration::ZERO).await;
}
