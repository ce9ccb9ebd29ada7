//! The same behaviour over every carrier of messages: the mesh, or a broker.
//!
//! Real brokers are tested if `./brokers run cargo test …` sets their addresses.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;
#[path = "common/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Host, SOON, echo, soon, wait_for};
use peerbus::{
    Body, BrokerKind, Call, DeliveryError, DropReason, EmbeddedBroker, Event, HandlerError, NodeId,
    OutboxError, Overflow, Reply, RequestError, SendError, ServeError, SubscribeError,
};
use tokio::sync::mpsc;
use world::{Carrier, World, collect};

async fn subscribers_get_what_they_ask_for(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let mut european = bob.subscribe("orders.eu.>").unwrap();
    let mut all = bob.subscribe("orders.>").unwrap();
    alice.wait_for_subscribers("orders.eu.new", 1, SOON).await.unwrap();
    alice.wait_for_subscribers("orders.us.new", 1, SOON).await.unwrap();
    let report = alice
        .publish("orders.us.new", Body::encode(&("apples", 17)).unwrap())
        .key("customer-7")
        .header("colour", "red")
        .await
        .unwrap();
    assert_eq!((report.queued, report.dropped.len()), (1, 0));
    alice.publish("orders.eu.new", "second").await.unwrap();
    alice.publish("prices", "unheard").await.unwrap();
    alice.publish("orders.eu.new.late", "third").await.unwrap();

    let first = soon(all.recv()).await.unwrap();
    assert_eq!((first.from, first.topic().unwrap().as_str()), (alice.id(), "orders.us.new"));
    assert_eq!(first.decode::<(String, u32)>().unwrap(), ("apples".into(), 17));
    assert_eq!(first.header.ordering_key(), Some("customer-7"));
    assert_eq!(first.header.content_type(), Some("application/msgpack"));
    assert_eq!(first.header.user_header("colour"), Some("red"));
    // A node that subscribes twice receives each event once per subscription.
    for subscription in [&mut all, &mut european] {
        for text in ["second", "third"] {
            assert_eq!(soon(subscription.recv()).await.unwrap().text(), text);
        }
    }
}

async fn a_subscription_that_ended_gets_nothing_more(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let mut kept = bob.subscribe("a.*").unwrap();
    let ended = bob.subscribe("a.b").unwrap();
    alice.wait_for_subscribers("a.b", 1, SOON).await.unwrap();
    alice.wait_for_subscribers("a.c", 1, SOON).await.unwrap();
    drop(ended);
    alice.publish("a.b", "x").await.unwrap();
    assert_eq!(soon(kept.recv()).await.unwrap().text(), "x");
    drop(kept);
    let moment = Duration::from_millis(200);
    soon(async { while alice.wait_for_subscribers("a.b", 1, moment).await.is_ok() {} }).await;
}

async fn a_request_gets_its_reply_or_the_handlers_error(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let handler = |call: Call| async move {
        match call.message.text().as_ref() {
            "panic" => panic!("on purpose"),
            "decline" => Err(HandlerError::new("not_found", "no order 17")),
            text => Ok(format!("{text}, of {}", call.message.from)),
        }
    };
    let _service = bob.serve("orders", handler).start().unwrap();
    alice.wait_for_service("orders", SOON).await.unwrap();
    let reply = alice.request("orders", "fine").await.unwrap();
    assert_eq!(reply.text(), format!("fine, of {}", alice.id()));
    assert_eq!(reply.from, bob.id());
    for (body, wanted) in [("decline", "not_found"), ("panic", "panic")] {
        match alice.request("orders", body).await {
            Err(RequestError::Handler(error)) => assert_eq!(error.code, wanted),
            other => panic!("{other:?}"),
        }
    }
}

async fn a_reply_carries_headers_and_a_content_type(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let menu = |call: Call| async move {
        let reply = Reply::new("[17]").content_type("application/json").header("version", "3");
        Ok(match call.message.text().as_ref() {
            "too much" => reply.header("long", "x".repeat(64 * 1024)),
            "plain" => Body::encode(&17)?.into(),
            _ => reply,
        })
    };
    let _service = bob.serve("menu", menu).start().unwrap();
    alice.wait_for_service("menu", SOON).await.unwrap();
    let reply = alice.request("menu", "fine").await.unwrap();
    assert_eq!(reply.text(), "[17]");
    assert_eq!(reply.header.content_type(), Some("application/json"));
    assert_eq!(reply.header.user_header("version"), Some("3"));
    let plain = alice.request("menu", "plain").await.unwrap();
    assert_eq!(plain.decode::<u32>().unwrap(), 17);
    assert_eq!(plain.header.content_type(), Some(peerbus::MESSAGEPACK));
    match alice.request("menu", "too much").await {
        Err(RequestError::Handler(error)) => assert_eq!(error.code, "too_large"),
        other => panic!("{other:?}"),
    }
}

