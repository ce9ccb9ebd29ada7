//! A node's reports: events for the user, counters, and the log.

use std::time::Duration;

use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, sleep};

use super::counters::{LiveCounters, Refused, Unreported};
use super::events::{Event, Events};
use super::log::{Line, Log};
use crate::address::ServiceName;
use crate::identity::NodeId;
use crate::peer::Address;
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};

/// The most unread events of one reader.
const MOST_EVENTS: usize = 1024;
/// The interval in which drops and moved keys are reported together, and that of what strangers
/// can cause.
const GROUP: Duration = Duration::from_millis(100);
const REFUSALS: Duration = Duration::from_secs(1);

pub(crate) struct Reporter {
    pub(crate) counters: LiveCounters,
    events: broadcast::Sender<Event>,
    /// The receiver of all events since the node's start, for the first reader.
    first_events: Mutex<Option<broadcast::Receiver<Event>>>,
    log: Log,
    /// Wakes the task that reports drops and moved keys in groups.
    unreported: Notify,
}

impl Reporter {
    /// A reporter that logs at most `log_lines` lines per second.
    pub(crate) fn new(log_lines: u32) -> Self {
        let (events, first) = broadcast::channel(MOST_EVENTS);
        Self {
            counters: LiveCounters::default(),
            events,
            first_events: Mutex::new(Rank::Leaf, Some(first)),
            log: Log::new(log_lines),
            unreported: Notify::new(),
        }
    }

    /// Returns all events since the node's start on the first call, later ones from then on.
    pub(crate) fn events(&self) -> Events {
        let first = lock(&self.first_events).take();
        Events::new(first.unwrap_or_else(|| self.events.subscribe()))
    }

    /// Reports an event to its readers and the log: refusals and denials in groups.
    pub(crate) fn report(&self, event: Event) {
        let is_first = match event {
            Event::Refused { address, reason, .. } => {
                self.counters.refusal(address, Refused { reason, by_door: false })
            }
            Event::Denied { peer, action, name, .. } => self.counters.denial(peer, action, name),
            event => return self.report_event(event),
        };
        if is_first {
            self.unreported.notify_one();
        }
    }

    /// Reports a connection that the front door refused.
    pub(crate) fn report_refusal(&self, address: Option<Address>, reason: String) {
        if self.counters.refusal(address, Refused { reason, by_door: true }) {
            self.unreported.notify_one();
        }
    }

    /// Reports an event that is already logged.
    pub(crate) fn report_unlogged(&self, event: Event) {
        let _nobody_watches = self.events.send(event);
    }

    fn report_now(&self, line: Line, event: Event) {
        self.log.push(line);
        self.report_unlogged(event);
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

    /// Reports in groups what is counted first, until this future is dropped.
    pub(super) async fn keep_reporting(&self) {
        let mut refusals_from = Instant::now();
        loop {
            self.unreported.notified().await;
            let all = Instant::now() >= refusals_from;
            let unreported = self.counters.take_unreported(all);
            if unreported.has_refusals() {
                refusals_from = Instant::now() + REFUSALS;
            }
            self.report_groups(unreported);
            sleep(GROUP).await;
            if !all {
                self.unreported.notify_one();
            }
        }
    }

    fn report_groups(&self, unreported: Unreported) {
        for ((peer, reason), count) in unreported.dropped {
            self.report_event(Event::Dropped { peer, reason, count });
        }
        for ((service, from, to), count) in unreported.moved {
            self.report_event(Event::KeysMoved { service, from, to, count });
        }
        if let Some((newcomer, forgotten, refused)) = unreported.inbox_full {
            self.report_event(Event::InboxFull { newcomer, forgotten, refused });
        }
        for ((peer, action, name), count) in unreported.denied {
            self.report_event(Event::Denied { peer, action, name, count });
        }
        for ((_, refused), (address, count)) in unreported.refused {
            let Refused { reason, by_door } = refused;
            let event = Event::Refused { address, reason, count };
            match by_door {
                true => self.report_now(Line::AtTheDoor(event.clone()), event),
                false => self.report_event(event),
            }
        }
    }

    fn report_event(&self, event: Event) {
        self.report_now(Line::Event(event.clone()), event);
    }

    /// Writes the log, until this future is dropped.
    pub(super) async fn keep_writing(&self) {
        self.log.keep_writing().await;
    }
}
