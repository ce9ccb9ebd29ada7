//! Reads stored messages back, on a blocking thread: the outbox asks for them under its lock, and
//! receives them later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Notify;

use super::Durable;
use super::last_read::LastRead;
use crate::core::Line;
use crate::engine::delivery::{DeliveryKey, Now, Outbox, Source};
use crate::identity::NodeId;
use crate::journal::Position;
use crate::sync::{Mutex, calling_out, lock};
use crate::wire::{Delivery, Envelope, decode_stored};

/// A message to be sent to a node.
pub(super) struct Transmission {
    pub(super) to: NodeId,
    pub(super) key: DeliveryKey,
    pub(super) delivery: Arc<Delivery>,
    /// The expiry, in ms since the Unix epoch.
    pub(super) expires_at: Option<u64>,
}

/// A stored message to be read.
pub(super) enum Wanted {
    /// A message to be stored again elsewhere: its number and its position.
    Move(u64, Position),
    Transmit(Transmission, Source),
}

/// A message that was read, or can't be read.
enum Found {
    Moved(u64, Option<Bytes>),
    Transmission(Transmission, Option<Arc<Envelope>>),
}

/// Messages queued to be read. The outbox's windows bound their number.
#[derive(Default)]
pub(super) struct Reader {
    waiting: Mutex<Waiting>,
    more: Notify,
}

#[derive(Default)]
struct Waiting {
    wanted: Vec<Wanted>,
    /// The number of messages queued here for each node. Further messages for a node are queued
    /// behind them, even those in memory.
    to: HashMap<NodeId, u64>,
}

impl Reader {
    pub(super) fn push(&self, wanted: Wanted) {
        let mut waiting = lock(&self.waiting);
        if let Wanted::Transmit(Transmission { to, .. }, _) = &wanted {
            *waiting.to.entry(*to).or_default() += 1;
        }
        waiting.wanted.push(wanted);
        drop(waiting);
        self.more.notify_one();
    }

    /// Returns true if a message for that node is queued here.
    pub(super) fn is_busy_for(&self, node: &NodeId) -> bool {
        lock(&self.waiting).to.contains_key(node)
    }

    fn take(&self) -> Vec<Wanted> {
        std::mem::take(&mut lock(&self.waiting).wanted)
    }

    fn handle_passed_on(&self, to: NodeId) {
        if let Entry::Occupied(mut count) = lock(&self.waiting).to.entry(to) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

impl Durable {
    /// Reads the messages that the outbox asks for, until this future is dropped.
    pub(super) async fn keep_reading(self: Arc<Self>) {
        let mut last = LastRead::default();
        loop {
            self.store.reader.more.notified().await;
            let durable = self.clone();
            let reading = tokio::task::spawn_blocking(move || {
                durable.read_waiting(&mut last);
                last
            });
            last = reading.await.unwrap_or_default();
        }
    }

    fn read_waiting(self: &Arc<Self>, last: &mut LastRead) {
        loop {
            let waiting = self.store.reader.take();
            if waiting.is_empty() {
                return;
            }
            calling_out();
            let found: Vec<_> =
                waiting.into_iter().map(|wanted| self.read_stored(last, wanted)).collect();
            self.with_outbox(|outbox, now| {
                for found in found {
                    self.handle_found(outbox, now, found);
                }
            });
        }
    }

    fn read_stored(&self, last: &mut LastRead, wanted: Wanted) -> Found {
        let store = &self.store;
        let mut read = |position, number| last.message(position, number, || store.entry(position));
        match wanted {
            Wanted::Move(number, position) => Found::Moved(number, read(position, number)),
            Wanted::Transmit(transmission, Source::Memory(message)) => {
                Found::Transmission(transmission, Some(message))
            }
            Wanted::Transmit(transmission, Source::Journal(position, number)) => {
                let encoded = read(position, number);
                let message =
                    encoded.and_then(|encoded| decode_stored(&encoded, &self.core.id).ok());
                Found::Transmission(transmission, message.map(Arc::new))
            }
        }
    }

    fn handle_found(self: &Arc<Self>, outbox: &mut Outbox, now: Now, found: Found) {
        if let Found::Transmission(it, _) = &found {
            self.store.reader.handle_passed_on(it.to);
        }
        match found {
            Found::Moved(number, encoded) => outbox.handle_read(now, number, encoded),
            // Its link may have ended meanwhile, or the message is settled.
            Found::Transmission(it, _) if !outbox.is_in_flight(it.key, it.delivery.attempt) => {}
            Found::Transmission(it, Some(message)) => {
                self.transmit(outbox, now, it, Arc::unwrap_or_clone(message));
            }
            Found::Transmission(it, None) => {
                self.core.reporter.log(Line::Unreadable(it.key.number));
                outbox.handle_unreadable(now, it.key);
            }
        }
    }
}
