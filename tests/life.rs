//! A node that can't do its work says so: its end, its limits, its pauses.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Host, SOON, echo, soon, wait_for};
use peerbus::{
    Call, Event, HandlerError, OutboxError, PublishError, RequestError, SendError, ServeError,
    SubscribeError, WaitError,
};
use tokio::runtime::{Builder, Runtime};

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn every_call_on_a_node_whose_runtime_has_ended_says_so_at_once() {
    let (host, first, second) = (Host::new(), runtime(), runtime());
    let folder = common::private_dir();
    let store = folder.path().join("store");
    let other = second.block_on(host.node("other"));
    let _service = other.serve("work", echo).start().unwrap();
    let _heard = other.subscribe("o.>").unwrap();
    let node = first.block_on(async {
        let node = host.config("lost").outbox(&store).start().await.unwrap();
        node.wait_for_service("work", SOON).await.unwrap();
        node.wait_for_subscribers("o.x", 1, SOON).await.unwrap();
        node
    });
    let mut subscription = node.subscribe("x").unwrap();
    let mut publisher = node.publisher("o.x").unwrap();
    let running = node.serve("slow", |_| std::future::pending::<Result<&str, _>>());
    let running = running.start().unwrap();
    let receipt = second.block_on(async {
        other.wait_for_service("slow", SOON).await.unwrap();
        let asking = other.request("slow", "").deadline(Duration::from_secs(3600));
        drop(tokio::time::timeout(Duration::from_millis(100), asking).await);
        node.send("nobody", "kept").guaranteed().await.unwrap()
    });
    // A request that is open when the runtime ends.
    let open = {
        let (node, other) = (node.clone(), other.clone());
        let _silent = other.serve("silent", |_| std::future::pending::<Result<&str, _>>());
        let silent = _silent.start().unwrap();
        second.spawn(async move {
            node.wait_for_service("silent", SOON).await.unwrap();
            let asked = node.request("silent", "").deadline(Duration::from_secs(3600)).await;
            drop(silent);
            asked
        })
    };
    second.block_on(async {
        while node.counters().requests == 0 {
            tokio::task::yield_now().await;
        }
    });
    drop(first);

    second.block_on(soon(async {
        assert_eq!(open.await.unwrap().unwrap_err(), RequestError::RuntimeEnded);
        assert_eq!(node.publish("o.x", "gone").await, Err(PublishError::RuntimeEnded));
        assert_eq!(publisher.publish("gone").await, Err(PublishError::RuntimeEnded));
        let hour = Duration::from_secs(3600);
        let asked = node.request("work", "x").deadline(hour).await;
        assert_eq!(asked.unwrap_err(), RequestError::RuntimeEnded);
        assert_eq!(node.send("work", "x").await.unwrap_err(), SendError::RuntimeEnded);
        let stored = node.send("work", "x").guaranteed().await;
        assert_eq!(stored.unwrap_err(), OutboxError::RuntimeEnded);
        assert_eq!(node.serve("w", echo).start().unwrap_err(), ServeError::RuntimeEnded);
        assert_eq!(node.subscribe("y").unwrap_err(), SubscribeError::RuntimeEnded);
        assert_eq!(node.wait_for_peers(9, hour).await, Err(WaitError::RuntimeEnded));
        assert!(subscription.recv().await.is_none());
        assert!(receipt.processed().await.is_err());
        assert!(node.peers().is_empty());
        running.drain().await;
        let report = node.shutdown().await;
        assert_eq!((report.pending, report.aborted), (1, 1));
        // Its store can be opened again: nobody holds it any more.
        let again = host.config("again").outbox(&store).start().await.unwrap();
        assert_eq!(again.outbox_size().pending, 1);
        assert!(PublishError::RuntimeEnded.to_string().contains("runtime"));
    }));
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test]
async fn a_node_that_is_dropped_without_a_shutdown_tells_what_it_lost() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let _heard = bob.subscribe("l.>").unwrap();
    alice.wait_for_subscribers("l.x", 1, SOON).await.unwrap();
    for _ in 0..1000 {
        // Without an await that waits, so nothing is confirmed meanwhile.
        assert_eq!(alice.publish("l.x", vec![b'x'; 200]).now().unwrap().queued, 1);
    }
    let log = Log::default();
    tracing::subscriber::with_default(log.clone(), || drop(alice));
    let lines = log.0.lock().unwrap().clone();
    let told = lines.iter().find(|line| line.contains("without a shutdown")).expect("it is told");
    let number = |name: &str| -> u64 {
        let value = told.split(&format!("{name}=")).nth(1).unwrap();
        value.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert_eq!(number("undelivered") + number("in_doubt"), 1000, "{told}");

    let log = Log::default();
    let carol = host.node("carol").await;
    carol.shutdown().await;
    tracing::subscriber::with_default(log.clone(), || drop(carol));
    assert!(log.0.lock().unwrap().is_empty(), "after a shutdown there is nothing to tell");
}

