//! Known peers, and how long they are remembered.

use super::*;
use crate::engine::delivery::Lapse;
use crate::report::DropReason;

#[test]
fn a_peer_that_messages_wait_for_is_reported_once() {
    let mut bench = Bench::new(None);
    bench.submit(Target::Node(BOB)).unwrap();
    bench.sleep(HOUR / 2);
    assert_eq!(bench.events, []);
    bench.sleep(HOUR);
    bench.sleep(HOUR);
    assert_eq!(bench.events, [OutboxEvent::PeerGone { peer: BOB, messages: 1 }]);
}

#[test]
fn a_peer_whose_messages_go_to_others_is_reported_too() {
    let mut bench = Bench::new(Some(HOUR / 4));
    bench.submit(Target::Node(BOB)).unwrap();
    for _ in 0..10 {
        bench.sleep(HOUR / 8);
    }
    assert_eq!(bench.events, [OutboxEvent::PeerGone { peer: BOB, messages: 1 }]);
    let due = bench.outbox.peer_timeout().unwrap();
    assert!(due > bench.now().time, "no busy loop");
}

#[test]
fn a_peer_that_comes_back_is_tried_at_once() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    bench.submit(Target::Node(BOB)).unwrap();
    let id = bench.sent[0].1.id.clone();
    bench.answer(BOB, &id, 1, DeliveryOutcome::Failed("no".into()));
    bench.lose(BOB);
    bench.meet(BOB);
    assert_eq!(bench.sent.len(), 2);
}

#[test]
fn a_peer_with_ever_new_subscriptions_is_remembered_for_some_only() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    for round in 0..3 {
        let names = (0..600).map(|n| format!("s{round}-{n}").parse().unwrap());
        let subscriptions = names.map(|name| (name, "orders.>".parse().unwrap())).collect();
        let info = InboxInfo { epoch: 1, subscriptions, ..InboxInfo::default() };
        bench.outbox.handle_inbox(bench.now(), BOB, info, &Grants::Everything);
        bench.run();
    }
    assert_eq!(bench.outbox.subscribers(&"orders.new".parse().unwrap()).len(), MAX_SUBSCRIPTIONS);
    let told = OutboxEvent::SubscriptionsNotRemembered(BOB);
    assert_eq!(bench.events.iter().filter(|event| **event == told).count(), 1, "told once");
}

fn minted(number: usize) -> NodeId {
    let mut id = [9; 32];
    id[..8].copy_from_slice(&number.to_le_bytes());
    NodeId::from_bytes(id)
}

#[test]
fn peers_that_nothing_is_kept_for_are_forgotten_when_they_go() {
    let mut bench = Bench::new(None);
    let name: ServiceName = "billing".parse().unwrap();
    bench.outbox.handle_link_up(BOB);
    bench.lose(BOB);
    assert_eq!(bench.outbox.peers.len(), 1, "he announced no inbox");
    bench.submit(Target::Node(BOB)).unwrap();
    bench.outbox.handle_link_up(BOB);
    bench.lose(BOB);
    assert!(bench.outbox.peers[&BOB].waiting == 1, "one waits for him");

    // Peers without messages are forgotten in favour of others; peers with a subscription are not.
    for number in 0..MAX_PEERS + 10 {
        bench.meet(minted(number));
        bench.lose(minted(number));
    }
    assert!(bench.outbox.peers.len() <= MAX_PEERS + 2 && bench.events.is_empty());
    for number in 0..MAX_PEERS + 1 {
        bench.subscribe(minted(number), &[&name], &[]);
    }
    let left_out = bench.events.iter().filter(|it| matches!(it, OutboxEvent::NotRemembered(_)));
    assert!(left_out.count() >= 1);
    for number in 0..MAX_PEERS + 1 {
        bench.lose(minted(number));
    }
    assert!(bench.outbox.peers.len() <= MAX_PEERS + 2);
    assert!(bench.outbox.subscribers(&"orders.new".parse().unwrap()).len() <= MAX_PEERS);
}

