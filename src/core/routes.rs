//! Changes of the known subscribers and instances, those of this node included.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// Counts the changes, and wakes tasks that wait for one.
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

    /// Returns the number of changes so far.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}
