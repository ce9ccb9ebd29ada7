//! What the journals of outbox and inbox hold: a byte that names the kind, then MessagePack.

use std::borrow::Cow;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

use super::{Binding, Fate, Target};
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
    pub(super) frozen: Raw<'a>,
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
    pub(super) dead: Option<Fate>,
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
    Dead(u64, u32, Option<Fate>),
    /// All that is remembered of peers.
    Peers(Vec<PeerRecord>),
    /// Message and part: it was never sent to the node that it was bound to, and is free again.
    Freed(Vec<(u64, u32)>),
    /// The same as [`OutboxRecord::Messages`], with the ids of those that are stored once, and their
    /// numbers.
    Once(MessageRecords<'a>, Vec<(MessageId, u64)>),
    /// Message and part: it was taken from its node, which may have processed it.
    Left(Vec<(u64, u32)>),
}

impl<'a> OutboxRecord<'a> {
    /// How many messages it stores.
    pub(super) fn messages(&self) -> u32 {
        match self {
            Self::Messages(messages) | Self::Once(messages, _) => messages.len() as u32,
            _ => 0,
        }
    }

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
            Self::Dead(number, part, fate) => with_kind(4, &(number, part, fate)),
            Self::Peers(peers) => with_kind(5, peers),
            Self::Freed(freed) => with_kind(6, freed),
            Self::Once(messages, ids) => {
                let ids = ids.iter().map(|(id, number)| (id.to_bytes(), number));
                with_kind(7, &(messages, ids.collect::<Vec<_>>()))
            }
            Self::Left(left) => with_kind(8, left),
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
                let (number, part, fate) = decode(rest)?;
                Self::Dead(number, part, fate)
            }
            5 => Self::Peers(decode(rest)?),
            6 => Self::Freed(decode(rest)?),
            7 => {
                let (messages, ids): (Vec<_>, Vec<(_, u64)>) = decode(rest)?;
                let ids = ids.into_iter().map(|(id, number)| (MessageId::from_bytes(id), number));
                Self::Once(messages.into(), ids.collect())
            }
            8 => Self::Left(decode(rest)?),
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
    32 + 128 * message.parts.len() + message.frozen.0.len()
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
