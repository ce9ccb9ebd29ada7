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
//! Rules that were taken out of the engine, one at a time, and the first seed that failed then:
//!
//! | Rule | Seed |
//! |---|---|
//! | permission of calls | 4 |
//! | permission of events | 0 |
//! | permission of guaranteed messages | 0 |
//! | permission of durable subscriptions | 19 |
//! | admission in the order of keys | 0 |
//! | concurrency | 0 |
//! | expiry in the queue | 2 |
//! | cancel | 11 |
//! | refusal by a service that nobody offers | 0 |
//! | completion over the request's own link | 0 |
//! | requests end with their link | 0 |
//! | late outcomes are counted | 2 |
//! | credit is given back | 0 |
//! | credit is given back once | 0 |
//! | credit is kept to | 1 |
//! | drops are reported | 0 |
//! | what is in doubt is counted | 0 |
//! | queued deliveries leave with their link | 4 |
//! | dedupe by the inbox | 0 |
//! | one run at a time of a delivery | 2 |
//! | answer only after the sync | 0 |
//! | begun is noted before the handler | 0 |
//! | streams of announced epochs are kept | 0 |
//! | stored is told after the sync | 0 |
//! | stored once by id | 59 |
//! | key order in the outbox | 0 |
//! | dead letters hold their key | 6 |
//! | binding stored before it is sent | 9 |
//! | binding synced | 19 |
//! | rebinding only after a loss | 0 |
//! | reassignment only after a time | 0 |
//! | former bindings are known | 3 |
//! | redelivered after a lost link | 3 |
//! | settled on the disk before the floor rises | 0 |
//! | dead letter told when it is stored | 147 |
//! | dead letter synced | 1213 |
//! | settled is restated before a segment goes | 0 |
//! | states are restated before a segment goes | 1 |
//! | restated facts are stored before it goes | 0 |
//! | cleaning may use kept room | 8 |
//! | room is kept for cleaning | 728 |
//! | messages are marked after a restore | 54 |
//! | the pattern is looked at when a message is sent | 5 |
//! | so is the right to serve | 8 |
//!
//! Not caught within 100 seeds: that handlers are interrupted when their caller is lost, and that
//! suspects run alone. Not within 150: that the right to hear is looked at when a message is sent,
//! and that what nothing serves takes no place in an inbox; unit tests hold these.

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
