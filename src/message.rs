//! Messages: a header, and a body of raw bytes or any serde type.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};

use crate::address::{Destination, Topic};
use crate::clock::coarse_unix_ms;
use crate::delivery_id::Delivery;
use crate::identity::NodeId;

/// A message's unique id: a UUIDv7 (RFC 9562), which also carries the time of sending.
///
/// ```text
///  48 bits          4   12       2   30       32 bits
/// | Unix time, ms | 7 | stem   | 2 | stem   | counter |
/// ```
///
/// The 42-bit stem is drawn at each start of a node; the counter grows by one for each message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(u128);

impl MessageId {
    /// An id from its 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    /// The 16 bytes, in network order.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The time at which the message was made, by its sender's clock, to a few milliseconds (on
    /// Linux the kernel's tick, elsewhere 1 ms).
    pub fn sent_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.unix_ms())
    }

    const fn unix_ms(self) -> u64 {
        (self.0 >> 80) as u64
    }

    const fn new(unix_ms: u64, stem: u64, counter: u32) -> Self {
        let high = ((stem >> 30) & 0xfff) as u128;
        let low = (stem & 0x3fff_ffff) as u128;
        Self(
            (unix_ms as u128) << 80
                | 0x7 << 76
                | high << 64
                | 0b10 << 62
                | low << 32
                | counter as u128,
        )
    }

    /// The id of the sender's next message, if made `later_ms` after this one.
    pub(crate) const fn successor(self, later_ms: u64) -> Self {
        let counter = (self.0 as u32).wrapping_add(1) as u128;
        let rest = self.0 & 0xffff_ffff_ffff_ffff_0000_0000;
        Self(((self.unix_ms() + later_ms) as u128) << 80 | rest | counter)
    }

    /// The milliseconds between `previous` and this id, if it is the successor within 127 ms.
    pub(crate) fn follows(self, previous: Self) -> Option<u8> {
        let later = self.unix_ms().checked_sub(previous.unix_ms())?;
        (later < 128 && previous.successor(later) == self).then_some(later as u8)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_u128(self.0).fmt(f)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a message id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a message id: expected a UUID")]
#[non_exhaustive]
pub struct MessageIdError;

impl FromStr for MessageId {
    type Err = MessageIdError;
    fn from_str(text: &str) -> Result<Self, MessageIdError> {
        uuid::Uuid::parse_str(text).map(|id| Self(id.as_u128())).map_err(|_| MessageIdError)
    }
}

impl Serialize for MessageId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The source of the ids of one node's messages.
#[derive(Debug)]
pub(crate) struct IdSource {
    stem: u64,
    counter: AtomicU32,
    last_ms: AtomicU64,
}

impl IdSource {
    pub(crate) fn new(stem: u64) -> Self {
        Self { stem, counter: AtomicU32::new(0), last_ms: AtomicU64::new(0) }
    }

    /// The next id. Ids stay in order even if the clock goes back.
    pub(crate) fn next(&self, unix_ms: u64) -> MessageId {
        // Mostly the millisecond is the same as at the previous call.
        let unix_ms = match self.last_ms.load(Ordering::Relaxed) {
            last if last >= unix_ms => last,
            _ => self.last_ms.fetch_max(unix_ms, Ordering::Relaxed).max(unix_ms),
        };
        MessageId::new(unix_ms, self.stem, self.counter.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn next_now(&self) -> MessageId {
        self.next(coarse_unix_ms())
    }
}

/// The intent of a message (Hohpe and Woolf, *Enterprise Integration Patterns*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// Something happened. The kind of a published message, unless set otherwise.
    Event,
    /// Do this. The kind of a sent message or a request, unless set otherwise.
    Command,
    /// Data; the receiver decides. The kind of a reply.
    Document,
}

/// The metadata that travels with a body.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// The message's own id.
    pub id: MessageId,
    /// Event, command or document.
    pub kind: Kind,
    /// The topic, service or node that it was sent to.
    pub destination: Destination,
    /// The id of the message that this message answers.
    pub correlation_id: Option<MessageId>,
    /// The return address: the node to which an answer should go.
    pub reply_to: Option<NodeId>,
    /// The remaining time in which it is worth handling, counted from its receipt, in whole
    /// milliseconds, so that clocks needn't agree.
    pub time_to_live: Option<Duration>,
    /// The rarer fields; `None` if the message has none of them.
    pub(crate) extra: Option<Box<Extra>>,
}

/// The parts of a header that few messages need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Extra {
    /// Messages with the same key are handled in order.
    pub(crate) ordering_key: Option<String>,
    /// The body's media type, such as `application/json`.
    pub(crate) content_type: Option<String>,
    /// The trace that the message belongs to: a W3C `traceparent`.
    pub(crate) traceparent: Option<String>,
    /// User-defined headers.
    pub(crate) headers: Vec<(String, String)>,
}

