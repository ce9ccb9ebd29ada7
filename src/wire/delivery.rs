//! Guaranteed delivery on the wire: the fields of a guaranteed message, and its answer.

use std::collections::BTreeSet;

use super::WireError;
use super::pack::{ArrayWriter, Fields, Reader, push_uint};
use crate::address::ServiceName;
pub(crate) use crate::delivery_id::{Delivery, DeliveryId, Moment, Stream};
use crate::text::{clean, shorten};

/// The receiver's answer to a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) id: DeliveryId,
    pub(crate) attempt: u32,
    pub(crate) outcome: DeliveryOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeliveryOutcome {
    /// The handler returned Ok, now or in an earlier attempt, and the record of that is durable.
    Processed,
    /// The handler failed: retry later.
    Failed(String),
    /// The handler rejected the message permanently.
    Rejected(String),
    /// The message was not run, as nothing serves it here now.
    Refused,
    /// The message was not run, as the node has no store for its inbox.
    NoInbox,
    /// The message was not run, as it had expired.
    Expired,
}

/// A node's announcement of its inbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct InboxInfo {
    /// The epoch, drawn when the inbox was created: a new one means that the old inbox is lost.
    pub(crate) epoch: u64,
    /// The durable subscriptions, by name.
    pub(crate) subscriptions: Vec<(ServiceName, crate::address::Pattern)>,
    /// The durable subscriptions that the node has ended permanently.
    pub(crate) ended: Vec<ServiceName>,
    /// The latest moment of the reader's outbox from which a message was processed there.
    pub(crate) heard: Option<Moment>,
}

/// The most names of ended durable subscriptions that are carried over to a later announcement.
const MAX_ENDED: usize = 512;

/// The longest text that an answer carries, in bytes.
const MAX_TEXT: usize = 1024;

impl DeliveryOutcome {
    fn code(&self) -> u64 {
        match self {
            Self::Processed => 0,
            Self::Failed(_) => 1,
            Self::Rejected(_) => 2,
            Self::Refused => 3,
            Self::NoInbox => 4,
            Self::Expired => 5,
        }
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Failed(text) | Self::Rejected(text) => Some(shorten(text, MAX_TEXT)),
            Self::Processed | Self::Refused | Self::NoInbox | Self::Expired => None,
        }
    }
}

impl Delivery {
    /// Returns true if the message is an event for a durable subscription.
    pub(crate) fn is_event(&self) -> bool {
        self.id.stream.subscription.is_some()
    }

    /// `[epoch, seq, floor, attempt, redelivered, subscription]`
    pub(super) fn write(&self, buf: &mut Vec<u8>) {
        let mut fields = ArrayWriter::new(buf);
        fields.uint(self.id.stream.epoch);
        fields.uint(self.id.seq);
        fields.uint(self.floor);
        fields.uint(u64::from(self.attempt));
        fields.bool(self.redelivered);
        fields.opt_str(self.id.stream.subscription.as_ref().map(ServiceName::as_str));
        fields.finish();
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut fields = reader.array()?;
        let epoch = fields.need(Reader::uint)?;
        let seq = fields.need(Reader::uint)?;
        let floor = fields.need(Reader::uint)?;
        let attempt = fields.need(Reader::uint)?;
        let redelivered = fields.need(Reader::bool)?;
        let subscription = read_subscription(&mut fields)?;
        fields.finish()?;
        if floor > seq {
            return Err(WireError::Unexpected("a delivery is below its floor"));
        }
        let id = DeliveryId { stream: Stream { epoch, subscription }, seq };
        let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
        Ok(Self { id, floor, attempt, redelivered })
    }
}

fn read_subscription(fields: &mut Fields<'_, '_>) -> Result<Option<ServiceName>, WireError> {
    fields.opt(|reader| Ok(ServiceName::from_wire(reader.str()?)?))
}

