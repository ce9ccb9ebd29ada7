//! Guaranteed messages between real nodes, with their stores on a disk.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use common::{Host, SOON, private_dir, soon, wait_for};
use peerbus::{
    Call, Config, DeadLetterReason, DeliveryError, Event, HandlerError, MemoryNetwork, Node,
    OutboxError, ServeError, StartError, StoreProblem,
};
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A host whose nodes keep stores.
struct Place {
    host: Host,
    stores: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { host: Host::new(), stores: private_dir() }
    }

    fn config(&self, name: &str) -> Config {
        self.host.config(name).outbox(self.stores.path().join(name))
    }

    async fn node(&self, name: &str) -> Node {
        self.config(name).start().await.unwrap()
    }

    /// A node whose handlers have a very short lease.
    async fn hasty_node(&self, name: &str) -> Node {
        self.config(name).lease(Duration::from_millis(50)).start().await.unwrap()
    }
}

/// The numbers of unprocessed messages and of dead letters of a node.
fn sizes(node: &Node) -> (u64, u64) {
    let size = node.outbox_size();
    (size.pending, size.dead_letters)
}

/// A handler's message: the text, the attempt, and whether it was redelivered.
type Seen = (String, u32, bool);

fn seen(call: &Call) -> Seen {
    (call.message.text().into_owned(), call.message.attempt(), call.message.is_redelivered())
}

fn fresh(text: &str) -> Seen {
    (text.into(), 1, false)
}

/// A handler that passes its message on to the test, and returns Ok.
fn sender(
    told: &UnboundedSender<Seen>,
) -> impl Fn(Call) -> std::future::Ready<Result<(), HandlerError>> + Send + Sync + 'static {
    let told = told.clone();
    move |call| {
        let _test_ended = told.send(seen(&call));
        std::future::ready(Ok(()))
    }
}

async fn next(seen: &mut UnboundedReceiver<Seen>) -> Seen {
    soon(seen.recv()).await.unwrap()
}

#[tokio::test]
async fn a_message_waits_for_its_service_and_is_processed_once() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let receipt = alice.send("work", "one").guaranteed().await.unwrap();
    assert_eq!(sizes(&alice), (1, 0));

    let bob = place.node("bob").await;
    let (told, mut seen) = unbounded_channel();
    let _service = bob.serve("work", sender(&told)).start().unwrap();
    soon(receipt.processed()).await.unwrap();
    assert_eq!(next(&mut seen).await, fresh("one"));
    assert_eq!(sizes(&alice), (0, 0));

    // To the running instance, to a node by its id, and to itself.
    let receipt = alice.send("work", "two").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    let _inbox = bob.serve_node(sender(&told)).start().unwrap();
    let receipt = alice.send(bob.id(), "three").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    let receipt = bob.send("work", "four").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    for text in ["two", "three", "four"] {
        assert_eq!(next(&mut seen).await.0, text);
    }
    assert!(seen.try_recv().is_err());
    let counters = alice.counters();
    assert_eq!((counters.stored, counters.settled, counters.dropped_total()), (3, 3, 0));
}

#[tokio::test]
async fn what_is_stored_outlives_its_sender() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let id = alice.id();
    for n in 0..100 {
        alice.send("work", format!("{n}")).guaranteed().await.unwrap();
    }
    let large = "x".repeat(100_000);
    let receipt = alice.send("work", large.clone()).guaranteed().await.unwrap();
    let report = alice.shutdown().await;
    assert_eq!(report.pending, 101);
    assert_eq!(soon(receipt.processed()).await, Err(DeliveryError::ShutDown));

    let alice = place.node("alice").await;
    assert_eq!(alice.id(), id, "the store keeps the identity");
    assert_eq!(alice.store_report().unwrap().pending, 101);
    let mut events = alice.events();
    let bob = place.node("bob").await;
    let (told, mut seen) = unbounded_channel();
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    let mut texts = Vec::new();
    for _ in 0..101 {
        texts.push(next(&mut seen).await.0);
    }
    let mut wanted: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    wanted.push(large);
    assert!(texts == wanted, "in the order in which they were stored");
    wait_for(&mut events, |event| matches!(event, Event::PeerUp(_)).then_some(())).await;
    soon(async {
        while sizes(&alice) != (0, 0) {
            tokio::task::yield_now().await
        }
    })
    .await;
    alice.shutdown().await;
    let alice = place.node("alice").await;
    assert_eq!(alice.store_report().unwrap().pending, 0);
}