impl Header {
    pub(crate) fn new(id: MessageId, kind: Kind, destination: Destination) -> Self {
        Self {
            id,
            kind,
            destination,
            correlation_id: None,
            reply_to: None,
            time_to_live: None,
            extra: None,
        }
    }

    /// The time at which the message was made, by its sender's clock, to a few milliseconds (on
    /// Linux the kernel's tick, elsewhere 1 ms).
    pub fn sent_at(&self) -> SystemTime {
        self.id.sent_at()
    }

    /// The user header of that name; the first one, if there are several.
    pub fn user_header(&self, name: &str) -> Option<&str> {
        self.user_headers().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// All user headers with their values, in the order in which their sender added them.
    pub fn user_headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let headers = self.extra.iter().flat_map(|extra| &extra.headers);
        headers.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The body's media type, if its sender set one.
    pub fn content_type(&self) -> Option<&str> {
        self.extra.as_ref()?.content_type.as_deref()
    }

    /// The ordering key, if its sender set one.
    pub fn ordering_key(&self) -> Option<&str> {
        self.extra.as_ref()?.ordering_key.as_deref()
    }

    /// The W3C `traceparent`, if its sender set one.
    pub fn traceparent(&self) -> Option<&str> {
        self.extra.as_ref()?.traceparent.as_deref()
    }

    /// Returns true if the header holds nothing beyond what every message of `usual` has.
    pub(crate) fn is_plain(&self, usual: Kind) -> bool {
        self.kind == usual
            && self.correlation_id.is_none()
            && self.reply_to.is_none()
            && self.time_to_live.is_none()
            && self.extra.is_none()
    }

    /// The length of the optional fields in bytes, as flow control counts them.
    pub(crate) fn extra_len(&self) -> usize {
        self.extra.as_ref().map_or(0, |extra| extra.counted_len())
    }
}

impl Extra {
    /// The length in bytes, as flow control counts it.
    pub(crate) fn counted_len(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let pair = |(name, value): &(String, String)| HEADER_COST + name.len() + value.len();
        let headers: usize = self.headers.iter().map(pair).sum();
        text(&self.ordering_key) + text(&self.content_type) + text(&self.traceparent) + headers
    }
}

/// A received message.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Message {
    /// The sending node: the peer at the other end of the link, or this node itself.
    pub from: NodeId,
    /// The metadata that travels with the body.
    pub header: Header,
    /// The body's bytes.
    pub body: Bytes,
    /// The sender made a request and awaits the reply.
    pub(crate) wants_reply: bool,
    /// The delivery from an outbox, which awaits the outcome; `None` if not guaranteed.
    pub(crate) delivery: Option<Arc<Delivery>>,
}

impl Message {
    pub(crate) fn new(from: NodeId, header: Header, body: Bytes) -> Self {
        Self { from, header, body, wants_reply: false, delivery: None }
    }

    pub(crate) fn request(from: NodeId, header: Header, body: Bytes) -> Self {
        Self { from, header, body, wants_reply: true, delivery: None }
    }

