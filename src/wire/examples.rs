//! Checks the examples of `protocol.md` against the codec, and the codec against random records.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::address::{Destination, MeshName, Topic};
use crate::identity::{Incarnation, NodeId};
use crate::message::{Extra, Header, Kind, MessageId};
use crate::peer::ServiceInfo;
use crate::trust::Action;

const ALICE: NodeId = NodeId::from_bytes([0xaa; 32]);
const BOB: NodeId = NodeId::from_bytes([0xbb; 32]);
const MAX_BODY: usize = 1 << 20;

fn id(counter: u8) -> MessageId {
    let mut bytes = [0x01, 0x93, 0x5b, 0, 0, 0, 0x71, 0x23, 0x84, 0x56, 0x78, 0x9a, 0, 0, 0, 0];
    bytes[15] = counter;
    MessageId::from_bytes(bytes)
}

fn event(counter: u8, topic: &str, body: impl Into<Bytes>) -> Envelope {
    let topic: Topic = topic.parse().unwrap();
    let header = Header::new(id(counter), Kind::Event, Destination::Topic(topic));
    Envelope { header, payload: Payload::Event(body.into()) }
}

fn call(counter: u8, service: &str, body: &'static str) -> Envelope {
    let destination = Destination::Service(service.parse().unwrap());
    let header = Header::new(id(counter), Kind::Command, destination);
    Envelope { header, payload: Payload::Call(body.into()) }
}

fn answer(counter: u8, to: u8, payload: Payload) -> Envelope {
    let mut header = Header::new(id(counter), Kind::Document, Destination::Node(BOB));
    header.correlation_id = Some(id(to));
    Envelope { header, payload }
}

fn message(envelope: Envelope) -> Vec<Record> {
    vec![Record::Message(envelope)]
}

fn control(control: Control) -> Vec<Record> {
    vec![Record::Control(control)]
}

/// The batches that Alice sends to Bob in the examples of `protocol.md`.
fn examples() -> Vec<(&'static str, Preamble, Vec<Record>)> {
    let fresh = Preamble::default();
    let hello = Hello {
        mesh: MeshName::default(),
        id: ALICE,
        incarnation: Incarnation(7),
        name: "alice".into(),
        limits: Limits { max_body: 1 << 20, windows: [4 << 20; 4] },
        seq: 2,
        patterns: vec!["orders.>".parse().unwrap()],
        services: vec![ServiceInfo { name: "stock".parse().unwrap(), concurrency: 64 }],
        addresses: vec!["10.0.0.1:4000".parse().unwrap()],
    };
    let hint = Hint {
        id: NodeId::from_bytes([0xcc; 32]),
        addresses: vec!["10.0.0.3:4000".parse().unwrap()],
    };
    let announcement = Announcement {
        seq: 3,
        subscribed: vec!["news.*".parse().unwrap()],
        withdrawn: vec!["stock".parse().unwrap()],
        ..Announcement::default()
    };
    let consumed = [
        Totals { messages: 3, bytes: 420 },
        Totals { messages: 0, bytes: 0 },
        Totals { messages: 1, bytes: 130 },
        Totals::default(),
    ];
    let delivery = DeliveryId { stream: Stream { epoch: 7, subscription: None }, seq: 12 };
    let mut guaranteed = call(3, "stock", "sell one");
    guaranteed.payload = Payload::Guaranteed(
        "sell one".into(),
        Arc::new(Delivery { id: delivery.clone(), floor: 10, attempt: 1, redelivered: false }),
    );
    let processed = Answer { id: delivery, attempt: 1, outcome: DeliveryOutcome::Processed };
    let subscription = Some("billing".parse().unwrap());
    let failed = Answer {
        id: DeliveryId { stream: Stream { epoch: 7, subscription }, seq: 3 },
        attempt: 2,
        outcome: DeliveryOutcome::Failed("busy".into()),
    };
    let subscriptions = vec![("billing".parse().unwrap(), "orders.>".parse().unwrap())];
    let moment = |offset| Moment { epoch: 7, segment: 1, offset };
    let heard = Some(moment(48));
    let inbox = InboxInfo { epoch: 9, subscriptions, ended: Vec::new(), heard };
    let mut request = call(3, "stock", "how many?");
    request.payload = Payload::Request("how many?".into());
    request.header.reply_to = Some(ALICE);
    request.header.time_to_live = Some(Duration::from_secs(5));
    let mut rich = event(9, "orders.new", "{}");
    rich.header.kind = Kind::Document;
    rich.header.extra = Some(Box::new(Extra {
        ordering_key: Some("customer-7".into()),
        content_type: Some("application/json".into()),
        traceparent: None,
        headers: vec![("colour".into(), "red".into())],
    }));
    let declined = Failure { code: "not_found".into(), text: "no apples".into() };
    vec![
        ("hello", fresh, control(Control::Hello(Box::new(hello)))),
        ("accept", fresh, control(Control::Accept)),
        ("announce", fresh, control(Control::Announce(Box::new(announcement)))),
        ("heartbeat", Preamble { consumed }, Vec::new()),
        ("dropped", fresh, control(Control::Dropped(vec![("slow_subscriber".into(), 12)]))),
        ("event", fresh, message(event(1, "orders.new", "apples"))),
        (
            "run",
            fresh,
            [message(event(1, "orders.new", "apples")), message(event(2, "orders.new", "pears"))]
                .into_iter()
                .flatten()
                .collect(),
        ),
        ("rich event", fresh, message(rich)),
        ("request", fresh, message(request)),
        ("reply", fresh, message(answer(4, 3, Payload::Reply("17".into())))),
        ("failure", fresh, message(answer(5, 3, Payload::Failed(declined)))),
        ("guaranteed", fresh, message(guaranteed)),
        ("answers", fresh, control(Control::Answers(vec![processed, failed]))),
        ("inbox", fresh, control(Control::Inbox(Box::new(inbox)))),
        ("epochs", fresh, control(Control::Epochs(vec![7], Some(moment(200))))),
        ("cancel", fresh, control(Control::Cancel(id(3)))),
        ("probe", fresh, control(Control::Probe(1))),
        ("peers", fresh, control(Control::Peers(vec![hint]))),
        ("denied", fresh, control(Control::Denied(vec![(Action::Subscribe, "salary".into())]))),
        ("bye", fresh, control(Control::Bye(Bye::Shutdown))),
    ]
}

