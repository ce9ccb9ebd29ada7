//! Batches: a preamble, records, and the bodies too long to stand in a record.

use bytes::Bytes;

use super::pack::{ArrayWriter, Reader};
use super::record::{Inheritance, ReadContext, read_record, write_message};
use super::{Control, Envelope, MAX_BATCH, MAX_FRAMES, PROTOCOL_VERSION, Record, WireError};
use crate::identity::NodeId;

/// A count of messages and what they cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

/// `[version, messages, bytes, messages, bytes, messages, bytes]`: what the writer has consumed of
/// each lane since the link began. So credit travels with every batch, and an empty batch is
/// both a heartbeat and a credit update.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub(crate) consumed: [Totals; 3],
}

impl Preamble {
    fn write(&self, buf: &mut Vec<u8>) {
        let mut array = ArrayWriter::new(buf);
        array.uint(PROTOCOL_VERSION);
        for totals in self.consumed {
            array.uint(totals.messages);
            array.uint(totals.bytes);
        }
        array.finish();
    }

    fn read(frame: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(frame);
        let mut fields = reader.array()?;
        let version = fields.need(Reader::uint)?;
        if version != PROTOCOL_VERSION {
            return Err(WireError::Version(version));
        }
        let mut consumed = [Totals::default(); 3];
        for totals in &mut consumed {
            totals.messages = fields.need(Reader::uint)?;
            totals.bytes = fields.need(Reader::uint)?;
        }
        fields.finish()?;
        Ok(Self { consumed })
    }
}

/// A batch that is ready for a link.
#[derive(Debug)]
pub(crate) struct EncodedBatch {
    /// The preamble, and behind it the records.
    pub(crate) head: Vec<u8>,
    /// Where the records begin in `head`.
    pub(crate) split: usize,
    /// The long bodies.
    pub(crate) bodies: Vec<Bytes>,
}

impl EncodedBatch {
    /// The frames, with the head made into bytes by `own`.
    pub(crate) fn into_frames(self, own: impl FnOnce(Vec<u8>) -> Bytes) -> Vec<Bytes> {
        let mut frames = Vec::with_capacity(2 + self.bodies.len());
        let mut head = own(self.head);
        frames.push(head.split_to(self.split));
        frames.push(head);
        frames.extend(self.bodies);
        frames
    }
}

/// Packs records into one batch.
pub(crate) struct BatchEncoder<'a> {
    me: &'a NodeId,
    batch: EncodedBatch,
    inherited: Inheritance,
    bytes: usize,
}

impl<'a> BatchEncoder<'a> {
    pub(crate) fn new(me: &'a NodeId, preamble: &Preamble) -> Self {
        let mut head = Vec::with_capacity(256);
        preamble.write(&mut head);
        let split = head.len();
        let batch = EncodedBatch { head, split, bodies: Vec::new() };
        Self { me, batch, inherited: Inheritance::default(), bytes: 0 }
    }

    fn has_records(&self) -> bool {
        self.batch.head.len() > self.batch.split
    }

    /// Whether one more message fits. An empty batch takes any.
    pub(crate) fn has_room_for(&self, envelope: &Envelope) -> bool {
        let len = envelope.cost() as usize;
        !self.has_records()
            || (self.bytes + len <= MAX_BATCH && self.batch.bodies.len() + 3 <= MAX_FRAMES)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.batch.head.len() >= MAX_BATCH
    }

    pub(crate) fn push(&mut self, envelope: &Envelope) {
        self.bytes += envelope.cost() as usize;
        let (me, inherited, bodies) = (self.me, &mut self.inherited, &mut self.batch.bodies);
        prefixed(&mut self.batch.head, |buf| {
            bodies.extend(write_message(buf, envelope, inherited, me));
        });
    }

    pub(crate) fn push_control(&mut self, control: &Control) {
        prefixed(&mut self.batch.head, |buf| control.write(buf));
        self.bytes = self.bytes.max(self.batch.head.len());
    }

    pub(crate) fn finish(self) -> EncodedBatch {
        self.batch
    }
}

/// Puts a big-endian u32 length before what `write` appends.
fn prefixed(buf: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = buf.len();
    buf.extend_from_slice(&[0; 4]);
    write(buf);
    let len = u32::try_from(buf.len() - start - 4).expect("records are far shorter than 2^32");
    buf[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

/// A batch as it was received: its preamble, and its records one by one.
pub(crate) struct Decoded<'a> {
    pub(crate) preamble: Preamble,
    context: ReadContext<'a>,
    records: Bytes,
    at: usize,
    bodies: std::vec::IntoIter<Bytes>,
    inherited: Inheritance,
}

/// Opens a batch that `peer` sent to `me`.
///
/// # Errors
/// [`WireError`] if it is no batch, or one of another version.
pub(crate) fn decode<'a>(
    frames: Vec<Bytes>,
    me: &'a NodeId,
    peer: &'a NodeId,
    max_body: usize,
) -> Result<Decoded<'a>, WireError> {
    let mut frames = frames.into_iter();
    let preamble = Preamble::read(&frames.next().ok_or(WireError::Truncated)?)?;
    let records = frames.next().unwrap_or_default();
    Ok(Decoded {
        preamble,
        context: ReadContext { me, peer, max_body },
        records,
        at: 0,
        bodies: frames,
        inherited: Inheritance::default(),
    })
}

impl Decoded<'_> {
    /// The next record; `None` at the end of a batch that had no fault.
    pub(crate) fn next_record(&mut self) -> Result<Option<Record>, WireError> {
        let mut reader = Reader::new(&self.records[self.at..]);
        if reader.is_empty() {
            return match self.bodies.next() {
                None => Ok(None),
                Some(_) => Err(WireError::Bodies),
            };
        }
        let len = reader.length_prefix()?;
        let bytes = reader.take(len)?;
        self.at += 4 + len;
        let mut next_body = || self.bodies.next();
        let inherited = &mut self.inherited;
        read_record(&self.records, bytes, self.context, inherited, &mut next_body).map(Some)
    }
}
