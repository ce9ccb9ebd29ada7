//! What is drawn once for a run.

use std::time::Duration;

use super::Random;
use super::disk::SEGMENT;

/// Guaranteed messages are sent by the first nodes.
pub(super) const SENDERS: usize = 2;
/// The first nodes have a store.
pub(super) const STORES: usize = 3;

#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) nodes: usize,
    /// Links, processes, disks and rules fail or change.
    pub(super) faults: bool,
    /// Nothing takes longer over a link, in microseconds.
    pub(super) latency: u64,
    pub(super) reassign_after: Option<Duration>,
    /// A dead letter holds up those with its key.
    pub(super) hold_keys: bool,
    /// What the disk of an outbox holds, in bytes, if that is little.
    pub(super) capacity: Option<u64>,
    /// The most bytes that an outbox has on their way to a peer.
    pub(super) window_bytes: u64,
}

impl Settings {
    pub(super) fn draw(random: &mut Random, nodes: usize, faults: bool) -> Self {
        let reassigns = random.once_in(3);
        let reassign_after = Duration::from_millis(random.between(50, 500));
        // Its manifest takes 24 KiB of it.
        let capacity = 24 * 1024 + random.between(9, 18) * SEGMENT;
        Self {
            nodes,
            faults,
            latency: if random.once_in(2) { 500 } else { 5_000 },
            reassign_after: reassigns.then_some(reassign_after),
            hold_keys: random.once_in(3) && faults,
            capacity: random.once_in(2).then_some(capacity),
            window_bytes: if random.once_in(3) { 6_000 } else { 600 },
        }
    }
}