#[tokio::test]
async fn a_node_refuses_what_its_peers_would_not_accept() {
    let host = Host::new();
    let folder = common::private_dir();
    let busy = host.config("busy").outbox(folder.path()).start().await.unwrap();
    let ping = |_| async { Ok::<_, HandlerError>("pong") };
    let _ping = busy.serve("ping", ping).start().unwrap();
    let mut subscriptions = Vec::new();
    let refused = loop {
        match busy.subscribe(format!("dev.{}.state", subscriptions.len())) {
            Ok(subscription) => subscriptions.push(subscription),
            Err(error) => break error,
        }
    };
    assert_eq!((refused, subscriptions.len()), (SubscribeError::TooMany, 9_999));
    assert_eq!(busy.serve("pong", ping).start().unwrap_err(), ServeError::TooMany);
    drop(subscriptions.pop());
    let _pong = busy.serve("pong", ping).start().expect("there is room again");

    let consume = |n| busy.consume(format!("d{n}"), "e.>", |_| async { Ok(()) }).start();
    let consumers: Vec<_> = (0..256).map(|n| consume(n).unwrap()).collect();
    assert_eq!(consume(256).unwrap_err(), ServeError::TooManyDurable);
    drop(consumers);

    let other = host.node("other").await;
    other.wait_for_service("pong", SOON).await.unwrap();
    assert_eq!(other.request("ping", "").await.unwrap().text(), "pong");
    assert_eq!(other.peers()[0].patterns.len(), 9_998);
}

#[test]
fn a_handler_that_blocks_its_thread_holds_up_no_link_while_other_threads_are_free() {
    let (host, first, second) = (Host::new(), runtime(), runtime());
    let long = Duration::from_secs(3600);
    let seconds = Duration::from_secs;
    let within = |name| host.config(name).suspect_after(seconds(2)).dead_after(seconds(3));
    let other = second.block_on(within("other").start()).unwrap();
    let blocker = first.block_on(within("blocker").start()).unwrap();
    let _slow = blocker.serve("slow", |_: Call| async {
        // Longer than the time after which a silent peer is dead.
        std::thread::sleep(Duration::from_secs(5));
        Ok::<_, HandlerError>("done")
    });
    let (_slow, _quick) = (_slow.start().unwrap(), blocker.serve("quick", echo).start().unwrap());
    second.block_on(soon(async {
        other.wait_for_service("slow", SOON).await.unwrap();
        assert_eq!(other.request("slow", "").deadline(long).await.unwrap().text(), "done");
        assert_eq!(other.counters().links, 1, "it is the first link");
        assert_eq!(other.request("quick", "").await.unwrap().text(), "");
    }));
}

#[test]
fn a_node_that_did_not_run_says_so_and_blames_no_peer() {
    let (host, second) = (Host::new(), runtime());
    // The peer is patient.
    let patient = host.config("patient").dead_after(Duration::from_secs(60));
    let patient = second.block_on(patient.start()).unwrap();
    let first = Builder::new_current_thread().enable_all().build().unwrap();
    first.block_on(soon(async {
        let stopped = host.config("stopped").suspect_after(Duration::from_millis(1500));
        let stopped = stopped.dead_after(Duration::from_secs(2)).start().await.unwrap();
        stopped.wait_for_peers(1, SOON).await.unwrap();
        let mut events = stopped.events();
        std::thread::sleep(Duration::from_secs(4));
        let pause = wait_for(&mut events, |event| match event {
            Event::PeerDown { reason, .. } => panic!("it blames its peer: {reason}"),
            Event::Paused { duration } => Some(duration),
            _ => None,
        });
        assert!(pause.await >= Duration::from_secs(1));
        // The link still carries messages.
        let _echo = patient.serve("echo", echo).start().unwrap();
        stopped.wait_for_service("echo", SOON).await.unwrap();
        assert_eq!(stopped.request("echo", "here").await.unwrap().text(), "here");
        assert_eq!(stopped.counters().links, 1, "it is the first link");
    }));
}

#[tokio::test]
async fn nodes_find_each_other_again_after_their_socket_folder_was_removed() {
    let host = Host::new();
    let at = |name| {
        let config = host.config(name).runtime_dir(host.path().join("run"));
        config.listen("127.0.0.1:0".parse().unwrap())
    };
    let old = at("old").start().await.unwrap();
    let _echo = old.serve("echo", echo).start().unwrap();
    std::fs::remove_dir_all(host.path().join("run")).unwrap();
    // A new node makes the folder again, and a host key of its own.
    let new = at("new").start().await.unwrap();
    new.wait_for_service("echo", SOON).await.unwrap();
    assert_eq!(new.request("echo", "found").await.unwrap().text(), "found");

    // Over loopback TCP, with either key.
    let address = peerbus::Address::Tcp(old.listening()[0]);
    let third = at("third").local(false).peer(address).start().await.unwrap();
    third.wait_for_service("echo", SOON).await.unwrap();
    assert_eq!(third.request("echo", "proved").await.unwrap().text(), "proved");
}

#[tokio::test]
async fn a_closed_outbox_can_be_changed_within_a_runtime() {
    let (host, folder) = (Host::new(), common::private_dir());
    let store = folder.path().join("store");
    let node = host.config("sender").outbox(&store).start().await.unwrap();
    node.send("nobody", "kept").guaranteed().await.unwrap();
    node.shutdown().await;
    drop(node);
    let mut outbox = peerbus::ClosedOutbox::open(&store).unwrap();
    let messages: Vec<_> = outbox.messages().collect();
    assert_eq!(messages.len(), 1);
    outbox.purge(&messages[0]).unwrap();
    assert_eq!(outbox.messages().count(), 0);
}

#[test]
fn a_node_without_a_runtime_does_not_start_and_says_so() {
    let starting = std::pin::pin!(peerbus::Node::builder().start());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match Future::poll(starting, &mut context) {
        std::task::Poll::Ready(Err(error)) => assert!(error.to_string().contains("runtime")),
        other => panic!("{other:?}"),
    }
}