async fn bodies_of_all_sizes_arrive(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let _service = bob.serve("echo", echo).start().unwrap();
    alice.wait_for_service("echo", SOON).await.unwrap();
    for len in [0, 1, 4096, 4097, 65_536, 1024 * 1024] {
        let body: Vec<u8> = (0..len).map(|n| n as u8).collect();
        let reply = alice.request("echo", &body).await.unwrap();
        assert!(reply.body == body, "{len} bytes");
    }
    let error = alice.request("echo", vec![0; 1024 * 1024 + 1]).await.unwrap_err();
    assert!(matches!(error, RequestError::TooLarge(_)), "{error}");
}

async fn a_request_ends_by_its_deadline_and_its_handler_hears_of_it(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let (told, mut heard) = mpsc::unbounded_channel();
    let handler = move |call: Call| {
        let told = told.clone();
        async move {
            call.cancelled().await;
            told.send(()).unwrap();
            Ok(())
        }
    };
    let _service = bob.serve("sleepy", handler).start().unwrap();
    alice.wait_for_service("sleepy", SOON).await.unwrap();
    let request = alice.request("sleepy", "").deadline(Duration::from_millis(200));
    let ended = soon(async { request.await }).await;
    assert!(matches!(ended, Err(RequestError::DeadlineExceeded(_))), "{ended:?}");
    soon(heard.recv()).await.unwrap();
}

