//! Nodes that find each other and exchange messages, over real sockets.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Host, SOON, echo, soon, wait_for};
use peerbus::{
    Address, Body, Call, DownCause, DropReason, Event, HandlerError, Kind, Node, RequestError,
    SendError, Source,
};
use tokio::sync::Notify;

async fn meet(a: &Node, b: &Node) {
    a.wait_for_peers(1, SOON).await.unwrap();
    b.wait_for_peers(1, SOON).await.unwrap();
}

#[tokio::test]
async fn nodes_of_one_host_meet_and_publish() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    meet(&alice, &bob).await;
    let peer = &alice.peers()[0];
    assert_eq!((peer.id, peer.name.as_str(), peer.source), (bob.id(), "bob", Source::Local));

    let mut orders = bob.subscribe("orders.*").unwrap();
    alice.wait_for_subscribers("orders.new", 1, SOON).await.unwrap();
    let report = alice
        .publish("orders.new", Body::encode(&("apples", 17)).unwrap())
        .key("customer-7")
        .header("colour", "red")
        .await
        .unwrap();
    assert_eq!((report.queued, report.dropped.len()), (1, 0));
    let order = soon(orders.recv()).await.unwrap();
    assert_eq!(order.from, alice.id());
    assert_eq!(order.header.kind, Kind::Event);
    assert_eq!(order.topic().unwrap().as_str(), "orders.new");
    assert_eq!(order.decode::<(String, u32)>().unwrap(), ("apples".into(), 17));
    assert_eq!(order.header.ordering_key(), Some("customer-7"));
    assert_eq!(order.header.content_type(), Some("application/msgpack"));
    assert_eq!(order.header.user_header("colour"), Some("red"));
    assert!(alice.publish("nobody.cares", "x").await.unwrap().is_unheard());
}

#[tokio::test]
async fn large_and_empty_bodies_arrive_over_unix_and_tcp() {
    let host = Host::new();
    for local in [true, false] {
        let config =
            |name| host.config(name).local(local).mesh(format!("m{local}").parse().unwrap());
        let alice = config("alice").start().await.unwrap();
        let mut bob = config("bob");
        if let Some(addr) = alice.listening().first() {
            bob = bob.peer(peerbus::Address::Tcp(*addr));
        }
        let bob = bob.start().await.unwrap();
        meet(&alice, &bob).await;
        let _service = bob.serve("echo", echo).start().unwrap();
        alice.wait_for_service("echo", SOON).await.unwrap();
        for len in [0, 1, 4096, 4097, 65_536, 1024 * 1024] {
            let body: Vec<u8> = (0..len).map(|n| n as u8).collect();
            let reply = alice.request("echo", &body).await.unwrap();
            assert!(reply.body == body, "{len} bytes, local: {local}");
        }
        let error = alice.request("echo", vec![0; 1024 * 1024 + 1]).await.unwrap_err();
        assert!(matches!(error, RequestError::TooLarge(_)), "{error}");
    }
}

#[tokio::test]
async fn a_node_with_thousands_of_long_patterns_is_met_over_a_network() {
    let host = Host::new();
    let alice = host.tcp_config("alice").start().await.unwrap();
    let mut subscriptions = Vec::new();
    for n in 0..2000 {
        subscriptions.push(alice.subscribe(format!("{}.{n}", "t".repeat(200))).unwrap());
    }
    let bob = host.tcp_config("bob").peer(Address::Tcp(alice.listening()[0]));
    let bob = bob.start().await.unwrap();
    meet(&alice, &bob).await;
    assert_eq!(bob.peers()[0].patterns.len(), 2000);
}

#[tokio::test]
async fn a_node_hears_and_serves_itself() {
    let host = Host::new();
    let node = host.node("solo").await;
    let mut all = node.subscribe(">").unwrap();
    assert_eq!(node.publish("a.b", "x").await.unwrap().queued, 1);
    assert_eq!(soon(all.recv()).await.unwrap().text(), "x");
    let _service = node.serve("echo", echo).start().unwrap();
    assert_eq!(node.request("echo", "y").await.unwrap().text(), "y");
}

/// An error of a user's own, which has a code of its own.
struct SoldOut;

impl From<SoldOut> for HandlerError {
    fn from(_: SoldOut) -> Self {
        Self::new("sold_out", "no apples are left")
    }
}

