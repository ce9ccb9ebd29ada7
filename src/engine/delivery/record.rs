//! The records in the journals of outbox and inbox: a byte for the kind, then MessagePack.

use std::borrow::Cow;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

use super::{Binding, DeadLetterReason, Target};
use crate::address::{Pattern, ServiceName};
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::wire::{Moment, Stream};

/// The error of decoding a journal entry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("the entry is empty")]
    Empty,
    #[error("unknown entry kind {0}")]
    Kind(u8),
    #[error("can't decode the entry: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error("invalid name in the entry: {0}")]
    Name(#[from] crate::address::AddressError),
    #[error("a message in the entry has no destination")]
    NoTarget,
    #[error("invalid message id in the entry")]
    Id,
    #[error("the entry refers to a stream that it does not define")]
    Stream,
}

/// Bytes, encoded as such and not as a list of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Raw<'a>(pub(super) Cow<'a, [u8]>);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Raw<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrowed;
        impl<'de> Visitor<'de> for Borrowed {
            type Value = Raw<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Raw<'de>, E> {
                Ok(Raw(bytes.into()))
            }
        }
        deserializer.deserialize_bytes(Borrowed)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeBytes(#[serde(with = "node_bytes")] pub(super) NodeId);

mod node_bytes {
    use super::*;

    pub(super) fn serialize<S: Serializer>(id: &NodeId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(id.as_bytes())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<NodeId, D::Error> {
        let Raw(bytes) = Raw::deserialize(from)?;
        let bytes = bytes[..].try_into().map_err(|_| de::Error::custom("an id has 32 bytes"))?;
        Ok(NodeId::from_bytes(bytes))
    }
}

/// The name of a service or of a durable subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name(pub(super) ServiceName);

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parsed;
        impl Visitor<'_> for Parsed {
            type Value = Name;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a name")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Name, E> {
                text.parse().map(Name).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Parsed)
    }
}

/// A message and its destinations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MessageRecord<'a> {
    pub(super) number: u64,
    #[serde(deserialize_with = "few")]
    pub(super) parts: SmallVec<[PartRecord; 1]>,
    /// In ms since the Unix epoch.
    pub(super) expires_at: Option<u64>,
    pub(super) not_before: Option<u64>,
    pub(super) order: Option<String>,
    #[serde(borrow)]
    pub(super) encoded: Raw<'a>,
}

/// The messages of one entry, mostly one.
pub(super) type MessageRecords<'a> = SmallVec<[MessageRecord<'a>; 1]>;

/// One destination of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartRecord {
    pub(super) target: TargetRecord,
    pub(super) binding: Option<BindingRecord>,
    pub(super) failures: u32,
    /// A handler may have received the message.
    pub(super) redelivered: bool,
    pub(super) settled: bool,
    /// The reason, if it is a dead letter.
    pub(super) dead: Option<DeadLetterReason>,
    /// Earlier bindings, under which it may have been processed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) former: Vec<BindingRecord>,
}

/// A service by its name, a node, or a durable subscription of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TargetRecord(Option<NodeBytes>, Option<Name>);

impl From<&Target> for TargetRecord {
    fn from(target: &Target) -> Self {
        match target {
            Target::Service(name) => Self(None, Some(Name(name.clone()))),
            Target::Node(node) => Self(Some(NodeBytes(*node)), None),
            Target::Subscription(node, name) => {
                Self(Some(NodeBytes(*node)), Some(Name(name.clone())))
            }
        }
    }
}

impl TargetRecord {
    pub(super) fn target(&self) -> Result<Target, RecordError> {
        Ok(match self {
            Self(None, Some(Name(name))) => Target::Service(name.clone()),
            Self(Some(NodeBytes(node)), None) => Target::Node(*node),
            Self(Some(NodeBytes(node)), Some(Name(name))) => {
                Target::Subscription(*node, name.clone())
            }
            Self(None, None) => return Err(RecordError::NoTarget),
        })
    }
}

/// The chosen node, and the delivery's id there: epoch, subscription and number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BindingRecord(NodeBytes, u64, Option<Name>, u64);

impl From<&Binding> for BindingRecord {
    fn from(Binding { node, stream, seq }: &Binding) -> Self {
        let name = stream.subscription.clone().map(Name);
        Self(NodeBytes(*node), stream.epoch, name, *seq)
    }
}

impl BindingRecord {
    pub(super) fn binding(&self) -> Binding {
        let Self(NodeBytes(node), epoch, name, seq) = self;
        let subscription = name.clone().map(|Name(name)| name);
        Binding { node: *node, stream: Stream { epoch: *epoch, subscription }, seq: *seq }
    }
}

