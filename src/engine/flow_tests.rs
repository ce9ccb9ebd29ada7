use super::*;
use crate::address::ServiceName;
use crate::engine::Budget;
use crate::trust::Action;
use crate::wire::{Bye, Hello};

fn flow() -> Flow {
    let limits = Limits { max_body: 1 << 20, windows: [4 << 20; LANES] };
    let share = Budget::new(64 << 20).share();
    Flow::new(Time::default(), NodeId::from_bytes([1; 32]), &limits, 4 << 20, share)
}

fn denial() -> Control {
    let names = (0..256).map(|n| (Action::Subscribe, format!("{n}{}", "x".repeat(250))));
    Control::denied(names).unwrap()
}

/// The bytes of all batches that can be sent now.
fn sent(flow: &mut Flow) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(batch) = flow.poll_transmit(Time::default()) {
        batch.into_frames(Into::into).iter().for_each(|frame| bytes.extend_from_slice(frame));
        flow.handle_released(1);
    }
    bytes
}

#[test]
fn a_peer_that_causes_records_and_reads_none_overflows_at_a_number_of_bytes() {
    let mut flow = flow();
    let record = (denial().encode().len() + size_of::<ControlRecord>()) as u64;
    let fit = MAX_CONTROL / record;
    for _ in 0..fit {
        flow.enqueue_control(&denial());
    }
    assert!(!flow.has_overflowed());
    for _ in 0..1000 {
        flow.enqueue_control(&denial());
    }
    assert!(flow.has_overflowed());
    assert!(flow.control.bytes() <= MAX_CONTROL);
}

#[test]
fn a_denial_keeps_no_more_than_the_names_that_it_has() {
    let denied = (0..200_000).map(|n| (Action::Subscribe, format!("{n}")));
    let Some(Control::Denied(names)) = Control::denied(denied) else { panic!("nothing denied") };
    assert_eq!(names.len(), 256);
    assert!(names.capacity() <= 512, "{}", names.capacity());
    assert_eq!(Control::denied([]), None);
}

#[test]
fn one_reply_answers_all_probes() {
    let mut flow = flow();
    for nonce in 1..=100_000 {
        flow.enqueue_control(&Control::ProbeReply(nonce));
    }
    assert_eq!(flow.control.bytes(), 0);
    assert!(sent(&mut flow).len() < 100);
    assert!(!flow.can_transmit());
}

#[test]
fn the_last_list_of_durable_subscriptions_says_what_ended_before_it() {
    let mut flow = flow();
    let name = |n: u32| format!("s{n}").parse::<ServiceName>().unwrap();
    let of = |names: &[u32], ended: &[u32]| InboxInfo {
        epoch: 1,
        subscriptions: names.iter().map(|n| (name(*n), "a.>".parse().unwrap())).collect(),
        ended: ended.iter().map(|n| name(*n)).collect(),
        heard: None,
    };
    for info in [of(&[2], &[1]), of(&[1], &[2]), of(&[1, 3], &[2])] {
        flow.enqueue_control(&Control::Inbox(Box::new(info)));
    }
    assert_eq!(flow.inbox.as_deref(), Some(&of(&[1, 3], &[2, 1])));
    assert!(!sent(&mut flow).is_empty());
    for n in 0..10_000 {
        flow.enqueue_control(&Control::Inbox(Box::new(of(&[], &[n]))));
    }
    assert_eq!(flow.inbox.as_ref().map(|info| info.ended.len()), Some(512));
}

#[test]
fn nothing_follows_a_hello_in_its_batch() {
    let mut flow = flow();
    let limits = Limits { max_body: 1, windows: [1; LANES] };
    let hello = Hello {
        mesh: "default".parse().unwrap(),
        id: NodeId::from_bytes([1; 32]),
        incarnation: crate::identity::Incarnation(1),
        name: "n".into(),
        limits,
        seq: 0,
        patterns: Vec::new(),
        services: Vec::new(),
        addresses: Vec::new(),
    };
    flow.enqueue_control(&Control::Hello(Box::new(hello)));
    flow.enqueue_control(&Control::Bye(Bye::Shutdown));
    assert!(flow.poll_transmit(Time::default()).is_some());
    assert!(flow.can_transmit(), "the bye is in the next batch");
}

#[test]
fn a_peer_that_makes_the_node_keep_more_than_its_share_breaks_the_flow() {
    let limits = Limits { max_body: 1 << 20, windows: [4 << 20; LANES] };
    let budget = Budget::new(16 << 20);
    let new =
        || Flow::new(Time::default(), NodeId::from_bytes([1; 32]), &limits, 1, budget.share());
    let [mut greedy, mut honest, _] = [new(), new(), new()];
    // An empty call holds 128 bytes of credit, and more memory.
    let call = Totals::one(128);
    let kept = (0..).take_while(|_| greedy.handle_received(Lane::Calls, call).is_ok()).count();
    assert!((12_000..14_000).contains(&kept), "{kept}");
    assert_eq!(greedy.handle_received(Lane::Calls, Totals::one(1 << 20)), Err(Violation::Share));
    for _ in 0..1000 {
        honest.handle_received(Lane::Calls, call).unwrap();
    }
    greedy.handle_consumed(Lane::Calls, Totals { messages: kept as u64, bytes: 128 * kept as u64 });
    honest.handle_received(Lane::Calls, Totals::one(3 << 20)).unwrap();
}
