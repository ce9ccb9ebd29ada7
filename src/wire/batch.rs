//! Batches: a preamble, records, and the bodies too long for a record.

use bytes::Bytes;

use super::LANES;
use super::pack::{ArrayWriter, Reader};
use super::record::{
    Inheritance, OutgoingEvent, ReadContext, read_record, read_successor, write_message,
};
use super::{Control, Envelope, Lane, MAX_BATCH, MAX_FRAMES, PROTOCOL_VERSION, Record, WireError};
use crate::identity::NodeId;
use crate::message::MessageId;

/// A number of messages, and their cost in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

impl Totals {
    /// Returns the totals of one message of that cost.
    pub(crate) fn one(bytes: u64) -> Self {
        Self { messages: 1, bytes }
    }
}

impl std::ops::AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.messages += other.messages;
        self.bytes += other.bytes;
    }
}

/// `[version, messages, bytes, messages, bytes, …]`: the totals that the writer consumed in each
/// lane since the link began. So every batch carries credit, and an empty batch is both a heartbeat
/// and a credit update.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub(crate) consumed: [Totals; LANES],
}

impl Preamble {
    fn write(&self, buf: &mut Vec<u8>) {
        let mut array = ArrayWriter::new(buf);
        array.uint(PROTOCOL_VERSION);
        for (lane, totals) in self.consumed.into_iter().enumerate() {
            if lane < LANES - 1 || totals != Totals::default() {
                array.uint(totals.messages);
                array.uint(totals.bytes);
            }
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
        let mut consumed = [Totals::default(); LANES];
        for (lane, totals) in consumed.iter_mut().enumerate() {
            if lane < LANES - 1 {
                totals.messages = fields.need(Reader::uint)?;
                totals.bytes = fields.need(Reader::uint)?;
            } else {
                totals.messages = fields.opt(Reader::uint)?.unwrap_or_default();
                totals.bytes = fields.opt(Reader::uint)?.unwrap_or_default();
            }
        }
        fields.finish()?;
        Ok(Self { consumed })
    }
}

/// An encoded batch, ready for a link.
#[derive(Debug)]
pub(crate) struct EncodedBatch {
    /// The records, followed by the preamble.
    pub(crate) head: Vec<u8>,
    /// The length of the records, in bytes.
    pub(crate) records: usize,
    /// The long bodies.
    pub(crate) bodies: Vec<Bytes>,
}

impl EncodedBatch {
    /// Returns the frames; `own` turns the head into [`Bytes`].
    pub(crate) fn into_frames(self, own: impl FnOnce(Vec<u8>) -> Bytes) -> Vec<Bytes> {
        let mut frames = Vec::with_capacity(2 + self.bodies.len());
        let mut preamble = own(self.head);
        let records = preamble.split_to(self.records);
        frames.push(preamble);
        frames.push(records);
        frames.extend(self.bodies);
        frames
    }
}

/// Encoded records; fields that they share are written once.
#[derive(Debug, Default)]
struct Records {
    bytes: Vec<u8>,
    bodies: Vec<Bytes>,
    inherited: Inheritance,
    /// The total cost of the messages.
    cost: u64,
}

impl Records {
    /// Returns true if a message of that cost fits. The first message always fits.
    fn has_room_for(&self, cost: u64) -> bool {
        self.bytes.is_empty()
            || (self.cost + cost <= MAX_BATCH as u64 && self.bodies.len() + 3 <= MAX_FRAMES)
    }
}

/// Events of one link, encoded when published, and waiting to be sent. They inherit nothing from
/// earlier records, so they can follow other records of a batch.
#[derive(Debug, Default)]
pub(crate) struct EventPack {
    records: Records,
    totals: Totals,
}

impl EventPack {
    /// Creates a pack that reuses `buffer`.
    pub(crate) fn reusing(mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        Self { records: Records { bytes: buffer, ..Records::default() }, ..Self::default() }
    }

    /// Returns true if the event fits, in a pack of at most the cost `most`.
    pub(crate) fn has_room_for(&self, event: &OutgoingEvent<'_>, most: u64) -> bool {
        self.records.has_room_for(event.cost()) && self.totals.bytes + event.cost() <= most
    }

    pub(crate) fn push(&mut self, event: &OutgoingEvent<'_>) {
        let Records { bytes, bodies, inherited, cost } = &mut self.records;
        *cost += event.cost();
        self.totals += Totals::one(event.cost());
        prefixed(bytes, |buf| bodies.extend(event.write(buf, inherited)));
    }

