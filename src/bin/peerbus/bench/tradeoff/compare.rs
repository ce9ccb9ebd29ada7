//! Runs all workloads over all systems, in turn, and makes the report.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::Context;

use super::report::{Compared, Fault, Machine, Moment, Outcome, Report, Skipped, Spread, System};
use super::round::{self, Round};
use super::systems::SystemName;
use super::tally::{Latencies, MOMENT};
use super::workload::Workload;
use crate::bench::by_hand;
use crate::bench::process::Placement;
use crate::output;
use crate::scratch::Scratch;

pub(super) struct Comparison {
    workloads: Vec<Workload>,
    systems: Vec<SystemName>,
    skipped: Vec<Skipped>,
    versions: BTreeMap<&'static str, String>,
    machine: Machine,
    date: String,
    /// The rounds by workload and system.
    rounds: BTreeMap<(usize, usize), Vec<Round>>,
}

impl Comparison {
    pub(super) async fn new(
        workloads: Vec<Workload>,
        systems: Vec<SystemName>,
        skipped: Vec<Skipped>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let date = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        Ok(Self {
            workloads,
            systems,
            skipped,
            versions: BTreeMap::new(),
            machine: machine(dir)?,
            date: date.replace('T', " ").replace('Z', " UTC"),
            rounds: BTreeMap::new(),
        })
    }

    /// Runs the rounds. Rounds finished before an error are kept.
    pub(super) async fn run(
        &mut self,
        rounds: u32,
        placement: Placement,
        dir: &Path,
    ) -> anyhow::Result<()> {
        for system in &self.systems {
            let version = system.version().await.with_context(|| system.title())?;
            self.versions.insert(system.as_str(), version);
        }
        let mut number = 0;
        for (place, workload) in self.workloads.iter().enumerate() {
            let rounds = workload.rounds.map_or(rounds, NonZeroU32::get);
            for round in 1..=rounds {
                for (which, system) in self.systems.iter().enumerate() {
                    if !system.takes_part(workload) {
                        continue;
                    }
                    number += 1;
                    output::progress(Some(&format!(
                        "{}, round {round} of {rounds}: {}",
                        workload.name,
                        system.title()
                    )));
                    let found = round::run(workload, *system, placement, dir, number).await;
                    let found = found.with_context(|| {
                        format!("{} over {}, round {round}", workload.name, system.title())
                    })?;
                    self.rounds.entry((place, which)).or_default().push(found);
                }
            }
        }
        Ok(())
    }

    pub(super) fn report(self, cut_short: Option<String>) -> Report {
        let workloads = self.workloads.iter().enumerate();
        let compared = workloads.map(|(place, workload)| self.compared(place, workload)).collect();
        let system = |system: &SystemName| System {
            name: system.as_str().to_owned(),
            title: system.title().to_owned(),
            version: self.versions.get(system.as_str()).cloned().unwrap_or_default(),
        };
        let systems = self.systems.iter().map(system).collect();
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            date: self.date,
            machine: self.machine,
            systems,
            skipped: self.skipped,
            workloads: compared,
            cut_short,
        }
    }

    fn compared(&self, place: usize, workload: &Workload) -> Compared {
        let results = self.systems.iter().enumerate().filter_map(|(which, system)| {
            Some(outcome(workload, *system, self.rounds.get(&(place, which))?))
        });
        Compared {
            name: workload.name.clone(),
            summary: workload.summary(),
            seconds: workload.seconds.as_secs_f64(),
            fault: workload.fault.map(|fault| Fault {
                what: fault.kill.title().to_owned(),
                from: fault.after.as_secs_f64(),
                to: (fault.after + fault.lasts).as_secs_f64(),
            }),
            results: results.collect(),
        }
    }
}

