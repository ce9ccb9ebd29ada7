//! Drain, say goodbye, close: in this order.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout_at};

use super::Inner;
use crate::carrier::{Wish, WishEnd};
use crate::report::Counters;

/// What a node left behind when it shut down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Messages that were still queued here and are dropped.
    pub undelivered: u64,
    /// Messages that were sent, and of which nobody can say whether they were handled.
    pub in_doubt: u64,
    /// Guaranteed messages that are not processed yet. They are kept, and go on their way when
    /// the store is opened again.
    pub pending: u64,
    /// Handlers that were still running and were ended.
    pub aborted: usize,
    /// All that was counted in the node's life.
    pub counters: Counters,
}

/// Ends a node's work within about `within`. Boxed, so that it is compiled here and not again in
/// each crate that calls it.
#[inline(never)]
pub(crate) fn run(node: &Arc<Inner>, within: Duration) -> BoxFuture<'_, ShutdownReport> {
    Box::pin(run_here(node, within))
}

async fn run_here(node: &Arc<Inner>, within: Duration) -> ShutdownReport {
    let (core, carrier) = (&node.core, &node.carrier);
    let counters = &core.reporter.counters;
    core.stop();
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

/// Takes no more calls; those taken are finished.
fn withdraw_services(node: &Inner) {
    let served = node.core.look(|front| {
        front.services().map(|(name, number)| (name.clone(), number)).collect::<Vec<_>>()
    });
    for (name, number) in served {
        if node.core.with_front(|front, _| front.withdraw(number)) {
            node.carrier.end_wish(Wish::Serve(name, 0), WishEnd::Forget);
        }
    }
}