#[tokio::test]
async fn a_handlers_error_and_panic_reach_the_caller() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let handler = |call: Call| async move {
        match call.message.text().as_ref() {
            "panic" => panic!("on purpose"),
            "decline" => Err(HandlerError::new("not_found", "no order 17")),
            "number" => Ok("x".parse::<u32>().map_err(HandlerError::from_error)?.to_string()),
            "sold out" => Err(SoldOut)?,
            "decode" => Ok(call.message.decode::<String>()?),
            _ => Ok("fine".to_owned()),
        }
    };
    let _service = bob.serve("orders", handler).concurrency(1).start().unwrap();
    alice.wait_for_service("orders", SOON).await.unwrap();
    let code = async |body: &str| match alice.request("orders", body).await {
        Err(RequestError::Handler(error)) => error.code,
        other => panic!("{other:?}"),
    };
    assert_eq!(code("decline").await, "not_found");
    assert_eq!(code("panic").await, "panic");
    assert_eq!(code("number").await, "error");
    assert_eq!(code("sold out").await, "sold_out");
    let error = alice.request("orders", "decode").await.unwrap_err().to_string();
    let told = "the handler declined: decode: the body can't be decoded: ";
    assert!(error.len() > told.len() && error.starts_with(told), "with its cause: {error}");
    assert_eq!(alice.request("orders", "ok").await.unwrap().text(), "fine");
    // The failure of a one-way message is counted at the sender.
    let mut events = alice.events();
    alice.send("orders", "decline").await.unwrap();
    let dropped = wait_for(&mut events, |event| match event {
        Event::Dropped { peer, reason, count } => Some((peer, reason, count)),
        _ => None,
    });
    assert_eq!(dropped.await, (bob.id(), DropReason::HandlerFailed, 1));
}

#[tokio::test]
async fn competing_consumers_share_the_work() {
    let host = Host::new();
    let boss = host.node("boss").await;
    let counts: Vec<Arc<AtomicUsize>> = (0..3).map(|_| Arc::default()).collect();
    let mut workers = Vec::new();
    for count in &counts {
        let worker = host.node("worker").await;
        let count = count.clone();
        let handler = move |_: Call| {
            count.fetch_add(1, Ordering::Relaxed);
            async { Ok(()) }
        };
        let service = worker.serve("work", handler).concurrency(1).start().unwrap();
        workers.push((worker, service));
    }
    boss.wait_for_peers(3, SOON).await.unwrap();
    for _ in 0..3 {
        boss.wait_for_service("work", SOON).await.unwrap();
    }
    soon(async {
        while counts.iter().any(|count| count.load(Ordering::Relaxed) < 5) {
            boss.request("work", "job").await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_ends_by_its_deadline_and_its_handler_hears_of_it() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let heard = Arc::new(Notify::new());
    let told = heard.clone();
    let handler = move |call: Call| {
        let told = told.clone();
        async move {
            call.cancelled().await;
            told.notify_one();
            Ok(())
        }
    };
    let _service = bob.serve("sleepy", handler).start().unwrap();
    alice.wait_for_service("sleepy", SOON).await.unwrap();
    let request = alice.request("sleepy", "").deadline(Duration::from_millis(50));
    assert!(matches!(soon(async { request.await }).await, Err(RequestError::DeadlineExceeded(_))));
    soon(heard.notified()).await;
    // Dropping a request notifies its handler as well.
    let dropped = tokio::time::timeout(Duration::from_millis(50), async {
        alice.request("sleepy", "").await
    });
    assert!(dropped.await.is_err());
    soon(heard.notified()).await;
}

#[tokio::test]
async fn nobody_serves_is_told_at_once_if_a_peer_is_up_and_after_the_grace_otherwise() {
    let host = Host::new();
    let alone =
        host.config("alone").service_grace(Duration::from_millis(20)).start().await.unwrap();
    let error = soon(async { alone.request("nothing", "").await }).await.unwrap_err();
    assert!(matches!(error, RequestError::NoService(_)), "{error}");
    let _other = host.node("other").await;
    alone.wait_for_peers(1, SOON).await.unwrap();
    let error = alone.send("nothing", "").await.unwrap_err();
    assert_eq!(error.to_string(), "no node serves nothing");
    assert!(matches!(alone.send(alone.id(), "").await, Err(SendError::NoService(_))));
    let bad = alone.request("two words", "").await.unwrap_err();
    assert!(matches!(bad, RequestError::Address(_)), "{bad}");
}

#[tokio::test]
async fn a_message_to_a_node_goes_there_and_can_be_answered_later() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    meet(&alice, &bob).await;
    let (send, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let inbox = move |call: Call| {
        let send = send.clone();
        async move {
            send.send(call.message).unwrap();
            Ok(())
        }
    };
    let _inbox = alice.serve_node(inbox).start().unwrap();
    let replier = bob.clone();
    let later = move |call: Call| {
        let bob = replier.clone();
        async move {
            let answer = bob.answer(&call.message, "later").expect("it has a return address");
            answer.await.map_err(HandlerError::from_error)?;
            Ok(())
        }
    };
    let _service = bob.serve("slow", later).start().unwrap();
    alice.wait_for_service("slow", SOON).await.unwrap();
    let sent = alice.send("slow", "when?").reply_to(alice.id()).await.unwrap();
    let answer = soon(answers.recv()).await.unwrap();
    assert_eq!((answer.text().as_ref(), answer.header.correlation_id), ("later", Some(sent.id)));
}

#[tokio::test]
async fn shutdown_delivers_what_was_queued_and_says_goodbye() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let mut all = bob.subscribe("n").unwrap();
    let mut events = bob.events();
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
    let reason = wait_for(&mut events, |event| match event {
        Event::PeerDown { reason, .. } => Some(reason),
        _ => None,
    });
    assert_eq!(reason.await, DownCause::Left);
    let after = alice.publish("n", "x").await.unwrap_err();
    assert_eq!(after.to_string(), "the node is shutting down");
}

#[tokio::test]
async fn a_service_drains_before_it_goes() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begin, wait) = (begun.clone(), go_on.clone());
    let handler = move |_: Call| {
        let (begin, wait) = (begin.clone(), wait.clone());
        async move {
            begin.notify_one();
            wait.notified().await;
            Ok("done")
        }
    };
    let service = bob.serve("slow", handler).start().unwrap();
    alice.wait_for_service("slow", SOON).await.unwrap();
    let caller = alice.clone();
    let request = tokio::spawn(async move { caller.request("slow", "").await });
    soon(begun.notified()).await;
    let drained = tokio::spawn(service.drain());
    go_on.notify_one();
    assert_eq!(soon(request).await.unwrap().unwrap().text(), "done");
    soon(drained).await.unwrap();
}

