use proptest::prelude::*;

use super::super::zmtp::{greeting, ready};
use super::*;

const LIMITS: GateLimits = GateLimits { message: 1000, frames: 8 };

fn handshake(identity: &[u8]) -> Vec<u8> {
    [&greeting()[..], &ready(identity)].concat()
}

/// Passes all the bytes at once; returns the frame sizes of each batch.
fn pass(gate: &mut Gate, bytes: &[u8]) -> Result<Vec<Vec<usize>>, Refusal> {
    pass_in_pieces(gate, bytes, bytes.len().max(1))
}

fn pass_in_pieces(gate: &mut Gate, bytes: &[u8], piece: usize) -> Result<Vec<Vec<usize>>, Refusal> {
    let mut input = BytesMut::new();
    let mut batches = Vec::new();
    for piece in bytes.chunks(piece) {
        input.extend_from_slice(piece);
        while let Some(batch) = gate.next_batch(&mut input)? {
            batches.push(batch.iter().map(Bytes::len).collect());
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
    assert_eq!(pass(&mut Gate::new(LIMITS), &header), Err(Refusal::TooLarge));
    // The same header right after the greeting, instead of READY.
    let bytes = [&greeting()[..], &header].concat();
    assert_eq!(bytes.len(), 73);
    assert_eq!(Gate::new(LIMITS).handshake(&mut bytes[..].into()), Err(Refusal::Ready));
}

#[test]
fn endless_multipart_is_cut_even_if_its_frames_are_empty() {
    let parts = frame(true, 0).repeat(LIMITS.frames);
    assert_eq!(pass(&mut Gate::new(LIMITS), &parts), Ok(vec![]));
    let parts = frame(true, 0).repeat(LIMITS.frames + 1);
    assert_eq!(pass(&mut Gate::new(LIMITS), &parts), Err(Refusal::TooManyFrames));
}

#[test]
fn a_batch_counts_as_a_whole() {
    let large = [frame(true, 600), frame(false, 401)].concat();
    assert_eq!(pass(&mut Gate::new(LIMITS), &large), Err(Refusal::TooLarge));
    let exact = [frame(true, 600), frame(false, 400)].concat().repeat(100);
    assert_eq!(pass(&mut Gate::new(LIMITS), &exact), Ok(vec![vec![600, 400]; 100]));
}

#[test]
fn a_stranger_gets_little_room_until_it_is_admitted() {
    let limits = GateLimits { message: 1 << 20, frames: 8 };
    let most = MAX_STRANGERS_MESSAGE as usize;
    let mut gate = Gate::new(limits);
    assert_eq!(pass(&mut gate, &frame(false, most)), Ok(vec![vec![most]]));
    assert_eq!(pass(&mut gate, &frame(false, most + 1)[..9]), Err(Refusal::TooLarge));
    let mut gate = Gate::new(limits);
    gate.admit();
    assert_eq!(pass(&mut gate, &frame(false, 1 << 20)), Ok(vec![vec![1 << 20]]));
    assert_eq!(pass(&mut gate, &frame(false, (1 << 20) + 1)), Err(Refusal::TooLarge));
}

#[test]
fn commands_and_reserved_bits_are_cut_after_the_handshake() {
    assert_eq!(pass(&mut Gate::new(LIMITS), &ready(&[1; 48])), Err(Refusal::Command));
    assert_eq!(pass(&mut Gate::new(LIMITS), &[0b1000, 0]), Err(Refusal::Flags));
}

#[test]
fn what_is_no_handshake_of_ours_is_refused_at_its_first_wrong_byte() {
    let refusal = |bytes: &[u8]| Gate::new(LIMITS).handshake(&mut bytes.into()).unwrap_err();
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
        let whole = pass(&mut Gate::new(LIMITS), &stream);
        prop_assert_eq!(pass_in_pieces(&mut Gate::new(LIMITS), &stream, piece), whole);
    }

    #[test]
    fn a_handshake_may_come_in_any_pieces(piece in 1usize..150) {
        let bytes = [handshake(&[1; 48]), frame(false, 3)].concat();
        let mut gate = Gate::new(LIMITS);
        let mut input = BytesMut::new();
        let mut claimed = None;
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            if claimed.is_none() {
                claimed = gate.handshake(&mut input).unwrap();
            }
        }
        prop_assert_eq!(claimed, Some(NodeId::from_bytes([1; 32])));
        prop_assert_eq!(gate.next_batch(&mut input), Ok(Some(vec![Bytes::from("xxx")])));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _refused = Gate::new(LIMITS).handshake(&mut bytes[..].into());
        let _refused = pass(&mut Gate::new(LIMITS), &bytes);
    }
}
