use proptest::prelude::*;

use super::super::zmtp::{greeting, pong, ready};
use super::*;
use crate::identity::NodeId;

const LIMITS: GateLimits = GateLimits { message: 1000, frames: 8 };
const NODE: End = End::Node(NodeId::from_bytes([9; 32]));

fn gate() -> Gate {
    Gate::new(NODE, LIMITS)
}

fn handshake(identity: &[u8]) -> Vec<u8> {
    [&greeting()[..], &ready(b"ROUTER", identity)].concat()
}

fn command(name: &str, data: &[u8]) -> Vec<u8> {
    let body = [&[name.len() as u8], name.as_bytes(), data].concat();
    [&[FLAG_COMMAND, body.len() as u8], &body[..]].concat()
}

/// Passes all the bytes at once; returns the frame sizes of each batch.
fn pass(gate: &mut Gate, bytes: &[u8]) -> Result<Vec<Vec<usize>>, Refusal> {
    pass_in_pieces(gate, bytes, bytes.len().max(1))
}

fn pass_in_pieces(gate: &mut Gate, bytes: &[u8], piece: usize) -> Result<Vec<Vec<usize>>, Refusal> {
    let (mut input, now) = (BytesMut::new(), Instant::now());
    let mut batches = Vec::new();
    for piece in bytes.chunks(piece) {
        input.extend_from_slice(piece);
        while let Some(received) = gate.next(&mut input, now)? {
            if let Received::Batch(batch) = received {
                batches.push(batch.iter().map(Bytes::len).collect());
            }
        }
    }
    Ok(batches)
}

fn frame(more: bool, len: usize) -> Vec<u8> {
    let mut bytes = vec![FLAG_LONG | u8::from(more)];
    bytes.extend_from_slice(&(len as u64).to_be_bytes());
    bytes.resize(bytes.len() + len, b'x');
    bytes
}

#[test]
fn a_frame_that_claims_the_memory_of_the_world_is_cut_at_its_header() {
    let mut header = vec![FLAG_LONG];
    header.extend_from_slice(&(1u64 << 45).to_be_bytes());
    assert_eq!(pass(&mut gate(), &header), Err(Refusal::TooLarge));
    // The same header right after the greeting, instead of READY.
    let bytes = [&greeting()[..], &header].concat();
    assert_eq!(bytes.len(), 73);
    assert_eq!(gate().handshake(&mut bytes[..].into()), Err(Refusal::Ready));
}

#[test]
fn endless_multipart_is_cut_even_if_its_frames_are_empty() {
    let parts = frame(true, 0).repeat(LIMITS.frames);
    assert_eq!(pass(&mut gate(), &parts), Ok(vec![]));
    let parts = frame(true, 0).repeat(LIMITS.frames + 1);
    assert_eq!(pass(&mut gate(), &parts), Err(Refusal::TooManyFrames));
}

#[test]
fn a_batch_counts_as_a_whole() {
    let large = [frame(true, 600), frame(false, 401)].concat();
    assert_eq!(pass(&mut gate(), &large), Err(Refusal::TooLarge));
    let exact = [frame(true, 600), frame(false, 400)].concat().repeat(100);
    assert_eq!(pass(&mut gate(), &exact), Ok(vec![vec![600, 400]; 100]));
}

#[test]
fn a_stranger_gets_little_room_until_it_is_admitted() {
    let limits = GateLimits { message: 1 << 20, frames: 8 };
    let most = MAX_STRANGERS_MESSAGE as usize;
    let mut gate = Gate::new(NODE, limits);
    assert_eq!(pass(&mut gate, &frame(false, most)), Ok(vec![vec![most]]));
    assert_eq!(pass(&mut gate, &frame(false, most + 1)[..9]), Err(Refusal::TooLarge));
    let mut gate = Gate::new(NODE, limits);
    gate.admit();
    assert_eq!(pass(&mut gate, &frame(false, 1 << 20)), Ok(vec![vec![1 << 20]]));
    assert_eq!(pass(&mut gate, &frame(false, (1 << 20) + 1)), Err(Refusal::TooLarge));
}

