//! Seeds. A failing one is printed; `PEERBUS_SIM_SEED=n` runs it alone, `PEERBUS_SIM_SEEDS=n`
//! runs that many.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use super::ledger::Seen;
use super::world::World;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Runs the seeds that are asked for, and names the one that fails.
pub(super) fn each_seed(default: u64, mut run: impl FnMut(u64)) {
    let seeds = match number("PEERBUS_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PEERBUS_SIM_SEEDS").unwrap_or(default),
    };
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("seed {seed} failed; PEERBUS_SIM_SEED={seed} runs it alone");
            resume_unwind(panic);
        }
    }
}

/// Whether only one seed is asked for.
pub(super) fn is_alone() -> bool {
    number("PEERBUS_SIM_SEED").is_some()
}

fn run_seeds(faults: bool, default: u64) -> Seen {
    let mut seen = Seen::default();
    each_seed(default, |seed| {
        let nodes = 3 + (seed % 3) as usize;
        seen.add(&World::new(seed, nodes, faults).run(Duration::from_secs(4)).seen);
    });
    println!("{seen:#?}");
    seen
}

#[test]
fn a_thousand_faulty_runs_lose_nothing_silently_and_hang_nowhere() {
    let seen = run_seeds(true, 1000);
    if is_alone() {
        return;
    }
    let fired = [
        ("deliveries", seen.delivered),
        ("replies", seen.replies),
        ("calls with an ordering key", seen.ordered_calls),
        ("requests that failed with their link", seen.failed_requests),
        ("requests past their deadline", seen.late_requests),
        ("calls taken back", seen.cancelled),
        ("drops", seen.dropped),
        ("drops for a slow peer", seen.slow_peer),
        ("drops for a slow subscriber", seen.slow_subscriber),
        ("messages in doubt", seen.in_doubt),
        ("cuts", seen.cuts),
        ("silent cuts", seen.silent_cuts),
        ("deaths noticed by silence", seen.silent_deaths),
        ("crashes", seen.crashes),
        ("restarts", seen.restarts),
        ("duplicate links", seen.duplicate_links),
        ("links replaced by a new incarnation's", seen.replaced_links),
        ("messages that a rule refused", seen.denied),
        ("links that ended since a rule changed", seen.distrusted_links),
        ("running calls that were interrupted", seen.interrupted),
        ("queued calls that were lost with their link", seen.lost_with_link),
    ];
    for (what, count) in fired {
        assert!(count > 0, "no {what} in the whole run");
    }
}

#[test]
fn without_faults_nothing_is_in_doubt() {
    let seen = run_seeds(false, 50);
    assert_eq!((seen.in_doubt, seen.failed_requests, seen.silent_deaths), (0, 0, 0));
    assert!(seen.delivered > 0 && seen.replies > 0);
}