#[tokio::test]
async fn a_failure_is_tried_again_and_a_rejection_is_a_dead_letter() {
    let place = Place::new();
    let (alice, bob) = (place.node("alice").await, place.node("bob").await);
    let (told, mut seen_by_handler) = unbounded_channel();
    let handler = move |call: Call| {
        let _test_ended = told.send(seen(&call));
        let result = match (call.message.text().as_ref(), call.message.attempt()) {
            ("flaky", 1 | 2) => Err(HandlerError::new("busy", "try again")),
            ("bad", _) => Err(HandlerError::reject("bad", "never")),
            ("panics", 1) => panic!("as the test wants it"),
            ("unreadable", _) => call.message.decode::<String>().map(drop).map_err(Into::into),
            _ => Ok(()),
        };
        std::future::ready(result)
    };
    let _service = bob.serve("work", handler).start().unwrap();
    let receipt = alice.send("work", "flaky").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    let flaky = |attempt, redelivered| ("flaky".to_owned(), attempt, redelivered);
    for wanted in [flaky(1, false), flaky(2, true), flaky(3, true)] {
        assert_eq!(next(&mut seen_by_handler).await, wanted);
    }
    let receipt = alice.send("work", "panics").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    let receipt = alice.send("work", "bad").guaranteed().await.unwrap();
    let Err(DeliveryError::DeadLetter(DeadLetterReason::Rejected { text })) =
        soon(receipt.processed()).await
    else {
        panic!("it was rejected");
    };
    assert_eq!(text, "bad: never");
    let receipt = alice.send("work", "unreadable").guaranteed().await.unwrap();
    let Err(DeliveryError::DeadLetter(DeadLetterReason::Rejected { text })) =
        soon(receipt.processed()).await
    else {
        panic!("it will never be readable");
    };
    assert!(text.starts_with("decode: the body can't be decoded: "), "{text}");
    assert_eq!(sizes(&alice), (0, 2));
    alice.shutdown().await;
    let alice = place.node("alice").await;
    assert_eq!(alice.store_report().unwrap().dead_letters, 2);
}

