//! Entry points of the fuzz targets: all parsers of untrusted input. Nothing here may panic.

use bytes::Bytes;

use crate::discovery::mdns;
use crate::identity::NodeId;
use crate::wire;

/// The bytes of a connection, from the first one on.
pub fn stream(bytes: &[u8]) {
    crate::tunnel::check_stream(bytes);
}

/// The records of a batch, and one body that follows them.
pub fn batch(records: &[u8]) {
    let (me, peer) = (NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32]));
    let preamble = Bytes::from_static(&[0x97, 1, 0, 0, 0, 0, 0, 0]);
    let frames = vec![preamble, Bytes::copy_from_slice(records), Bytes::from(vec![0; 5000])];
    let Ok(mut batch) = wire::decode(frames, &me, &peer, 1 << 20) else { return };
    loop {
        while batch.next_successor().is_some() {}
        match batch.next_record() {
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return,
        }
    }
}

/// The fields of a hello, without the head that every hello has.
pub fn hello(fields: &[u8]) {
    let record = [&[0x9b, 1], fields].concat();
    batch(&[&(record.len() as u32).to_be_bytes()[..], &record].concat());
}

/// The strings of a TXT record, each after its length.
pub fn txt(strings: &[u8]) {
    mdns::check_txt(strings);
}

/// An entry in the journal of an outbox or inbox.
pub fn journal_record(bytes: &[u8]) {
    crate::engine::delivery::check_record(bytes);
}

/// The head of a message as a broker carries it, and the body that follows.
pub fn parcel(head: &[u8]) {
    let me = NodeId::from_bytes([1; 32]);
    let parcel = wire::Parcel { head: Bytes::copy_from_slice(head), body: "body".into() };
    if let Ok(unpacked) = parcel.unpack(&me, 1 << 20) {
        assert!(unpacked.from != NodeId::BROKER, "a claim to be the broker");
    }
}

/// The messages of two clients to the embedded broker, each as a length and its frames, each as a
/// length and its bytes.
pub fn hub(bytes: &[u8]) {
    crate::carrier::broker::check_hub(bytes);
}

/// A file of mesh keys, trusted keys or rules.
pub fn trust(text: &[u8]) {
    crate::trust::check_text(&String::from_utf8_lossy(text));
}
