//! The end of a node without a shutdown: its last handle is dropped, or its runtime ends.

use std::sync::{Arc, Weak};

use super::Inner;
use crate::core::Stopped;

impl Inner {
    /// Ends the node without a goodbye, and without waiting. Does nothing if it has ended, or is
    /// shutting down.
    fn abandon(&self, why: Stopped) {
        let core = &self.core;
        if !core.stop(why) {
            return;
        }
        core.abort_tasks();
        self.end_calls();
        let before = core.reporter.counters.snapshot();
        let aborted = core.with_front(|front, _| front.abort_all());
        self.carrier.abandon();
        let runners = core
            .look(|front| front.numbers().map(|(_, runner)| runner.clone()).collect::<Vec<_>>());
        runners.iter().for_each(|runner| runner.notify_ended());
        core.reporter.write_log();
        let after = core.reporter.counters.snapshot();
        let lost = Loss {
            undelivered: after.dropped_total() - before.dropped_total(),
            in_doubt: after.in_doubt - before.in_doubt,
            aborted,
        };
        lost.tell(why);
        let _only_once = self.lost.set(lost);
    }
}

/// The messages and handlers that a node lost when it ended without a shutdown.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Loss {
    /// The number of messages that were never sent.
    pub(super) undelivered: u64,
    /// The number of sent messages that were not confirmed.
    pub(super) in_doubt: u64,
    /// The number of running handlers.
    pub(super) aborted: usize,
}

impl Loss {
    fn tell(self, why: Stopped) {
        let Self { undelivered, in_doubt, aborted } = self;
        match why {
            Stopped::RuntimeEnded => tracing::error!(
                undelivered,
                in_doubt,
                aborted,
                "the runtime of this node has ended, and the node with it: messages were not sent \
                 (undelivered), or may not have arrived (in_doubt); call Node::shutdown first"
            ),
            Stopped::ShutDown if undelivered > 0 || in_doubt > 0 || aborted > 0 => tracing::warn!(
                undelivered,
                in_doubt,
                aborted,
                "the node was dropped without a shutdown: messages were not sent (undelivered), or \
                 may not have arrived (in_doubt); call Node::shutdown first"
            ),
            Stopped::ShutDown => {}
        }
    }
}

/// Ends a node when its last handle is dropped.
pub(super) struct Life(pub(super) Arc<Inner>);

impl Drop for Life {
    fn drop(&mut self) {
        self.0.abandon(Stopped::ShutDown);
    }
}

/// Ends a node with its runtime, which drops its tasks, this guard's one among them.
pub(super) struct RuntimeGuard(Weak<Inner>);

impl RuntimeGuard {
    pub(super) fn watch(node: &Arc<Inner>) {
        let guard = Self(Arc::downgrade(node));
        node.core.spawn(async move {
            let _guard = guard;
            std::future::pending().await
        });
    }
}

impl Drop for RuntimeGuard {
    fn drop(&mut self) {
        // A node that ends in another way has stopped before it ends its tasks.
        if let Some(node) = self.0.upgrade() {
            node.abandon(Stopped::RuntimeEnded);
        }
    }
}
