//! Message records: events, calls, requests, replies and failures.
//!
//! ```text
//! [type, id, destination, body, kind, correlation, reply_to, ttl, key, content_type, trace, headers, delivery]
//! ```

use std::sync::Arc;

use bytes::Bytes;
use rmp::Marker;

use super::pack::{ArrayWriter, Fields, NIL, Next, Reader, push_str, push_uint};
use super::{Control, INLINE_BODY, WireError};
use crate::address::{Destination, ServiceName, Topic};
use crate::delivery_id::Delivery;
use crate::identity::NodeId;
use crate::message::MAX_HEADER;
use crate::message::{BASE_COST, Extra, Header, Kind, MessageId};
use crate::text::{Line, shorten};

/// One of the four flows on a link, each with its own credit. A shared credit would deadlock: a
/// subscriber that awaits a request in its event loop would block its own reply behind unread
/// events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    Events,
    Calls,
    Replies,
    /// Messages from outboxes, in a lane of their own so that their backlog delays no call.
    Guaranteed,
}

/// The number of lanes.
pub(crate) const LANES: usize = 4;

/// The code and text with which a handler, or the node on its behalf, declined a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: String,
    pub(crate) text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", Line(&self.code), Line(&self.text))
    }
}

/// A message between two nodes; its lane follows from the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Envelope {
    pub(crate) header: Header,
    pub(crate) payload: Payload,
}

/// The payload of a message, by type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    Event(Bytes),
    /// A one-way message to a service or node.
    Call(Bytes),
    /// A call whose sender awaits the reply.
    Request(Bytes),
    Reply(Bytes),
    Failed(Failure),
    /// A message from an outbox, answered once it is processed.
    Guaranteed(Bytes, Arc<Delivery>),
}

impl Payload {
    /// Returns the body; `None` for a payload without a user's body.
    pub(super) fn body_mut(&mut self) -> Option<&mut Bytes> {
        match self {
            Self::Event(body)
            | Self::Call(body)
            | Self::Request(body)
            | Self::Reply(body)
            | Self::Guaranteed(body, _) => Some(body),
            Self::Failed(_) => None,
        }
    }

    /// Takes the body out of the payload; empty if there is no user's body.
    pub(crate) fn take_body(&mut self) -> Bytes {
        self.body_mut().map(std::mem::take).unwrap_or_default()
    }

    fn body_len(&self) -> usize {
        match self {
            Self::Event(body)
            | Self::Call(body)
            | Self::Request(body)
            | Self::Reply(body)
            | Self::Guaranteed(body, _) => body.len(),
            Self::Failed(failure) => failure.code.len() + failure.text.len(),
        }
    }
}

impl Envelope {
    /// Creates a message without a reply: an event if its destination is a topic, else a call.
    pub(crate) fn one_way(header: Header, body: Bytes) -> Self {
        let payload = match header.destination {
            Destination::Topic(_) => Payload::Event(body),
            Destination::Service(_) | Destination::Node(_) => Payload::Call(body),
        };
        Self { header, payload }
    }

    pub(crate) fn lane(&self) -> Lane {
        match self.payload {
            Payload::Event(_) => Lane::Events,
            Payload::Call(_) | Payload::Request(_) => Lane::Calls,
            Payload::Guaranteed(..) => Lane::Guaranteed,
            Payload::Reply(_) | Payload::Failed(_) => Lane::Replies,
        }
    }

    pub(crate) fn body_len(&self) -> usize {
        self.payload.body_len()
    }

    /// Returns the credit that the message takes from its lane, in bytes. Both sides compute it
    /// from the message alone.
    pub(crate) fn cost(&self) -> u64 {
        BASE_COST + self.body_len() as u64 + self.header.extra_len() as u64
    }
}

const TYPE_EVENT: u64 = 16;
const TYPE_CALL: u64 = 17;
const TYPE_REPLY: u64 = 18;
const TYPE_FAILURE: u64 = 19;
const TYPE_REQUEST: u64 = 20;
const TYPE_GUARANTEED_CALL: u64 = 21;
const TYPE_GUARANTEED_EVENT: u64 = 22;

/// The fields that a record may omit because the previous message record of the batch had them.
#[derive(Debug, Default)]
pub(crate) struct Inheritance {
    id: Option<MessageId>,
    topic: Option<Topic>,
    service: Option<ServiceName>,
    /// The previous record was an event, on that topic.
    pub(super) event_before: bool,
}

/// One record of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Control(Control),
    Message(Envelope),
    /// A record of an unknown type, skipped.
    Unknown(u64),
}