fn encode(preamble: &Preamble, records: &[Record]) -> Vec<Bytes> {
    let mut batch = BatchEncoder::new(&ALICE, *preamble);
    for record in records {
        match record {
            Record::Control(control) => batch.push_control(control),
            Record::Message(envelope) => batch.push(envelope),
            Record::Unknown(_) => panic!("nobody writes these"),
        }
    }
    batch.finish().into_frames(Bytes::from)
}

/// Reads a batch record by record, and again with the fast path for runs of events: both must yield
/// the same records.
fn read(frames: Vec<Bytes>) -> Result<(Preamble, Vec<Record>), WireError> {
    let one_by_one = read_with(frames.clone(), false);
    assert_eq!(read_with(frames, true), one_by_one);
    one_by_one
}

fn read_with(frames: Vec<Bytes>, short_cut: bool) -> Result<(Preamble, Vec<Record>), WireError> {
    let mut batch = decode(frames, &BOB, &ALICE, MAX_BODY)?;
    let mut records = Vec::new();
    loop {
        while short_cut && let Some((id, body)) = batch.next_successor() {
            let Some(Record::Message(before)) = records.last() else { panic!("it has no topic") };
            let header = Header::new(id, Kind::Event, before.header.destination.clone());
            let payload = Payload::Event(Bytes::copy_from_slice(body));
            records.push(Record::Message(Envelope { header, payload }));
        }
        match batch.next_record()? {
            Some(record) => records.push(record),
            None => return Ok((batch.preamble, records)),
        }
    }
}

/// Returns the frames of the named example: hex, with `#` for a comment and `--` for a frame.
fn from_page(name: &str) -> Vec<Bytes> {
    let page = include_str!("protocol.md");
    let head = format!("```hex {name}\n");
    let block = page.split_once(&head).unwrap_or_else(|| panic!("no example {name:?}")).1;
    let block = block.split_once("```").unwrap().0;
    let frame = |text: &str| -> Bytes {
        let digits =
            text.lines().flat_map(|line| line.split('#').next().unwrap().split_whitespace());
        digits.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
    };
    block.split("--").map(frame).collect()
}

#[test]
fn the_examples_of_the_protocol_page_decode_to_what_they_say() {
    for (name, preamble, records) in examples() {
        let page = from_page(name);
        let (read_preamble, read_records) = read(page.clone()).unwrap();
        assert_eq!((read_preamble, &read_records), (preamble, &records), "{name}");
        assert_eq!(encode(&preamble, &records), page, "{name}: another encoding of the same");
    }
}