/// The remembered state of a peer: its inbox epoch, and its durable subscriptions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PeerRecord {
    pub(super) node: NodeBytes,
    pub(super) inbox: u64,
    pub(super) subscriptions: Vec<(String, String)>,
    /// The last time that it was linked, in ms since the Unix epoch; zero if unknown.
    #[serde(default)]
    pub(super) seen_at: u64,
    /// The subscriptions that never acknowledged a message.
    #[serde(default)]
    pub(super) unproven: Vec<String>,
}

impl PeerRecord {
    pub(super) fn subscriptions(&self) -> Result<Vec<(ServiceName, Pattern)>, RecordError> {
        let parse = |(name, pattern): &(String, String)| Ok((name.parse()?, pattern.parse()?));
        self.subscriptions.iter().map(parse).collect()
    }
}

/// The records to keep of removed segments.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptRecord<'a> {
    /// A number above those of all messages so far.
    pub(super) next: u64,
    /// The messages settled for all destinations, as the first and last of each range.
    pub(super) settled: Vec<(u64, u64)>,
    /// The streams, which states refer to by index.
    pub(super) streams: Vec<StreamName>,
    /// The states of messages stored in other segments.
    pub(super) states: Vec<StateRecord>,
    /// The ids of messages stored once, and their numbers.
    #[serde(borrow)]
    pub(super) ids: Vec<IdsRecord<'a>>,
    /// The remembered state of all peers.
    pub(super) peers: Option<Vec<PeerRecord>>,
    /// The history of the outbox.
    #[serde(default)]
    pub(super) history: Option<HistoryRecord>,
}

/// The lives of an outbox, and the messages that another copy of it may have sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HistoryRecord {
    /// The epoch of the present life.
    pub(super) epoch: u64,
    /// The ends of earlier lives, in order.
    pub(super) lives: Vec<MomentRecord>,
    /// The number below which messages may have been processed, by receiver.
    pub(super) doubted: Vec<(NodeBytes, u64)>,
    pub(super) doubted_by_all: u64,
}

/// A node and a stream of deliveries to it: its epoch, and its subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StreamName(NodeBytes, u64, Option<Name>);

/// The state of a message: its number, whether it still expires, and its destinations, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StateRecord(pub(super) u64, pub(super) bool, pub(super) Vec<PartState>);

/// The variable fields of a [`PartRecord`], with streams by index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartState {
    pub(super) binding: Option<(u32, u64)>,
    pub(super) failures: u32,
    pub(super) redelivered: bool,
    pub(super) settled: bool,
    pub(super) dead: Option<DeadLetterReason>,
    pub(super) former: Vec<(u32, u64)>,
}

impl KeptRecord<'_> {
    /// Returns the index of a binding's stream, and the number in it.
    fn shorten(&mut self, binding: &BindingRecord) -> (u32, u64) {
        let BindingRecord(node, epoch, name, seq) = binding;
        let stream = StreamName(node.clone(), *epoch, name.clone());
        let place = self.streams.iter().position(|it| *it == stream).unwrap_or_else(|| {
            self.streams.push(stream);
            self.streams.len() - 1
        });
        (place as u32, *seq)
    }

    /// Returns the state of a message.
    pub(super) fn state(&mut self, message: &MessageRecord<'_>) -> StateRecord {
        let parts = message.parts.iter().map(|part| PartState {
            binding: part.binding.as_ref().map(|binding| self.shorten(binding)),
            failures: part.failures,
            redelivered: part.redelivered,
            settled: part.settled,
            dead: part.dead.clone(),
            former: part.former.iter().map(|former| self.shorten(former)).collect(),
        });
        StateRecord(message.number, message.expires_at.is_some(), parts.collect())
    }

    pub(super) fn binding(&self, (place, seq): (u32, u64)) -> Result<BindingRecord, RecordError> {
        let stream = self.streams.get(place as usize).ok_or(RecordError::Stream)?;
        let StreamName(node, epoch, name) = stream.clone();
        Ok(BindingRecord(node, epoch, name, seq))
    }
}

/// Ids of equal age: the number of journal bytes written since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IdsRecord<'a> {
    pub(super) age: u64,
    #[serde(borrow)]
    pub(super) ids: Vec<(Raw<'a>, u64)>,
}