#[tokio::test]
async fn a_sender_says_how_often_a_message_is_tried_and_how_soon() {
    let place = Place::new();
    let (soon_again, hour) = (Duration::from_millis(1), Duration::from_secs(3600));
    let hasty = place.config("hasty").max_attempts(3).backoff(soon_again, soon_again);
    let patient = place.config("patient").max_attempts(2).backoff(hour, hour);
    let (hasty, patient) = (hasty.start().await.unwrap(), patient.start().await.unwrap());
    let bob = place.node("bob").await;
    let (told, mut seen_by_handler) = unbounded_channel();
    let handler = move |call: Call| {
        let _test_ended = told.send(seen(&call));
        std::future::ready(Err::<(), _>(HandlerError::new("busy", "never again")))
    };
    let _service = bob.serve("work", handler).concurrency(1).start().unwrap();
    let waits = patient.send("work", "waits").guaranteed().await.unwrap();
    assert_eq!(next(&mut seen_by_handler).await, fresh("waits"));
    let receipt = hasty.send("work", "fails").guaranteed().await.unwrap();
    for attempt in 1..=3 {
        assert_eq!(next(&mut seen_by_handler).await, ("fails".into(), attempt, attempt > 1));
    }
    let text = "busy: never again".to_owned();
    let failed = DeadLetterReason::Failed { failures: 3, text };
    match soon(receipt.processed()).await {
        Err(DeliveryError::DeadLetter(reason)) => assert_eq!(reason, failed),
        other => panic!("{other:?}"),
    }
    drop(waits);
    assert_eq!(sizes(&patient), (1, 0), "it waits for its second attempt");

    let (zero, second) = (Duration::ZERO, Duration::from_secs(1));
    for (config, wanted) in [
        (place.config("x").max_attempts(0), "max_attempts is 0"),
        (place.config("x").backoff(zero, second), "at least 1 ms is needed"),
        (place.config("x").backoff(2 * second, second), "begins with 2s, above its longest, 1s"),
    ] {
        let error = config.start().await.err().unwrap().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[tokio::test]
async fn messages_of_one_key_keep_their_order_though_one_fails() {
    let place = Place::new();
    let (alice, bob) = (place.node("alice").await, place.node("bob").await);
    let (told, mut seen_by_handler) = unbounded_channel();
    let handler = move |call: Call| {
        let _test_ended = told.send(seen(&call));
        let fails = call.message.text() == "0" && call.message.attempt() < 3;
        std::future::ready(match fails {
            true => Err(HandlerError::new("busy", "try again")),
            false => Ok(()),
        })
    };
    let _service = bob.serve("work", handler).start().unwrap();
    let mut receipts = Vec::new();
    for n in 0..5 {
        let message = alice.send("work", n.to_string()).key("customer-7").guaranteed();
        receipts.push(message.await.unwrap());
    }
    for receipt in receipts {
        soon(receipt.processed()).await.unwrap();
    }
    for wanted in ["0", "0", "0", "1", "2", "3", "4"] {
        assert_eq!(next(&mut seen_by_handler).await.0, wanted);
    }
}

#[tokio::test]
async fn a_durable_subscription_gets_what_was_published_while_it_was_away() {
    let place = Place::new();
    let (alice, bob) = (place.node("alice").await, place.node("bob").await);
    let receipt = alice.publish("orders.new", "nobody").guaranteed().await.unwrap();
    assert_eq!(receipt.destinations(), 0, "nobody is known who wants it");
    soon(receipt.processed()).await.unwrap();

    let (told, mut seen) = unbounded_channel();
    let consumer = bob.consume("billing", "orders.*", sender(&told)).start().unwrap();
    let again = bob.consume("billing", "other", sender(&told)).start();
    assert!(matches!(again, Err(ServeError::AlreadyServed(_))));
    let met = async {
        loop {
            let receipt = alice.publish("orders.new", "one").guaranteed().await.unwrap();
            if receipt.destinations() == 1 {
                return receipt;
            }
            tokio::task::yield_now().await;
        }
    };
    soon(soon(met).await.processed()).await.unwrap();
    assert_eq!(next(&mut seen).await, fresh("one"));

    soon(consumer.drain()).await;
    let two = alice.publish("orders.new", "two").guaranteed().await.unwrap();
    bob.shutdown().await;
    let three = alice.publish("orders.new", "three").guaranteed().await.unwrap();
    let other = alice.publish("news.today", "no").guaranteed().await.unwrap();
    let counts = [&two, &three, &other].map(peerbus::Receipt::destinations);
    assert_eq!(counts, [1, 1, 0]);
    // The publisher remembers the subscription across its restart.
    alice.shutdown().await;
    let alice = place.node("alice").await;
    alice.publish("orders.new", "four").guaranteed().await.unwrap();

    let bob = place.node("bob").await;
    let _consumer =
        bob.consume("billing", "orders.*", sender(&told)).concurrency(1).start().unwrap();
    for text in ["two", "three", "four"] {
        assert_eq!(next(&mut seen).await.0, text);
    }
    assert!(seen.try_recv().is_err());
}

#[tokio::test]
async fn a_durable_subscription_that_has_ended_is_kept_by_nobody() {
    let place = Place::new();
    let (alice, bob) = (place.node("alice").await, place.node("bob").await);
    let (told, mut seen) = unbounded_channel();
    let consumer = bob.consume("billing", "orders.*", sender(&told)).start().unwrap();
    alice.wait_for_consumers("orders.new", 1, SOON).await.unwrap();
    soon(consumer.unsubscribe()).await;
    let forgotten = async {
        while alice.publish("orders.new", "gone").guaranteed().await.unwrap().destinations() > 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(forgotten).await;
    assert_eq!(sizes(&alice), (0, 0));
    assert!(seen.try_recv().is_err());

    // The subscription may be opened anew, and end while its publisher is away for good.
    let consumer = bob.consume("billing", "orders.*", sender(&told)).start().unwrap();
    alice.wait_for_consumers("orders.new", 1, SOON).await.unwrap();
    soon(bob.shutdown()).await;
    soon(consumer.drain()).await;
    alice.publish("orders.new", "kept").guaranteed().await.unwrap();
    let name = "billing".parse().unwrap();
    assert_eq!(alice.forget_subscription(&alice.id(), &name), None);
    assert_eq!(alice.forget_subscription(&bob.id(), &name), Some(1));
    assert_eq!(alice.outbox_size().pending, 0);
}

#[tokio::test]
async fn a_transaction_is_stored_as_a_whole() {
    let place = Place::new();
    let config = place.config("alice");
    let alice = config.outbox_messages(3).start().await.unwrap();
    let mut transaction = alice.transaction();
    for n in 0..4 {
        transaction.add(alice.send("work", n.to_string()).guaranteed());
    }
    let full = transaction.commit().await.unwrap_err();
    assert!(matches!(full, OutboxError::OutboxFull { messages: 0, .. }), "{full}");
    let mut transaction = alice.transaction();
    for n in 0..3 {
        transaction.add(alice.send("work", n.to_string()).guaranteed());
    }
    assert_eq!(transaction.commit().await.unwrap().len(), 3);
    let full = alice.send("work", "one more").guaranteed().await.unwrap_err();
    assert_eq!(sizes(&alice), (3, 0));
    assert!(matches!(full, OutboxError::OutboxFull { messages: 3, .. }));
    let bob = place.node("bob").await;
    let (told, mut seen) = unbounded_channel();
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    for n in 0..3 {
        assert_eq!(next(&mut seen).await.0, n.to_string());
    }
}

#[tokio::test]
async fn stores_that_cant_be_used_are_refused() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let problem = |started: Result<Node, StartError>| match started {
        Err(StartError::Store(error)) => error.problem,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it started"),
    };
    let second = place.host.config("second").outbox(place.stores.path().join("alice"));
    assert!(matches!(problem(second.start().await), StoreProblem::InUse));
    let foreign = private_dir();
    std::fs::write(foreign.path().join("thesis.txt"), "precious").unwrap();
    let node = place.host.config("foreign").outbox(foreign.path());
    assert!(matches!(problem(node.start().await), StoreProblem::Foreign(_)));
    let file = foreign.path().join("thesis.txt");
    let node = place.host.config("file").outbox(file);
    assert!(matches!(problem(node.start().await), StoreProblem::Io(_)));
    alice.shutdown().await;
    place.node("alice").await;
}

#[tokio::test]
async fn a_node_without_a_store_takes_and_sends_nothing_guaranteed() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let bare = place.host.node("bare").await;
    let refused = bare.send("work", "x").guaranteed().await.unwrap_err();
    assert_eq!(refused, OutboxError::NoOutbox);
    let (told, mut seen) = unbounded_channel();
    let refused = bare.consume("billing", "orders.*", sender(&told)).start();
    assert!(matches!(refused, Err(ServeError::NoStore)));
    let _service = bare.serve("work", sender(&told)).start().unwrap();
    alice.wait_for_service("work", SOON).await.unwrap();
    let receipt = alice.send("work", "waits").guaranteed().await.unwrap();
    // The instance with a store receives it, though the other one was there first.
    let bob = place.node("bob").await;
    let _service = bob.serve("work", |_| async { Ok("") }).start().unwrap();
    soon(receipt.processed()).await.unwrap();
    assert!(seen.try_recv().is_err());
}

#[tokio::test]
async fn what_expires_is_a_dead_letter_and_what_is_for_later_waits() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let message = alice.send("work", "old").guaranteed().expires_in(Duration::from_millis(50));
    let receipt = message.await.unwrap();
    let reason = soon(receipt.processed()).await;
    let expired = DeadLetterReason::Expired { maybe_processed: false };
    assert_eq!(reason, Err(DeliveryError::DeadLetter(expired)));

    let (told, mut seen) = unbounded_channel();
    let _service = alice.serve("work", sender(&told)).start().unwrap();
    let due = SystemTime::now() + Duration::from_millis(300);
    let later = alice.send("work", "later").guaranteed().not_before(due).await.unwrap();
    let now = alice.send("work", "now").guaranteed().await.unwrap();
    soon(now.processed()).await.unwrap();
    soon(later.processed()).await.unwrap();
    assert!(SystemTime::now() >= due);
    assert_eq!([next(&mut seen).await.0, next(&mut seen).await.0], ["now", "later"]);
}