#[test]
fn a_plain_event_takes_40_bytes_of_header_and_16_in_a_run() {
    let body = [1; 64];
    let one = encode(&Preamble::default(), &message(event(1, "orders.new", body.to_vec())));
    assert!(one[1].len() - 64 <= 40, "{}", one[1].len() - 64);
    let run: Vec<Record> =
        (0..100).flat_map(|n| message(event(n, "orders.new", body.to_vec()))).collect();
    let run = encode(&Preamble::default(), &run);
    assert!(run[1].len() / 100 - 64 <= 16, "{}", run[1].len() / 100 - 64);
}

#[test]
fn a_body_over_4_kib_gets_a_frame_of_its_own() {
    let records: Vec<Record> = [10, 4097, 20, 100_000]
        .iter()
        .enumerate()
        .flat_map(|(n, len)| message(event(n as u8, "a", vec![n as u8; *len])))
        .collect();
    let frames = encode(&Preamble::default(), &records);
    assert_eq!(frames.iter().map(Bytes::len).skip(2).collect::<Vec<_>>(), [4097, 100_000]);
    assert_eq!(read(frames.clone()).unwrap().1, records);
    // One body frame missing, one surplus, one of the wrong length.
    assert_eq!(read(frames[..3].to_vec()), Err(WireError::Bodies));
    let mut surplus = frames.clone();
    surplus.push(Bytes::from_static(b"x"));
    assert_eq!(read(surplus), Err(WireError::Bodies));
    let mut short = frames;
    short[2].truncate(4096);
    assert_eq!(read(short), Err(WireError::Bodies));
}

#[test]
fn what_a_later_version_adds_is_passed_over() {
    let preamble = Bytes::from_static(&[0x9a, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0xa3, b'n', b'e', b'w']);
    // A record of an unknown type, and an accept with an extra field.
    let records = Bytes::from_static(&[0, 0, 0, 3, 0x92, 0x63, 0xc0, 0, 0, 0, 4, 0x92, 2, 0x91, 9]);
    let (_, records) = read(vec![preamble, records]).unwrap();
    assert_eq!(records, [Record::Unknown(0x63), Record::Control(Control::Accept)]);
}

#[test]
fn an_unknown_record_is_passed_over_with_its_body_frame() {
    let frames = encode(&Preamble::default(), &message(event(1, "a", vec![7; 5000])));
    // A message of type 30 with an id, a destination, a body of 4,100 bytes, and another field.
    let mut records = vec![0, 0, 0, 8, 0x95, 30, 1, 0xc0, 0xcd, 0x10, 0x04, 0xc3];
    records.extend_from_slice(&frames[1]);
    let bodies = [Bytes::from(vec![1; 4100]), frames[2].clone()];
    let batch = |bodies: &[Bytes]| [&[frames[0].clone(), records.clone().into()], bodies].concat();
    let (_, read_back) = read(batch(&bodies)).unwrap();
    assert_eq!(read_back[0], Record::Unknown(30));
    assert_eq!(read_back[1..], message(event(1, "a", vec![7; 5000])));
    assert_eq!(read(batch(&bodies[1..])), Err(WireError::Bodies));
}

