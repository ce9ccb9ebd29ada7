//! More events than a subscriber can handle: what is dropped or queued, and that all of it is
//! counted.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{SOON, soon};
use futures_util::StreamExt;
use peerbus::{Config, Counters, DropReason, MemoryNetwork, Node, Overflow};
use proptest::prelude::*;

/// The minimum limits of a node's configuration.
const WINDOW: u64 = 512 * 1024;

fn small(network: &MemoryNetwork) -> Config {
    Node::builder().memory(network).window(WINDOW).max_body(64 * 1024).send_queue(32 * 1024)
}

async fn number(message: peerbus::Message) -> u32 {
    message.decode().unwrap()
}

fn body(number: u32) -> peerbus::Body {
    peerbus::Body::encode(&number).unwrap()
}

#[tokio::test]
async fn a_publisher_that_waits_loses_nothing_to_a_subscription_that_holds_back() {
    let network = MemoryNetwork::default();
    let publisher = small(&network).start().await.unwrap();
    let reader = small(&network).subscription_queue(1024).start().await.unwrap();
    let inbox = reader.subscribe_with("load", Overflow::HoldBack).unwrap();
    soon(publisher.wait_for_subscribers("load", 1, SOON)).await.unwrap();

    // While the subscriber doesn't read, the peer's window and the queue here fill, then it waits.
    let mut sent = 0;
    let report = loop {
        let report = publisher.publish("load", body(sent)).now().unwrap();
        if !report.dropped.is_empty() {
            break report;
        }
        sent += 1;
    };
    assert_eq!(report.dropped, [(reader.id(), DropReason::SlowPeer)]);
    let moment = Duration::from_millis(1);
    let report = publisher.publish("load", body(sent)).within(moment).await.unwrap();
    assert_eq!(report.dropped, [(reader.id(), DropReason::SlowPeer)], "nobody reads");

    let total = sent + 20_000;
    let reading =
        tokio::spawn(
            async move { inbox.take(total as usize).then(number).collect::<Vec<_>>().await },
        );
    for next in sent..total {
        let report = publisher.publish("load", body(next)).within(SOON).await.unwrap();
        assert_eq!(report.queued, 1, "{report:?}");
    }
    assert_eq!(soon(reading).await.unwrap(), (0..total).collect::<Vec<_>>());
    assert_eq!(publisher.counters().dropped, BTreeMap::from([(DropReason::SlowPeer, 2)]));
}

#[tokio::test]
async fn a_publisher_that_waits_for_a_peer_that_is_lost_hears_of_it() {
    let network = MemoryNetwork::default();
    let publisher = small(&network).start().await.unwrap();
    let reader = small(&network).start().await.unwrap();
    let _unread = reader.subscribe_with("load", Overflow::HoldBack).unwrap();
    soon(publisher.wait_for_subscribers("load", 1, SOON)).await.unwrap();
    while publisher.publish("load", "").now().unwrap().dropped.is_empty() {}
    let waiting = publisher.clone();
    let waiting = tokio::spawn(async move { waiting.publish("load", "").within(SOON).await });
    network.cut(&reader.id());
    let report = soon(waiting).await.unwrap().unwrap();
    assert_eq!(report.dropped, [(reader.id(), DropReason::LinkLost)]);
}

/// The messages in a subscription of the publishing node itself after `count` messages on `topics`
/// topics in turn, more than its queue holds.
async fn after_overflow(overflow: Overflow, count: u32, topics: u32) -> (Vec<u32>, Counters) {
    let network = MemoryNetwork::default();
    let node = small(&network).subscription_queue(1400).start().await.unwrap();
    let mut inbox = node.subscribe_with("load.*", overflow).unwrap();
    for n in 0..count {
        let report = node.publish(format!("load.{}", n % topics), body(n)).await.unwrap();
        // Dropping an older message for this one is not a drop of this one.
        assert!(overflow == Overflow::DropNewest || report.queued == 1, "{report:?}");
    }
    let counters = node.counters();
    soon(node.shutdown()).await;
    let mut kept = Vec::new();
    while let Some(message) = inbox.recv().await {
        kept.push(message.decode().unwrap());
    }
    assert_eq!(kept.len() as u64, counters.delivered);
    assert_eq!(counters.delivered + counters.dropped_total(), u64::from(count));
    (kept, counters)
}

#[tokio::test]
async fn each_subscription_chooses_what_it_loses() {
    let (newest, _) = after_overflow(Overflow::DropNewest, 100, 1).await;
    assert_eq!(newest, (0..newest.len() as u32).collect::<Vec<_>>());
    assert!((1..20).contains(&newest.len()), "{newest:?}");

    let (oldest, _) = after_overflow(Overflow::DropOldest, 100, 1).await;
    assert_eq!(oldest, (100 - newest.len() as u32..100).collect::<Vec<_>>());

    let (latest, counters) = after_overflow(Overflow::KeepLatest, 100, 3).await;
    assert_eq!(latest, [97, 98, 99]);
    assert_eq!(counters.dropped, BTreeMap::from([(DropReason::Superseded, 97)]));
}

fn overflow() -> impl Strategy<Value = Overflow> {
    prop::sample::select(vec![
        Overflow::DropNewest,
        Overflow::DropOldest,
        Overflow::KeepLatest,
        Overflow::HoldBack,
    ])
}

/// Publishes at random to one subscription that reads at random; returns the numbers of messages
/// sent, received, and counted as dropped.
async fn overload(overflow: Overflow, queue: u64, sends: Vec<(u8, u16, bool)>) -> (u64, u64, u64) {
    let network = MemoryNetwork::default();
    let publisher = small(&network).start().await.unwrap();
    let reader = small(&network).subscription_queue(queue).start().await.unwrap();
    let mut inbox = reader.subscribe_with("load.>", overflow).unwrap();
    soon(publisher.wait_for_subscribers("load.0", 1, SOON)).await.unwrap();
    let (mut sent, mut taken) = (0, 0);
    for (topic, size, reads) in sends {
        for _ in 0..40 {
            let publish = publisher.publish(format!("load.{}", topic % 4), vec![0; size.into()]);
            publish.now().unwrap();
            sent += 1;
        }
        if reads {
            inbox.recv().await.unwrap();
            taken += 1;
        }
    }
    // The remaining messages are read until both sides have shut down.
    let rest = tokio::spawn(inbox.count());
    soon(publisher.shutdown()).await;
    soon(reader.shutdown()).await;
    taken += soon(rest).await.unwrap() as u64;
    (sent, taken, publisher.counters().dropped_total())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn under_overload_what_is_dropped_and_what_is_delivered_is_what_was_sent(
        overflow in overflow(),
        queue in 500u64..100_000,
        sends in prop::collection::vec((any::<u8>(), 0u16..9_000, prop::bool::weighted(0.2)), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (sent, taken, dropped) = runtime.block_on(overload(overflow, queue, sends));
        prop_assert_eq!(taken + dropped, sent);
    }
}
