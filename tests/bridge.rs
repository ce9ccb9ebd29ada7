//! Bridges between a mesh and a broker.
//!
//! Real brokers are tested if `./brokers run cargo test …` sets their addresses.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;
#[path = "common/world.rs"]
mod world;

use common::{SOON, soon};
use peerbus::{
    Bridge, BridgeError, Call, HandlerError, Kind, Node, Reply, RequestError, ServeError,
    Subscription,
};
use world::World;

/// A mesh, a broker, and a node of each that form a bridge.
struct Sides {
    mesh: World,
    broker: World,
}

impl Sides {
    async fn new() -> Self {
        Self { mesh: World::mesh().await.unwrap(), broker: World::embedded().await.unwrap() }
    }

    async fn ends(&self) -> (Node, Node) {
        (self.mesh.node("inner").await, self.broker.node("outer").await)
    }
}

/// The messages of a subscription up to a message that is marked as the last.
async fn until_last(subscription: &mut Subscription) -> Vec<String> {
    let mut got = Vec::new();
    loop {
        match soon(subscription.recv()).await.unwrap().text().into_owned() {
            last if last == "last" => return got,
            text => got.push(text),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chosen_events_cross_in_the_chosen_direction_and_never_come_back() {
    let sides = Sides::new().await;
    let (inner, outer) = sides.ends().await;
    // An event that two patterns match crosses once.
    let bridge = Bridge::between(&inner, &outer).export("a.>").export("a.x");
    let bridge = bridge.import("a.>").import("b.>");
    let bridge = bridge.start().unwrap();
    let (alice, bob) = (sides.mesh.node("alice").await, sides.broker.node("bob").await);
    let (mut here, mut there) = (alice.subscribe(">").unwrap(), bob.subscribe(">").unwrap());
    // The inner node subscribes to exported topics, and the outer one to imported topics.
    alice.wait_for_subscribers("a.x", 2, SOON).await.unwrap();
    bob.wait_for_subscribers("a.x", 2, SOON).await.unwrap();
    bob.wait_for_subscribers("b.x", 2, SOON).await.unwrap();
    inner.wait_for_subscribers("a.x", 1, SOON).await.unwrap();

    let sent = alice.publish("a.x", "from the mesh").key("k").header("colour", "red");
    sent.kind(Kind::Document).await.unwrap();
    alice.publish("b.x", "stays in the mesh").await.unwrap();
    alice.publish("c.x", "stays in the mesh").await.unwrap();
    let crossed = soon(there.recv()).await.unwrap();
    assert_eq!(crossed.text(), "from the mesh");
    assert_eq!((crossed.from, crossed.header.kind), (outer.id(), Kind::Document));
    assert_eq!(crossed.header.ordering_key(), Some("k"));
    assert_eq!(crossed.header.user_header("colour"), Some("red"));
    let (first, by) = (alice.id().to_string(), inner.id().to_string());
    assert_eq!(crossed.header.user_header(Bridge::FROM), Some(&*first));
    assert_eq!(crossed.header.user_header(Bridge::VIA), Some(&*by));
    let original = soon(here.recv()).await.unwrap();
    assert_eq!(original.header.id, crossed.header.id);

    bob.publish("b.x", "from the broker").await.unwrap();
    // On the same topic, so that it arrives after the others.
    bob.publish("b.x", "last").await.unwrap();
    assert_eq!(until_last(&mut there).await, ["from the broker"]);
    let got = until_last(&mut here).await;
    assert_eq!(got, ["stays in the mesh", "stays in the mesh", "from the broker"]);
    assert_eq!((bridge.exported().passed, bridge.imported().passed), (1, 2));
    assert_eq!(bridge.exported().dropped + bridge.imported().dropped, 0);
    bridge.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_bridges_beside_each_other_make_no_loop() {
    let sides = Sides::new().await;
    let mut bridges = Vec::new();
    for name in ["first", "second"] {
        let (inner, outer) = (sides.mesh.node(name).await, sides.broker.node(name).await);
        let bridge = Bridge::between(&inner, &outer).export("a.>").import("a.>").start().unwrap();
        bridges.push((bridge, inner, outer));
    }
    let (alice, bob) = (sides.mesh.node("alice").await, sides.broker.node("bob").await);
    let (mut here, mut there) = (alice.subscribe("a.>").unwrap(), bob.subscribe("a.>").unwrap());
    alice.wait_for_subscribers("a.x", 3, SOON).await.unwrap();
    bob.wait_for_subscribers("a.x", 3, SOON).await.unwrap();
    for (_, inner, _) in &bridges {
        inner.wait_for_subscribers("a.x", 3, SOON).await.unwrap();
    }
    alice.publish("a.x", "round and round").await.unwrap();
    // A message that loops would go on crossing before this one.
    for _ in 0..3 {
        bob.publish("a.x", "last").await.unwrap();
        let mut got = until_last(&mut here).await;
        got.extend(until_last(&mut there).await);
        assert!(got.len() <= 5, "each bridge carries a message once in each direction: {got:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_are_asked_across_in_both_directions() {
    let sides = Sides::new().await;
    let (inner, outer) = sides.ends().await;
    let bridge = Bridge::between(&inner, &outer).export_service("stock").import_service("prices");
    let bridge = bridge.start().unwrap();
    let (alice, bob) = (sides.mesh.node("alice").await, sides.broker.node("bob").await);
    let stock = |call: Call| async move {
        match call.message.text().as_ref() {
            "pears" => Err(HandlerError::new("sold_out", "no pears")),
            fruit => Ok(format!("17 {fruit}")),
        }
    };
    let _stock = alice.serve("stock", stock).start().unwrap();
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let prices = move |call: Call| {
        told.send(call.message.clone()).unwrap();
        std::future::ready(Ok::<_, HandlerError>(Reply::new("2.50").header("currency", "euro")))
    };
    let _prices = bob.serve("prices", prices).start().unwrap();
    inner.wait_for_service("stock", SOON).await.unwrap();
    bob.wait_for_service("stock", SOON).await.unwrap();
    alice.wait_for_service("prices", SOON).await.unwrap();

    assert_eq!(bob.request("stock", "apples").await.unwrap().text(), "17 apples");
    match bob.request("stock", "pears").await {
        Err(RequestError::Handler(error)) => assert_eq!(error.code, "sold_out"),
        other => panic!("{other:?}"),
    }
    let price = alice.request("prices", "apples").await.unwrap();
    assert_eq!(
        (price.text().as_ref(), price.header.user_header("currency")),
        ("2.50", Some("euro"))
    );
    assert_eq!(soon(heard.recv()).await.unwrap().text(), "apples");
    alice.send("prices", "one way").header("colour", "red").await.unwrap();
    let message = soon(heard.recv()).await.unwrap();
    assert_eq!(message.text(), "one way");
    assert_eq!(message.header.user_header("colour"), Some("red"));
    bridge.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_cross_is_refused_at_the_start() {
    let sides = Sides::new().await;
    let (inner, outer) = sides.ends().await;
    let bridge = Bridge::between(&inner, &outer).export_service("stock").import_service("stock");
    let error = bridge.start().err().unwrap();
    assert!(
        matches!(error, BridgeError::BothWays(ref name) if name.as_str() == "stock"),
        "{error}"
    );
    let error = Bridge::between(&inner, &outer).export("a..b").start().err().unwrap();
    assert!(matches!(error, BridgeError::Address(_)), "{error}");
    let error = Bridge::between(&inner, &outer).export("a").guaranteed(true).start().err().unwrap();
    assert!(error.to_string().contains("guaranteed messages"), "{error}");
    let error = Bridge::between(&inner, &outer).import("a").guaranteed(true).start().err().unwrap();
    assert!(matches!(error, BridgeError::Serve(ServeError::NoStore)), "{error}");
}

#[cfg(all(feature = "cli", any(feature = "nats", feature = "rabbitmq")))]
mod guaranteed {
    use std::collections::HashMap;
    use std::process::{Child, Command, Stdio};

    use peerbus::MessageId;
    use tokio::sync::mpsc;

    use super::*;
    use world::collect;

    const MESSAGES: usize = 1500;
    const KILLS: usize = 8;

    /// A `peerbus bridge` process.
    struct Process {
        command: Command,
        child: Child,
    }

    impl Process {
        fn start(sides: &Sides) -> Self {
            let mut command = Command::new(env!("CARGO_BIN_EXE_peerbus"));
            command
                .args(["bridge", "--no-mdns", "--export", "orders.>", "--import", "prices.>"])
                .args(["--export-service", "stock", "--mesh", &sides.mesh.mesh])
                .args(["--broker", &sides.broker.url().unwrap(), "--name", "bridge"])
                .arg("--outbox")
                .arg(sides.mesh.host.path().join("bridge"))
                .env("XDG_RUNTIME_DIR", sides.mesh.host.path())
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            let child = command.spawn().unwrap();
            Self { command, child }
        }

        fn kill(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            self.kill();
        }
    }

    /// The number of arrivals of each message, once all have arrived.
    async fn take(
        mut messages: mpsc::UnboundedReceiver<peerbus::Message>,
        wanted: usize,
    ) -> HashMap<MessageId, usize> {
        let mut times = HashMap::new();
        while times.len() < wanted {
            let message = tokio::time::timeout(SOON * 4, messages.recv()).await;
            let message = message.unwrap_or_else(|_| panic!("{} of {wanted}", times.len()));
            *times.entry(message.unwrap().header.id).or_default() += 1;
        }
        while let Ok(message) = messages.try_recv() {
            *times.entry(message.header.id).or_default() += 1;
        }
        times
    }

    /// Sends guaranteed messages in both directions across a bridge that is killed repeatedly.
    async fn nothing_is_lost_and_nothing_doubled(broker: World, may_double: bool) {
        // One mesh name for both sides, as in the command.
        let mut sides = Sides { mesh: World::mesh().await.unwrap(), broker };
        sides.broker.mesh = sides.mesh.mesh.clone();
        let mut bridge = Process::start(&sides);
        // The folder in which the command finds other nodes of this host.
        let alice = sides.mesh.config("alice").runtime_dir(sides.mesh.host.path().join("peerbus"));
        let alice = alice.outbox(sides.mesh.host.path().join("alice")).start().await.unwrap();
        let bob = sides.broker.durable("bob").await;
        let (handler, orders) = collect();
        let _orders = bob.consume("ledger", "orders.>", handler).start().unwrap();
        let (handler, mut prices) = collect();
        let _prices = alice.consume("ledger", "prices.>", handler).start().unwrap();
        let (handler, stock) = collect();
        let _stock = alice.serve("stock", handler).start().unwrap();
        alice.wait_for_consumers("orders.new", 1, SOON).await.unwrap();
        bob.wait_for_consumers("prices.new", 1, SOON).await.unwrap();
        // A durable subscription that the bridge has not met is promised nothing.
        soon(async {
            loop {
                bob.publish("prices.first", "").guaranteed().await.unwrap();
                let moment = std::time::Duration::from_millis(300);
                if tokio::time::timeout(moment, prices.recv()).await.is_ok() {
                    return;
                }
            }
        })
        .await;
        bob.wait_for_service("stock", SOON).await.unwrap();

        let ours = async {
            for number in 0..MESSAGES {
                alice.publish("orders.new", number.to_string()).guaranteed().await.unwrap();
            }
        };
        let theirs = async {
            for number in 0..MESSAGES {
                bob.publish("prices.new", number.to_string()).guaranteed().await.unwrap();
                bob.send("stock", number.to_string()).guaranteed().await.unwrap();
            }
        };
        let sending = async { tokio::join!(ours, theirs) };
        let mut sending = std::pin::pin!(sending);
        let mut sent = false;
        for round in 0..KILLS {
            // Not an event to wait for: the kill must come at any moment.
            let moment = std::time::Duration::from_millis(150 + 90 * round as u64);
            tokio::select! {
                _ = &mut sending, if !sent => sent = true,
                () = tokio::time::sleep(moment) => {}
            }
            bridge.kill();
            bridge.child = bridge.command.spawn().unwrap();
        }
        if !sent {
            sending.await;
        }
        let (orders, stock) = tokio::join!(take(orders, MESSAGES), take(stock, MESSAGES));
        // The first ones may still arrive.
        let prices = take(prices, MESSAGES).await;
        for (what, times) in [("orders", orders), ("stock", stock), ("prices", prices)] {
            let doubled = times.values().filter(|times| **times > 1).count();
            println!("{what}: {} messages, {doubled} of them more than once", times.len());
            assert!(doubled == 0 || (may_double && what == "orders"), "{what}: {doubled} doubled");
        }
    }

    #[cfg(feature = "nats")]
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_is_lost_and_nothing_doubled_by_a_bridge_to_nats_that_is_killed() {
        if let Some(broker) = World::nats().await {
            nothing_is_lost_and_nothing_doubled(broker, false).await;
        }
    }

    /// RabbitMQ keeps two copies of a message that was sent twice.
    #[cfg(feature = "rabbitmq")]
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_is_lost_by_a_bridge_to_rabbitmq_that_is_killed() {
        if let Some(broker) = World::rabbitmq().await {
            nothing_is_lost_and_nothing_doubled(broker, true).await;
        }
    }
}
