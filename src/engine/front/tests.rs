//! The front alone: what a call, a request and a refusal lead to.

use std::time::Duration;

use super::*;
use crate::address::Recipient;
use crate::engine::{FORGOTTEN_AT_ONCE, LinkId, LinkLoss};
use crate::message::{Header, IdSource, Kind};

const ME: NodeId = NodeId::from_bytes([1; 32]);
const PEER: NodeId = NodeId::from_bytes([2; 32]);
const LINK: LinkId = LinkId(7);

struct Names;

impl Host for Names {
    type Hold = &'static str;
    type Waiter = char;
    type Way = LinkId;
    type Service = &'static str;
    type Handle = ();
}

fn at(ms: u64) -> Time {
    Time::after_start(Duration::from_millis(ms))
}

fn front() -> Front<Names> {
    Front::new(ME, FrontLimits { max_body: 100, local: 300, broker: 300 })
}

fn call(ids: &IdSource, wants_reply: bool) -> Box<Message> {
    let to = Recipient::Service("work".parse().unwrap());
    let header = Header::new(ids.next(0), Kind::Command, to.into());
    let mut message = Box::new(Message::new(PEER, header, Bytes::from_static(b"do it")));
    message.wants_reply = wants_reply;
    message
}

/// The effects in words, runs apart.
fn effects(front: &mut Front<Names>) -> (Vec<Run<Names>>, Vec<String>) {
    let (mut runs, mut others) = (Vec::new(), Vec::new());
    while let Some(effect) = front.poll_effect() {
        others.push(match effect {
            Effect::Run(run) => {
                runs.push(run);
                continue;
            }
            Effect::Interrupt(()) => "interrupt".into(),
            Effect::Abort(()) => "abort".into(),
            Effect::CallEnded(_) | Effect::Discard(_) => continue,
            Effect::Complete(waiter, outcome) => format!("complete {waiter} {outcome:?}"),
            Effect::TakeBack(link, _) => format!("take back {}", link.0),
            Effect::Reply(hold, reply) => match reply.payload {
                Payload::Failed(failure) => format!("{hold}: failed {}", failure.code),
                _ => format!("{hold}: reply"),
            },
            Effect::Release(hold) => format!("{hold}: release"),
            Effect::Drop(hold, reason) => format!("{hold}: drop {reason}"),
            Effect::Forget(reason) => format!("forget {reason}"),
            Effect::Settle(hold, ..) => format!("{hold}: settle"),
            Effect::OwnDropped { reason, count, .. } => format!("own {count} {reason}"),
            Effect::OwnInDoubt(count) => format!("in doubt {count}"),
        });
    }
    (runs, others)
}

fn replied(body: &'static str) -> Ended {
    Ended::Replied { body: Bytes::from_static(body.as_bytes()), extra: None }
}

#[test]
fn a_call_runs_and_its_end_gives_the_hold_back() {
    let (mut front, ids) = (front(), IdSource::new(1));
    let name = "work".parse().unwrap();
    let number = front.serve(&name, 1, "work").unwrap();
    assert!(front.serve(&name, 1, "again").is_none(), "the name is taken");
    front.handle_call(at(0), Path::Link(LINK), call(&ids, true), "first");
    front.handle_call(at(0), Path::Link(LINK), call(&ids, false), "second");
    let (runs, others) = effects(&mut front);
    assert_eq!((runs.len(), others), (1, vec![]));
    assert_eq!(front.load(&name), Some((2, 1)));
    let next = front.handle_ended(at(1), number, runs[0].key, replied("done")).unwrap();
    assert_eq!(effects(&mut front).1, ["first: reply"]);
    let failure = Failure { code: "no".into(), text: "not today".into() };
    let ended = Ended::Failed { failure, rejects: false };
    assert!(front.handle_ended(at(2), number, next.key, ended).is_none());
    assert_eq!(effects(&mut front).1, ["second: drop handler_failed"]);
    assert!(front.is_quiet());
}

#[test]
fn whoever_is_not_served_is_told_in_its_own_way() {
    let (mut front, ids) = (front(), IdSource::new(1));
    front.handle_call(at(0), Path::Link(LINK), call(&ids, true), "request");
    front.handle_call(at(0), Path::Link(LINK), call(&ids, false), "send");
    let number = front.serve(&"work".parse().unwrap(), 1, "work").unwrap();
    assert!(front.withdraw(number));
    assert!(!front.withdraw(number), "once is enough");
    front.handle_call(at(0), Path::Link(LINK), call(&ids, true), "late");
    let expected =
        ["request: failed no_service", "send: drop no_service", "late: failed no_service"];
    assert_eq!(effects(&mut front).1, expected);
}

#[test]
fn a_reply_over_the_limit_fails_and_a_cancelled_call_is_dropped_or_interrupted() {
    let (mut front, ids) = (front(), IdSource::new(1));
    let number = front.serve(&"work".parse().unwrap(), 1, "work").unwrap();
    let (path, queued) = (Path::Link(LINK), call(&ids, true));
    let id = queued.header.id;
    front.handle_call(at(0), path, call(&ids, true), "large");
    front.handle_call(at(0), path, queued, "queued");
    let (runs, _) = effects(&mut front);
    front.handle_cancel(path, id);
    front.handle_cancel(path, runs[0].key.id);
    assert_eq!(effects(&mut front).1, ["queued: drop cancelled", "interrupt"]);
    let body = Bytes::from(vec![0; 101]);
    front.handle_ended(at(1), number, runs[0].key, Ended::Replied { body, extra: None });
    assert_eq!(effects(&mut front).1, ["large: failed too_large"]);
}