    /// The topic that it was published on; `None` if it was sent point to point.
    pub fn topic(&self) -> Option<&Topic> {
        match &self.header.destination {
            Destination::Topic(topic) => Some(topic),
            Destination::Service(_) | Destination::Node(_) => None,
        }
    }

    /// Returns true if a handler may have received this guaranteed message before, on any node.
    pub fn is_redelivered(&self) -> bool {
        self.delivery.as_ref().is_some_and(|delivery| delivery.redelivered)
    }

    /// The number of times it was sent to this node, this time included; 1 if not guaranteed.
    pub fn attempt(&self) -> u32 {
        self.delivery.as_ref().map_or(1, |delivery| delivery.attempt)
    }

    /// The cost in queues and flow control, in bytes.
    pub(crate) fn cost(&self) -> u64 {
        BASE_COST + self.body.len() as u64 + self.header.extra_len() as u64
    }

    /// Copies a body that is much smaller than the transport's 64 KiB read buffer, of which it is a
    /// slice: while queued, it would keep the whole buffer alive.
    pub(crate) fn unpin(&mut self) {
        self.body = unpinned(&self.body);
    }

    /// The body as text; invalid UTF-8 is replaced.
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.body)
    }

    /// Decodes the body from the MessagePack that [`Body::encode`] writes.
    ///
    /// # Errors
    /// [`DecodeError`] if the body is not MessagePack of that type.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        let mut rest = &self.body[..];
        let value = rmp_serde::from_read(&mut rest).map_err(|error| DecodeError(error.into()))?;
        match rest.len() {
            0 => Ok(value),
            more => Err(DecodeError(Undecodable::Longer { more })),
        }
    }
}

/// The cost of a message's fixed part in flow control, in bytes.
pub(crate) const BASE_COST: u64 = 128;

/// The cost of a user header besides its name and value: an empty one takes memory too.
const HEADER_COST: usize = 32;

/// A quarter of the transport's read buffer.
const COPY_BELOW: usize = 16 * 1024;

/// Copies bytes that are much fewer than the read buffer of which they may be a slice.
pub(crate) fn unpinned(bytes: &Bytes) -> Bytes {
    match bytes.len() < COPY_BELOW {
        true => Bytes::copy_from_slice(bytes),
        false => bytes.clone(),
    }
}

/// The media type of bodies made by [`Body::encode`].
pub const MESSAGEPACK: &str = "application/msgpack";

/// A body to send: raw bytes, or any serde type as MessagePack.
///
/// ```
/// # use peerbus::Body;
/// let raw: Body = "just bytes".into();
/// let typed = Body::encode(&("order", 17))?;
/// # Ok::<(), peerbus::EncodeError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body {
    pub(crate) bytes: Bytes,
    pub(crate) content_type: Option<&'static str>,
}

impl Body {
    /// A body without bytes.
    pub const fn empty() -> Self {
        Self { bytes: Bytes::new(), content_type: None }
    }

