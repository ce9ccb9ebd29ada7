//! The report for a terminal.

use super::report::{Outcome, Report, Spread};

/// The width of the column with the systems' names.
const WIDE: usize = 17;

pub(super) fn text(report: &Report) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "{}, {} cores, {} MiB, Linux {}; fdatasync {:.0} µs; {}\n",
        machine.processor,
        machine.cores,
        machine.memory_mib,
        machine.kernel,
        machine.fdatasync_us,
        report.date
    );
    for system in &report.systems {
        text += &format!("  {:<WIDE$} {}, {}\n", system.name, system.title, system.version);
    }
    for skipped in &report.skipped {
        text += &format!("  {:<WIDE$} skipped: {}\n", skipped.system, skipped.reason);
    }
    for compared in &report.workloads {
        if compared.results.is_empty() {
            continue;
        }
        text += &format!("\n{}: {}\n", compared.name, compared.summary);
        if let Some(fault) = &compared.fault {
            text += &format!("{} from {} s to {} s\n", fault.what, fault.from, fault.to);
        }
        text += &format!(
            "\n{:<WIDE$}{:>10}{:>10}{:>10}{:>10}{:>12}{:>9}{:>8}{:>8}{:>10}{:>10}{:>7}{:>9}{:>9}\n",
            "",
            "p50",
            "p99",
            "p99.9",
            "max",
            "messages/s",
            "CPU s/M",
            "MiB",
            "B each",
            "lost",
            "told",
            "twice",
            "disorder",
            "back in"
        );
        compared.results.iter().for_each(|outcome| text += &row(outcome));
        text.push('\n');
        for outcome in &compared.results {
            text += &format!("  {:<WIDE$}{}\n", outcome.system, outcome.promise);
        }
    }
    text += "\nLatencies count from when a message was due, so waiting counts. Medians over the rounds.";
    if let Some(why) = &report.cut_short {
        text += &format!("\nThe results are incomplete: {why}");
    }
    text
}

fn row(outcome: &Outcome) -> String {
    format!(
        "{:<WIDE$}{:>10}{:>10}{:>10}{:>10}{:>12}{:>9}{:>8}{:>8}{:>10}{:>10}{:>7}{:>9}{:>9}\n",
        outcome.system,
        time(outcome.p50_us),
        time(outcome.p99_us),
        time(outcome.p999_us),
        time(outcome.max_us),
        plain(outcome.throughput, 0),
        plain(outcome.cpu_s_per_million, 1),
        plain(outcome.memory_mib, 0),
        plain(outcome.wire_bytes, 0),
        outcome.lost,
        outcome.lost_and_told,
        outcome.duplicated,
        outcome.out_of_order,
        outcome.recovery_s.map_or("-".into(), |it| format!("{:.1} s", it.median)),
    )
}

fn plain(spread: Spread, digits: usize) -> String {
    match spread.median.is_finite() {
        true => format!("{:.digits$}", spread.median),
        false => "-".to_owned(),
    }
}

fn time(spread: Spread) -> String {
    match spread.median {
        us if !us.is_finite() => "-".to_owned(),
        us if us < 10_000.0 => format!("{us:.0} µs"),
        us if us < 10_000_000.0 => format!("{:.0} ms", us / 1000.0),
        us => format!("{:.0} s", us / 1_000_000.0),
    }
}