async fn pair(network: &MemoryNetwork, stores: &TempDir) -> (Node, Node) {
    let node = |name: &str| {
        Node::builder().name(name).memory(network).outbox(stores.path().join(name)).start()
    };
    (node("alice").await.unwrap(), node("bob").await.unwrap())
}

#[tokio::test]
async fn a_link_that_breaks_under_a_handler_has_it_run_once() {
    let (network, stores) = (MemoryNetwork::default(), private_dir());
    let (alice, bob) = pair(&network, &stores).await;
    let (begun, mut begins) = unbounded_channel();
    let go_on = Arc::new(tokio::sync::Notify::new());
    let gate = go_on.clone();
    let handler = move |call: Call| {
        let (begun, gate) = (begun.clone(), gate.clone());
        async move {
            begun.send(seen(&call)).unwrap();
            gate.notified().await;
            Ok(())
        }
    };
    let _service = bob.serve("work", handler).start().unwrap();
    let mut events = alice.events();
    let receipt = alice.send("work", "once").guaranteed().await.unwrap();
    assert_eq!(next(&mut begins).await, fresh("once"));
    network.cut(&bob.id());
    wait_for(&mut events, |event| matches!(event, Event::PeerDown { .. }).then_some(())).await;
    wait_for(&mut events, |event| matches!(event, Event::PeerUp(_)).then_some(())).await;
    go_on.notify_one();
    soon(receipt.processed()).await.unwrap();
    assert!(begins.try_recv().is_err(), "it ran once");
    assert_eq!((alice.counters().in_doubt, alice.counters().dropped_total()), (0, 0));
}