/// Passes all the bytes at once; returns the contexts of the PINGs.
fn pings(gate: &mut Gate, bytes: &[u8], now: Instant) -> Result<Vec<Bytes>, Refusal> {
    let (mut input, mut contexts) = (BytesMut::from(bytes), Vec::new());
    while let Some(received) = gate.next(&mut input, now)? {
        if let Received::Ping(context) = received {
            contexts.push(context);
        }
    }
    Ok(contexts)
}

#[test]
fn a_ping_is_handed_on_with_its_context_even_between_the_frames_of_a_batch() {
    let ping = command("PING", b"\0\x0asixteen bytes...");
    let bytes = [&frame(true, 2)[..], &ping, &frame(false, 3)].concat();
    assert_eq!(pass(&mut gate(), &bytes), Ok(vec![vec![2, 3]]));
    let mut split = gate();
    assert_eq!(pings(&mut split, &bytes, Instant::now()), Ok(vec!["sixteen bytes...".into()]));
    assert_eq!(pings(&mut split, &command("PING", b"\0\0"), Instant::now()), Ok(vec!["".into()]));
    assert_eq!(pong(b"abc"), command("PONG", b"abc"));
}

#[test]
fn an_invalid_ping_and_a_long_command_are_cut_at_once() {
    for data in [&b""[..], b"\0", b"\0\x0aseventeen bytes.."] {
        assert_eq!(pass(&mut gate(), &command("PING", data)), Err(Refusal::Command));
    }
    assert_eq!(pass(&mut gate(), &[FLAG_COMMAND, 0]), Err(Refusal::Command));
    assert_eq!(pass(&mut gate(), &[FLAG_COMMAND, 2, 9, b'X']), Err(Refusal::Command));
    let long = [&[FLAG_COMMAND | FLAG_LONG][..], &513u64.to_be_bytes()].concat();
    assert_eq!(pass(&mut gate(), &long), Err(Refusal::Command));
}

#[test]
fn other_commands_are_passed_over_at_a_bounded_rate() {
    let (mut gate, start) = (gate(), Instant::now());
    let one = command("SUBSCRIBE", b"all");
    let burst = one.repeat(COMMANDS_AT_ONCE as usize);
    assert_eq!(pings(&mut gate, &burst, start), Ok(vec![]));
    let second = start + std::time::Duration::from_secs(1);
    let more = command("PONG", b"").repeat(COMMANDS_A_SECOND as usize);
    assert_eq!(pings(&mut gate, &more, second), Ok(vec![]));
    assert_eq!(pings(&mut gate, &one, second), Err(Refusal::TooManyCommands));
}

#[test]
fn reserved_bits_and_commands_in_several_frames_are_cut() {
    assert_eq!(pass(&mut gate(), &[0b1000, 0]), Err(Refusal::Flags));
    assert_eq!(pass(&mut gate(), &[FLAG_COMMAND | FLAG_MORE, 0]), Err(Refusal::Flags));
}

#[test]
fn each_end_accepts_the_sockets_that_it_can_talk_to() {
    let refusal = |end, socket_type: &[u8], identity: &[u8]| {
        let bytes = [&greeting()[..], &ready(socket_type, identity)].concat();
        Gate::new(end, LIMITS).handshake(&mut bytes[..].into()).err()
    };
    assert_eq!(refusal(NODE, b"DEALER", &[1; 48]), None);
    assert_eq!(refusal(NODE, b"PUB", &[1; 48]), Some(Refusal::SocketType));
    assert_eq!(refusal(NODE, b"DEALER", &[0; 48]), Some(Refusal::WeakKey));
    assert_eq!(refusal(End::Broker, b"DEALER", b""), None);
    assert_eq!(refusal(End::Broker, b"ROUTER", b""), Some(Refusal::SocketType));
    assert_eq!(refusal(End::BrokerClient, b"ROUTER", b""), None);
    assert_eq!(refusal(End::BrokerClient, b"DEALER", b""), Some(Refusal::SocketType));
}