fn kind_number(kind: Kind) -> u64 {
    match kind {
        Kind::Event => 0,
        Kind::Command => 1,
        Kind::Document => 2,
    }
}

fn kind_from(number: u64) -> Result<Kind, WireError> {
    match number {
        0 => Ok(Kind::Event),
        1 => Ok(Kind::Command),
        2 => Ok(Kind::Document),
        _ => Err(WireError::Unexpected("an unknown kind")),
    }
}

fn usual_kind(payload: &Payload) -> Kind {
    match payload {
        Payload::Event(_) => Kind::Event,
        Payload::Guaranteed(_, delivery) if delivery.is_event() => Kind::Event,
        Payload::Call(_) | Payload::Request(_) | Payload::Guaranteed(..) => Kind::Command,
        Payload::Reply(_) | Payload::Failed(_) => Kind::Document,
    }
}

/// Appends the record, without its length prefix; returns the body if it needs a frame of its own.
/// `me` is the writing node.
pub(super) fn write_message(
    buf: &mut Vec<u8>,
    envelope: &Envelope,
    inherited: &mut Inheritance,
    me: &NodeId,
) -> Option<Bytes> {
    let Envelope { header, payload } = envelope;
    if let (Payload::Event(body), Destination::Topic(topic)) = (payload, &header.destination) {
        return OutgoingEvent::new(header, topic, body, me).write(buf, inherited);
    }
    let mut record = ArrayWriter::new(buf);
    record.uint(match payload {
        Payload::Event(_) => TYPE_EVENT,
        Payload::Call(_) => TYPE_CALL,
        Payload::Request(_) => TYPE_REQUEST,
        Payload::Reply(_) => TYPE_REPLY,
        Payload::Failed(_) => TYPE_FAILURE,
        Payload::Guaranteed(_, delivery) if delivery.is_event() => TYPE_GUARANTEED_EVENT,
        Payload::Guaranteed(..) => TYPE_GUARANTEED_CALL,
    });
    match inherited.id.and_then(|previous| header.id.follows(previous)) {
        Some(later) => record.uint(u64::from(later)),
        None => record.bin(&header.id.to_bytes()),
    }
    inherited.id = Some(header.id);
    write_destination(&mut record, header, payload, inherited);
    let mut own_frame = None;
    match payload {
        Payload::Event(body)
        | Payload::Call(body)
        | Payload::Request(body)
        | Payload::Reply(body)
        | Payload::Guaranteed(body, _) => {
            if body.len() > INLINE_BODY {
                record.uint(body.len() as u64);
                own_frame = Some(body.clone());
            } else {
                record.bin(body);
            }
        }
        Payload::Failed(failure) => {
            let mut body = Vec::with_capacity(failure.code.len() + failure.text.len() + 8);
            body.push(Marker::FixArray(2).to_u8());
            push_str(&mut body, &failure.code);
            push_str(&mut body, &failure.text);
            record.bin(&body);
        }
    }
    write_rest(&mut record, header, usual_kind(payload), me);
    if let Payload::Guaranteed(_, delivery) = payload {
        record.skip_to(12);
        record.nested(|buf| delivery.write(buf));
    }
    record.finish();
    own_frame
}

/// Writes the fields after the body, which are the same on every link.
fn write_rest(record: &mut ArrayWriter<'_>, header: &Header, usual: Kind, me: &NodeId) {
    record.opt_uint((header.kind != usual).then(|| kind_number(header.kind)));
    record.opt_bin(header.correlation_id.map(MessageId::to_bytes).as_ref().map(|id| &id[..]));
    match &header.reply_to {
        Some(node) if node == me => record.bool(true),
        other => record.opt_bin(other.as_ref().map(|node| &node.as_bytes()[..])),
    }
    record.opt_uint(header.time_to_live.map(|ttl| ttl.as_millis() as u64));
    if let Some(extra) = &header.extra {
        record.opt_str(extra.ordering_key.as_deref());
        record.opt_str(extra.content_type.as_deref());
        record.opt_str(extra.traceparent.as_deref());
        let texts: Vec<&String> =
            extra.headers.iter().flat_map(|(key, value)| [key, value]).collect();
        record.list(texts.into_iter(), |buf, text| push_str(buf, text));
    }
}

/// An event to be sent on any number of links. It is encoded once, except for the fields that each
/// link's batch may inherit.
#[derive(Debug)]
pub(crate) struct OutgoingEvent<'a> {
    id: MessageId,
    topic: &'a Topic,
    body: &'a Bytes,
    /// The encoded fields after the body, and their number.
    rest: Vec<u8>,
    rest_fields: u8,
    cost: u64,
}

