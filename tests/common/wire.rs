//! What a node says on the wire, byte by byte, for tests that play a hostile peer. The protocol is
//! described in `src/wire/protocol.md`.

use rmp::encode;

pub(crate) const GREETING: [u8; 64] = {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12] = b'N';
    greeting[13] = b'U';
    greeting[14] = b'L';
    greeting[15] = b'L';
    greeting
};

pub(crate) fn ready(identity: &[u8]) -> Vec<u8> {
    let mut command = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity".to_vec();
    command.extend_from_slice(&(identity.len() as u32).to_be_bytes());
    command.extend_from_slice(identity);
    let mut bytes = vec![4, command.len() as u8];
    bytes.extend_from_slice(&command);
    bytes
}

pub(crate) fn frame(more: bool, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2 | u8::from(more)];
    bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The preamble of a side that has consumed nothing.
pub(crate) const PREAMBLE: [u8; 8] = [0x97, 1, 0, 0, 0, 0, 0, 0];

/// A batch of one record.
pub(crate) fn batch(preamble: &[u8], record: &[u8]) -> Vec<u8> {
    batch_of(preamble, [record])
}

pub(crate) fn batch_of(preamble: &[u8], records: impl IntoIterator<Item: AsRef<[u8]>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        bytes.extend_from_slice(&(record.as_ref().len() as u32).to_be_bytes());
        bytes.extend_from_slice(record.as_ref());
    }
    [frame(true, preamble), frame(false, &bytes)].concat()
}

/// A record, written value by value.
#[derive(Clone)]
pub(crate) struct Record(Vec<u8>);

impl Record {
    /// A record of that many elements, the first of which is its type.
    pub(crate) fn new(elements: u32, kind: u64) -> Self {
        Self(Vec::new()).array(elements).uint(kind)
    }

    pub(crate) fn array(mut self, len: u32) -> Self {
        encode::write_array_len(&mut self.0, len).unwrap();
        self
    }

    pub(crate) fn uint(mut self, value: u64) -> Self {
        encode::write_uint(&mut self.0, value).unwrap();
        self
    }

    pub(crate) fn str(mut self, text: &str) -> Self {
        encode::write_str(&mut self.0, text).unwrap();
        self
    }

    pub(crate) fn bin(mut self, bytes: &[u8]) -> Self {
        encode::write_bin(&mut self.0, bytes).unwrap();
        self
    }

    pub(crate) fn bool(mut self, value: bool) -> Self {
        encode::write_bool(&mut self.0, value).unwrap();
        self
    }

    pub(crate) fn nils(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0xc0);
        self
    }

    /// An array, each of whose items `write` appends.
    pub(crate) fn list<T>(
        self,
        items: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
        write: impl FnMut(Self, T) -> Self,
    ) -> Self {
        let items = items.into_iter();
        let len = items.len() as u32;
        items.fold(self.array(len), write)
    }

    pub(crate) fn strings<T: AsRef<str>>(self, texts: &[T]) -> Self {
        self.list(texts, |record, text| record.str(text.as_ref()))
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0
    }
}

impl AsRef<[u8]> for Record {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A hello without patterns and addresses.
pub(crate) fn hello(mesh: &str, id: [u8; 32]) -> Vec<u8> {
    hello_with(mesh, id, &[], &[])
}

pub(crate) fn hello_with(
    mesh: &str,
    id: [u8; 32],
    patterns: &[&str],
    addresses: &[String],
) -> Vec<u8> {
    let hello = Record::new(11, 1).str(mesh).bin(&id).uint(7).str("x").uint(1 << 20);
    let windows = hello.list([4 << 20; 4], Record::uint);
    windows.uint(0).strings(patterns).array(0).strings(addresses).bytes()
}

/// The record by which the deciding side chooses the link.
pub(crate) const ACCEPT: [u8; 2] = [0x91, 2];

/// `[3, seq, subscribed, unsubscribed]`
pub(crate) fn announcement(seq: u32, subscribed: &[String], unsubscribed: &[String]) -> Vec<u8> {
    Record::new(4, 3).uint(seq.into()).strings(subscribed).strings(unsubscribed).bytes()
}