    /// Encodes `value` as MessagePack with named fields, so that each side may add fields
    /// independently. The content type is `application/msgpack`.
    ///
    /// # Errors
    /// [`EncodeError`] if the type's `Serialize` fails.
    pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Self, EncodeError> {
        let bytes = rmp_serde::to_vec_named(value).map_err(EncodeError)?;
        Ok(Self { bytes: bytes.into(), content_type: Some(MESSAGEPACK) })
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns true if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// What a message may have besides its body: header, topic, user headers.
pub(crate) const MAX_HEADER: usize = 64 * 1024;

/// Checks the length of a body, and of the user's part of a header.
pub(crate) fn check_size(
    len: usize,
    extra: Option<&Extra>,
    max_body: usize,
) -> Result<(), BodyError> {
    if len > max_body {
        return Err(BodyError::Body { len, max: max_body });
    }
    match extra.map_or(0, Extra::counted_len) {
        len if len > MAX_HEADER => Err(BodyError::Header { len, max: MAX_HEADER }),
        _ => Ok(()),
    }
}

/// A message that is too large to send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BodyError {
    /// The body is over [`Config::max_body`](crate::Config::max_body).
    #[error("the body is {len} bytes long; at most {max} are allowed")]
    Body {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The user headers, the key, the content type and the trace take over 64 KiB.
    #[error("the header is {len} bytes long; at most {max} are allowed")]
    Header {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
}

/// The value can't be written as MessagePack.
#[derive(Debug, thiserror::Error)]
#[error("the body can't be encoded")]
pub struct EncodeError(#[source] rmp_serde::encode::Error);

/// The body is not MessagePack of the wanted type. Its [source](std::error::Error::source) says why.
#[derive(Debug, thiserror::Error)]
#[error("the body can't be decoded")]
pub struct DecodeError(#[source] Undecodable);

#[derive(Debug, thiserror::Error)]
enum Undecodable {
    #[error(transparent)]
    MessagePack(#[from] rmp_serde::decode::Error),
    /// Nearly any text begins with the MessagePack of a small number.
    #[error("{more} bytes follow after its end")]
    Longer { more: usize },
}

macro_rules! body_from {
    ($($type:ty => |$value:ident| $bytes:expr;)*) => {$(
        impl From<$type> for Body {
            fn from($value: $type) -> Self {
                Self { bytes: $bytes, content_type: None }
            }
        }
    )*};
}

body_from! {
    Bytes => |bytes| bytes;
    Vec<u8> => |bytes| bytes.into();
    String => |text| text.into();
    &[u8] => |bytes| Bytes::copy_from_slice(bytes);
    &Vec<u8> => |bytes| Bytes::copy_from_slice(bytes);
    &str => |text| Bytes::copy_from_slice(text.as_bytes());
    &String => |text| Bytes::copy_from_slice(text.as_bytes());
    () => |_unit| Bytes::new();
}

impl<const N: usize> From<&[u8; N]> for Body {
    fn from(bytes: &[u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_uuid_v7_and_tell_their_time() {
        let ids = IdSource::new(0x3ff_ffff_ffff);
        let id = ids.next(1_700_000_000_123);
        let uuid = uuid::Uuid::from_bytes(id.to_bytes());
        assert_eq!(uuid.get_version_num(), 7);
        assert_eq!(uuid.get_variant(), uuid::Variant::RFC4122);
        assert_eq!(id.sent_at(), UNIX_EPOCH + Duration::from_millis(1_700_000_000_123));
    }

    #[test]
    fn a_text_is_no_number_though_it_begins_like_one() {
        let decode = |body: Body| {
            let destination = Destination::Node(NodeId::BROKER);
            let header = Header::new(MessageId(1), Kind::Command, destination);
            Message::new(NodeId::BROKER, header, body.bytes).decode::<u32>()
        };
        assert_eq!(decode(Body::encode(&17_u32).unwrap()).unwrap(), 17);
        let why = |body| std::error::Error::source(&decode(body).unwrap_err()).unwrap().to_string();
        assert_eq!(why("17".into()), "1 bytes follow after its end");
        assert!(!why(Body::empty()).is_empty());
    }

    #[test]
    fn a_successor_is_recognised_and_rebuilt() {
        let ids = IdSource::new(0x123_4567_89ab);
        let first = ids.next(1_000);
        let second = ids.next(1_005);
        assert_eq!(second.follows(first), Some(5));
        assert_eq!(first.successor(5), second);
        assert_eq!(ids.next(2_000).follows(second), None, "too much later");
        assert_eq!(IdSource::new(7).next(1_000).follows(first), None, "another sender");
    }

    #[test]
    fn ids_stay_in_order_when_the_clock_goes_back() {
        let ids = IdSource::new(1);
        let first = ids.next(2_000);
        assert!(ids.next(1_000) > first);
    }
}