impl<'a> OutgoingEvent<'a> {
    /// Creates an event with only an id, a topic and a body.
    pub(crate) fn plain(id: MessageId, topic: &'a Topic, body: &'a Bytes) -> Self {
        let cost = BASE_COST + body.len() as u64;
        Self { id, topic, body, rest: Vec::new(), rest_fields: 0, cost }
    }

    /// Creates an event sent by `me`.
    pub(crate) fn new(header: &Header, topic: &'a Topic, body: &'a Bytes, me: &NodeId) -> Self {
        let mut event = Self::plain(header.id, topic, body);
        if !header.is_plain(Kind::Event) {
            let mut fields = ArrayWriter::new(&mut event.rest);
            write_rest(&mut fields, header, Kind::Event, me);
            event.rest_fields = fields.finish();
            // They become fields of the record's own array.
            event.rest.remove(0);
            event.cost += header.extra_len() as u64;
        }
        event
    }

    pub(crate) fn cost(&self) -> u64 {
        self.cost
    }

    pub(crate) fn body_len(&self) -> usize {
        self.body.len()
    }

    /// Appends the record; returns the body if it needs a frame of its own.
    ///
    /// This runs for every event and link, so it writes by hand what [`ArrayWriter`] would.
    pub(super) fn write(&self, buf: &mut Vec<u8>, inherited: &mut Inheritance) -> Option<Bytes> {
        buf.push(Marker::FixArray(4 + self.rest_fields).to_u8());
        buf.push(TYPE_EVENT as u8);
        match inherited.id.and_then(|previous| self.id.follows(previous)) {
            Some(later) => buf.push(later),
            None => {
                buf.extend_from_slice(&[Marker::Bin8.to_u8(), 16]);
                buf.extend_from_slice(&self.id.to_bytes());
            }
        }
        inherited.id = Some(self.id);
        if inherited.topic.as_ref() == Some(self.topic) {
            buf.push(NIL);
        } else {
            push_str(buf, self.topic.as_str());
            inherited.topic = Some(self.topic.clone());
        }
        let own_frame = match self.body.len() {
            len @ ..=0xff => {
                buf.extend_from_slice(&[Marker::Bin8.to_u8(), len as u8]);
                buf.extend_from_slice(self.body);
                None
            }
            len @ ..=INLINE_BODY => {
                buf.push(Marker::Bin16.to_u8());
                buf.extend_from_slice(&(len as u16).to_be_bytes());
                buf.extend_from_slice(self.body);
                None
            }
            len => {
                push_uint(buf, len as u64);
                Some(self.body.clone())
            }
        };
        buf.extend_from_slice(&self.rest);
        own_frame
    }
}

fn write_destination(
    record: &mut ArrayWriter<'_>,
    header: &Header,
    payload: &Payload,
    inherited: &mut Inheritance,
) {
    match (&header.destination, payload) {
        // A reply's destination is the node at the other end of the link, and is omitted.
        (_, Payload::Reply(_) | Payload::Failed(_)) => record.nil(),
        (Destination::Topic(topic), _) if inherited.topic.as_ref() == Some(topic) => record.nil(),
        (Destination::Topic(topic), _) => {
            record.str(topic.as_str());
            inherited.topic = Some(topic.clone());
        }
        (Destination::Service(name), _) if inherited.service.as_ref() == Some(name) => record.nil(),
        (Destination::Service(name), _) => {
            record.str(name.as_str());
            inherited.service = Some(name.clone());
        }
        (Destination::Node(node), _) => record.bin(node.as_bytes()),
    }
}

/// Reads a plain event whose id and topic follow from the previous one, as in a run of events;
/// returns its id and body, or `None` for any other record.
pub(super) fn read_successor<'a>(
    bytes: &'a [u8],
    max_body: usize,
    inherited: &mut Inheritance,
) -> Option<(MessageId, &'a [u8])> {
    const ARRAY: u8 = 0x94;
    const BIN_8: u8 = 0xc4;
    const BIN_16: u8 = 0xc5;
    const EVENT: u8 = TYPE_EVENT as u8;
    let (later, body) = match bytes {
        [ARRAY, EVENT, later @ 0..0x80, NIL, BIN_8, len, body @ ..]
            if body.len() == usize::from(*len) =>
        {
            (*later, body)
        }
        [ARRAY, EVENT, later @ 0..0x80, NIL, BIN_16, high, low, body @ ..]
            if body.len() == usize::from(u16::from_be_bytes([*high, *low])) =>
        {
            (*later, body)
        }
        _ => return None,
    };
    if body.len() > max_body || !inherited.event_before {
        return None;
    }
    let id = inherited.id?.successor(u64::from(later));
    inherited.id = Some(id);
    Some((id, body))
}

