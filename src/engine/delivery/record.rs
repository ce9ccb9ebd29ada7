//! What the journals of outbox and inbox hold: a byte that names the kind, then MessagePack.

use std::borrow::Cow;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

use super::{Binding, DeadLetterReason, Target};
use crate::address::{Pattern, ServiceName};
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::wire::Stream;

/// An entry of a journal that this version can't read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("it is empty")]
    Empty,
    #[error("it is of a kind that this version doesn't know ({0})")]
    Kind(u8),
    #[error("it can't be decoded: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error("it holds what is no name: {0}")]
    Name(#[from] crate::address::AddressError),
    #[error("it holds a message that goes nowhere")]
    NoTarget,
    #[error("it holds what is no id")]
    Id,
    #[error("it names a stream that it doesn't hold")]
    Stream,
}

/// Bytes as such, not as a list of numbers.
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

/// A service's name, or a durable subscription's.
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

/// A message and where it has to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MessageRecord<'a> {
    pub(super) number: u64,
    #[serde(deserialize_with = "few")]
    pub(super) parts: SmallVec<[PartRecord; 1]>,
    /// In ms since 1970.
    pub(super) expires_at: Option<u64>,
    pub(super) not_before: Option<u64>,
    pub(super) order: Option<String>,
    #[serde(borrow)]
    pub(super) encoded: Raw<'a>,
}

/// Most messages are stored alone.
pub(super) type MessageRecords<'a> = SmallVec<[MessageRecord<'a>; 1]>;

/// One destination of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartRecord {
    pub(super) target: TargetRecord,
    pub(super) binding: Option<BindingRecord>,
    pub(super) failures: u32,
    /// A handler may have had it.
    pub(super) redelivered: bool,
    pub(super) settled: bool,
    /// Why it is a dead letter, if it is one.
    pub(super) dead: Option<DeadLetterReason>,
    /// Where it was bound to before, and may have been processed.
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

/// The node that was chosen, and the delivery's id there.
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

/// What is remembered of a peer: its inbox epoch, and its durable subscriptions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PeerRecord {
    pub(super) node: NodeBytes,
    pub(super) inbox: u64,
    pub(super) subscriptions: Vec<(String, String)>,
}

impl PeerRecord {
    pub(super) fn subscriptions(&self) -> Result<Vec<(ServiceName, Pattern)>, RecordError> {
        let parse = |(name, pattern): &(String, String)| Ok((name.parse()?, pattern.parse()?));
        self.subscriptions.iter().map(parse).collect()
    }
}

/// What is still wanted of segments that go.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptRecord<'a> {
    /// No message has had this number, or a higher one.
    pub(super) next: u64,
    /// Messages that are settled for all destinations, from the first to the last of each range.
    pub(super) settled: Vec<(u64, u64)>,
    /// The streams that the states name by their places here.
    pub(super) streams: Vec<StreamName>,
    /// How messages stand that lie elsewhere.
    pub(super) states: Vec<StateRecord>,
    /// Ids of messages that are stored once, and their numbers.
    #[serde(borrow)]
    pub(super) ids: Vec<IdsRecord<'a>>,
    /// All that is remembered of peers.
    pub(super) peers: Option<Vec<PeerRecord>>,
}

/// A node and a stream of deliveries to it: its epoch, and its subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StreamName(NodeBytes, u64, Option<Name>);

/// How a message stands: its number, whether it still expires, and its destinations in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StateRecord(pub(super) u64, pub(super) bool, pub(super) Vec<PartState>);

/// The same as a [`PartRecord`], without what doesn't change.
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
    /// The place of a binding's stream, and its number there.
    fn shorten(&mut self, binding: &BindingRecord) -> (u32, u64) {
        let BindingRecord(node, epoch, name, seq) = binding;
        let stream = StreamName(node.clone(), *epoch, name.clone());
        let place = self.streams.iter().position(|it| *it == stream).unwrap_or_else(|| {
            self.streams.push(stream);
            self.streams.len() - 1
        });
        (place as u32, *seq)
    }

    /// How a message stands.
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

/// Ids that are equally old: so much of the journal was written since, in bytes.
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
    /// Messages that are stored together or not at all.
    Messages(MessageRecords<'a>),
    /// Message, part and node: where it is bound to from now on, or that it is free again.
    Bound(Vec<(u64, u32, Option<BindingRecord>)>),
    /// Message and part: processed, or purged.
    Settled(Vec<(u64, u32)>),
    /// Message, part, and how often its handler failed.
    Failed(u64, u32, u32),
    /// Message, part, and what it is a dead letter for; `None` if it is tried again.
    Dead(u64, u32, Option<DeadLetterReason>),
    /// All that is remembered of peers.
    Peers(Vec<PeerRecord>),
    /// Message and part: it was never sent to the node that it was bound to, and is free again.
    Freed(Vec<(u64, u32)>),
    /// The same as [`OutboxRecord::Messages`], with the ids of those that are stored once, and their
    /// numbers.
    Once(MessageRecords<'a>, Vec<(MessageId, u64)>),
    /// Message and part: it was taken from its node, which may have processed it.
    Left(Vec<(u64, u32)>),
    /// What is still wanted of segments that go.
    Kept(KeptRecord<'a>),
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
            kind => return Err(RecordError::Kind(*kind)),
        })
    }
}

/// A stream of deliveries that an inbox knows, by a short number.
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

/// An entry of an inbox's journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InboxRecord {
    /// All that is known, in place of what was: the epoch, and the streams.
    Snapshot(u64, Vec<StreamRecord>),
    /// A stream that is new.
    Opened(StreamRecord),
    /// Stream and place: its handler returned Ok.
    Processed(u64, u64),
    /// Stream, place, and how often the handler of a redelivered message was begun.
    Begun(u64, u64, u32),
    /// Streams whose sender has settled all of them.
    Forgotten(Vec<u64>),
}

impl InboxRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Snapshot(epoch, streams) => with_kind(0, &(epoch, streams)),
            Self::Opened(stream) => with_kind(1, stream),
            Self::Processed(stream, seq) => with_kind(2, &(stream, seq)),
            Self::Begun(stream, seq, times) => with_kind(3, &(stream, seq, times)),
            Self::Forgotten(streams) => with_kind(4, streams),
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

/// In bytes; few records take more.
fn about_size(message: &MessageRecord<'_>) -> usize {
    32 + 128 * message.parts.len() + message.encoded.0.len()
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, RecordError> {
    Ok(rmp_serde::from_slice(bytes)?)
}

/// A list that is short, by way of one that makes no room for what its length only claims.
fn few<'de, D: Deserializer<'de>>(from: D) -> Result<SmallVec<[PartRecord; 1]>, D::Error> {
    Ok(Vec::deserialize(from)?.into())
}

/// Reads bytes as an entry of either journal: for the fuzzer.
#[cfg(fuzzing)]
pub(crate) fn check(bytes: &[u8]) {
    let (_, _) = (OutboxRecord::decode(bytes).is_ok(), InboxRecord::decode(bytes).is_ok());
}
