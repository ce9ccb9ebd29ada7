//! Changes of the subscribers and instances that a node knows, itself included.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// Counts the changes, and wakes those that wait for one.
pub(crate) struct RouteWatch {
    version: AtomicU64,
    changed: watch::Sender<()>,
}

impl Default for RouteWatch {
    fn default() -> Self {
        Self { version: AtomicU64::new(0), changed: watch::Sender::new(()) }
    }
}

impl RouteWatch {
    pub(crate) fn notify(&self) {
        self.version.fetch_add(1, Ordering::Release);
        self.changed.send_replace(());
    }

    /// The number of changes so far.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}