#[tokio::test]
async fn a_slow_subscriber_loses_counted_messages_and_stalls_nobody() {
    let host = Host::new();
    let queue = 512 * 1024;
    let publisher = host.config("publisher").window(queue).max_body(100_000).send_queue(queue);
    let publisher = publisher.start().await.unwrap();
    let slow = host.config("slow").window(queue).max_body(100_000).start().await.unwrap();
    let quick = host.config("quick").max_body(100_000).start().await.unwrap();
    let mut unread = slow.subscribe("load").unwrap();
    let mut read = quick.subscribe("load").unwrap();
    publisher.wait_for_subscribers("load", 2, SOON).await.unwrap();
    let rounds = 2000_u64;
    soon(async {
        for n in 0..rounds {
            publisher.publish("load", vec![n as u8; 1000]).await.unwrap();
            assert_eq!(read.recv().await.unwrap().body[0], n as u8);
            assert!(publisher.queued_bytes(&slow.id()) <= queue);
        }
    })
    .await;
    let dropped = publisher.counters().dropped_total();
    assert!(dropped > 0, "2 MB don't fit into two queues of 512 KiB");
    // Reading on, the slow subscriber receives exactly the messages that were not dropped.
    let mut got = 0;
    soon(async {
        while got + publisher.counters().dropped_total() < rounds {
            unread.recv().await.unwrap();
            got += 1;
        }
    })
    .await;
    assert_eq!(got + publisher.counters().dropped_total(), rounds);
}