/// Passes over a record of an unknown type. From the first type of a message on, its layout is that
/// of a message up to the body, whose frame is passed over too.
fn skip_unknown(
    record_type: u64,
    mut fields: Fields<'_, '_>,
    next_body: &mut dyn FnMut() -> Option<Bytes>,
) -> Result<Record, WireError> {
    if record_type >= TYPE_EVENT {
        let (_id, _destination) = (fields.opt(Reader::skip)?, fields.opt(Reader::skip)?);
        let length = fields.opt(|reader| match reader.is_uint() {
            true => reader.uint().map(Some),
            false => reader.skip().map(|()| None),
        })?;
        if let Some(length) = length.flatten() {
            let body = next_body().ok_or(WireError::Bodies)?;
            if body.len() as u64 != length {
                return Err(WireError::Bodies);
            }
        }
    }
    Ok(Record::Unknown(record_type))
}

/// The reading node, the writing peer, and the largest accepted body in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReadContext<'a> {
    pub(super) me: &'a NodeId,
    pub(super) peer: &'a NodeId,
    pub(super) max_body: usize,
}

/// Reads one record. `bytes` is a part of `frame`, so that bodies can be slices of it; `next_body`
/// returns the body frames in order.
pub(super) fn read_record(
    frame: &Bytes,
    bytes: &[u8],
    context: ReadContext<'_>,
    inherited: &mut Inheritance,
    next_body: &mut dyn FnMut() -> Option<Bytes>,
) -> Result<Record, WireError> {
    let mut reader = Reader::new(bytes);
    let mut fields = reader.array()?;
    let record_type = fields.need(Reader::uint)?;
    if !(TYPE_EVENT..=TYPE_GUARANTEED_EVENT).contains(&record_type) {
        return match Control::read(record_type, &mut fields)? {
            Some(control) => {
                fields.finish()?;
                Ok(Record::Control(control))
            }
            None => skip_unknown(record_type, fields, next_body),
        };
    }
    let id = read_id(&mut fields, inherited)?;
    inherited.id = Some(id);
    let destination = fields.opt(|reader| read_destination(reader, record_type, inherited))?;
    let destination = match destination {
        Some(destination) => destination,
        None => inherited_destination(record_type, inherited, context.me)?,
    };
    let body = fields.need(|reader| match reader.next_is() {
        Next::Uint => {
            let len = reader.uint()?;
            let body = next_body().ok_or(WireError::Bodies)?;
            if body.len() as u64 != len { Err(WireError::Bodies) } else { Ok(body) }
        }
        _ => Ok(frame.slice_ref(reader.bin()?)),
    })?;
    let mut payload = match record_type {
        TYPE_EVENT => Payload::Event(body),
        TYPE_CALL => Payload::Call(body),
        TYPE_REQUEST => Payload::Request(body),
        TYPE_REPLY => Payload::Reply(body),
        // Their delivery is the last field.
        TYPE_GUARANTEED_CALL => Payload::Call(body),
        TYPE_GUARANTEED_EVENT => Payload::Event(body),
        _ => Payload::Failed(read_failure(&body)?),
    };
    let body_len = payload.body_len();
    if body_len > context.max_body {
        return Err(WireError::BodyTooLarge(body_len));
    }
    let kind = match fields.opt(Reader::uint)? {
        Some(number) => kind_from(number)?,
        None => usual_kind(&payload),
    };
    let mut header = Header::new(id, kind, destination);
    header.correlation_id = fields.opt(Reader::bin_array)?.map(MessageId::from_bytes);
    header.reply_to = fields.opt(|reader| match reader.next_is() {
        Next::True => reader.skip().map(|()| *context.peer),
        _ => reader.node_id(),
    })?;
    header.time_to_live = fields.opt(Reader::uint)?.map(std::time::Duration::from_millis);
    let owned = |reader: &mut Reader<'_>| reader.str().map(str::to_owned);
    let ordering_key = fields.opt(owned)?;
    let content_type = fields.opt(owned)?;
    let traceparent = fields.opt(owned)?;
    let mut texts = fields.list(owned)?.into_iter();
    if matches!(record_type, TYPE_GUARANTEED_CALL | TYPE_GUARANTEED_EVENT)
        && let Payload::Call(body) | Payload::Event(body) = payload
    {
        let delivery = fields.need(Delivery::read)?;
        if delivery.is_event() != (record_type == TYPE_GUARANTEED_EVENT) {
            return Err(WireError::Unexpected("a mismatched subscription"));
        }
        payload = Payload::Guaranteed(body, Arc::new(delivery));
    }
    fields.finish()?;
    let mut headers = Vec::with_capacity(texts.len() / 2);
    while let Some(key) = texts.next() {
        let value = texts.next().ok_or(WireError::Unexpected("a header without a value"))?;
        headers.push((key, value));
    }
    let extra = Extra { ordering_key, content_type, traceparent, headers };
    header.extra = (extra != Extra::default()).then(|| Box::new(extra));
    if header.extra_len() > MAX_HEADER {
        return Err(WireError::HeaderTooLarge(header.extra_len()));
    }
    Ok(Record::Message(Envelope { header, payload }))
}

