use proptest::prelude::*;

use super::*;

const LIMITS: GateLimits = GateLimits {
    message: 1000,
    frames: 8,
};

fn handshake(identity: &[u8]) -> Vec<u8> {
    let ready = Ready {
        claimed: NodeId::from_bytes([1; 32]),
        socket_type: "ROUTER",
    };
    [&inner_greeting()[..], &inner_ready(&ready, identity)].concat()
}

fn open_gate() -> Gate {
    let mut gate = Gate::new(LIMITS);
    let bytes = handshake(&[1; 48]);
    let (ready, taken) = gate.handshake(&bytes).unwrap().unwrap();
    assert_eq!(
        (ready.claimed, taken),
        (NodeId::from_bytes([1; 32]), bytes.len())
    );
    gate
}

fn frame(more: bool, len: usize) -> Vec<u8> {
    let mut bytes = vec![FLAG_LONG | u8::from(more)];
    bytes.extend_from_slice(&(len as u64).to_be_bytes());
    bytes.resize(bytes.len() + len, b'x');
    bytes
}

#[test]
fn the_frame_that_would_abort_the_process_is_cut() {
    // 64 bytes of greeting and a 9-byte header that claims 2^45 bytes.
    let mut gate = open_gate();
    let mut header = vec![FLAG_LONG];
    header.extend_from_slice(&(1u64 << 45).to_be_bytes());
    assert_eq!(gate.inspect(&header), Err(Refusal::TooLarge));
    // The same right after the greeting, where a READY belongs.
    let mut gate = Gate::new(LIMITS);
    let mut bytes = handshake(&[1; 48])[..GREETING_LEN].to_vec();
    bytes.extend_from_slice(&header);
    assert_eq!(bytes.len(), 73);
    assert_eq!(gate.handshake(&bytes), Err(Refusal::Ready));
}

#[test]
fn endless_multipart_is_cut_even_if_its_frames_are_empty() {
    let mut gate = open_gate();
    for _ in 0..LIMITS.frames {
        assert_eq!(gate.inspect(&frame(true, 0)), Ok(()));
    }
    assert_eq!(gate.inspect(&frame(true, 0)), Err(Refusal::TooManyFrames));
}

#[test]
fn a_batch_counts_as_a_whole() {
    let mut gate = open_gate();
    assert_eq!(gate.inspect(&frame(true, 600)), Ok(()));
    assert_eq!(gate.inspect(&frame(false, 401)), Err(Refusal::TooLarge));
    let mut gate = open_gate();
    for _ in 0..100 {
        assert_eq!(gate.inspect(&frame(true, 600)), Ok(()));
        assert_eq!(gate.inspect(&frame(false, 400)), Ok(()));
    }
}

#[test]
fn commands_and_reserved_bits_are_cut_after_the_handshake() {
    let second_ready = &handshake(&[1; 48])[GREETING_LEN..];
    assert_eq!(open_gate().inspect(second_ready), Err(Refusal::Command));
    assert_eq!(open_gate().inspect(&[0b1000, 0]), Err(Refusal::Flags));
}

#[test]
fn what_is_no_handshake_of_ours_is_refused_at_its_first_wrong_byte() {
    let refusal = |bytes: &[u8]| Gate::new(LIMITS).handshake(bytes).unwrap_err();
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
        chunk in 1usize..50,
    ) {
        let mut stream: Vec<u8> =
            frames.iter().flat_map(|(more, len)| frame(*more, *len)).collect();
        stream.extend(tail);
        let whole = open_gate().inspect(&stream);
        let mut gate = open_gate();
        let pieces = stream.chunks(chunk).try_for_each(|piece| gate.inspect(piece));
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn a_handshake_may_come_in_any_pieces(chunk in 1usize..150) {
        let mut bytes = handshake(&[1; 48]);
        let len = bytes.len();
        bytes.extend(frame(false, 3));
        let mut gate = Gate::new(LIMITS);
        let mut at = 0;
        let taken = loop {
            let piece = &bytes[at..(at + chunk).min(bytes.len())];
            if let Some((_, taken)) = gate.handshake(piece).unwrap() {
                break at + taken;
            }
            at += piece.len();
        };
        prop_assert_eq!(taken, len);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _refused = Gate::new(LIMITS).handshake(&bytes);
        let _refused = open_gate().inspect(&bytes);
    }
}
