//! A simulator: many engines, virtual time, one seed.
//!
//! ```text
//!  World: time, links, faults ──▶ SimNode: mesh, flows, front, subscription, rules
//!    │ Machine: disks                 └─ Store: outbox, inbox, their journals on disks
//!    ▼
//!  Ledger: events, calls, requests ── Promises: guaranteed messages ── Seen: what happened at all
//! ```
//!
//! `world` moves batches and time; `machine` breaks things; `node` is the engine's shell, as thin
//! as it can be, with its users; `ledger` and `promises` check what was promised; `operator` looks
//! after dead letters; `tests` runs seeds on all cores. `crowd` is another world, of nothing but
//! meshes, so that there can be many of them; `full_disk` has one inbox on a disk without room.
//!
//! RULES

mod crowd;
mod disk;
mod full_disk;
mod ledger;
mod machine;
mod node;
mod operator;
mod promises;
mod rules;
mod seen;
mod settings;
mod tests;
mod world;

/// Random numbers from a seed (SplitMix64, Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True once in `n`.
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