    /// Returns the totals of the pack's events.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }
}

/// Encodes records into one batch.
pub(crate) struct BatchEncoder<'a> {
    me: &'a NodeId,
    preamble: Preamble,
    records: Records,
}

impl<'a> BatchEncoder<'a> {
    pub(crate) fn new(me: &'a NodeId, preamble: Preamble) -> Self {
        Self { me, preamble, records: Records::default() }
    }

    /// Returns true if the message fits. An empty batch takes any message.
    pub(crate) fn has_room_for(&self, envelope: &Envelope) -> bool {
        self.records.has_room_for(envelope.cost())
    }

    pub(crate) fn is_full(&self) -> bool {
        self.records.bytes.len() >= MAX_BATCH
    }

    pub(crate) fn push(&mut self, envelope: &Envelope) {
        let Records { bytes, bodies, inherited, cost } = &mut self.records;
        *cost += envelope.cost();
        prefixed(bytes, |buf| bodies.extend(write_message(buf, envelope, inherited, self.me)));
    }

    pub(crate) fn push_control(&mut self, control: &Control) {
        let Records { bytes, cost, .. } = &mut self.records;
        prefixed(bytes, |buf| control.write(buf));
        *cost = (*cost).max(bytes.len() as u64);
    }

    /// Appends a record from [`Control::encode`].
    pub(crate) fn push_encoded(&mut self, record: &[u8]) {
        let Records { bytes, cost, .. } = &mut self.records;
        prefixed(bytes, |buf| buf.extend_from_slice(record));
        *cost = (*cost).max(bytes.len() as u64);
    }

    pub(crate) fn has_room_for_events(&self, pack: &EventPack) -> bool {
        let bodies = self.records.bodies.len() + pack.records.bodies.len();
        self.records.has_room_for(pack.records.cost) && bodies + 2 <= MAX_FRAMES
    }

    /// Appends a pack of events; moves it if it is the first content.
    pub(crate) fn push_events(&mut self, pack: EventPack) {
        let mut events = pack.records;
        if self.records.bytes.is_empty() {
            self.records = events;
        } else {
            self.records.cost += events.cost;
            self.records.bytes.append(&mut events.bytes);
            self.records.bodies.append(&mut events.bodies);
            self.records.inherited = events.inherited;
        }
    }

    pub(crate) fn finish(self) -> EncodedBatch {
        let Records { bytes: mut head, bodies, .. } = self.records;
        let records = head.len();
        self.preamble.write(&mut head);
        EncodedBatch { head, records, bodies }
    }
}

/// Prefixes the bytes that `write` appends with their length, as a big-endian u32.
fn prefixed(buf: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = buf.len();
    buf.extend_from_slice(&[0; 4]);
    write(buf);
    let len = u32::try_from(buf.len() - start - 4).expect("records are far shorter than 2^32");
    buf[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

/// A received batch: its preamble, and a reader of its records.
pub(crate) struct Decoded<'a> {
    pub(crate) preamble: Preamble,
    context: ReadContext<'a>,
    records: Bytes,
    at: usize,
    bodies: std::vec::IntoIter<Bytes>,
    inherited: Inheritance,
}

/// Decodes the preamble of a batch from `peer` to `me`, and returns a reader of its records.
///
/// # Errors
/// [`WireError`] if the preamble is invalid, or of another version.
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
    /// Returns the id and body of the next record, if that is a plain event on the topic of the
    /// previous one. Any other record is left to [`Decoded::next_record`].
    pub(crate) fn next_successor(&mut self) -> Option<(MessageId, &[u8])> {
        let (len, rest) = self.records.get(self.at..)?.split_first_chunk::<4>()?;
        let bytes = rest.get(..u32::from_be_bytes(*len) as usize)?;
        let event = read_successor(bytes, self.context.max_body, &mut self.inherited)?;
        self.at += 4 + bytes.len();
        Some(event)
    }

    /// Returns the next record, or `None` at the end of a valid batch.
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
        let record = read_record(&self.records, bytes, self.context, inherited, &mut next_body)?;
        inherited.event_before =
            matches!(&record, Record::Message(envelope) if envelope.lane() == Lane::Events);
        Ok(Some(record))
    }
}
