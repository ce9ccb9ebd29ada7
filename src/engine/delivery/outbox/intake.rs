//! Intake of submitted messages, atomically.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{
    Choose, DeliveryKey, Entry, OutboundDelivery, Outbox, Pending, Rare, State, Submitted,
};
use crate::engine::delivery::record::{
    BindingRecord, MessageRecord, OutboxRecord, PartRecord, Raw,
};
use crate::engine::delivery::{Now, Target};
use crate::message::BASE_COST;
use crate::message::MessageId;
use crate::wire::{Envelope, encode_stored};

/// A message to be stored.
#[derive(Debug, Clone)]
pub(crate) struct NewMessage {
    /// The envelope of a message without a reply.
    pub(crate) envelope: Arc<Envelope>,
    pub(crate) targets: SmallVec<[Target; 1]>,
    /// In ms since the Unix epoch.
    pub(crate) expires_at: Option<u64>,
    pub(crate) not_before: Option<u64>,
    /// The message is not stored if another one with its id was.
    pub(crate) once: bool,
}

/// Messages submitted together, mostly one.
pub(crate) type NewMessages = SmallVec<[NewMessage; 1]>;

impl NewMessage {
    pub(crate) fn id(&self) -> MessageId {
        self.envelope.header.id
    }

    /// Returns the size that counts against the outbox's limit, in bytes.
    fn size(&self) -> u64 {
        let destinations = BASE_COST * self.targets.len().max(1) as u64;
        destinations + self.envelope.cost() - BASE_COST
    }
}

/// The error of submitting to a full outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the outbox is full: it holds {messages} messages, {bytes} bytes")]
pub(crate) struct Full {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

/// The most bytes submitted together; a journal entry must be shorter than 4 GiB.
const MOST_TOGETHER: u64 = 1024 * 1024 * 1024;

/// The most bytes of new messages kept in memory until they are sent.
const MAX_CACHED: u64 = 16 * 1024 * 1024;

impl Outbox {
    /// Submits messages: all of them are stored, or none.
    ///
    /// # Errors
    /// [`Full`] if there is no room for them.
    pub(crate) fn submit(
        &mut self,
        now: Now,
        messages: NewMessages,
        choose: &mut Choose<'_>,
    ) -> Result<SmallVec<[Submitted; 1]>, Full> {
        self.now = now.time;
        let mut submitted: SmallVec<[Option<Submitted>; 1]> =
            messages.iter().map(|message| self.submitted_before(message)).collect();
        let new = messages.iter().zip(&submitted).filter(|(_, before)| before.is_none());
        let (count, bytes) =
            new.fold((0, 0), |(count, bytes), (new, _)| (count + 1, bytes + new.size()));
        let (held, held_bytes) = (self.entries.len() as u64, self.bytes);
        let is_full =
            held + count > self.config.max_messages || held_bytes + bytes > self.config.max_bytes;
        if is_full || bytes > MOST_TOGETHER {
            return Err(Full { messages: held, bytes: held_bytes });
        }
        let (mut numbers, mut records, mut ids) = (SmallVec::new(), SmallVec::new(), Vec::new());
        for (message, submitted) in messages.into_iter().zip(&mut submitted) {
            // An earlier message of this batch may have the same id.
            *submitted = submitted.take().or_else(|| self.submitted_before(&message));
            if submitted.is_some() {
                continue;
            }
            let number = self.next_number;
            self.next_number += 1;
            if message.once {
                self.once.submit(message.id(), number);
                ids.push((message.id(), number));
            }
            records.push(self.take_in(now, number, message, choose));
            numbers.push(number);
            *submitted = Some(Submitted::New(number));
        }
        let record = match ids.is_empty() {
            true => OutboxRecord::Messages(records),
            false => OutboxRecord::Once(records, ids.clone()),
        };
        if !numbers.is_empty() {
            self.append(&record, Pending::Messages(numbers, ids));
        }
        Ok(submitted.into_iter().flatten().collect())
    }

    /// Adds a new message; returns the record to store.
    fn take_in(
        &mut self,
        now: Now,
        number: u64,
        message: NewMessage,
        choose: &mut Choose<'_>,
    ) -> MessageRecord<'static> {
        let size = message.size();
        let NewMessage { envelope, targets, expires_at, not_before, once: _ } = message;
        let order: Option<Arc<str>> = envelope.header.ordering_key().map(Arc::from);
        let encoded = encode_stored(&envelope, &self.config.me);
        let later = not_before.is_some_and(|at| at > now.unix_ms);
        let (mut parts, mut part_records) = (SmallVec::new(), SmallVec::new());
        for (part, target) in targets.into_iter().enumerate() {
            let key = DeliveryKey { number, part: part as u32 };
            let in_target = self.target_number(&target);
            // After a restart, a bound message counts as possibly sent; and one behind its ordering
            // key would hold a number that its receiver waits for. So neither is bound yet.
            let waits = later
                || self.waiting.contains_key(&in_target)
                || order
                    .as_ref()
                    .is_some_and(|order| self.key_queues.contains_key(&(in_target, order.clone())));
            let node = match waits {
                true => None,
                false => self.taker(&target, order.as_deref(), choose),
            };
            let bound = node.map(|node| self.bind(key, node, &target));
            part_records.push(PartRecord {
                target: (&target).into(),
                binding: bound.map(|bound| BindingRecord::from(&self.binding(bound))),
                failures: 0,
                redelivered: false,
                settled: false,
                dead: None,
                former: Vec::new(),
            });
            if let Some(order) = &order {
                self.key_queues.entry((in_target, order.clone())).or_default().push_back(key);
            }
            self.open += 1;
            if matches!(target, Target::Subscription(..)) {
                self.kept_for.entry(in_target).or_default().insert(number, part as u32);
            }
            parts.push(OutboundDelivery {
                target: in_target,
                bound,
                state: State::Storing,
                failures: 0,
                attempts: 0,
                redelivered: false,
            });
        }
        let record = MessageRecord {
            number,
            parts: part_records,
            expires_at,
            not_before,
            order: order.as_deref().map(str::to_owned),
            encoded: Raw(encoded.into()),
        };
        let rare = Rare { expires_at, not_before, order };
        let rare = (rare != Rare::default()).then(|| Box::new(rare));
        let cached = (self.cached_bytes + size <= MAX_CACHED).then(|| {
            self.cached_bytes += size;
            envelope
        });
        self.bytes += size;
        let entry = Entry { position: None, cached, rare, parts, size: size as u32 };
        self.entries.insert(number, entry);
        record
    }
}
