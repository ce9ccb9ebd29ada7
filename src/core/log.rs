//! Log lines of decisions that are made under a lock: queued there, written by a task.
//!
//! A subscriber of `tracing` may block, for example on a terminal or a full pipe, and would block
//! every thread that wants the lock.

use std::collections::VecDeque;
use std::time::Instant;

use tokio::sync::Notify;
use tracing::level_filters::LevelFilter;

use super::events::Event;
use crate::address::ServiceName;
use crate::engine::{Bucket, Rate, Time};
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::sync::{Mutex, Rank, calling_out, lock};

/// The most queued lines. Further ones are only counted.
const MOST_LINES: usize = 1024;

/// A log line: an event, or a fact that is not reported as an event.
pub(crate) enum Line {
    Event(Event),
    /// A connection that the front door refused.
    AtTheDoor(Event),
    /// A handler of this node failed, and no reply tells its caller.
    HandlerFailed {
        service: ServiceName,
        id: MessageId,
        /// The attempt at a guaranteed message.
        attempt: Option<u32>,
        error: String,
    },
    LinkClosed {
        peer: NodeId,
        reason: String,
    },
    /// A stored message that can't be read, by its number.
    Unreadable(u64),
    UnknownAnswer(NodeId),
    /// A peer for whose durable subscriptions the outbox has no room.
    NotRemembered(NodeId),
    /// A peer for some of whose durable subscriptions the outbox has no room.
    SubscriptionsNotRemembered(NodeId),
}

pub(crate) struct Log {
    waiting: Mutex<Waiting>,
    more: Notify,
    started: Instant,
}

struct Waiting {
    lines: VecDeque<Line>,
    skipped: u64,
    /// The limit of lines per second; four seconds' worth may come at once.
    pace: Bucket,
}

impl Log {
    pub(super) fn new(lines_per_second: u32) -> Self {
        let per_second = u64::from(lines_per_second);
        let pace = Bucket::new(Time::default(), Rate { burst: 4 * per_second, per_second });
        let waiting = Waiting { lines: VecDeque::new(), skipped: 0, pace };
        Self {
            waiting: Mutex::new(Rank::Leaf, waiting),
            more: Notify::new(),
            started: Instant::now(),
        }
    }

    /// Queues a line. Never waits, and calls no foreign code.
    pub(super) fn push(&self, line: Line) {
        if line.is_detail() && LevelFilter::current() < LevelFilter::DEBUG {
            return;
        }
        let now = Time::after_start(self.started.elapsed());
        let mut waiting = lock(&self.waiting);
        match waiting.lines.len() < MOST_LINES && waiting.pace.take(now, 1) {
            true => waiting.lines.push_back(line),
            false => waiting.skipped += 1,
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Writes lines as they are queued, until this future is dropped.
    pub(super) async fn keep_writing(&self) {
        loop {
            self.more.notified().await;
            self.write();
        }
    }

    /// Writes the queued lines.
    pub(super) fn write(&self) {
        calling_out();
        let mut waiting = lock(&self.waiting);
        let lines = std::mem::take(&mut waiting.lines);
        // They are told of with the next line that is written.
        let skipped = match lines.is_empty() {
            true => 0,
            false => std::mem::take(&mut waiting.skipped),
        };
        drop(waiting);
        if skipped > 0 {
            tracing::warn!(
                lines = skipped,
                "more lines than the limit per second: some were skipped"
            );
        }
        lines.into_iter().for_each(Line::write);
    }
}

impl Line {
    /// Returns true if the line is of interest only when a fault is investigated.
    fn is_detail(&self) -> bool {
        matches!(
            self,
            Self::LinkClosed { .. }
                | Self::UnknownAnswer(_)
                | Self::AtTheDoor(_)
                | Self::Event(Event::Dropped { .. })
        )
    }

    fn write(self) {
        match self {
            Self::Event(event) => write_event(event),
            Self::AtTheDoor(Event::Refused { address, reason, count }) => {
                let address = address.as_ref().map(tracing::field::display);
                tracing::debug!(address, %reason, count, "the front door refused connections");
            }
            Self::AtTheDoor(event) => write_event(event),
            Self::HandlerFailed { service, id, attempt, error } => {
                tracing::warn!(%service, message_id = %id, attempt, error, "a handler failed");
            }
            Self::LinkClosed { peer, reason } => {
                tracing::debug!(peer = %peer.short(), reason, "link closed");
            }
            Self::Unreadable(number) => {
                tracing::error!(number, "a stored message can't be read");
            }
            Self::UnknownAnswer(peer) => {
                tracing::debug!(peer = %peer.short(), "an answer to an unknown message");
            }
            Self::SubscriptionsNotRemembered(peer) => tracing::warn!(
                peer = %peer.short(),
                "the outbox remembers 256 durable subscriptions of this peer, and no more: it gets no \
                 guaranteed events for the others; forget old ones with `peerbus outbox forget`"
            ),
            Self::NotRemembered(peer) => tracing::warn!(
                peer = %peer.short(),
                "the outbox can't remember more peers: events published while this one is away are \
                 not kept for it"
            ),
        }
    }
}

fn write_event(event: Event) {
    match event {
        Event::PeerUp(peer) => {
            tracing::info!(peer = %peer.id.short(), name = %peer.name, by = %peer.source, "peer up");
        }
        Event::PeerDown { id, name, reason } => {
            tracing::info!(peer = %id.short(), %name, %reason, "peer down");
        }
        Event::Denied { peer, action, name, count } => tracing::warn!(
            peer = %peer.short(), %action, %name, count, "a peer's rules deny an action"
        ),
        Event::Refused { address, reason, count } => {
            let address = address.as_ref().map(tracing::field::display);
            tracing::warn!(address, %reason, count, "connections refused");
        }
        Event::Paused { duration } => tracing::warn!(
            ?duration,
            "this node did not run: a handler blocks the threads of its runtime, or the process was \
             stopped; let handlers block in spawn_blocking only"
        ),
        Event::IdentityConflict { address } => {
            let address = address.as_ref().map(tracing::field::display);
            tracing::warn!(
                address,
                "another live node has this node's identity: give one of them another file"
            );
        }
        Event::DeadLetter { number, reason } => {
            tracing::warn!(number, %reason, "a message is a dead letter");
        }
        Event::InboxLost { peer } => tracing::warn!(
            peer = %peer.short(),
            "a peer lost its inbox: it may process messages again"
        ),
        Event::OutboxIsOlder { peer } => tracing::warn!(
            peer = %peer.short(),
            "a peer knows a later state of this outbox: it was restored from an older copy, or runs \
             twice; messages may be processed again, marked as redelivered"
        ),
        Event::SubscriptionLapsed { peer, name, reason, messages } => tracing::warn!(
            peer = %peer.short(),
            %name,
            %reason,
            messages,
            "a durable subscription was ended, with its messages"
        ),
        Event::InboxFull { newcomer, forgotten, refused } => tracing::warn!(
            newcomer = %newcomer.short(),
            forgotten,
            refused,
            "the inbox is full: it forgets senders, whose duplicates may run again"
        ),
        Event::PeerGone { peer, messages } => {
            tracing::warn!(peer = %peer.short(), messages, "messages await an absent peer");
        }
        Event::Dropped { peer, reason, count } => {
            tracing::debug!(peer = %peer.short(), %reason, count, "messages dropped");
        }
        Event::KeysMoved { service, from, to, count } => {
            tracing::info!(%service, from = %from.short(), to = %to.short(), count, "keys moved");
        }
    }
}
