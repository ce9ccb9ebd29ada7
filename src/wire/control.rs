//! Control records: messages between the nodes themselves rather than their users.

use super::LANES;
use super::WireError;
use super::delivery::{Answer, InboxInfo, Moment, push_numbers, read_moment, write_moment};
use super::pack::{ArrayWriter, Fields, Reader, push_str};
use crate::address::{MeshName, Pattern, ServiceName};
use crate::identity::{Incarnation, NodeId};
use crate::message::MessageId;
use crate::peer::{Address, ServiceInfo};
use crate::text::{clean, is_visible};
use crate::trust::Action;

/// A control record. It needs no credit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Control {
    /// `[1, mesh, id, incarnation, name, max_body, windows, seq, patterns, services, addresses]`
    Hello(Box<Hello>),
    /// `[2]`: the deciding node chooses this link for the pair.
    Accept,
    /// `[3, seq, added patterns, removed patterns, added services, removed services]`
    Announce(Box<Announcement>),
    /// `[4, [[reason, count], …]]`: messages dropped by this side after receipt, in all on the
    /// link.
    Dropped(Vec<(String, u64)>),
    /// `[5, id]`: the caller no longer wants the reply.
    Cancel(MessageId),
    /// `[6, code, text]`: the link ends, for this reason.
    Bye(Bye),
    /// `[7, nonce]`: asks for a sign of life and a credit update.
    Probe(u64),
    /// `[8, nonce]`
    ProbeReply(u64),
    /// `[9, [[id, addresses], …]]`: addresses at which other nodes may be found.
    Peers(Vec<Hint>),
    /// `[10, [answer, …]]`: answers to guaranteed messages.
    Answers(Vec<Answer>),
    /// `[11, [epoch, …], moment]`: the epochs of which this outbox still has unsettled messages, and
    /// the present moment of its history.
    Epochs(Vec<u64>, Option<Moment>),
    /// `[12, epoch, [[name, pattern], …], [ended name, …], moment]`: this node keeps an inbox.
    Inbox(Box<InboxInfo>),
    /// `[13, [[action, name], …]]`: actions of the other side that this side denies.
    Denied(Vec<(Action, String)>),
}

/// The most answers in one record.
pub(crate) const MAX_ANSWERS: usize = 1024;

/// The most names in a record of denials; further ones are omitted.
const MAX_DENIED: usize = 256;

/// The longest text of a peer that is logged, in characters.
const MAX_TEXT: usize = 255;

/// The most hints in one record.
pub(crate) const MAX_HINTS: usize = 16;

/// Addresses at which a node may be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hint {
    pub(crate) id: NodeId,
    pub(crate) addresses: Vec<Address>,
}

/// A node's identity, limits and interests; the first record on a link in each direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) mesh: MeshName,
    pub(crate) id: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) name: String,
    pub(crate) limits: Limits,
    /// The number of announcements that follow to complete the lists below.
    pub(crate) seq: u64,
    pub(crate) patterns: Vec<Pattern>,
    pub(crate) services: Vec<ServiceInfo>,
    /// The addresses at which others reach the node over a network.
    pub(crate) addresses: Vec<Address>,
}

/// A node's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The longest body, in bytes.
    pub(crate) max_body: u64,
    /// The credit window of each lane, in bytes.
    pub(crate) windows: [u64; LANES],
}

/// A change of a node's subscriptions and services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Announcement {
    pub(crate) seq: u64,
    pub(crate) subscribed: Vec<Pattern>,
    pub(crate) unsubscribed: Vec<Pattern>,
    pub(crate) serving: Vec<ServiceInfo>,
    pub(crate) withdrawn: Vec<ServiceName>,
}

impl Announcement {
    /// The number of changes.
    pub(crate) fn len(&self) -> usize {
        let Self { seq: _, subscribed, unsubscribed, serving, withdrawn } = self;
        subscribed.len() + unsubscribed.len() + serving.len() + withdrawn.len()
    }

    /// Takes the first changes, if there are more than that many. Ends come before beginnings.
    pub(crate) fn take_part(&mut self, most: usize) -> Option<Self> {
        if self.len() <= most {
            return None;
        }
        fn take<T>(from: &mut Vec<T>, room: &mut usize) -> Vec<T> {
            let taken: Vec<T> = from.drain(from.len().saturating_sub(*room)..).collect();
            *room -= taken.len();
            taken
        }
        let mut room = most;
        Some(Self {
            seq: self.seq,
            unsubscribed: take(&mut self.unsubscribed, &mut room),
            withdrawn: take(&mut self.withdrawn, &mut room),
            subscribed: take(&mut self.subscribed, &mut room),
            serving: take(&mut self.serving, &mut room),
        })
    }
}

/// The reason for which a link ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Bye {
    /// The node shuts down.
    Shutdown,
    /// The pair already has another link.
    Duplicate,
    /// The nodes belong to different meshes.
    Mesh,
    /// The other side speaks a newer protocol.
    Version,
    /// Another live node has the same identity.
    IdentityInUse,
    /// The other side broke the protocol.
    Violation(String),
    /// The other side's key is no longer trusted.
    Distrusted,
    /// The code is unknown to this version.
    Other(u64, String),
}

