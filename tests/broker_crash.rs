//! Brokers that crash under their nodes, and restart. Separate from the other tests, which share
//! the real brokers.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;
#[path = "common/world.rs"]
mod world;

use std::process::Command;
use std::time::Duration;

use common::{SOON, echo, soon, wait_for};
use peerbus::{DownCause, EmbeddedBroker, Event, NodeId};
use world::{Carrier, World, collect};

/// Kills the broker, as in a crash, and restarts it.
async fn restart(world: &mut World) {
    match std::mem::replace(&mut world.carrier, Carrier::Mesh) {
        Carrier::Embedded(broker) => {
            let addr = broker.addr();
            broker.stop().await;
            let fresh = soon(async {
                loop {
                    match EmbeddedBroker::start(addr).await {
                        Ok(fresh) => return fresh,
                        // Its connections still have to close.
                        Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                    }
                }
            });
            world.carrier = Carrier::Embedded(fresh.await);
        }
        Carrier::Real(url) => {
            // RabbitMQ 3.10 can't recover a quorum queue that was created seconds before a kill.
            let (name, end) = match url.starts_with("nats") {
                true => ("nats", "kill"),
                false => ("rabbitmq", "end"),
            };
            for act in [end, "start"] {
                let script = std::env::var("PEERBUS_BROKERS").unwrap();
                let ended = tokio::task::spawn_blocking(move || {
                    Command::new(script).args([act, name]).output().unwrap()
                });
                let output = ended.await.unwrap();
                assert!(output.status.success(), "{output:?}");
            }
            world.carrier = Carrier::Real(url);
        }
        Carrier::Mesh => unreachable!("the mesh has no broker"),
    }
}

async fn a_broker_that_crashes_is_told_and_what_was_promised_is_kept(mut world: World) {
    let keeps = matches!(world.carrier, Carrier::Real(_));
    let (alice, bob) = (world.durable("alice").await, world.durable("bob").await);
    let mut heard = bob.subscribe("a").unwrap();
    let _service = bob.serve("echo", echo).start().unwrap();
    alice.wait_for_service("echo", SOON).await.unwrap();
    if keeps {
        alice.send("later", "promised").guaranteed().await.unwrap();
    }
    let mut events = alice.events();
    let down = async |events: &mut peerbus::Events| {
        wait_for(events, |event| match event {
            Event::PeerDown { id, reason, .. } => Some((id, reason)),
            _ => None,
        })
        .await
    };
    restart(&mut world).await;
    assert_eq!(down(&mut events).await, (NodeId::BROKER, DownCause::Lost));
    // All subscriptions and services are restored.
    alice.wait_for_subscribers("a", 1, SOON * 2).await.unwrap();
    alice.wait_for_service("echo", SOON).await.unwrap();
    alice.publish("a", "again").await.unwrap();
    assert_eq!(soon(heard.recv()).await.unwrap().text(), "again");
    assert_eq!(alice.request("echo", "again").await.unwrap().text(), "again");
    if keeps {
        let (handler, mut taken) = collect();
        let _later = bob.serve("later", handler).start().unwrap();
        assert_eq!(soon(taken.recv()).await.unwrap().text(), "promised");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_embedded_broker_crashes() {
    a_broker_that_crashes_is_told_and_what_was_promised_is_kept(World::embedded().await.unwrap())
        .await;
}

#[cfg(feature = "nats")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_crashes() {
    if let Some(world) = World::nats().await {
        a_broker_that_crashes_is_told_and_what_was_promised_is_kept(world).await;
    }
    // Both tests kill the same server.
    if let Some(world) = World::nats().await {
        what_nats_has_forgotten_to_have_delivered_is_marked_as_redelivered(world).await;
    }
}

/// A killed server may forget which messages it had delivered.
#[cfg(feature = "nats")]
async fn what_nats_has_forgotten_to_have_delivered_is_marked_as_redelivered(mut world: World) {
    use std::collections::HashSet;
    use std::sync::{Arc, Mutex};

    use peerbus::{Call, HandlerError};

    let (alice, bob) = (world.durable("alice").await, world.durable("bob").await);
    let (began, mut beginnings) = tokio::sync::mpsc::unbounded_channel();
    let begun = Arc::new(Mutex::new(HashSet::new()));
    let handler = move |call: Call| {
        let (text, again) = (call.message.text().into_owned(), call.message.is_redelivered());
        let first = begun.lock().unwrap().insert(text.clone());
        began.send((text.clone(), first, again)).unwrap();
        async move {
            // Calls of the server's first run never end.
            if first && text.starts_with("early") {
                std::future::pending::<()>().await;
            }
            Ok::<_, HandlerError>(())
        }
    };
    let _service = bob.serve("marked", handler).concurrency(200).start().unwrap();
    for n in 0..100 {
        alice.send("marked", format!("early {n}")).guaranteed().await.unwrap();
    }
    let mut early = 0;
    while early < 100 {
        let (text, first, again) = soon(beginnings.recv()).await.unwrap();
        assert!(first && !again, "{text}");
        early += 1;
    }
    let mut events = alice.events();
    restart(&mut world).await;
    wait_for(&mut events, |event| match event {
        Event::PeerUp(peer) => (peer.id == NodeId::BROKER).then_some(()),
        _ => None,
    })
    .await;
    alice.send("marked", "late").guaranteed().await.unwrap();
    let mut is_late_there = false;
    while early < 200 || !is_late_there {
        let next = tokio::time::timeout(SOON * 4, beginnings.recv());
        let (text, first, again) = next.await.expect("it comes again").unwrap();
        match text.as_str() {
            "late" => is_late_there = true,
            _ => {
                assert!(!first && again, "{text} came again and didn't say so");
                early += 1;
            }
        }
    }
}

#[cfg(feature = "rabbitmq")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_crashes() {
    if let Some(world) = World::rabbitmq().await {
        a_broker_that_crashes_is_told_and_what_was_promised_is_kept(world).await;
    }
}