#[tokio::test]
async fn a_handler_that_hangs_loses_its_lease() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let bob = place.hasty_node("bob").await;
    let times = Arc::new(AtomicU32::new(0));
    let count = times.clone();
    let handler = move |call: Call| {
        let count = count.clone();
        async move {
            if count.fetch_add(1, Ordering::SeqCst) == 0 {
                std::future::pending::<()>().await;
            }
            // Longer than the lease, which the handler extends.
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(25)).await;
                call.extend();
            }
            Ok(())
        }
    };
    let _service = bob.serve("work", handler).start().unwrap();
    let receipt = alice.send("work", "hangs").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    assert_eq!(times.load(Ordering::SeqCst), 2);
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("it is dropped");
    }
}

#[tokio::test]
async fn a_handler_that_panics_as_its_lease_ends_leaves_its_place_to_others() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let bob = place.hasty_node("bob").await;
    let times = Arc::new(AtomicU32::new(0));
    let count = times.clone();
    let handler = move |_: Call| {
        let first = count.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if first {
                let _panics = PanicsWhenDropped;
                std::future::pending::<()>().await;
            }
            Ok(())
        }
    };
    let _service = bob.serve("work", handler).concurrency(1).start().unwrap();
    let receipt = alice.send("work", "hangs").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    assert_eq!(times.load(Ordering::SeqCst), 2);
}

/// Copies a store, like a backup.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => _ = std::fs::copy(entry.path(), target).unwrap(),
        }
    }
}

