//! Seeds. A failing one is printed; `PEERBUS_SIM_SEED=n` runs it alone, `PEERBUS_SIM_SEEDS=n`
//! runs that many.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::seen::Seen;
use super::world::World;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn seeds(default: u64) -> Range<u64> {
    match number("PEERBUS_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PEERBUS_SIM_SEEDS").unwrap_or(default),
    }
}

/// Runs the seeds that are asked for, on all cores; what they saw, each added to what was seen
/// before.
///
/// # Panics
/// If a seed fails. The lowest that does is named.
pub(super) fn each_seed<S: Default + Send>(
    default: u64,
    run: impl Fn(u64) -> S + Sync,
    add: impl Fn(&mut S, S) + Sync,
) -> S {
    let seeds = seeds(default);
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicU64::new(u64::MAX);
    let work = || {
        let mut seen = S::default();
        loop {
            // Seeds are handed out in order, so that all below one that fails are run.
            let seed = next.fetch_add(1, Ordering::SeqCst);
            if seed >= seeds.end || seed > failed.load(Ordering::SeqCst) {
                return Ok(seen);
            }
            match catch_unwind(AssertUnwindSafe(|| run(seed))) {
                Ok(one) => add(&mut seen, one),
                Err(panic) => {
                    eprintln!("seed {seed} failed; PEERBUS_SIM_SEED={seed} runs it alone");
                    failed.fetch_min(seed, Ordering::SeqCst);
                    return Err((seed, panic));
                }
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let results: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running.into_iter().map(|it| it.join().expect("panics are caught")).collect()
    });
    let (mut seen, mut first) = (S::default(), None);
    for result in results {
        match result {
            Ok(part) => add(&mut seen, part),
            Err((seed, panic)) => match &first {
                Some((before, _)) if *before < seed => {}
                _ => first = Some((seed, panic)),
            },
        }
    }
    if let Some((seed, panic)) = first {
        eprintln!("seed {seed} is the lowest that failed");
        resume_unwind(panic);
    }
    seen
}

/// Whether only one seed is asked for.
pub(super) fn is_alone() -> bool {
    number("PEERBUS_SIM_SEED").is_some()
}

fn world(seed: u64, faults: bool) -> World {
    World::new(seed, 3 + (seed % 3) as usize, faults)
}

fn run_seeds(faults: bool, default: u64) -> Seen {
    let seen = each_seed(default, |seed| world(seed, faults).run().seen, Seen::extend);
    println!("{seen:#?}");
    seen
}

#[test]
fn ten_thousand_faulty_runs_keep_every_promise() {
    let seen = run_seeds(true, 10_000);
    if !is_alone() {
        seen.check();
    }
}

#[test]
fn without_faults_nothing_is_in_doubt() {
    let seen = run_seeds(false, 50);
    let in_doubt = ["messages in doubt", "requests that failed with their link", "cuts"];
    assert!(in_doubt.iter().all(|what| seen.count(what) == 0));
    let done = ["deliveries", "replies", "messages processed", "dead letters by failure"];
    assert!(is_alone() || done.iter().all(|what| seen.count(what) > 0));
}

#[test]
fn a_seed_runs_the_same_again() {
    for seed in 0..6 {
        assert_eq!(world(seed, true).run(), world(seed, true).run(), "seed {seed}");
    }
}