async fn nobody_serves_is_told_at_once(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    alice.wait_for_peers(1, SOON).await.unwrap();
    let error = alice.request("nothing", "").await.unwrap_err();
    assert!(matches!(error, RequestError::NoService(_)), "{error}");
    // A service that was withdrawn.
    let service = bob.serve("echo", echo).start().unwrap();
    alice.wait_for_service("echo", SOON).await.unwrap();
    service.drain().await;
    soon(async {
        loop {
            match alice.request("echo", "").deadline(Duration::from_millis(500)).await {
                Err(RequestError::NoService(_)) => return,
                // The withdrawal is still in flight.
                Err(RequestError::Handler(error)) if error.code == "no_service" => {}
                Err(RequestError::DeadlineExceeded(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    })
    .await;
}

async fn competing_consumers_share_the_work_and_each_call_is_handled_once(world: World) {
    let boss = world.node("boss").await;
    let counts: Vec<Arc<AtomicUsize>> = (0..3).map(|_| Arc::default()).collect();
    let mut workers = Vec::new();
    for count in &counts {
        let worker = world.node("worker").await;
        let count = count.clone();
        let handler = move |_: Call| {
            count.fetch_add(1, Ordering::Relaxed);
            async { Ok(()) }
        };
        let service = worker.serve("work", handler).concurrency(1).start().unwrap();
        workers.push((worker, service));
    }
    boss.wait_for_instances("work", 3, SOON).await.unwrap();
    let handled = || counts.iter().map(|count| count.load(Ordering::Relaxed));
    let mut sent = 0;
    soon(async {
        while handled().any(|count| count < 5) {
            boss.request("work", "job").await.unwrap();
            sent += 1;
        }
    })
    .await;
    assert_eq!(handled().sum::<usize>(), sent);
}

async fn a_message_to_a_node_goes_there_and_can_be_answered_later(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let (handler, mut answers) = collect();
    let _inbox = alice.serve_node(handler).start().unwrap();
    let replier = bob.clone();
    let later = move |call: Call| {
        let bob = replier.clone();
        async move {
            bob.answer(&call.message, "later")
                .expect("it has a return address")
                .await
                .map_err(HandlerError::from_error)?;
            Ok(())
        }
    };
    let _service = bob.serve("slow", later).start().unwrap();
    alice.wait_for_service("slow", SOON).await.unwrap();
    let sent = alice.send("slow", "when?").reply_to(alice.id()).await.unwrap();
    assert_eq!(sent.to, if world.is_mesh() { bob.id() } else { NodeId::BROKER });
    let answer = soon(answers.recv()).await.unwrap();
    assert_eq!((answer.text().as_ref(), answer.header.correlation_id), ("later", Some(sent.id)));
}

async fn a_node_hears_and_serves_itself(world: World) {
    let node = world.node("solo").await;
    let mut all = node.subscribe(">").unwrap();
    node.wait_for_subscribers("a.b", 1, SOON).await.unwrap();
    assert_eq!(node.publish("a.b", "x").await.unwrap().queued, 1);
    assert_eq!(soon(all.recv()).await.unwrap().text(), "x");
    let _service = node.serve("echo", echo).start().unwrap();
    node.wait_for_service("echo", SOON).await.unwrap();
    assert_eq!(node.request("echo", "y").await.unwrap().text(), "y");
}

async fn meshes_do_not_mix(world: World) {
    let alice = world.node("alice").await;
    let other = world.config("other").mesh("another".parse().unwrap()).start().await.unwrap();
    let mut heard = other.subscribe(">").unwrap();
    let mut own = alice.subscribe(">").unwrap();
    alice.wait_for_subscribers("a", 1, SOON).await.unwrap();
    other.wait_for_subscribers("a", 1, SOON).await.unwrap();
    alice.publish("a", "of alice").await.unwrap();
    other.publish("a", "of other").await.unwrap();
    assert_eq!(soon(own.recv()).await.unwrap().text(), "of alice");
    assert_eq!(soon(heard.recv()).await.unwrap().text(), "of other");
}

async fn many_messages_come_in_order_and_none_is_lost(world: World) {
    // No more than a subscription holds: the two sides alternate in one task.
    const COUNT: u32 = 5_000;
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let mut numbers = bob.subscribe("n").unwrap();
    alice.wait_for_subscribers("n", 1, SOON).await.unwrap();
    let publishing = async {
        for n in 0..COUNT {
            let report = alice.publish("n", n.to_string()).within(SOON).await.unwrap();
            assert_eq!(report.queued, 1, "{report:?}");
        }
    };
    let reading = async {
        for n in 0..COUNT {
            assert_eq!(numbers.recv().await.unwrap().text(), n.to_string());
        }
    };
    soon(async { tokio::join!(publishing, reading) }).await;
}

async fn shutdown_delivers_what_was_queued(world: World) {
    let (alice, bob) = (world.node("alice").await, world.node("bob").await);
    let mut all = bob.subscribe("n").unwrap();
    alice.wait_for_subscribers("n", 1, SOON).await.unwrap();
    for n in 0..1000 {
        alice.publish("n", n.to_string()).await.unwrap();
    }
    let reader = async {
        for n in 0..1000 {
            assert_eq!(all.recv().await.unwrap().text(), n.to_string());
        }
    };
    let (report, ()) = soon(async { tokio::join!(alice.shutdown(), reader) }).await;
    assert_eq!((report.undelivered, report.in_doubt, report.aborted), (0, 0, 0));
    assert!(alice.publish("n", "x").await.is_err());
}

// Guaranteed messages.

async fn a_guaranteed_message_waits_for_its_service(world: World) {
    let sender = world.durable("sender").await;
    for n in 0..100 {
        sender.send("billing", n.to_string()).guaranteed().await.unwrap();
    }
    let taker = world.durable("taker").await;
    let (handler, mut taken) = collect();
    let _service = taker.serve("billing", handler).concurrency(4).start().unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < 100 {
        let message = soon(taken.recv()).await.unwrap();
        assert_eq!((message.from, message.attempt()), (sender.id(), 1));
        assert!(!message.is_redelivered());
        assert!(seen.insert(message.text().parse::<u32>().unwrap()), "a duplicate");
    }
}

async fn what_fails_is_tried_again_and_what_is_rejected_is_not(world: World) {
    let (sender, taker) = (world.durable("sender").await, world.durable("taker").await);
    let (told, mut tries) = mpsc::unbounded_channel();
    let handler = move |call: Call| {
        let message = call.message;
        let text = message.text().into_owned();
        told.send((text.clone(), message.attempt(), message.is_redelivered())).unwrap();
        let result = match (text.as_str(), message.attempt()) {
            ("fails twice", 1..=2) => Err(HandlerError::new("busy", "not now")),
            ("hopeless", _) => Err(HandlerError::reject("broken", "never")),
            _ => Ok(()),
        };
        std::future::ready(result)
    };
    let _service = taker.serve("billing", handler).start().unwrap();
    for body in ["hopeless", "fails twice"] {
        sender.send("billing", body).guaranteed().await.unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.push(soon(tries.recv()).await.unwrap());
    }
    seen.sort_unstable();
    let again = |attempt: u32| ("fails twice".to_owned(), attempt, attempt > 1);
    assert_eq!(seen, [again(1), again(2), again(3), ("hopeless".to_owned(), 1, false)]);
}

async fn what_always_fails_is_tried_as_often_as_was_set(world: World) {
    // More often than by default. The sender says so in the mesh, over NATS who handles it, and
    // with RabbitMQ both.
    const ATTEMPTS: u32 = 12;
    let moment = Duration::from_millis(1);
    let node = async |name: &str| {
        let config = world.durable_config(name).max_attempts(ATTEMPTS).backoff(moment, moment);
        config.start().await.unwrap()
    };
    let (sender, taker) = (node("sender").await, node("taker").await);
    let (told, mut tries) = mpsc::unbounded_channel();
    let handler = move |call: Call| {
        let text = call.message.text().into_owned();
        told.send((text.clone(), call.message.attempt())).unwrap();
        std::future::ready(match text.as_str() {
            "fails" => Err(HandlerError::new("busy", "not now")),
            _ => Ok(()),
        })
    };
    let _service = taker.serve("billing", handler).start().unwrap();
    sender.send("billing", "fails").guaranteed().await.unwrap();
    for attempt in 1..=ATTEMPTS {
        assert_eq!(soon(tries.recv()).await.unwrap(), ("fails".to_owned(), attempt));
    }
    sender.send("billing", "next").guaranteed().await.unwrap();
    assert_eq!(soon(tries.recv()).await.unwrap(), ("next".to_owned(), 1));
}

async fn a_durable_subscription_gets_what_was_published_while_it_was_away(world: World) {
    let publisher = world.durable("publisher").await;
    let subscriber = world.durable("subscriber").await;
    let (handler, mut taken) = collect();
    let consumer = subscriber.consume("billing", "orders.>", handler).start().unwrap();
    publisher.wait_for_consumers("orders.new", 1, SOON).await.unwrap();
    publisher.publish("orders.new", "one").guaranteed().await.unwrap();
    assert_eq!(soon(taken.recv()).await.unwrap().text(), "one");
    drop(consumer);
    subscriber.shutdown().await;

    for body in ["two", "three"] {
        publisher.publish("orders.new", body).guaranteed().await.unwrap();
        publisher.publish("prices", body).guaranteed().await.unwrap();
    }
    let subscriber = world.durable("subscriber").await;
    let (handler, mut taken) = collect();
    let consumer = subscriber.consume("billing", "orders.>", handler).concurrency(1);
    let consumer = consumer.start().unwrap();
    for body in ["two", "three"] {
        let message = soon(taken.recv()).await.unwrap();
        assert_eq!((message.text().as_ref(), message.from), (body, publisher.id()));
        assert_eq!(message.topic().unwrap().as_str(), "orders.new");
    }
    consumer.unsubscribe().await;
}

async fn what_has_expired_is_not_delivered(world: World) {
    let sender = world.durable("sender").await;
    let soon_over = Duration::from_millis(50);
    sender.send("billing", "stale").guaranteed().expires_in(soon_over).await.unwrap();
    tokio::time::sleep(soon_over).await;
    sender.send("billing", "fresh").guaranteed().await.unwrap();
    let taker = world.durable("taker").await;
    let (handler, mut taken) = collect();
    let _service = taker.serve("billing", handler).start().unwrap();
    assert_eq!(soon(taken.recv()).await.unwrap().text(), "fresh");
}

// Tests for brokers only.

async fn what_a_broker_cannot_do_is_an_error_that_names_it(world: World) {
    let node = world.durable("node").await;
    let error = node.send("x", "y").key("k").await.unwrap_err();
    assert!(matches!(error, SendError::Unsupported(_)), "{error}");
    let error = node.request("x", "y").key("k").await.unwrap_err();
    assert!(matches!(error, RequestError::Unsupported(_)), "{error}");
    let error = node.subscribe_with("a", Overflow::HoldBack).err().unwrap();
    assert!(matches!(error, SubscribeError::Unsupported(_)), "{error}");
    assert!(
        node.wait_for_peers(2, SOON).await.unwrap_err().to_string().contains("connected nodes")
    );
    let mut transaction = node.transaction();
    transaction.add(node.send("x", "y").guaranteed());
    let error = transaction.commit().await.unwrap_err();
    assert!(matches!(error, OutboxError::Unsupported(_)), "{error}");
    if let Carrier::Embedded(_) = world.carrier {
        let error = node.send("x", "y").guaranteed().await.unwrap_err();
        assert_eq!(error.to_string(), "the embedded broker has no guaranteed messages");
        let error = node.consume("x", "y", echo).start().err().unwrap();
        assert!(matches!(error, ServeError::Unsupported(_)), "{error}");
        return;
    }
    let receipt = node.send("x", "y").guaranteed().await.unwrap();
    let error = receipt.processed().await.unwrap_err();
    assert!(matches!(error, DeliveryError::Unsupported(_)), "{error}");
    let passing = world.node("passing").await;
    let error = passing.consume("x", "y", echo).start().err().unwrap();
    assert!(matches!(error, ServeError::NoIdentity), "{error}");
}

async fn a_broker_that_is_not_there_is_told_and_tried_again(world: World) {
    // A port on which no broker listens yet.
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = socket.local_addr().unwrap();
    drop(socket);
    let config = world.config("early").broker(format!("peerbus://{addr}"));
    let early = config.service_grace(Duration::from_millis(10)).start().await.unwrap();
    let mut events = early.events();
    let mut heard = early.subscribe("a").unwrap();
    let unreachable = early.unreachable();
    assert_eq!(unreachable[0].address.to_string(), addr.to_string());
    let report = early.publish("a", "lost").await.unwrap();
    assert_eq!(report.dropped, [(NodeId::BROKER, DropReason::LinkLost)]);
    let error = early.request("x", "").await.unwrap_err();
    assert!(matches!(error, RequestError::PeerLost { maybe_executed: false }), "{error}");

    let broker = EmbeddedBroker::start(addr).await.unwrap();
    let up = wait_for(&mut events, |event| match event {
        Event::PeerUp(peer) => Some(peer),
        _ => None,
    });
    assert_eq!(up.await.id, NodeId::BROKER);
    early.wait_for_subscribers("a", 1, SOON).await.unwrap();
    early.publish("a", "heard").await.unwrap();
    assert_eq!(soon(heard.recv()).await.unwrap().text(), "heard");
    broker.stop().await;
}

#[cfg(any(feature = "nats", feature = "rabbitmq"))]
async fn wrong_credentials_are_told_at_the_start(world: World) {
    let Carrier::Real(url) = &world.carrier else { return };
    let (scheme, rest) = url.split_once("://").unwrap();
    let (_, address) = rest.split_once('@').unwrap();
    let wrong = world.config("x").broker(format!("{scheme}://peerbus:hunter2@{address}"));
    let error = wrong.start().await.err().unwrap();
    assert!(matches!(error, peerbus::StartError::Broker { .. }), "{error}");
    assert!(!error.to_string().contains("hunter2"), "{error}");
}

#[cfg(any(feature = "nats", feature = "rabbitmq"))]
async fn a_certificate_that_nobody_vouches_for_is_told_and_not_trusted(world: World) {
    let stranger = world.host.config("stranger").mesh(world.mesh.parse().unwrap());
    let stranger = stranger.broker(world.url().unwrap()).start().await.unwrap();
    let unreachable = stranger.unreachable();
    assert!(unreachable[0].last_error.contains("certificate"), "{unreachable:?}");
    let report = stranger.publish("a", "x").await.unwrap();
    assert_eq!(report.dropped, [(NodeId::BROKER, DropReason::LinkLost)]);
}

#[cfg(feature = "rabbitmq")]
async fn a_queue_that_is_there_with_other_settings_is_named(world: World) {
    use lapin::options::QueueDeclareOptions;
    use lapin::types::FieldTable;
    let Carrier::Real(url) = &world.carrier else { return };
    let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default());
    let connection = connection.await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let queue = format!("peerbus.{}.work.billing", world.mesh);
    let options = QueueDeclareOptions::default();
    channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await.unwrap();
    let node = world.durable("node").await;
    let error = node.send("billing", "x").guaranteed().await.unwrap_err();
    assert!(error.to_string().contains(&queue), "{error}");
    // The other queues are not affected.
    node.send("shipping", "x").guaranteed().await.unwrap();
}

#[tokio::test]
async fn addresses_that_make_no_sense_are_refused_with_a_reason() {
    let host = Host::new();
    for (url, told) in [
        ("mqtt://x", "\"mqtt\" is no broker's scheme"),
        ("peerbus://", "no host"),
        ("peerbus://x:port", "no host"),
    ] {
        let error = host.config("x").broker(url).start().await.err().unwrap().to_string();
        assert!(error.contains(told), "{error}");
    }
    let both = host.config("x").broker("peerbus://127.0.0.1:1").outbox(host.path().join("o"));
    let error = both.start().await.err().unwrap().to_string();
    assert_eq!(error, "in broker mode the broker keeps guaranteed messages: no outbox");
    let error = EmbeddedBroker::start("0.0.0.0:0".parse().unwrap()).await.err().unwrap();
    assert!(error.to_string().contains("loopback address"), "{error}");
    assert_eq!(BrokerKind::Nats.to_string(), "NATS");
}

macro_rules! suite {
    ($module:ident, $world:expr, [$($behaviour:ident)*]) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $behaviour() {
                    if let Some(world) = $world.await {
                        super::$behaviour(world).await;
                    }
                }
            )*
        }
    };
    (best_effort: $module:ident, $world:expr, [$($more:ident)*]) => {
        suite!($module, $world, [
            subscribers_get_what_they_ask_for
            a_subscription_that_ended_gets_nothing_more
            a_request_gets_its_reply_or_the_handlers_error
            a_reply_carries_headers_and_a_content_type
            bodies_of_all_sizes_arrive
            a_request_ends_by_its_deadline_and_its_handler_hears_of_it
            nobody_serves_is_told_at_once
            competing_consumers_share_the_work_and_each_call_is_handled_once
            a_message_to_a_node_goes_there_and_can_be_answered_later
            a_node_hears_and_serves_itself
            meshes_do_not_mix
            many_messages_come_in_order_and_none_is_lost
            shutdown_delivers_what_was_queued
            $($more)*
        ]);
    };
    (guaranteed: $module:ident, $world:expr, [$($more:ident)*]) => {
        suite!(best_effort: $module, $world, [
            a_guaranteed_message_waits_for_its_service
            what_fails_is_tried_again_and_what_is_rejected_is_not
            what_always_fails_is_tried_as_often_as_was_set
            a_durable_subscription_gets_what_was_published_while_it_was_away
            what_has_expired_is_not_delivered
            $($more)*
        ]);
    };
}