#[test]
fn properties_of_a_ready_are_limited_and_not_repeated() {
    let property = |name: &str, value: &[u8]| {
        let len = (value.len() as u32).to_be_bytes();
        [&[name.len() as u8], name.as_bytes(), &len, value].concat()
    };
    let refusal = |properties: &[Vec<u8>]| {
        let body = [&b"\x05READY"[..], &properties.concat()].concat();
        let head = [&[FLAG_COMMAND | FLAG_LONG][..], &(body.len() as u64).to_be_bytes()].concat();
        let bytes = [&greeting()[..], &head, &body].concat();
        Gate::new(End::Broker, LIMITS).handshake(&mut bytes[..].into()).err()
    };
    let dealer = property("Socket-Type", b"DEALER");
    assert_eq!(refusal(&[dealer.clone(), property("X-Of-My-Own", b"yes")]), None);
    assert_eq!(refusal(&[dealer.clone(), property("Identity", &[1; 255])]), None);
    let long = property("Identity", &[1; 256]);
    assert_eq!(refusal(&[dealer.clone(), long]), Some(Refusal::Identity));
    assert_eq!(refusal(&[dealer.clone(), dealer.clone()]), Some(Refusal::Ready));
    assert_eq!(refusal(&[dealer.clone(), property("", b"")]), Some(Refusal::Ready));
    assert_eq!(refusal(&[dealer, property("X", &[1; 512])]), Some(Refusal::Ready));
}

#[test]
fn what_is_no_handshake_of_ours_is_refused_at_its_first_wrong_byte() {
    let refusal = |bytes: &[u8]| gate().handshake(&mut bytes.into()).unwrap_err();
    assert_eq!(refusal(b"GET / HTTP/1.1\r\n"), Refusal::NotZmtp);
    let good = handshake(&[1; 48]);
    let changed = |place: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[place] = byte;
        bytes
    };
    assert_eq!(refusal(&changed(9, 0)), Refusal::NotZmtp);
    assert_eq!(refusal(&changed(10, 2)), Refusal::NotZmtp);
    assert_eq!(refusal(&changed(12, b'C')), Refusal::Mechanism);
    assert_eq!(refusal(&changed(64, 0)), Refusal::Ready);
    assert_eq!(refusal(&changed(67, b'X')), Refusal::Ready);
    assert_eq!(refusal(&handshake(b"short")), Refusal::Identity);
    let mut long = good[..GREETING_LEN].to_vec();
    long.extend_from_slice(&[FLAG_COMMAND | FLAG_LONG, 0, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(refusal(&long), Refusal::Ready);
}

proptest! {
    #[test]
    fn the_verdict_does_not_depend_on_how_the_bytes_are_cut(
        frames in prop::collection::vec((any::<bool>(), 0usize..400), 1..12),
        tail in prop::collection::vec(any::<u8>(), 0..12),
        piece in 1usize..50,
    ) {
        let mut stream: Vec<u8> =
            frames.iter().flat_map(|(more, len)| frame(*more, *len)).collect();
        stream.extend(tail);
        let whole = pass(&mut gate(), &stream);
        prop_assert_eq!(pass_in_pieces(&mut gate(), &stream, piece), whole);
    }

    #[test]
    fn a_handshake_may_come_in_any_pieces(piece in 1usize..150) {
        let bytes = [handshake(&[1; 48]), frame(false, 3)].concat();
        let mut gate = gate();
        let mut input = BytesMut::new();
        let mut claimed = None;
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            if claimed.is_none() {
                claimed = gate.handshake(&mut input).unwrap();
            }
        }
        prop_assert_eq!(claimed, Some(Ready { claimed: Some(NodeId::from_bytes([1; 32])) }));
        let batch = Received::Batch(vec![Bytes::from("xxx")]);
        prop_assert_eq!(gate.next(&mut input, Instant::now()), Ok(Some(batch)));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _refused = gate().handshake(&mut bytes[..].into());
        let _refused = pass(&mut gate(), &bytes);
    }
}