#[test]
fn who_was_never_met_is_missed_from_when_something_waits_for_it() {
    let mut bench = Bench::new(None);
    bench.sleep(10 * HOUR);
    bench.submit(Target::Node(BOB)).unwrap();
    bench.sleep(HOUR / 2);
    assert_eq!(bench.events, []);
    bench.sleep(HOUR);
    assert_eq!(bench.events.len(), 1);
    // Once he is connected, no message waits.
    bench.meet(BOB);
    assert_eq!(bench.outbox.peers[&BOB].waiting, 0);
}

#[test]
fn a_subscription_that_is_ended_leaves_nothing_behind() {
    let name: ServiceName = "billing".parse().unwrap();
    let subscription = Target::Subscription(BOB, name.clone());
    let mut bench = Bench::new(None);
    bench.subscribe(BOB, &[&name], &[]);
    bench.lose(BOB);
    let kept = bench.submit(subscription.clone()).unwrap();
    let message = bench.message(subscription.clone());
    bench.subscribe(BOB, &[&name], &[]);
    assert_eq!(bench.sent.len(), 1, "it is in flight");
    // One more message is being stored.
    let choose: &mut Choose<'_> = &mut |_, _, _| None;
    let storing = bench.outbox.submit(bench.now(), smallvec![message], choose).unwrap()[0].number();
    bench.subscribe(BOB, &[], &[&name]);
    assert_eq!(bench.done, [(kept, Ok(())), (storing, Ok(()))]);
    assert_eq!(bench.outbox.pending(), 0);
    assert!(bench.outbox.subscribers(&"orders.new".parse().unwrap()).is_empty());

    bench.sleep(2 * DISK_RETRY);

    let mut next = Bench::new(None);
    for (position, entry) in &bench.journal {
        next.outbox.recover(*position, entry).unwrap();
    }
    next.outbox.handle_recovered(next.now());
    assert_eq!((next.outbox.pending(), next.outbox.subscriptions().count()), (0, 0));
}

#[test]
fn the_messages_of_an_ended_subscription_are_dropped_after_a_crash_too() {
    let name: ServiceName = "billing".parse().unwrap();
    let subscription = Target::Subscription(BOB, name.clone());
    let mut bench = Bench::new(None);
    (bench.outbox.config.max_messages, bench.outbox.config.max_bytes) = (3000, 1 << 30);
    bench.subscribe(BOB, &[&name], &[]);
    bench.sleep(2 * DISK_RETRY);
    bench.subscribe(BOB, &[], &[]);
    // More than are dropped at once.
    for _ in 0..3000 {
        bench.submit(subscription.clone()).unwrap();
    }
    bench.subscribe(BOB, &[], &[&name]);
    assert!(bench.outbox.pending() > 1000);

    let mut bench = bench.restart();
    for _ in 0..3 {
        bench.sleep(Duration::from_millis(10));
    }
    assert_eq!(bench.outbox.pending(), 0);
    bench.subscribe(BOB, &[&name], &[]);
    assert!(bench.sent.is_empty());
    bench.submit(subscription).unwrap();
    assert_eq!(bench.sent.len(), 1);
}

#[test]
fn a_subscription_that_ends_and_begins_again_gets_what_comes_only() {
    let name: ServiceName = "billing".parse().unwrap();
    let subscription = Target::Subscription(BOB, name.clone());
    let mut bench = Bench::new(None);
    bench.subscribe(BOB, &[&name], &[]);
    bench.subscribe(BOB, &[], &[]);
    let kept = bench.submit(subscription.clone()).unwrap();
    bench.subscribe(BOB, &[&name], &[&name]);
    assert_eq!(bench.done, [(kept, Ok(()))]);
    assert!(bench.sent.is_empty());
    bench.submit(subscription).unwrap();
    assert_eq!(bench.sent.len(), 1);
}

#[test]
fn an_operator_ends_the_subscription_of_a_node_that_is_gone() {
    let name: ServiceName = "billing".parse().unwrap();
    let mut bench = Bench::new(None);
    bench.subscribe(BOB, &[&name], &[]);
    bench.lose(BOB);
    bench.submit(Target::Subscription(BOB, name.clone())).unwrap();
    bench.submit(Target::Node(BOB)).unwrap();
    assert_eq!(bench.outbox.handle_unsubscribed(CAROL, &name), None);
    assert_eq!(bench.outbox.handle_unsubscribed(BOB, &name), Some(1));
    bench.run();
    assert_eq!((bench.outbox.pending(), bench.outbox.subscriptions().count()), (1, 0));
}