#[tokio::test]
async fn an_outbox_that_is_restored_from_an_old_copy_has_nothing_new_dropped_as_a_duplicate() {
    let place = Place::new();
    let store = |name: &str| place.stores.path().join(name);
    let bob = place.node("bob").await;
    let (told, mut seen) = unbounded_channel();
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    let alice = place.node("alice").await;
    let receipt = alice.send("work", "one").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    alice.shutdown().await;
    copy(&store("alice"), &store("backup"));

    let alice = place.node("alice").await;
    for text in ["two", "three"] {
        let receipt = alice.send("work", text).guaranteed().await.unwrap();
        soon(receipt.processed()).await.unwrap();
    }
    alice.shutdown().await;
    std::fs::remove_dir_all(store("alice")).unwrap();
    copy(&store("backup"), &store("alice"));
    let alice = place.node("alice").await;
    for text in ["four", "five", "six"] {
        let receipt = alice.send("work", text).guaranteed().await.unwrap();
        soon(receipt.processed()).await.unwrap();
    }
    // What was stored before the receiver told of a later state may be marked as redelivered.
    for text in ["one", "two", "three", "four", "five", "six"] {
        assert_eq!(next(&mut seen).await.0, text);
    }
    assert_eq!(bob.counters().duplicates, 0);
}

#[tokio::test]
async fn what_was_processed_before_its_outbox_was_restored_comes_again_as_redelivered() {
    let place = Place::new();
    let store = |name: &str| place.stores.path().join(name);
    let alice = place.node("alice").await;
    for text in ["one", "two"] {
        alice.send("work", text).guaranteed().await.unwrap();
    }
    alice.shutdown().await;
    copy(&store("alice"), &store("backup"));
    let (told, mut seen) = unbounded_channel();
    // The original, its copy, and the copy once more.
    for life in 0..3 {
        std::fs::remove_dir_all(store("alice")).unwrap();
        copy(&store("backup"), &store("alice"));
        let bob = place.node("bob").await;
        let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
        let mut alice = place.node("alice").await;
        for text in ["one", "two"] {
            assert_eq!(next(&mut seen).await, (text.into(), 1, life > 0), "life {life}");
        }
        let receipt = alice.send("work", "new").guaranteed().await.unwrap();
        soon(receipt.processed()).await.unwrap();
        assert_eq!(
            next(&mut seen).await,
            fresh("new"),
            "what is stored from then on is not doubted"
        );
        if life > 0 {
            let is_older = |event| matches!(event, Event::OutboxIsOlder { .. }).then_some(());
            wait_for(&mut alice.events(), is_older).await;
        }
        // An outbox that goes on is not doubted.
        alice.shutdown().await;
        alice = place.node("alice").await;
        let receipt = alice.send("work", "more").guaranteed().await.unwrap();
        soon(receipt.processed()).await.unwrap();
        assert_eq!(next(&mut seen).await, fresh("more"));
        alice.shutdown().await;
        bob.shutdown().await;
    }
}

#[tokio::test]
async fn a_copy_that_runs_beside_its_original_sends_what_was_processed_as_redelivered() {
    let place = Place::new();
    let store = |name: &str| place.stores.path().join(name);
    let alice = place.node("alice").await;
    let mut receipts = Vec::new();
    for text in ["one", "two"] {
        receipts.push(alice.send("work", text).guaranteed().await.unwrap());
    }
    copy(&store("alice"), &store("clone"));
    let (told, mut seen) = unbounded_channel();
    let bob = place.node("bob").await;
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    for text in ["one", "two"] {
        assert_eq!(next(&mut seen).await, fresh(text));
    }
    for receipt in receipts {
        soon(receipt.processed()).await.unwrap();
    }
    bob.shutdown().await;

    // In one mesh, one of the two would end: they have one identity.
    let elsewhere = Host::new();
    let config = |name: &str| elsewhere.config(name).outbox(store(name));
    let bob = config("bob").start().await.unwrap();
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    let clone = config("clone").start().await.unwrap();
    assert_eq!(clone.id(), alice.id());
    for text in ["one", "two"] {
        assert_eq!(next(&mut seen).await, (text.into(), 1, true));
    }
    let receipt = clone.send("work", "of the clone").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    assert_eq!(next(&mut seen).await, fresh("of the clone"));
    clone.shutdown().await;
    bob.shutdown().await;

    // The original doesn't know what its copy has sent meanwhile.
    let receipt = alice.send("work", "of the original").guaranteed().await.unwrap();
    let bob = place.node("bob").await;
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    soon(receipt.processed()).await.unwrap();
    assert_eq!(next(&mut seen).await, ("of the original".into(), 1, true));
    assert!(seen.try_recv().is_err());
}