impl Answer {
    /// `[epoch, seq, attempt, outcome, subscription, text]`
    pub(super) fn write(&self, buf: &mut Vec<u8>) {
        let mut fields = ArrayWriter::new(buf);
        fields.uint(self.id.stream.epoch);
        fields.uint(self.id.seq);
        fields.uint(u64::from(self.attempt));
        fields.uint(self.outcome.code());
        fields.opt_str(self.id.stream.subscription.as_ref().map(ServiceName::as_str));
        fields.opt_str(self.outcome.text());
        fields.finish();
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut fields = reader.array()?;
        let epoch = fields.need(Reader::uint)?;
        let seq = fields.need(Reader::uint)?;
        let attempt = u32::try_from(fields.need(Reader::uint)?).unwrap_or(u32::MAX);
        let code = fields.need(Reader::uint)?;
        let subscription = read_subscription(&mut fields)?;
        let text = fields.opt(|reader| Ok(clean(shorten(reader.str()?, MAX_TEXT), MAX_TEXT)))?;
        let text = text.unwrap_or_default();
        fields.finish()?;
        let outcome = match code {
            0 => DeliveryOutcome::Processed,
            1 => DeliveryOutcome::Failed(text),
            2 => DeliveryOutcome::Rejected(text),
            3 => DeliveryOutcome::Refused,
            4 => DeliveryOutcome::NoInbox,
            5 => DeliveryOutcome::Expired,
            code => DeliveryOutcome::Failed(format!("outcome {code}: {text}")),
        };
        let id = DeliveryId { stream: Stream { epoch, subscription }, seq };
        Ok(Self { id, attempt, outcome })
    }
}

impl InboxInfo {
    /// Takes the place of an earlier announcement that was not sent. What ended before ends still:
    /// a subscription that began again with its name is another one.
    pub(crate) fn supersede(&mut self, before: Self) {
        let known: BTreeSet<ServiceName> = self.ended.iter().cloned().collect();
        self.ended.extend(before.ended.into_iter().filter(|name| !known.contains(name)));
        self.ended.truncate(MAX_ENDED);
    }

    /// Writes the fields `epoch, [[name, pattern], …], [ended name, …], moment`.
    pub(super) fn write(&self, record: &mut ArrayWriter<'_>) {
        record.uint(self.epoch);
        record.list(self.subscriptions.iter(), |buf, (name, pattern)| {
            let mut pair = ArrayWriter::new(buf);
            pair.str(name.as_str());
            pair.str(pattern.as_str());
            pair.finish();
        });
        record.list(self.ended.iter(), |buf, name| super::pack::push_str(buf, name.as_str()));
        write_moment(record, self.heard);
    }

    pub(super) fn read(fields: &mut Fields<'_, '_>) -> Result<Self, WireError> {
        let epoch = fields.need(Reader::uint)?;
        let subscriptions = fields.list(|reader| {
            let mut pair = reader.array()?;
            let name = pair.need(|reader| Ok(ServiceName::from_wire(reader.str()?)?))?;
            let pattern = pair.need(|reader| Ok(reader.str()?.parse()?))?;
            pair.finish()?;
            Ok((name, pattern))
        })?;
        let ended = fields.list(|reader| Ok(ServiceName::from_wire(reader.str()?)?))?;
        let heard = read_moment(fields)?;
        Ok(Self { epoch, subscriptions, ended, heard })
    }
}

/// Writes `[epoch, segment, offset]`, or nothing.
pub(super) fn write_moment(record: &mut ArrayWriter<'_>, moment: Option<Moment>) {
    let Some(Moment { epoch, segment, offset }) = moment else { return };
    record.nested(|buf| {
        let mut fields = ArrayWriter::new(buf);
        [epoch, segment, offset].into_iter().for_each(|field| fields.uint(field));
        fields.finish();
    });
}

pub(super) fn read_moment(fields: &mut Fields<'_, '_>) -> Result<Option<Moment>, WireError> {
    fields.opt(|reader| {
        let mut fields = reader.array()?;
        let epoch = fields.need(Reader::uint)?;
        let segment = fields.need(Reader::uint)?;
        let offset = fields.need(Reader::uint)?;
        fields.finish()?;
        Ok(Moment { epoch, segment, offset })
    })
}

/// Writes numbers as a list.
pub(super) fn push_numbers(record: &mut ArrayWriter<'_>, numbers: &[u64]) {
    record.list(numbers.iter(), |buf, number| push_uint(buf, *number));
}