#[test]
fn a_peer_whose_messages_were_given_to_others_is_not_missed() {
    let mut bench = Bench::new(Some(HOUR / 4));
    bench.serving = vec![BOB, CAROL];
    bench.meet(BOB);
    bench.submit(Target::Service("work".parse().unwrap())).unwrap();
    bench.lose(BOB);
    bench.meet(CAROL);
    for _ in 0..10 {
        bench.sleep(HOUR / 4);
    }
    assert_eq!(bench.sent.last().unwrap().0, CAROL);
    assert_eq!(bench.events, []);
}

#[test]
fn a_peer_that_changes_its_mind_about_its_inbox_costs_little() {
    let mut bench = Bench::new(None);
    bench.meet(BOB);
    let stored = bench.journal.len();
    for epoch in 2..1000 {
        let subscription = ("billing".parse().unwrap(), "orders.>".parse().unwrap());
        let info = InboxInfo { epoch, subscriptions: vec![subscription], ..InboxInfo::default() };
        bench.outbox.handle_inbox(bench.now(), BOB, info, &Grants::Everything);
        bench.run();
    }
    assert_eq!((bench.journal.len(), bench.events.len()), (stored, 0), "a process has one inbox");
    for pattern in ["orders.eu", "orders.us"].iter().cycle().take(1000) {
        let subscription = ("billing".parse().unwrap(), pattern.parse().unwrap());
        let info =
            InboxInfo { epoch: 1, subscriptions: vec![subscription], ..InboxInfo::default() };
        bench.outbox.handle_inbox(bench.now(), BOB, info, &Grants::Everything);
        bench.run();
    }
    assert_eq!(bench.journal.len(), stored + 1, "a new peer is stored at once, nothing else yet");
    bench.sleep(2 * DISK_RETRY);
    assert_eq!(bench.journal.len(), stored + 2, "the current state");
}

fn names(count: usize) -> Vec<ServiceName> {
    (0..count).map(|n| format!("s{n}").parse().unwrap()).collect()
}

/// Lapses by reason.
fn lapsed(bench: &Bench, wanted: Lapse) -> Vec<NodeId> {
    let lapsed = bench.events.iter().filter_map(|event| match event {
        OutboxEvent::Lapsed { node, reason, .. } if *reason == wanted => Some(*node),
        _ => None,
    });
    lapsed.collect()
}

#[test]
fn a_flood_of_ids_that_subscribe_and_leave_makes_room_for_itself() {
    let topic = "orders.new".parse().unwrap();
    let billing: ServiceName = "billing".parse().unwrap();
    let mut bench = Bench::new(None);
    // Bob has taken a message, and left; Carol never got one.
    bench.subscribe(BOB, &[&billing], &[]);
    bench.submit(Target::Subscription(BOB, billing.clone())).unwrap();
    let id = bench.sent[0].1.id.clone();
    bench.answer(BOB, &id, 1, DeliveryOutcome::Processed);
    bench.lose(BOB);
    bench.subscribe(CAROL, &[&billing], &[]);
    bench.lose(CAROL);
    let names = names(MAX_SUBSCRIPTIONS);
    let all: Vec<&ServiceName> = names.iter().collect();
    for number in 0..60 {
        bench.subscribe(minted(number), &all, &[]);
        bench.lose(minted(number));
    }
    let kept = bench.outbox.subscribers(&topic);
    assert!(kept.len() <= MAX_UNPROVEN + 1, "{}", kept.len());
    for node in [BOB, CAROL] {
        assert!(kept.contains(&Target::Subscription(node, billing.clone())));
    }
    let gone = lapsed(&bench, Lapse::NoRoom);
    assert!(gone.len() > MAX_UNPROVEN && !gone.contains(&CAROL));
    // The same is known after a restart.
    bench.sleep(2 * DISK_RETRY);
    let bench = bench.restart();
    assert_eq!(bench.outbox.subscribers(&topic).len(), kept.len());
}