#[test]
fn calls_of_the_node_to_itself_have_a_room_that_is_given_back() {
    let (mut front, ids) = (front(), IdSource::new(1));
    let number = front.serve(&"work".parse().unwrap(), 8, "work").unwrap();
    let own = |front: &mut Front<Names>| front.handle_own_call(at(0), call(&ids, true), "own");
    assert_eq!((own(&mut front), own(&mut front)), (Ok(()), Ok(())));
    assert_eq!(own(&mut front), Err(DropReason::SlowPeer));
    let (runs, _) = effects(&mut front);
    front.handle_ended(at(1), number, runs[0].key, replied("done"));
    assert_eq!(own(&mut front), Ok(()));
    // Calls from a broker have a limit of their own.
    for _ in 0..3 {
        front.handle_call(at(0), Path::Broker, call(&ids, true), "broker");
    }
    let (runs, others) = effects(&mut front);
    assert_eq!((runs.len(), &others[1..]), (3, &["broker: failed slow_peer".to_owned()][..]));
}

#[test]
fn a_request_ends_once_by_reply_deadline_loss_or_shutdown() {
    let (mut front, ids) = (front(), IdSource::new(1));
    let id: Vec<_> = (0..6).map(|_| ids.next(0)).collect();
    let other = LinkId(8);
    for (id, deadline, link, waiter) in [
        (id[0], 10, LINK, 'a'),
        (id[1], 5, LINK, 'b'),
        (id[2], 30, other, 'c'),
        (id[3], 30, LINK, 'd'),
        (id[4], 40, other, 'e'),
    ] {
        front.open_request(id, at(deadline), Path::Link(link), link, waiter);
    }
    assert_eq!(front.poll_timeout(), Some(at(5)));
    front.handle_timeout(at(5));
    assert_eq!(effects(&mut front).1, ["complete b DeadlineExceeded", "take back 7"]);
    let outcome = || RequestOutcome::Failed(Failure { code: "x".into(), text: String::new() });
    front.handle_outcome(Path::Link(other), Some(id[0]), outcome(), "elsewhere");
    assert_eq!(effects(&mut front).1, ["elsewhere: drop late"], "it took another link");
    front.handle_outcome(Path::Link(other), Some(id[2]), outcome(), "there");
    let told = effects(&mut front).1;
    assert!(told[0] == "there: release" && told[1].starts_with("complete c"), "{told:?}");
    let loss = LinkLoss { unsent: 1, unsent_calls: vec![id[3]], in_doubt: 1 };
    front.handle_link_lost(LINK, PEER, &loss);
    let expected = [
        "own 1 link_lost",
        "in doubt 1",
        "complete a PeerLost { maybe_executed: true }",
        "complete d PeerLost { maybe_executed: false }",
    ];
    assert_eq!(effects(&mut front).1, expected);
    front.handle_abandoned(id[4]);
    assert_eq!(effects(&mut front).1, ["take back 8"]);
    front.open_request(id[5], at(50), Path::Local, LINK, 'f');
    front.handle_shut_down();
    assert_eq!(effects(&mut front).1, ["complete f ShutDown"]);
    assert!(front.is_quiet());
}

#[test]
fn a_lost_link_takes_its_queued_calls_along_and_interrupts_those_that_run() {
    let (mut front, ids) = (front(), IdSource::new(1));
    front.serve(&"work".parse().unwrap(), 1, "work").unwrap();
    front.handle_call(at(0), Path::Link(LINK), call(&ids, true), "runs");
    front.handle_call(at(0), Path::Link(LINK), call(&ids, true), "queued");
    front.handle_call(at(0), Path::Link(LinkId(8)), call(&ids, true), "other");
    let _runs = effects(&mut front);
    front.handle_link_lost(LINK, PEER, &LinkLoss::default());
    assert_eq!(effects(&mut front).1, ["interrupt", "queued: release", "forget link_lost"]);
}

#[test]
fn the_queued_calls_of_a_lost_link_are_forgotten_bit_by_bit_and_never_run() {
    let (mut front, ids) = (front(), IdSource::new(1));
    let number = front.serve(&"work".parse().unwrap(), 1, "work").unwrap();
    for _ in 0..=200 {
        front.handle_call(at(0), Path::Link(LINK), call(&ids, true), "queued");
    }
    front.handle_call(at(0), Path::Link(LinkId(8)), call(&ids, true), "other");
    let (runs, _) = effects(&mut front);
    let forgotten = |front: &mut Front<Names>| {
        let told = effects(front).1;
        told.iter().filter(|effect| *effect == "forget link_lost").count()
    };
    assert!(front.handle_link_lost(LINK, PEER, &LinkLoss::default()), "there are more");
    assert_eq!(forgotten(&mut front), FORGOTTEN_AT_ONCE);
    let next = front.handle_ended(at(1), number, runs[0].key, replied("done"));
    assert!(next.is_some_and(|run| run.key.path == Path::Link(LinkId(8))), "no lost call runs");
    let _reply = effects(&mut front);
    let mut all = FORGOTTEN_AT_ONCE;
    while front.forget_lost() {
        all += forgotten(&mut front);
    }
    assert_eq!(all + forgotten(&mut front), 200);
    assert!(!front.forget_lost());
}