fn read_id(
    fields: &mut super::pack::Fields<'_, '_>,
    inherited: &Inheritance,
) -> Result<MessageId, WireError> {
    fields.need(|reader| match reader.next_is() {
        Next::Uint => {
            let later = reader.uint()?;
            let previous = inherited.id.ok_or(WireError::Inheritance)?;
            if later > 127 {
                return Err(WireError::Unexpected("an id over 127 ms later"));
            }
            Ok(previous.successor(later))
        }
        _ => reader.bin_array().map(MessageId::from_bytes),
    })
}

fn read_destination(
    reader: &mut Reader<'_>,
    record_type: u64,
    inherited: &mut Inheritance,
) -> Result<Destination, WireError> {
    match record_type {
        TYPE_EVENT | TYPE_GUARANTEED_EVENT => {
            let text = reader.str()?;
            let topic = match &inherited.topic {
                Some(topic) if topic.as_str() == text => topic.clone(),
                _ => text.parse()?,
            };
            inherited.topic = Some(topic.clone());
            Ok(Destination::Topic(topic))
        }
        TYPE_CALL | TYPE_REQUEST | TYPE_GUARANTEED_CALL if reader.next_is() == Next::Str => {
            let text = reader.str()?;
            let name = match &inherited.service {
                Some(name) if name.as_str() == text => name.clone(),
                _ => ServiceName::from_wire(text)?,
            };
            inherited.service = Some(name.clone());
            Ok(Destination::Service(name))
        }
        _ => reader.bin_array().map(|node| Destination::Node(NodeId::from_bytes(node))),
    }
}

fn inherited_destination(
    record_type: u64,
    inherited: &Inheritance,
    me: &NodeId,
) -> Result<Destination, WireError> {
    let destination = match record_type {
        TYPE_EVENT | TYPE_GUARANTEED_EVENT => inherited.topic.clone().map(Destination::Topic),
        TYPE_CALL | TYPE_REQUEST | TYPE_GUARANTEED_CALL => {
            inherited.service.clone().map(Destination::Service)
        }
        _ => Some(Destination::Node(*me)),
    };
    destination.ok_or(WireError::Inheritance)
}

/// The longest code or text of a failure, in bytes; the rest is cut off. They are a program's, so
/// they stay as they are until they are shown.
const MAX_FAILURE: usize = 16 * 1024;

fn read_failure(body: &[u8]) -> Result<Failure, WireError> {
    let mut reader = Reader::new(body);
    let mut fields = reader.array()?;
    let mut short = || fields.need(|reader| Ok(shorten(reader.str()?, MAX_FAILURE).to_owned()));
    let (code, text) = (short()?, short()?);
    fields.finish()?;
    Ok(Failure { code, text })
}

/// The estimated size of a stored header, in bytes.
const STORED_HEADER: usize = 128;

/// Encodes a message without a reply, for storage on disk.
pub(crate) fn encode_stored(envelope: &Envelope, me: &NodeId) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(STORED_HEADER + envelope.body_len());
    bytes.extend([0; 4]);
    let own_frame = write_message(&mut bytes, envelope, &mut Inheritance::default(), me);
    let length = bytes.len() as u32 - 4;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&own_frame.unwrap_or_default());
    bytes
}

/// Decodes the output of [`encode_stored`].
pub(crate) fn decode_stored(bytes: &Bytes, me: &NodeId) -> Result<Envelope, WireError> {
    let mut reader = Reader::new(bytes);
    let length = reader.length_prefix()?;
    let record = reader.take(length)?;
    let mut own_frame = Some(bytes.slice(4 + length..)).filter(|frame| !frame.is_empty());
    let context = ReadContext { me, peer: me, max_body: usize::MAX };
    let inherited = &mut Inheritance::default();
    match read_record(bytes, record, context, inherited, &mut || own_frame.take())? {
        Record::Message(
            envelope @ Envelope { payload: Payload::Event(_) | Payload::Call(_), .. },
        ) => Ok(envelope),
        _ => Err(WireError::Unexpected("expected a message")),
    }
}