#[test]
fn another_version_is_named() {
    let preamble = Bytes::from_static(&[0x97, 2, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(vec![preamble]).unwrap_err(), WireError::Version(2));
}

fn text() -> impl Strategy<Value = Option<String>> {
    prop::option::of("[a-z]{0,12}")
}

prop_compose! {
    fn any_extra()(
        ordering_key in text(),
        content_type in text(),
        traceparent in text(),
        headers in prop::collection::vec(("[a-z]{0,5}", "[a-z]{0,5}"), 0..4),
    ) -> Option<Box<Extra>> {
        let extra = Extra { ordering_key, content_type, traceparent, headers };
        (extra != Extra::default()).then(|| Box::new(extra))
    }
}

prop_compose! {
    fn any_envelope()(
        what in 0..7,
        id in any::<[u8; 16]>(),
        kind in prop::sample::select(vec![Kind::Event, Kind::Command, Kind::Document]),
        address in prop::sample::select(vec!["a", "a.b", "orders.eu.new"]),
        to_node in any::<bool>(),
        body in prop::collection::vec(any::<u8>(), 0..6000),
        correlation in prop::option::of(any::<[u8; 16]>()),
        reply_to in prop::option::of(prop::sample::select(vec![ALICE, BOB])),
        ttl in prop::option::of(0..100_000_u64),
        extra in any_extra(),
    ) -> Envelope {
        let destination = match (what, to_node) {
            (0 | 6, _) => Destination::Topic(address.parse().unwrap()),
            (1 | 4 | 5, false) => Destination::Service(address.parse().unwrap()),
            _ => Destination::Node(BOB),
        };
        let mut header = Header::new(MessageId::from_bytes(id), kind, destination);
        header.correlation_id = correlation.map(MessageId::from_bytes);
        header.reply_to = reply_to;
        header.time_to_live = ttl.map(Duration::from_millis);
        header.extra = extra;
        let failure = || Failure { code: "code".into(), text: address.into() };
        let payload = match what {
            0 => Payload::Event(body.into()),
            1 => Payload::Call(body.into()),
            2 => Payload::Reply(body.into()),
            4 => Payload::Request(body.into()),
            5 | 6 => {
                let subscription = (what == 6).then(|| "billing".parse().unwrap());
                let (epoch, seq) = (id[0].into(), u64::from(id[1]) + 3);
                let id = DeliveryId { stream: Stream { epoch, subscription }, seq };
                let delivery = Delivery { id, floor: 2, attempt: 1, redelivered: to_node };
                Payload::Guaranteed(body.into(), Arc::new(delivery))
            }
            _ => Payload::Failed(failure()),
        };
        Envelope { header, payload }
    }
}

proptest! {
    #[test]
    fn any_run_of_events_survives_the_wire(
        steps in prop::collection::vec((0..3_u8, 0..200_u64, 0..6000_usize, 0..8_u8), 1..40),
    ) {
        let mut last = id(1);
        let mut records = Vec::new();
        for (topic, later, len, odd) in steps {
            last = last.successor(later);
            let topic: Topic = format!("topic.{topic}").parse().unwrap();
            let mut header = Header::new(last, Kind::Event, Destination::Topic(topic));
            match odd {
                0 => header.kind = Kind::Document,
                1 => header.time_to_live = Some(Duration::from_millis(5)),
                2 => records.push(Record::Control(Control::Accept)),
                _ => {}
            }
            let payload = Payload::Event(vec![odd; len].into());
            records.push(Record::Message(Envelope { header, payload }));
        }
        prop_assert_eq!(read(encode(&Preamble::default(), &records)).unwrap().1, records);
    }

    #[test]
    fn any_batch_survives_the_wire(envelopes in prop::collection::vec(any_envelope(), 0..20)) {
        let costs: Vec<u64> = envelopes.iter().map(Envelope::cost).collect();
        let records: Vec<Record> = envelopes.into_iter().map(Record::Message).collect();
        let (_, read) = read(encode(&Preamble::default(), &records)).unwrap();
        prop_assert_eq!(&read, &records);
        // Both sides compute the same cost.
        let read_costs: Vec<u64> = read.iter().map(|record| match record {
            Record::Message(envelope) => envelope.cost(),
            _ => 0,
        }).collect();
        prop_assert_eq!(read_costs, costs);
    }

    #[test]
    fn a_batch_cut_or_changed_anywhere_is_read_or_refused_but_never_panics(
        which in 0..19_usize,
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let (name, ..) = examples().swap_remove(which);
        let mut frames = from_page(name);
        let frame = at.index(frames.len());
        let mut bytes = frames[frame].to_vec();
        if !bytes.is_empty() {
            let place = at.index(bytes.len());
            if cut { bytes.truncate(place) } else { bytes[place] = byte }
        }
        frames[frame] = bytes.into();
        let _read_or_refused = read(frames);
    }

    #[test]
    fn arbitrary_frames_never_panic(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..4),
    ) {
        let _read_or_refused = read(frames.into_iter().map(Bytes::from).collect());
    }
}

proptest! {
    #[test]
    fn a_message_survives_the_disk(envelope in any_envelope()) {
        if let Payload::Event(_) | Payload::Call(_) = &envelope.payload {
            let encoded = encode_stored(&envelope, &ALICE);
            prop_assert_eq!(decode_stored(&encoded.into(), &ALICE).unwrap(), envelope);
        }
    }
}