impl IdsRecord<'_> {
    pub(super) fn new(age: u64, ids: &[(MessageId, u64)]) -> Self {
        let raw = |(id, number): &(MessageId, u64)| (Raw(id.to_bytes().to_vec().into()), *number);
        Self { age, ids: ids.iter().map(raw).collect() }
    }

    pub(super) fn ids(&self) -> Result<Vec<(MessageId, u64)>, RecordError> {
        let id = |(Raw(bytes), number): &(Raw<'_>, u64)| {
            let bytes = bytes[..].try_into().map_err(|_| RecordError::Id)?;
            Ok((MessageId::from_bytes(bytes), *number))
        };
        self.ids.iter().map(id).collect()
    }
}

/// An entry of an outbox's journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OutboxRecord<'a> {
    /// Messages stored atomically.
    Messages(MessageRecords<'a>),
    /// Message and destination: the new binding, or `None` if it is unbound.
    Bound(Vec<(u64, u32, Option<BindingRecord>)>),
    /// Message and destination: processed, or purged.
    Settled(Vec<(u64, u32)>),
    /// Message, destination, and the number of handler failures.
    Failed(u64, u32, u32),
    /// Message, destination, and the reason of a dead letter; `None` if it is sent again.
    Dead(u64, u32, Option<DeadLetterReason>),
    /// The remembered state of all peers.
    Peers(Vec<PeerRecord>),
    /// Message and destination: never sent to its node, and unbound.
    Freed(Vec<(u64, u32)>),
    /// [`OutboxRecord::Messages`], with the ids and numbers of the messages stored once.
    Once(MessageRecords<'a>, Vec<(MessageId, u64)>),
    /// Message and destination: unbound from a node that may have processed it.
    Left(Vec<(u64, u32)>),
    /// The records to keep of removed segments.
    Kept(KeptRecord<'a>),
    /// The history of the outbox.
    History(HistoryRecord),
    /// The remembered state of some peers, which replaces what was known of them.
    Met(Vec<PeerRecord>),
    /// The epoch of a life in which the outbox does not run, but is changed.
    ClosedLife(u64),
}

impl<'a> OutboxRecord<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Messages(messages) => {
                let mut bytes = Vec::with_capacity(messages.iter().map(about_size).sum());
                write_kind(&mut bytes, 0, messages);
                bytes
            }
            Self::Bound(bound) => with_kind(1, bound),
            Self::Settled(settled) => with_kind(2, settled),
            Self::Failed(number, part, failures) => with_kind(3, &(number, part, failures)),
            Self::Dead(number, part, reason) => with_kind(4, &(number, part, reason)),
            Self::Peers(peers) => with_kind(5, peers),
            Self::Freed(freed) => with_kind(6, freed),
            Self::Once(messages, ids) => {
                let ids = ids.iter().map(|(id, number)| (id.to_bytes(), number));
                with_kind(7, &(messages, ids.collect::<Vec<_>>()))
            }
            Self::Left(left) => with_kind(8, left),
            Self::Kept(kept) => with_kind(9, kept),
            Self::History(history) => with_kind(10, history),
            Self::Met(peers) => with_kind(11, peers),
            Self::ClosedLife(epoch) => with_kind(12, epoch),
        }
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let (kind, rest) = bytes.split_first().ok_or(RecordError::Empty)?;
        Ok(match kind {
            0 => Self::Messages(decode::<Vec<_>>(rest)?.into()),
            1 => Self::Bound(decode(rest)?),
            2 => Self::Settled(decode(rest)?),
            3 => {
                let (number, part, failures) = decode(rest)?;
                Self::Failed(number, part, failures)
            }
            4 => {
                let (number, part, reason) = decode(rest)?;
                Self::Dead(number, part, reason)
            }
            5 => Self::Peers(decode(rest)?),
            6 => Self::Freed(decode(rest)?),
            7 => {
                let (messages, ids): (Vec<_>, Vec<(_, u64)>) = decode(rest)?;
                let ids = ids.into_iter().map(|(id, number)| (MessageId::from_bytes(id), number));
                Self::Once(messages.into(), ids.collect())
            }
            8 => Self::Left(decode(rest)?),
            9 => Self::Kept(decode(rest)?),
            10 => Self::History(decode(rest)?),
            11 => Self::Met(decode(rest)?),
            12 => Self::ClosedLife(decode(rest)?),
            kind => return Err(RecordError::Kind(*kind)),
        })
    }
}

/// A stream of deliveries known to an inbox, with a short number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StreamRecord {
    pub(super) number: u64,
    pub(super) node: NodeBytes,
    pub(super) epoch: u64,
    pub(super) subscription: Option<Name>,
    pub(super) floor: u64,
    pub(super) processed: Vec<(u64, u64)>,
}