suite!(guaranteed: mesh, crate::world::World::mesh(), []);
suite!(best_effort: embedded, crate::world::World::embedded(), [
    what_a_broker_cannot_do_is_an_error_that_names_it
    a_broker_that_is_not_there_is_told_and_tried_again
]);
#[cfg(feature = "nats")]
suite!(guaranteed: nats, crate::world::World::nats(), [
    what_a_broker_cannot_do_is_an_error_that_names_it
    wrong_credentials_are_told_at_the_start
]);
#[cfg(feature = "nats")]
suite!(best_effort: nats_over_tls, crate::world::World::nats_over_tls(), [
    wrong_credentials_are_told_at_the_start
    a_certificate_that_nobody_vouches_for_is_told_and_not_trusted
]);
#[cfg(feature = "rabbitmq")]
suite!(guaranteed: rabbitmq_over_tls, crate::world::World::rabbitmq_over_tls(), [
    wrong_credentials_are_told_at_the_start
    a_certificate_that_nobody_vouches_for_is_told_and_not_trusted
]);
#[cfg(feature = "rabbitmq")]
suite!(guaranteed: rabbitmq, crate::world::World::rabbitmq(), [
    what_a_broker_cannot_do_is_an_error_that_names_it
    wrong_credentials_are_told_at_the_start
    a_queue_that_is_there_with_other_settings_is_named
]);
