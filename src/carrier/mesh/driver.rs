//! The task that handles the timeouts of the mesh, its links and the outbox.

use std::sync::Arc;
use std::time::Duration;

use super::MeshCarrier;
use crate::core::Event;
use crate::engine::{DownReason, Liveness, Time};

/// The longest sleep of the driver.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The shortest sleep of the driver, so that the timeouts of several links share one wake-up.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);

/// Handles timeouts when they are due.
pub(super) async fn run(carrier: Arc<MeshCarrier>) {
    let core = &carrier.core;
    carrier.pulse.begin();
    loop {
        // Not counted anew when something wakes the driver: it would never come to its work.
        let earliest = core.now() + SHORTEST_SLEEP;
        let next = || {
            let now = core.now();
            let next = next_timeout(&carrier, now).unwrap_or(now + LONGEST_SLEEP);
            let next = next.min(now + LONGEST_SLEEP).max(earliest);
            carrier.pulse.plan(next.since(now));
            Some(next)
        };
        carrier.alarm.sleep_until_next(core, next).await;
        handle_timeouts(&carrier);
    }
}

/// Handles the timeouts that are due. A node whose driver is held up calls this from elsewhere.
pub(super) fn handle_timeouts(carrier: &Arc<MeshCarrier>) {
    let core = &carrier.core;
    if core.has_lost_runtime() {
        return;
    }
    if let Some(pause) = carrier.pulse.beat() {
        handle_pause(carrier, pause);
    }
    carrier.pulse.plan(LONGEST_SLEEP);
    check_links(carrier);
    if let Some(durable) = &carrier.durable {
        durable.handle_outbox_timeout(core.now());
        durable.handle_inbox_timeout(core.now());
    }
    carrier.with_mesh(|mesh, now| mesh.handle_timeout(now));
}

/// Handles a time in which this node did not run: no peer is to blame for its silence then.
fn handle_pause(carrier: &Arc<MeshCarrier>, pause: Duration) {
    let now = carrier.core.now();
    for link in carrier.links.all() {
        link.with_flow(|flow| flow.handle_pause(now, pause));
    }
    carrier.with_mesh(|mesh, _| mesh.handle_pause(pause));
    carrier.core.reporter.report(Event::Paused { duration: pause });
}

fn next_timeout(carrier: &MeshCarrier, now: Time) -> Option<Time> {
    let links = carrier.links.all();
    let timing = &carrier.links.timing;
    let flows = links.iter().map(|link| link.peek(|flow| flow.poll_timeout(now, timing)));
    let outbox = carrier.durable.as_ref().and_then(|durable| durable.outbox_timeout(now));
    flows.chain(carrier.links.mesh_timeout()).chain(outbox).min()
}

/// Sends heartbeats, and ends the links that have been silent for too long.
fn check_links(carrier: &Arc<MeshCarrier>) {
    for link in carrier.links.all() {
        let (heard, now) = (link.last_heard(), carrier.core.now());
        let liveness = link.with_flow(|flow| {
            if let Some(heard) = heard {
                flow.handle_alive(heard);
            }
            flow.handle_timeout(now, &carrier.links.timing)
        });
        if liveness == Liveness::Dead {
            carrier.with_mesh(|mesh, now| mesh.handle_closed(now, link.id, DownReason::Silent));
        }
    }
}