#[tokio::test]
async fn an_outbox_that_is_wiped_has_nothing_new_dropped_as_a_duplicate() {
    let place = Place::new();
    let bob = place.node("bob").await;
    let (told, mut seen) = unbounded_channel();
    let _service = bob.serve("work", sender(&told)).concurrency(1).start().unwrap();
    let mut ids = Vec::new();
    for texts in [["one", "two"], ["three", "four"]] {
        let alice = place.node("alice").await;
        ids.push(alice.id());
        for text in texts {
            let receipt = alice.send("work", text).guaranteed().await.unwrap();
            soon(receipt.processed()).await.unwrap();
            assert_eq!(next(&mut seen).await.0, text);
        }
        alice.shutdown().await;
        std::fs::remove_dir_all(place.stores.path().join("alice/outbox")).unwrap();
    }
    assert_eq!(ids[0], ids[1], "its identity is kept");
    assert_eq!(bob.counters().duplicates, 0);
}

/// The files of a store, with their contents.
fn files(dir: &std::path::Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push((path.clone(), std::fs::read(path).unwrap())),
        }
    }
    all.sort();
    all
}

#[tokio::test]
async fn a_store_that_is_newer_in_part_is_refused_and_left_as_it_is() {
    let place = Place::new();
    for newer in ["inbox", "outbox"] {
        place.node(newer).await.shutdown().await;
        let store = place.stores.path().join(newer);
        let segments = files(&store.join(newer)).into_iter();
        let mut segments =
            segments.filter(|(path, _)| path.extension().is_some_and(|it| it == "segment"));
        let (path, mut bytes) = segments.next().unwrap();
        bytes[8..12].copy_from_slice(&99u32.to_le_bytes());
        let check = crc32c::crc32c(&bytes[..44]);
        bytes[44..48].copy_from_slice(&check.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
        let before = files(&store);
        let Err(StartError::Store(error)) = place.host.config("x").outbox(&store).start().await
        else {
            panic!("it started")
        };
        assert!(matches!(&error.problem, StoreProblem::Newer(text) if text.contains("99")));
        assert!(files(&store) == before, "nothing was written");
    }
}

#[tokio::test]
async fn a_receiver_whose_store_is_lost_is_reported_and_gets_what_is_not_settled() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let mut events = alice.events();
    let identity = place.stores.path().join("identity-of-bob");
    let bob = |store: &str| {
        let config = place.host.config("bob").identity(&identity);
        config.outbox(place.stores.path().join(store)).start()
    };
    let first = bob("first").await.unwrap();
    let (begun, mut begins) = unbounded_channel();
    let hangs = move |call: Call| {
        begun.send(seen(&call)).unwrap();
        std::future::pending::<Result<(), HandlerError>>()
    };
    let service = first.serve("work", hangs).start().unwrap();
    let receipt = alice.send("work", "again").guaranteed().await.unwrap();
    assert_eq!(next(&mut begins).await, fresh("again"));
    drop(service);
    first.shutdown_within(Duration::ZERO).await;

    let second = bob("second").await.unwrap();
    let (told, mut seen) = unbounded_channel();
    let _service = second.serve("work", sender(&told)).start().unwrap();
    let lost = |event| match event {
        Event::InboxLost { peer } => Some(peer),
        _ => None,
    };
    assert_eq!(wait_for(&mut events, lost).await, second.id());
    soon(receipt.processed()).await.unwrap();
    let (text, _, redelivered) = next(&mut seen).await;
    assert!(text == "again" && redelivered);
}

/// One thread, so that no task of the node has run when the service starts.
#[tokio::test]
async fn what_waited_for_a_service_of_its_own_node_goes_there_after_a_restart() {
    let stores = private_dir();
    let config = || {
        let network = MemoryNetwork::default();
        Node::builder().memory(&network).outbox(stores.path().join("alice"))
    };
    let alice = config().start().await.unwrap();
    alice.send("work", "one").guaranteed().await.unwrap();
    alice.shutdown().await;
    let alice = config().start().await.unwrap();
    let (told, mut seen) = unbounded_channel();
    let _service = alice.serve("work", sender(&told)).start().unwrap();
    assert_eq!(next(&mut seen).await.0, "one");
    alice.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn messages_of_a_node_to_itself_come_one_by_one_in_their_order() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let (told, mut seen) = unbounded_channel();
    let consume = alice.consume("billing", "orders.>", sender(&told));
    let _consumer = consume.concurrency(1).start().unwrap();
    let sent = (0..5000).map(|n| format!("{n}"));
    let publish = |text: &String| alice.publish("orders.new", text.clone()).guaranteed();
    let stored = sent.clone().map(|text| publish(&text).into_future());
    let stored = futures_util::future::join_all(stored).await;
    assert!(stored.iter().all(|receipt| receipt.is_ok()));
    for text in sent {
        assert_eq!(next(&mut seen).await, fresh(&text));
    }
    alice.shutdown().await;
}