fn outcome(workload: &Workload, system: SystemName, rounds: &[Round]) -> Outcome {
    let mut all = Latencies::new();
    let each: Vec<Latencies> = rounds
        .iter()
        .map(|round| {
            let mut latencies = Latencies::new();
            for tally in &round.received {
                latencies.merge(&tally.latencies);
                all.merge(&tally.latencies);
            }
            latencies
        })
        .collect();
    let at = |quantile: f64| spread(each.iter().map(|latencies| latencies.at(quantile)));
    let received = |round: &Round| round.received.iter().map(|it| it.received).sum::<u64>();
    let expected = |round: &Round| {
        round.sent.iter().map(|it| it.sent).sum::<u64>() * workload.fan_out() as u64
    };
    let over = |value: &dyn Fn(&Round) -> f64| spread(rounds.iter().map(value));
    let total = |count: &dyn Fn(&Round) -> u64| rounds.iter().map(count).sum::<u64>();
    let took = |round: &Round| {
        let last = round.received.iter().map(|it| it.last).max().unwrap_or(0);
        last.saturating_sub(round.start) as f64 / 1e9
    };
    let lost = total(&|round| expected(round).saturating_sub(received(round)));
    let told = total(&|round| round.sent.iter().map(|it| it.told).sum());
    Outcome {
        system: system.as_str().to_owned(),
        promise: system.promise(workload.pattern).to_owned(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: at(1.0),
        percentiles: all.curve(),
        throughput: over(&|round| received(round) as f64 / took(round)),
        cpu_s_per_million: over(&|round| round.cpu * 1e6 / received(round) as f64),
        memory_mib: over(&|round| round.memory as f64 / (1024.0 * 1024.0)),
        wire_bytes: over(&|round| round.wire as f64 / received(round) as f64),
        sent: total(&|round| round.sent.iter().map(|it| it.sent).sum()),
        received: total(&received),
        lost,
        lost_and_told: told.min(lost),
        duplicated: total(&|round| round.received.iter().map(|it| it.duplicated).sum()),
        out_of_order: total(&|round| round.received.iter().map(|it| it.out_of_order).sum()),
        recovery_s: recovery(workload, rounds),
        timeline: rounds.last().map_or_else(Vec::new, |round| timeline(workload, round)),
    }
}

/// The time from the repair of the fault to the first message after it, to a tenth of a second.
fn recovery(workload: &Workload, rounds: &[Round]) -> Option<Spread> {
    workload.fault?;
    let each = rounds.iter().filter_map(|round| {
        let mended = (round.mended?.saturating_sub(round.start)) / MOMENT;
        let first = &round.received.first()?.arrived;
        let after = first.iter().skip(mended as usize).position(|count| *count > 0)?;
        Some(after as f64 * MOMENT as f64 / 1e9)
    });
    let each: Vec<f64> = each.collect();
    (!each.is_empty()).then(|| spread(each.into_iter()))
}

fn timeline(workload: &Workload, round: &Round) -> Vec<Moment> {
    let moments = round.received.iter().map(|it| it.arrived.len());
    let moments = moments.chain(round.sent.iter().map(|it| it.due.len())).max().unwrap_or(0);
    let at = |list: &Vec<u64>, moment: usize| list.get(moment).copied().unwrap_or(0);
    let moment = |moment: usize| {
        let sent: u64 = round.sent.iter().map(|it| at(&it.due, moment)).sum();
        let kept: u64 = round.received.iter().map(|it| at(&it.due, moment)).sum();
        Moment {
            at: moment as f64 * MOMENT as f64 / 1e9,
            sent,
            received: round.received.iter().map(|it| at(&it.arrived, moment)).sum(),
            lost: (sent * workload.fan_out() as u64).saturating_sub(kept),
        }
    };
    (0..moments).map(moment).collect()
}

fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_unstable_by(f64::total_cmp);
    let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
    Spread { min: at(0), median: at(values.len() / 2), max: at(values.len().saturating_sub(1)) }
}

fn machine(dir: &Path) -> anyhow::Result<Machine> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory = after(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    let scratch = Scratch::inside(dir)?;
    let (syncs, _) = by_hand::store(&scratch.path().join("sync"), &[7; 1024], 300)?;
    Ok(Machine {
        processor: after(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown".into()),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory_mib: memory / 1024,
        // The kernel version without the distributor's suffix.
        kernel: read("/proc/sys/kernel/osrelease")
            .split('-')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned(),
        fdatasync_us: syncs.percentile(500),
    })
}
