//! The tasks that watch the clock for the engine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::events::Event;
use super::shared::Shared;
use crate::engine::{DownReason, Liveness, Time};

/// How long the driver sleeps when nothing is due.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Timeouts needn't be met to the microsecond; this keeps links from waking it one by one.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);

/// Looks at timeouts when they are due.
pub(crate) async fn run(shared: Arc<Shared>) {
    let base = Instant::from_std(shared.started);
    let mut retry_at = Time::default();
    loop {
        let now = shared.now();
        // What becomes due while this looks leaves its notice.
        shared.armed_ms.store(u64::MAX, Ordering::Release);
        let next = next_timeout(&shared, now).min(now + LONGEST_SLEEP).max(now + SHORTEST_SLEEP);
        shared.armed_ms.store(next.since_start().as_millis() as u64, Ordering::Release);
        tokio::select! {
            () = sleep_until(base + next.since_start()) => {}
            () = shared.earlier.notified() => continue,
        }
        shared.expire_requests();
        check_links(&shared);
        if shared.outbox_timeout(shared.now()).is_some_and(|at| at <= shared.now()) {
            shared.check_outbox();
        }
        if retry_at <= shared.now() {
            shared.check_inbox();
            retry_at = shared.now() + LONGEST_SLEEP;
        }
        shared.with_mesh(|mesh, now| mesh.handle_timeout(now));
    }
}

fn next_timeout(shared: &Arc<Shared>, now: Time) -> Time {
    let cells = shared.cells();
    let flows = cells.iter().map(|cell| cell.peek(|flow| flow.poll_timeout(now, &shared.timing)));
    let mesh = shared.mesh_timeout();
    let outbox = shared.outbox_timeout(now);
    flows
        .chain(mesh)
        .chain(outbox)
        .chain(shared.next_deadline())
        .min()
        .unwrap_or(now + LONGEST_SLEEP)
}

/// Sends heartbeats, and ends the links that have been silent for too long.
fn check_links(shared: &Arc<Shared>) {
    for cell in shared.cells() {
        let (heard, now) = (cell.last_heard(), cell.now());
        let liveness = cell.with_flow(|flow| {
            if let Some(heard) = heard {
                flow.handle_alive(heard);
            }
            flow.handle_timeout(now, &shared.timing)
        });
        if liveness == Liveness::Dead {
            let link = cell.id;
            shared.with_mesh(|mesh, now| mesh.handle_closed(now, link, DownReason::Silent));
        }
    }
}

/// Tells of drops and moved keys, those of 100 ms together.
pub(crate) async fn report_groups(shared: Arc<Shared>) {
    loop {
        shared.unreported.notified().await;
        let unreported = shared.counters.take_unreported();
        for ((peer, reason), count) in unreported.dropped {
            shared.tell(Event::Dropped { peer, reason, count });
        }
        for ((service, from, to), count) in unreported.moved {
            shared.tell(Event::KeysMoved { service, from, to, count });
        }
        sleep(Duration::from_millis(100)).await;
    }
}
