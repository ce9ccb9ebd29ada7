//! Log lines of decisions that are made under a lock: queued there, written by a task.
//!
//! A subscriber of `tracing` may wait, for a terminal or a full pipe say, and whoever wants the
//! lock would wait with it.

use std::collections::VecDeque;

use tokio::sync::Notify;
use tracing::level_filters::LevelFilter;

use super::events::Event;
use crate::identity::NodeId;
use crate::sync::{Mutex, calling_out, lock};

/// The most lines that wait. Beyond it they are counted only.
const MOST_LINES: usize = 1024;

/// A line of the log, or what is no event besides.
pub(crate) enum Line {
    Event(Event),
    LinkClosed {
        peer: NodeId,
        reason: String,
    },
    /// A stored message, by its number.
    Unreadable(u64),
    UnknownAnswer(NodeId),
    /// A peer whose durable subscriptions the outbox has no room for.
    NotRemembered(NodeId),
}

#[derive(Default)]
pub(crate) struct Log {
    waiting: Mutex<Waiting>,
    more: Notify,
}

#[derive(Default)]
struct Waiting {
    lines: VecDeque<Line>,
    skipped: u64,
}

impl Log {
    /// Queues a line. Never waits, and calls nobody.
    pub(super) fn push(&self, line: Line) {
        if line.is_detail() && LevelFilter::current() < LevelFilter::DEBUG {
            return;
        }
        let mut waiting = lock(&self.waiting);
        match waiting.lines.len() < MOST_LINES {
            true => waiting.lines.push_back(line),
            false => waiting.skipped += 1,
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Writes what comes, until it is dropped.
    pub(super) async fn keep_writing(&self) {
        loop {
            self.more.notified().await;
            self.write();
        }
    }

    /// Writes what waits.
    pub(super) fn write(&self) {
        calling_out();
        let Waiting { lines, skipped } = std::mem::take(&mut *lock(&self.waiting));
        lines.into_iter().for_each(Line::write);
        if skipped > 0 {
            tracing::warn!(lines = skipped, "more happened than could be logged");
        }
    }
}

impl Line {
    /// Only of interest to who looks for a fault.
    fn is_detail(&self) -> bool {
        matches!(
            self,
            Self::LinkClosed { .. } | Self::UnknownAnswer(_) | Self::Event(Event::Dropped { .. })
        )
    }

    fn write(self) {
        match self {
            Self::Event(event) => write_event(event),
            Self::LinkClosed { peer, reason } => {
                tracing::debug!(peer = %peer.short(), reason, "link closed");
            }
            Self::Unreadable(number) => {
                tracing::error!(number, "a stored message can't be read");
            }
            Self::UnknownAnswer(peer) => {
                tracing::debug!(peer = %peer.short(), "an answer to no message of ours");
            }
            Self::NotRemembered(peer) => tracing::warn!(
                peer = %peer.short(),
                "the outbox remembers no more peers: what is published while this one is away is \
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
        Event::Denied { peer, action, name } => {
            tracing::warn!(peer = %peer.short(), %action, %name, "a peer's rules don't allow it");
        }
        Event::Refused { address, reason } => {
            let address = address.as_ref().map(tracing::field::display);
            tracing::warn!(address, %reason, "connection refused");
        }
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
            "a peer has lost its inbox: it may process again what it had processed"
        ),
        Event::PeerGone { peer, messages } => {
            tracing::warn!(peer = %peer.short(), messages, "messages have waited long for a peer");
        }
        Event::Dropped { peer, reason, count } => {
            tracing::debug!(peer = %peer.short(), %reason, count, "messages dropped");
        }
        Event::KeysMoved { service, from, to, count } => {
            tracing::info!(%service, from = %from.short(), to = %to.short(), count, "keys moved");
        }
    }
}
