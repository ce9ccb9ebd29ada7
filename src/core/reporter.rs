//! A node's reports: events for the user, counters, and the log.

use std::time::Duration;

use tokio::sync::{Notify, broadcast};
use tokio::time::sleep;

use super::counters::LiveCounters;
use super::events::{Event, Events};
use super::log::{Line, Log};
use crate::address::ServiceName;
use crate::identity::NodeId;
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};

/// The most unread events of one reader.
const MOST_EVENTS: usize = 1024;
/// The interval in which drops and moved keys are reported together.
const GROUP: Duration = Duration::from_millis(100);

pub(crate) struct Reporter {
    pub(crate) counters: LiveCounters,
    events: broadcast::Sender<Event>,
    /// The receiver of all events since the node's start, for the first reader.
    first_events: Mutex<Option<broadcast::Receiver<Event>>>,
    log: Log,
    /// Wakes the task that reports drops and moved keys in groups.
    unreported: Notify,
}

impl Default for Reporter {
    fn default() -> Self {
        let (events, first) = broadcast::channel(MOST_EVENTS);
        Self {
            counters: LiveCounters::default(),
            events,
            first_events: Mutex::new(Rank::Leaf, Some(first)),
            log: Log::default(),
            unreported: Notify::new(),
        }
    }
}

impl Reporter {
    /// Returns all events since the node's start on the first call, later ones from then on.
    pub(crate) fn events(&self) -> Events {
        let first = lock(&self.first_events).take();
        Events::new(first.unwrap_or_else(|| self.events.subscribe()))
    }

    /// Reports an event to its readers and the log.
    pub(crate) fn report(&self, event: Event) {
        self.log.push(Line::Event(event.clone()));
        self.report_unlogged(event);
    }

    /// Reports an event that is already logged.
    pub(crate) fn report_unlogged(&self, event: Event) {
        let _nobody_watches = self.events.send(event);
    }

    /// Queues a log line. Never waits.
    pub(crate) fn log(&self, line: Line) {
        self.log.push(line);
    }

    /// Writes the queued log lines.
    pub(crate) fn write_log(&self) {
        self.log.write();
    }

    /// Counts dropped messages of this node, and schedules their report.
    pub(crate) fn count_drop(&self, peer: NodeId, reason: DropReason, count: u64) {
        if self.counters.dropped(peer, reason, count) {
            self.unreported.notify_one();
        }
    }

    /// Counts an ordering key that moved to another instance, and schedules its report.
    pub(crate) fn count_moved_key(&self, service: &ServiceName, from: NodeId, to: NodeId) {
        if self.counters.moved(service, from, to) {
            self.unreported.notify_one();
        }
    }

    /// Counts what a full inbox forgot for `newcomer` and refused it, and schedules the report.
    pub(crate) fn count_inbox_full(&self, newcomer: NodeId, forgotten: u64, refused: u64) {
        if self.counters.inbox_full(newcomer, forgotten, refused) {
            self.unreported.notify_one();
        }
    }

    /// Reports drops and moved keys in groups, until this future is dropped.
    pub(super) async fn keep_reporting(&self) {
        loop {
            self.unreported.notified().await;
            let unreported = self.counters.take_unreported();
            for ((peer, reason), count) in unreported.dropped {
                self.report(Event::Dropped { peer, reason, count });
            }
            for ((service, from, to), count) in unreported.moved {
                self.report(Event::KeysMoved { service, from, to, count });
            }
            if let Some((newcomer, forgotten, refused)) = unreported.inbox_full {
                self.report(Event::InboxFull { newcomer, forgotten, refused });
            }
            sleep(GROUP).await;
        }
    }

    /// Writes the log, until this future is dropped.
    pub(super) async fn keep_writing(&self) {
        self.log.keep_writing().await;
    }
}
