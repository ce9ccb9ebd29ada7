//! Drain, say goodbye, close: in this order.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout_at};

use super::shared::Shared;
use crate::engine::Flow;
use crate::report::Counters;
use crate::sync::lock;

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

/// How often peers are asked how far they are.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How long peers may take to close after the goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Ends a node's work within about `within`. Boxed, so that it is compiled here and not again in
/// each crate that calls it.
#[inline(never)]
pub(crate) fn run(shared: &Arc<Shared>, within: Duration) -> BoxFuture<'_, ShutdownReport> {
    Box::pin(run_here(shared, within))
}

async fn run_here(shared: &Arc<Shared>, within: Duration) -> ShutdownReport {
    shared.stopping.store(true, Ordering::Release);
    let deadline = Instant::now() + within;
    shared.with_mesh(|mesh, _| mesh.stop_linking());
    for service in shared.services() {
        shared.withdraw(&service.name);
    }
    let services = shared.handling();
    for service in &services {
        let _too_slow = timeout_at(deadline, service.drain()).await;
    }
    let aborted = services.iter().map(|service| service.abort(shared)).sum();
    let _too_slow = timeout_at(deadline, settled(shared)).await;
    let before = shared.counters.snapshot();
    if let Some(broker) = shared.broker() {
        broker.client.close(deadline).await;
    }
    shared.with_mesh(|mesh, _| mesh.say_goodbye());
    // Peers close a link when they have read the goodbye.
    let _too_slow = timeout_at(Instant::now() + GOODBYE, unlinked(shared)).await;
    shared.with_mesh(|mesh, now| mesh.close_all(now));
    shared.fail_all_requests();
    shared.inboxes.load().all().into_iter().for_each(|inbox| inbox.close());
    let mut tasks = std::mem::take(&mut *lock(&shared.tasks));
    tasks.shutdown().await;
    if let Some(transport) = shared.transport.get() {
        transport.close().await;
    }
    let pending = shared.close_store().await;
    shared.log.write();
    let counters = shared.counters.snapshot();
    ShutdownReport {
        pending,
        undelivered: counters.dropped_total() - before.dropped_total(),
        in_doubt: counters.in_doubt - before.in_doubt,
        aborted,
        counters,
    }
}

/// Until every peer has confirmed all that it was sent.
async fn settled(shared: &Arc<Shared>) {
    loop {
        if shared.cells().iter().all(|cell| cell.peek(Flow::is_settled)) && shared.inbox_is_idle() {
            return;
        }
        shared.with_mesh(|mesh, _| mesh.probe_all());
        sleep(ASK_EVERY).await;
    }
}

/// Until no peer is left.
async fn unlinked(shared: &Arc<Shared>) {
    let mut changes = shared.routes_changed.subscribe();
    while shared.routing.load().peers() > 0 {
        if changes.changed().await.is_err() {
            return;
        }
    }
}