#[tokio::test]
async fn subscriptions_come_and_go() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let first = bob.subscribe("a").unwrap();
    let second = bob.subscribe("a").unwrap();
    alice.wait_for_subscribers("a", 1, SOON).await.unwrap();
    drop(first);
    assert_eq!(alice.publish("a", "").await.unwrap().queued, 1);
    drop(second);
    soon(async {
        while alice.publish("a", "").await.unwrap().queued > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn meshes_on_one_host_do_not_mix() {
    let host = Host::new();
    let red = host.config("red").local(false).mesh("red".parse().unwrap()).start().await.unwrap();
    let mut events = red.events();
    let address = peerbus::Address::Tcp(red.listening()[0]);
    let blue =
        host.config("blue").mesh("blue".parse().unwrap()).peer(address).start().await.unwrap();
    let reason = wait_for(&mut events, |event| match event {
        Event::Refused { reason, .. } => Some(reason),
        _ => None,
    });
    assert!(reason.await.contains("blue"));
    assert!(red.peers().is_empty() && blue.peers().is_empty());
    soon(async {
        while blue.unreachable().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(blue.unreachable()[0].last_error.contains("another mesh"));
}

#[tokio::test]
async fn two_nodes_with_one_identity_are_told() {
    let host = Host::new();
    let dir = common::private_dir();
    let key = dir.path().join("key.pem");
    let first = host.config("first").identity(&key).start().await.unwrap();
    let second = host.config("second").identity(&key).start().await.unwrap();
    assert_eq!(first.id(), second.id());
    let mut events = second.events();
    wait_for(&mut events, |event| matches!(event, Event::IdentityConflict { .. }).then_some(()))
        .await;
}

#[tokio::test]
async fn a_publisher_notices_who_comes_and_goes() {
    let host = Host::new();
    let alice = host.node("alice").await;
    let mut news = alice.publisher("news.today").unwrap();
    assert!(news.publish("nobody").await.unwrap().is_unheard());

    let mut own = alice.subscribe("news.*").unwrap();
    assert_eq!(news.publish("own").await.unwrap().queued, 1);
    assert_eq!(soon(own.recv()).await.unwrap().text(), "own");
    drop(own);
    assert!(news.publish("nobody").await.unwrap().is_unheard());

    let bob = host.node("bob").await;
    let mut theirs = bob.subscribe("news.>").unwrap();
    alice.wait_for_subscribers("news.today", 1, SOON).await.unwrap();
    assert_eq!(news.publish("theirs").key("k").await.unwrap().queued, 1);
    let message = soon(theirs.recv()).await.unwrap();
    assert_eq!((message.text().as_ref(), message.header.ordering_key()), ("theirs", Some("k")));
    let mut events = alice.events();
    bob.shutdown().await;
    wait_for(&mut events, |event| matches!(event, Event::PeerDown { .. }).then_some(())).await;
    assert!(news.publish("nobody").await.unwrap().is_unheard());
    assert!(alice.publisher("not a topic").is_err());
    alice.shutdown().await;
    assert!(news.publish("late").await.is_err());
}

#[tokio::test]
async fn a_key_stays_with_one_instance_while_that_is_there() {
    let host = Host::new();
    let (alice, bob) = (host.node("alice").await, host.node("bob").await);
    let caller = host.node("caller").await;
    let name = |name: &'static str| {
        move |_call: Call| async move { Ok::<_, HandlerError>(Body::from(name)) }
    };
    let _stays = alice.serve("work", name("alice")).start().unwrap();
    let _leaves = bob.serve("work", name("bob")).start().unwrap();
    caller.wait_for_instances("work", 2, SOON).await.unwrap();

    let ask = async |key: usize| {
        let reply = caller.request("work", "").key(format!("customer-{key}")).await.unwrap();
        reply.text().into_owned()
    };
    let mut takers = Vec::new();
    for key in 0..40 {
        takers.push(ask(key).await);
        assert_eq!(ask(key).await, takers[key], "customer {key} was moved");
    }
    let of_bob = takers.iter().filter(|taker| *taker == "bob").count();
    assert!((1..40).contains(&of_bob), "one took all: {takers:?}");
    assert_eq!(caller.counters().moved_keys, 0);

    let mut events = caller.events();
    bob.shutdown().await;
    wait_for(&mut events, |event| matches!(event, Event::PeerDown { .. }).then_some(())).await;
    for key in 0..40 {
        assert_eq!(ask(key).await, "alice");
    }
    assert_eq!(caller.counters().moved_keys, of_bob as u64);
    let mut told = 0;
    while told < of_bob as u64 {
        told += wait_for(&mut events, |event| match event {
            Event::KeysMoved { service, from, to, count } => {
                assert_eq!((service.as_str(), from, to), ("work", bob.id(), alice.id()));
                Some(count)
            }
            _ => None,
        })
        .await;
    }
    assert_eq!(told, of_bob as u64);
}

#[tokio::test]
async fn calls_with_one_key_are_handled_one_at_a_time_and_in_order() {
    let host = Host::new();
    let (worker, caller) = (host.node("worker").await, host.node("caller").await);
    let (sender, mut handled) = tokio::sync::mpsc::unbounded_channel();
    let gate = Arc::new(Notify::new());
    let (opener, running) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
    let handler = move |call: Call| {
        let (sender, gate, running) = (sender.clone(), gate.clone(), running.clone());
        async move {
            if call.message.header.ordering_key().is_some() {
                assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                gate.notified().await;
                running.fetch_sub(1, Ordering::SeqCst);
            }
            sender.send(call.message.text().into_owned()).unwrap();
            Ok::<_, HandlerError>(Body::empty())
        }
    };
    let _service = worker.serve("log", handler).start().unwrap();
    caller.wait_for_service("log", SOON).await.unwrap();
    for number in 0..5 {
        caller.send("log", number.to_string()).key("one").await.unwrap();
    }
    caller.send("log", "beside").await.unwrap();
    assert_eq!(soon(handled.recv()).await.unwrap(), "beside", "others are not held up");
    for number in 0..5 {
        opener.notify_one();
        assert_eq!(soon(handled.recv()).await.unwrap(), number.to_string());
    }
}