#[test]
fn ids_that_stay_make_room_for_those_with_fewer_subscriptions() {
    let names = names(MAX_SUBSCRIPTIONS);
    let all: Vec<&ServiceName> = names.iter().collect();
    let mut bench = Bench::new(None);
    for number in 0..10 {
        bench.subscribe(minted(number), &all, &[]);
    }
    bench.subscribe(BOB, &[&names[0]], &[]);
    let kept = bench.outbox.subscribers(&"orders.new".parse().unwrap());
    assert!(kept.len() <= MAX_ALL);
    assert!(kept.contains(&Target::Subscription(BOB, names[0].clone())));
}

#[test]
fn a_subscription_whose_node_stays_away_lapses() {
    let billing: ServiceName = "billing".parse().unwrap();
    let mut bench = Bench::new(None);
    bench.subscribe(BOB, &[&billing], &[]);
    bench.subscribe(CAROL, &[&billing], &[]);
    bench.lose(BOB);
    let mut bench = bench.restart();
    bench.outbox.handle_link_up(CAROL);
    bench.submit(Target::Subscription(BOB, billing.clone())).unwrap();
    for _ in 0..23 {
        bench.sleep(HOUR);
    }
    assert_eq!(bench.outbox.subscriptions().count(), 2);
    for _ in 0..3 {
        bench.sleep(HOUR);
    }
    assert_eq!(lapsed(&bench, Lapse::Absent), [BOB]);
    assert_eq!((bench.outbox.subscriptions().count(), bench.outbox.pending()), (1, 0));
}

#[test]
fn what_a_peer_may_no_longer_have_is_not_sent() {
    let rules: crate::trust::Rules = "* subscribe public.>".parse().unwrap();
    let grants = rules.grants(&BOB, None);
    let billing: ServiceName = "billing".parse().unwrap();
    let announce = |bench: &mut Bench, pattern: &str, grants: &Grants| {
        bench.outbox.handle_link_up(BOB);
        let subscriptions = vec![(billing.clone(), pattern.parse().unwrap())];
        let info = InboxInfo { epoch: 1, subscriptions, ..InboxInfo::default() };
        bench.outbox.handle_inbox(bench.now(), BOB, info, grants);
        bench.run();
    };
    let mut bench = Bench::new(None);
    announce(&mut bench, "secret.>", &Grants::Everything);
    bench.lose(BOB);
    bench.submit(Target::Subscription(BOB, billing.clone())).unwrap();
    // He comes back with the same name for what he may have.
    announce(&mut bench, "public.>", &grants);
    assert_eq!(lapsed(&bench, Lapse::NotAllowed), [BOB]);
    assert_eq!((bench.sent.len(), bench.outbox.pending()), (0, 0));
    // Each message is judged by its own topic when it is sent.
    bench.submit(Target::Subscription(BOB, billing.clone())).unwrap();
    let key = DeliveryKey { number: 2, part: 0 };
    let objection = |topic: &str, grants: &Grants| {
        let destination = Destination::Topic(topic.parse().unwrap());
        bench.outbox.objection(key, &destination, grants)
    };
    assert_eq!(objection("public.news", &grants), None);
    assert_eq!(objection("secret.plan", &grants), Some(DropReason::NoSubscriber));
    assert_eq!(objection("public.news", &Grants::nothing()), Some(DropReason::NotAllowed));
    bench.outbox.handle_not_transmitted(bench.now(), key, DropReason::NotAllowed);
    bench.run();
    assert_eq!(bench.done.last(), Some(&(2, Err(DeadLetterReason::NotAllowed))));
}

#[test]
fn nothing_is_kept_for_a_key_that_is_no_longer_trusted() {
    let billing: ServiceName = "billing".parse().unwrap();
    let mut bench = Bench::new(None);
    bench.subscribe(BOB, &[&billing], &[]);
    bench.lose(BOB);
    let event = bench.submit(Target::Subscription(BOB, billing.clone())).unwrap();
    let command = bench.submit(Target::Node(BOB)).unwrap();
    bench.submit(Target::Node(CAROL)).unwrap();
    bench.outbox.handle_distrusted(bench.now(), |node| *node == BOB);
    bench.run();
    let forbidden = Err(DeadLetterReason::NotAllowed);
    assert_eq!(bench.done, [(event, Ok(())), (command, forbidden)]);
    assert_eq!((lapsed(&bench, Lapse::NotAllowed), bench.outbox.dead_letters()), (vec![BOB], 1));
}