#[tokio::test]
async fn a_subscription_that_drains_leaves_its_successor_alone() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let (begun, mut begins) = unbounded_channel();
    let (end, ends) = tokio::sync::watch::channel(false);
    let slow = move |_: Call| {
        let (begun, mut ends) = (begun.clone(), ends.clone());
        async move {
            let _test_ended = begun.send(());
            let _sender_gone = ends.wait_for(|end| *end).await;
            Ok::<(), HandlerError>(())
        }
    };
    let old = alice.consume("billing", "orders.>", slow).start().unwrap();
    alice.publish("orders.new", "one").guaranteed().await.unwrap();
    soon(begins.recv()).await.unwrap();
    let mut draining = Box::pin(old.drain());
    assert!(futures_util::poll!(&mut draining).is_pending());
    let (told, mut seen) = unbounded_channel();
    let _new = alice.consume("billing", "orders.>", sender(&told)).start().unwrap();
    end.send_replace(true);
    soon(draining).await;
    alice.publish("orders.new", "two").guaranteed().await.unwrap();
    assert_eq!(next(&mut seen).await.0, "two");
    alice.shutdown().await;
}

#[tokio::test]
async fn a_withdrawn_service_ends_what_it_has_begun() {
    let place = Place::new();
    let (alice, bob) = (place.node("alice").await, place.node("bob").await);
    let (begun, mut begins) = unbounded_channel();
    let end = Arc::new(tokio::sync::Notify::new());
    let ended = end.clone();
    let service = bob.serve("work", move |_| {
        begun.send(()).unwrap();
        let ended = ended.clone();
        async move {
            ended.notified().await;
            Ok(())
        }
    });
    let service = service.start().unwrap();
    let receipt = alice.send("work", "long").guaranteed().await.unwrap();
    soon(begins.recv()).await.unwrap();
    drop(service);
    let stopping = tokio::spawn(async move { bob.shutdown_within(SOON).await });
    end.notify_one();
    let report = soon(stopping).await.unwrap();
    assert_eq!((report.aborted, soon(receipt.processed()).await), (0, Ok(())));
}

#[tokio::test]
async fn a_node_that_is_dropped_gives_its_store_back() {
    let place = Place::new();
    let alice = place.node("alice").await;
    let (begun, mut begins) = unbounded_channel();
    let service = alice.serve("work", move |call| {
        begun.send(call.message.is_redelivered()).unwrap();
        std::future::pending::<Result<(), HandlerError>>()
    });
    let service = service.concurrency(1).start().unwrap();
    let first = alice.send("work", "first").guaranteed().await.unwrap();
    let second = alice.send("work", "second").guaranteed().await.unwrap();
    assert_eq!(soon(begins.recv()).await, Some(false));
    drop(alice);
    for receipt in [first, second] {
        assert_eq!(soon(receipt.processed()).await, Err(DeliveryError::ShutDown));
    }
    // The service is still held here; the store is released.
    let again = async {
        loop {
            let config = place.config("alice");
            match config.start().await {
                Ok(node) => return node,
                Err(StartError::Store(error)) => {
                    assert!(matches!(error.problem, StoreProblem::InUse), "{error:?}");
                }
                Err(error) => panic!("{error}"),
            }
            tokio::task::yield_now().await;
        }
    };
    let alice = soon(again).await;
    assert_eq!(sizes(&alice), (2, 0));
    assert!(begins.try_recv().is_err());
    drop(service);
}
