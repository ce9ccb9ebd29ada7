//! Shutdown: drains, says goodbye and closes, in this order.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout_at};

use super::Inner;
use super::ending::Loss;
use crate::address::{Pattern, ServiceName};
use crate::carrier::{Wish, WishEnd};
use crate::core::Stopped;
use crate::engine::ServiceNumber;
use crate::report::Counters;

/// The outcome of a node's shutdown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// The number of messages that were still queued here, and are dropped.
    pub undelivered: u64,
    /// The number of sent messages that were not confirmed, and may or may not have been handled.
    pub in_doubt: u64,
    /// The number of unprocessed guaranteed messages. They are kept, and sent when the store is
    /// opened again.
    pub pending: u64,
    /// The number of handlers that were still running, and were aborted.
    pub aborted: usize,
    /// The counters over the node's life.
    pub counters: Counters,
}

/// Shuts a node down within about `within`. Boxed, so that it is compiled once, here, and not in
/// each crate that calls it.
#[inline(never)]
pub(crate) fn run(node: &Arc<Inner>, within: Duration) -> BoxFuture<'_, ShutdownReport> {
    Box::pin(run_here(node, within))
}

async fn run_here(node: &Arc<Inner>, within: Duration) -> ShutdownReport {
    let (core, carrier) = (&node.core, &node.carrier);
    let counters = &core.reporter.counters;
    core.stop(Stopped::ShutDown);
    if core.has_lost_runtime() {
        return close_lost(node).await;
    }
    let deadline = Instant::now() + within;
    carrier.stop_linking();
    withdraw_services(node);
    let numbers = core.look(|front| {
        front.numbers().map(|(number, runner)| (number, runner.clone())).collect::<Vec<_>>()
    });
    for (number, runner) in numbers {
        let _too_slow = timeout_at(deadline, runner.wait_until_idle(core, number)).await;
    }
    let aborted = core.with_front(|front, _| front.abort_all());
    let _too_slow = timeout_at(deadline, carrier.settle()).await;
    let before = counters.snapshot();
    let pending = carrier.close(deadline).await;
    node.end_calls();
    core.reporter.write_log();
    let after = counters.snapshot();
    ShutdownReport {
        pending,
        undelivered: after.dropped_total() - before.dropped_total(),
        in_doubt: after.in_doubt - before.in_doubt,
        aborted,
        counters: after,
    }
}

/// Closes the files of a node whose runtime has ended: there is nobody left to send anything.
async fn close_lost(node: &Inner) -> ShutdownReport {
    let Loss { undelivered, in_doubt, aborted } = node.lost.get().copied().unwrap_or_default();
    let pending = node.carrier.close(Instant::now()).await;
    let counters = node.core.reporter.counters.snapshot();
    ShutdownReport { undelivered, in_doubt, pending, aborted, counters }
}

/// Withdraws all services; admitted calls are finished.
fn withdraw_services(node: &Inner) {
    let served = node.core.look(|front| {
        front.services().map(|(name, number)| (name.clone(), number)).collect::<Vec<_>>()
    });
    for (name, number) in served {
        if node.core.with_front(|front, _| front.withdraw(number)) {
            node.carrier.end_wish(Wish::Serve(name, 0), WishEnd::Forget);
        }
    }
    let consumed = node.core.look(|front| {
        let consumed = front.consumers();
        consumed.map(|(name, pattern, number)| (name.clone(), pattern.clone(), number)).collect()
    });
    let consumed: Vec<(ServiceName, Pattern, ServiceNumber)> = consumed;
    for (name, pattern, number) in consumed {
        if node.core.with_front(|front, _| front.withdraw(number)) {
            node.carrier.end_wish(Wish::Consume(name, pattern, 0), WishEnd::Pause);
        }
    }
}