impl Bye {
    fn code(&self) -> u64 {
        match self {
            Self::Shutdown => 0,
            Self::Duplicate => 1,
            Self::Mesh => 2,
            Self::Version => 3,
            Self::IdentityInUse => 4,
            Self::Violation(_) => 5,
            Self::Distrusted => 6,
            Self::Other(code, _) => *code,
        }
    }
}

impl std::fmt::Display for Bye {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => f.write_str("it shut down"),
            Self::Duplicate => f.write_str("there is another link for this pair"),
            Self::Mesh => f.write_str("it is of another mesh"),
            Self::Version => f.write_str("it speaks another version of the protocol"),
            Self::IdentityInUse => f.write_str("another live node has the same identity"),
            Self::Violation(text) => write!(f, "the protocol was broken: {text}"),
            Self::Distrusted => f.write_str("this node's key is not trusted any more"),
            Self::Other(code, text) => write!(f, "reason {code}: {text}"),
        }
    }
}

fn push_service(buf: &mut Vec<u8>, service: &ServiceInfo) {
    let mut pair = ArrayWriter::new(buf);
    pair.str(service.name.as_str());
    pair.uint(u64::from(service.concurrency));
    pair.finish();
}

fn read_service(reader: &mut Reader<'_>) -> Result<ServiceInfo, WireError> {
    let mut fields = reader.array()?;
    let name = fields.need(|reader| Ok(ServiceName::from_wire(reader.str()?)?))?;
    let concurrency = fields.need(Reader::uint)?;
    fields.finish()?;
    let concurrency = u32::try_from(concurrency).unwrap_or(u32::MAX).max(1);
    Ok(ServiceInfo { name, concurrency })
}

fn read_pattern(reader: &mut Reader<'_>) -> Result<Pattern, WireError> {
    Ok(reader.str()?.parse()?)
}

fn push_address(buf: &mut Vec<u8>, address: &Address) {
    push_str(buf, &address.to_string());
}

/// Reads addresses, without those of an unknown kind.
fn read_addresses(fields: &mut Fields<'_, '_>) -> Result<Vec<Address>, WireError> {
    let addresses = fields.list(|reader| Ok(reader.str()?.parse().ok()))?;
    Ok(addresses.into_iter().flatten().collect())
}

impl Control {
    /// Returns a record of denials, of the first names; `None` if there are none.
    pub(crate) fn denied(denied: impl IntoIterator<Item = (Action, String)>) -> Option<Self> {
        let denied: Vec<_> = denied.into_iter().take(MAX_DENIED).collect();
        (!denied.is_empty()).then_some(Self::Denied(denied))
    }