impl StreamRecord {
    pub(super) fn stream(&self) -> Stream {
        let subscription = self.subscription.clone().map(|Name(name)| name);
        Stream { epoch: self.epoch, subscription }
    }
}

/// A moment of an outbox: epoch, segment, offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MomentRecord(u64, u64, u64);

impl From<Moment> for MomentRecord {
    fn from(Moment { epoch, segment, offset }: Moment) -> Self {
        Self(epoch, segment, offset)
    }
}

impl From<MomentRecord> for Moment {
    fn from(MomentRecord(epoch, segment, offset): MomentRecord) -> Self {
        Self { epoch, segment, offset }
    }
}

/// A sender that an inbox remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SenderRecord {
    pub(super) node: NodeBytes,
    /// The latest moment of its outbox from which a message was processed.
    pub(super) heard: Option<MomentRecord>,
    /// The sender came back after an absence.
    pub(super) returned: bool,
}

/// The whole state of an inbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InboxState {
    pub(super) epoch: u64,
    /// Senders were forgotten for want of room.
    pub(super) has_forgotten: bool,
    /// The senders, the longest unheard first.
    pub(super) senders: Vec<SenderRecord>,
    pub(super) streams: Vec<StreamRecord>,
}

/// An entry of an inbox's journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InboxRecord {
    /// A snapshot of earlier versions: the epoch, and the streams.
    Snapshot(u64, Vec<StreamRecord>),
    /// A new stream.
    Opened(StreamRecord),
    /// Stream and number: the handler returned Ok.
    Processed(u64, u64),
    /// Stream, number, and how many times the handler of a redelivered message was begun.
    Begun(u64, u64, u32),
    /// Streams whose deliveries the sender has all settled.
    Forgotten(Vec<u64>),
    /// A message is processed from this moment of the sender's outbox.
    Heard(NodeBytes, MomentRecord),
    /// A sender that was forgotten for want of room.
    Evicted(NodeBytes),
    /// A snapshot that replaces all earlier entries.
    State(InboxState),
}

impl InboxRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Snapshot(epoch, streams) => with_kind(0, &(epoch, streams)),
            Self::Opened(stream) => with_kind(1, stream),
            Self::Processed(stream, seq) => with_kind(2, &(stream, seq)),
            Self::Begun(stream, seq, times) => with_kind(3, &(stream, seq, times)),
            Self::Forgotten(streams) => with_kind(4, streams),
            Self::Heard(node, moment) => with_kind(5, &(node, moment)),
            Self::Evicted(node) => with_kind(6, node),
            Self::State(state) => with_kind(7, state),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (kind, rest) = bytes.split_first().ok_or(RecordError::Empty)?;
        Ok(match kind {
            0 => {
                let (epoch, streams) = decode(rest)?;
                Self::Snapshot(epoch, streams)
            }
            1 => Self::Opened(decode(rest)?),
            2 => {
                let (stream, seq) = decode(rest)?;
                Self::Processed(stream, seq)
            }
            3 => {
                let (stream, seq, times) = decode(rest)?;
                Self::Begun(stream, seq, times)
            }
            4 => Self::Forgotten(decode(rest)?),
            5 => {
                let (node, moment) = decode(rest)?;
                Self::Heard(node, moment)
            }
            6 => Self::Evicted(decode(rest)?),
            7 => Self::State(decode(rest)?),
            kind => return Err(RecordError::Kind(*kind)),
        })
    }
}

fn with_kind<T: Serialize + ?Sized>(kind: u8, value: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    write_kind(&mut bytes, kind, value);
    bytes
}

fn write_kind<T: Serialize + ?Sized>(bytes: &mut Vec<u8>, kind: u8, value: &T) {
    bytes.push(kind);
    rmp_serde::encode::write(bytes, value).expect("writing to memory doesn't fail");
}

/// Returns an estimate of the encoded size in bytes, which few records exceed.
fn about_size(message: &MessageRecord<'_>) -> usize {
    32 + 128 * message.parts.len() + message.encoded.0.len()
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, RecordError> {
    Ok(rmp_serde::from_slice(bytes)?)
}

/// Decodes a short list without preallocating for its claimed length.
fn few<'de, D: Deserializer<'de>>(from: D) -> Result<SmallVec<[PartRecord; 1]>, D::Error> {
    Ok(Vec::deserialize(from)?.into())
}

/// Decodes bytes as an entry of either journal, for the fuzzer.
#[cfg(fuzzing)]
pub(crate) fn check(bytes: &[u8]) {
    let (_, _) = (OutboxRecord::decode(bytes).is_ok(), InboxRecord::decode(bytes).is_ok());
}