    /// Returns the record, without its length prefix.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write(&mut bytes);
        bytes
    }

    /// Appends the record, without its length prefix.
    pub(super) fn write(&self, buf: &mut Vec<u8>) {
        let mut record = ArrayWriter::new(buf);
        match self {
            Self::Hello(hello) => {
                record.uint(1);
                record.str(hello.mesh.as_str());
                record.bin(hello.id.as_bytes());
                record.uint(hello.incarnation.0);
                record.str(&hello.name);
                record.uint(hello.limits.max_body);
                record.list(hello.limits.windows.iter(), |buf, window| {
                    buf.push(rmp::Marker::U64.to_u8());
                    buf.extend_from_slice(&window.to_be_bytes());
                });
                record.uint(hello.seq);
                record.list(hello.patterns.iter(), |buf, text| push_str(buf, text.as_str()));
                record.list(hello.services.iter(), push_service);
                record.list(hello.addresses.iter(), push_address);
            }
            Self::Accept => record.uint(2),
            Self::Announce(announcement) => {
                record.uint(3);
                record.uint(announcement.seq);
                let patterns = [&announcement.subscribed, &announcement.unsubscribed];
                for list in patterns {
                    record.list(list.iter(), |buf, text| push_str(buf, text.as_str()));
                }
                record.list(announcement.serving.iter(), push_service);
                record
                    .list(announcement.withdrawn.iter(), |buf, name| push_str(buf, name.as_str()));
            }
            Self::Dropped(counts) => {
                record.uint(4);
                record.list(counts.iter(), |buf, (reason, count)| {
                    let mut pair = ArrayWriter::new(buf);
                    pair.str(reason);
                    pair.uint(*count);
                    pair.finish();
                });
            }
            Self::Cancel(id) => {
                record.uint(5);
                record.bin(&id.to_bytes());
            }
            Self::Bye(bye) => {
                record.uint(6);
                record.uint(bye.code());
                record.str(&bye.to_string());
            }
            Self::Probe(nonce) => {
                record.uint(7);
                record.uint(*nonce);
            }
            Self::ProbeReply(nonce) => {
                record.uint(8);
                record.uint(*nonce);
            }
            Self::Peers(hints) => {
                record.uint(9);
                record.list(hints.iter(), |buf, hint| {
                    let mut pair = ArrayWriter::new(buf);
                    pair.bin(hint.id.as_bytes());
                    pair.list(hint.addresses.iter(), push_address);
                    pair.finish();
                });
            }
            Self::Answers(answers) => {
                record.uint(10);
                record.list(answers.iter(), |buf, answer| answer.write(buf));
            }
            Self::Epochs(epochs, moment) => {
                record.uint(11);
                push_numbers(&mut record, epochs);
                write_moment(&mut record, *moment);
            }
            Self::Inbox(info) => {
                record.uint(12);
                info.write(&mut record);
            }
            Self::Denied(denied) => {
                record.uint(13);
                record.list(denied.iter(), |buf, (action, name)| {
                    let mut pair = ArrayWriter::new(buf);
                    pair.uint(action.code());
                    pair.str(name);
                    pair.finish();
                });
            }
        }
        record.finish();
    }

    /// Reads the fields after the type; `None` if the type is unknown.
    pub(super) fn read(
        record_type: u64,
        fields: &mut Fields<'_, '_>,
    ) -> Result<Option<Self>, WireError> {
        Ok(Some(match record_type {
            1 => Self::Hello(Box::new(read_hello(fields)?)),
            2 => Self::Accept,
            3 => Self::Announce(Box::new(Announcement {
                seq: fields.need(Reader::uint)?,
                subscribed: fields.list(read_pattern)?,
                unsubscribed: fields.list(read_pattern)?,
                serving: fields.list(read_service)?,
                withdrawn: fields.list(|reader| Ok(ServiceName::from_wire(reader.str()?)?))?,
            })),
            4 => Self::Dropped(fields.list(|reader| {
                let mut pair = reader.array()?;
                let reason = pair.need(|reader| reader.str().map(str::to_owned))?;
                let count = pair.need(Reader::uint)?;
                pair.finish()?;
                Ok((reason, count))
            })?),
            5 => Self::Cancel(MessageId::from_bytes(fields.need(Reader::bin_array)?)),
            6 => {
                let code = fields.need(Reader::uint)?;
                let text = fields.opt(|reader| reader.str().map(printable))?.unwrap_or_default();
                Self::Bye(match code {
                    0 => Bye::Shutdown,
                    1 => Bye::Duplicate,
                    2 => Bye::Mesh,
                    3 => Bye::Version,
                    4 => Bye::IdentityInUse,
                    5 => Bye::Violation(text),
                    6 => Bye::Distrusted,
                    code => Bye::Other(code, text),
                })
            }
            7 => Self::Probe(fields.need(Reader::uint)?),
            8 => Self::ProbeReply(fields.need(Reader::uint)?),
            9 => Self::Peers(fields.list(|reader| {
                let mut pair = reader.array()?;
                let id = pair.need(Reader::node_id)?;
                let addresses = read_addresses(&mut pair)?;
                pair.finish()?;
                Ok(Hint { id, addresses })
            })?),
            10 => Self::Answers(fields.list(Answer::read)?),
            11 => Self::Epochs(fields.list(Reader::uint)?, read_moment(fields)?),
            12 => Self::Inbox(Box::new(InboxInfo::read(fields)?)),
            13 => Self::Denied(read_denied(fields)?),
            _ => return Ok(None),
        }))
    }
}

/// Reads denials, without those of unknown actions.
fn read_denied(fields: &mut Fields<'_, '_>) -> Result<Vec<(Action, String)>, WireError> {
    let denied = fields.list(|reader| {
        let mut pair = reader.array()?;
        let action = Action::from_code(pair.need(Reader::uint)?);
        let name = pair.need(|reader| reader.str().map(printable))?;
        pair.finish()?;
        Ok(action.map(|action| (action, name)))
    })?;
    Ok(denied.into_iter().flatten().take(MAX_DENIED).collect())
}

/// Makes a peer's text safe for logs and terminals.
fn printable(text: &str) -> String {
    clean(text, MAX_TEXT)
}

/// The longest accepted name of a node, in bytes.
const MAX_NAME: usize = 255;

fn read_hello(fields: &mut Fields<'_, '_>) -> Result<Hello, WireError> {
    let mesh = fields.need(|reader| Ok(reader.str()?.parse()?))?;
    let id = fields.need(Reader::node_id)?;
    let incarnation = Incarnation(fields.need(Reader::uint)?);
    let name = fields.need(|reader| reader.str().map(str::to_owned))?;
    if name.len() > MAX_NAME || !is_visible(&name) {
        return Err(WireError::Unexpected("the node's name is too long, or has hidden characters"));
    }
    let max_body = fields.need(Reader::uint)?;
    let told = fields.list(Reader::uint)?;
    if told.len() < LANES - 1 {
        return Err(WireError::Unexpected("too few windows"));
    }
    let mut windows = [0; LANES];
    for (window, told) in windows.iter_mut().zip(told) {
        *window = told;
    }
    Ok(Hello {
        mesh,
        id,
        incarnation,
        name,
        limits: Limits { max_body, windows },
        seq: fields.need(Reader::uint)?,
        patterns: fields.list(read_pattern)?,
        services: fields.list(read_service)?,
        addresses: read_addresses(fields)?,
    })
}
