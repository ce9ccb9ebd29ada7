//! The report as one self-contained HTML page: no script, no font, no network.

use super::charts::{self, swatch};
use super::report::{Compared, Machine, Outcome, Report, Skipped, Spread, System};

/// The whole page. All texts of the report are escaped; missing measurements show as a dash.
pub(crate) fn page(report: &Report) -> String {
    let workloads = report.workloads.iter().enumerate();
    let workloads = workloads.map(|(place, compared)| workload(place, compared, &report.systems));
    let workloads: String = workloads.collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>peerbus: what each promise costs, {date}</title>\n<style>\n{style}</style>\n\
         </head>\n<body>\n{patterns}{header}<main>\n{notice}{reading}{workloads}</main>\n\
         <footer><p>Made by <code>peerbus bench tradeoff</code>, version {version}.</p></footer>\n\
         </body>\n</html>\n",
        date = escape(&report.date),
        style = include_str!("report.css"),
        patterns = charts::PATTERNS,
        header = header(report),
        notice = notice(report.cut_short.as_deref()),
        reading = HOW_TO_READ,
        version = escape(&report.version),
    )
}

fn header(report: &Report) -> String {
    format!(
        "<header>\n<p class=\"eyebrow\">peerbus bench tradeoff {}</p>\n\
         <h1>What each promise costs</h1>\n<p class=\"date\">{}</p>\n\
         <div class=\"setting\">\n{}{}</div>\n{}</header>\n",
        escape(&report.version),
        escape(&report.date),
        systems(&report.systems, &report.skipped),
        machine(&report.machine),
        contents(&report.workloads)
    )
}

fn systems(systems: &[System], skipped: &[Skipped]) -> String {
    let rows: String = systems.iter().map(system).collect();
    format!(
        "<section aria-labelledby=\"systems\">\n<h2 id=\"systems\">Systems</h2>\n\
         <table class=\"systems\">\n<thead><tr><th scope=\"col\">Name</th>\
         <th scope=\"col\">What it is</th></tr></thead>\n\
         <tbody>\n{rows}</tbody>\n</table>\n{}</section>\n",
        skipped_systems(skipped)
    )
}

fn system(system: &System) -> String {
    format!(
        "<tr><th scope=\"row\">{}{}</th><td><span>{}</span> <small>{}</small></td></tr>\n",
        swatch(&system.name),
        escape(&system.name),
        escape(&system.title),
        escape(&system.version)
    )
}

fn skipped_systems(skipped: &[Skipped]) -> String {
    if skipped.is_empty() {
        return String::new();
    }
    let each = skipped.iter().map(|skipped| {
        format!("<li><b>{}</b>: {}</li>\n", escape(&skipped.system), escape(&skipped.reason))
    });
    format!("<h3>Skipped</h3>\n<ul class=\"skipped\">\n{}</ul>\n", each.collect::<String>())
}

fn machine(machine: &Machine) -> String {
    let memory = match machine.memory_mib {
        mib if mib < 1024 => format!("{mib}\u{a0}MiB"),
        mib => format!("{}\u{a0}GiB", plain(mib as f64 / 1024.0)),
    };
    let rows = [
        ("Processor", escape(&machine.processor)),
        ("Cores", machine.cores.to_string()),
        ("Memory", memory),
        ("Kernel", escape(&machine.kernel)),
        ("<code>fdatasync</code>", duration(machine.fdatasync_us)),
    ];
    let rows = rows.map(|(name, value)| format!("<dt>{name}</dt><dd>{value}</dd>\n")).concat();
    format!(
        "<section aria-labelledby=\"machine\">\n<h2 id=\"machine\">Machine</h2>\n\
         <dl>\n{rows}</dl>\n<p class=\"note\"><code>fdatasync</code>: the median after 1 KiB, \
         on the disk of the stores.</p>\n</section>\n"
    )
}

fn contents(workloads: &[Compared]) -> String {
    let each = workloads.iter().enumerate().map(|(place, compared)| {
        format!("<li><a href=\"#w{place}\">{}</a></li>\n", escape(&compared.name))
    });
    let each: String = each.collect();
    if each.is_empty() {
        return "<p class=\"none\">No workload was finished.</p>\n".to_owned();
    }
    format!("<nav aria-label=\"Workloads\">\n<ol>\n{each}</ol>\n</nav>\n")
}

fn notice(cut_short: Option<&str>) -> String {
    cut_short.map_or_else(String::new, |reason| {
        format!(
            "<p class=\"notice\" role=\"note\"><b>This run ended early:</b> {}. \
             The finished results are shown.</p>\n",
            escape(reason.trim_end_matches('.'))
        )
    })
}

const HOW_TO_READ: &str = "<section class=\"reading\" aria-labelledby=\"reading\">\n\
    <h2 id=\"reading\">How to read this</h2>\n<ul>\n\
    <li><b>Promises are not equal.</b> A system that confirms nothing does less than one that \
    syncs every message to a disk. Each row names its promise; compare numbers only together \
    with it.</li>\n\
    <li><b>Latency counts from when a message was due</b>, not from when it left. \
    If a system stalls, the waiting of every message behind the stall counts.</li>\n\
    <li><b>Large numbers are medians over the rounds</b>; the small ones beneath are the lowest \
    and the highest round. Counts of messages are sums over all rounds.</li>\n\
    <li><b class=\"best\">Marked</b> is the best of its column, whatever was promised; nothing is \
    marked where most are alike.</li>\n\
    <li><b class=\"bad\">Lost</b> messages were sent and never received. <i>Told</i> are those \
    that the system reported to their sender.</li>\n\
    <li><b>In the charts by percentile</b> each step to the right is ten times rarer; the scale \
    of latencies is logarithmic too. A dash in a table means not measured.</li>\n\
    </ul>\n</section>\n";

fn workload(place: usize, compared: &Compared, systems: &[System]) -> String {
    let id = format!("w{place}");
    let fault = compared.fault.as_ref().map_or_else(String::new, |fault| {
        format!(
            "<p class=\"lead\"><b>Fault:</b> {}, from {} to {} of each round.</p>\n",
            escape(&fault.what),
            seconds(fault.from),
            seconds(fault.to)
        )
    });
    format!(
        "<section class=\"workload\" aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{}</h2>\n\
         <p class=\"lead\">{}. Each round ran {}.</p>\n{fault}{}</section>\n",
        escape(&compared.name),
        escape(compared.summary.trim_end_matches('.')),
        seconds(compared.seconds),
        if compared.results.is_empty() {
            "<p class=\"none\">No system finished this workload.</p>\n".to_owned()
        } else {
            table(compared) + &absent(compared, systems) + &figures(&id, compared)
        }
    )
}

/// The systems that did not take part, which explains missing rows.
fn absent(compared: &Compared, systems: &[System]) -> String {
    let took_part =
        |system: &System| compared.results.iter().any(|outcome| outcome.system == system.name);
    let names = systems.iter().filter(|system| !took_part(system));
    let names: Vec<_> = names.map(|system| escape(&system.name)).collect();
    if names.is_empty() {
        return String::new();
    }
    format!("<p class=\"absent\">Did not take part: {}.</p>\n", names.join(", "))
}

fn figures(id: &str, compared: &Compared) -> String {
    let figure = |title: &str, note: &str, chart: String| {
        format!(
            "<figure><figcaption><b>{title}</b><small>{note}</small></figcaption>\n{chart}</figure>\n"
        )
    };
    let mut html = "<div class=\"figures\">\n".to_owned();
    html += &figure(
        "Latency by percentile",
        "lower is better; both scales are logarithmic",
        charts::latency(&format!("{id}-latency"), compared),
    );
    html += &figure(
        "Messages a second",
        "longer is better; the whisker spans the rounds",
        charts::throughput(&format!("{id}-throughput"), compared),
    );
    html += "</div>\n";
    if let Some(fault) = &compared.fault {
        html += COURSE_KEY;
        html += "<div class=\"strips\">\n";
        html += &charts::course(&format!("{id}-course"), compared, fault);
        html += "</div>\n";
    }
    html
}

const COURSE_KEY: &str = "<h3>The course of the last round</h3>\n\
    <p class=\"key\">Messages a second, the same scales for all: \
    <span><svg class=\"swatch other\" viewBox=\"0 0 34 14\" aria-hidden=\"true\">\
    <path class=\"area\" d=\"M1 3H33V14H1z\"/><path class=\"received\" d=\"M1 3H33\"/></svg>\
    received</span> \
    <span><svg class=\"swatch\" viewBox=\"0 0 34 14\" aria-hidden=\"true\">\
    <path class=\"sent\" d=\"M1 7H33\"/></svg>sent</span> \
    <span><svg class=\"swatch\" viewBox=\"0 0 34 14\" aria-hidden=\"true\">\
    <path class=\"lost\" d=\"M1 2H33V13H1z\"/></svg>lost, at the time when they were due</span> \
    <span><svg class=\"swatch\" viewBox=\"0 0 34 14\" aria-hidden=\"true\">\
    <rect class=\"fault\" x=\"1\" y=\"1\" width=\"32\" height=\"12\"/></svg>the fault</span></p>\n";

/// A table column of spreads.
struct Column {
    name: &'static str,
    of: fn(&Outcome) -> Option<Spread>,
    show: fn(f64) -> String,
    more_is_better: bool,
}

impl Column {
    const fn new(
        name: &'static str,
        of: fn(&Outcome) -> Option<Spread>,
        show: fn(f64) -> String,
    ) -> Self {
        Self { name, of, show, more_is_better: false }
    }

    /// The best median as shown, unless most systems share it.
    fn best(&self, results: &[Outcome]) -> Option<String> {
        let medians = results.iter().filter_map(|outcome| (self.of)(outcome));
        let medians = medians.map(|spread| spread.median).filter(|median| median.is_finite());
        let medians: Vec<f64> = medians.collect();
        let better = if self.more_is_better { f64::max } else { f64::min };
        let best = (self.show)(medians.iter().copied().reduce(better)?);
        let alike = medians.iter().filter(|median| (self.show)(**median) == best).count();
        (alike * 2 <= medians.len()).then_some(best)
    }

    fn cell(&self, outcome: &Outcome, best: Option<&str>) -> String {
        let Some(spread) = (self.of)(outcome).filter(|spread| spread.median.is_finite()) else {
            return "<td class=\"nil\">–</td>".to_owned();
        };
        let median = (self.show)(spread.median);
        let range = range(spread, self.show);
        if best == Some(median.as_str()) {
            return format!(
                "<td><b class=\"best\">{median}<span class=\"aside\"> (best)</span></b>{range}</td>"
            );
        }
        format!("<td>{median}{range}</td>")
    }
}

/// The columns before the counts of messages.
const MEASURED: [Column; 8] = [
    Column::new("p50", |outcome| Some(outcome.p50_us), duration),
    Column::new("p99", |outcome| Some(outcome.p99_us), duration),
    Column::new("p99.9", |outcome| Some(outcome.p999_us), duration),
    Column::new("max", |outcome| Some(outcome.max_us), duration),
    Column {
        name: "messages/s",
        of: |outcome| Some(outcome.throughput),
        show: rate,
        more_is_better: true,
    },
    Column::new("CPU s per million", |outcome| Some(outcome.cpu_s_per_million), plain),
    Column::new("memory, MiB", |outcome| Some(outcome.memory_mib), plain),
    Column::new("bytes on wire", |outcome| Some(outcome.wire_bytes), plain),
];

const RECOVERY: Column =
    Column::new("recovery", |outcome| outcome.recovery_s, |seconds| duration(seconds * 1e6));

const COUNTED: [&str; 5] = ["sent", "received", "lost", "duplicated", "out of order"];

fn table(compared: &Compared) -> String {
    let recovers = compared.fault.is_some()
        || compared.results.iter().any(|outcome| outcome.recovery_s.is_some());
    let last = recovers.then_some(RECOVERY);
    let columns: Vec<Column> = MEASURED.into_iter().chain(last).collect();
    let best: Vec<_> = columns.iter().map(|column| column.best(&compared.results)).collect();
    let rows = compared.results.iter().map(|outcome| {
        let cells = columns.iter().zip(&best);
        let mut cells = cells.map(|(column, best)| column.cell(outcome, best.as_deref()));
        let measured: String = cells.by_ref().take(MEASURED.len()).collect();
        format!(
            "<tr><th scope=\"row\">{}{}<small>{}</small></th>{measured}{}{}</tr>\n",
            swatch(&outcome.system),
            escape(&outcome.system),
            escape(&outcome.promise),
            counts(outcome),
            cells.collect::<String>()
        )
    });
    let rows: String = rows.collect();
    format!(
        "<div class=\"scroll\" role=\"region\" aria-label=\"Results: {}\" tabindex=\"0\">\n\
         <table class=\"results\">\n<colgroup></colgroup><colgroup span=\"4\"></colgroup>\
         <colgroup></colgroup><colgroup span=\"3\"></colgroup><colgroup span=\"5\"></colgroup>{}\n\
         {}<tbody>\n{rows}</tbody>\n</table>\n</div>\n",
        escape(&compared.name),
        if recovers { "<colgroup></colgroup>" } else { "" },
        table_head(recovers)
    )
}

fn table_head(recovers: bool) -> String {
    let names = MEASURED.iter().map(|column| column.name).chain(COUNTED);
    let names = names.chain(recovers.then_some(RECOVERY.name));
    let names: String = names.map(|name| format!("<th scope=\"col\">{name}</th>")).collect();
    format!(
        "<thead>\n<tr><th scope=\"col\" rowspan=\"2\">System and its promise</th>\
         <th scope=\"colgroup\" colspan=\"4\">Latency</th>\
         <th scope=\"colgroup\">Rate</th><th scope=\"colgroup\" colspan=\"3\">Cost</th>\
         <th scope=\"colgroup\" colspan=\"5\">Messages of all rounds</th>{}</tr>\n\
         <tr>{names}</tr>\n</thead>\n",
        if recovers { "<th scope=\"colgroup\">Fault</th>" } else { "" }
    )
}

fn counts(outcome: &Outcome) -> String {
    let plain = |count: u64| format!("<td>{}</td>", whole(count));
    let fault = |count: u64, class: &str, more: &str| match count {
        0 => "<td class=\"nil\">0</td>".to_owned(),
        _ => format!("<td><b class=\"{class}\">{}</b>{more}</td>", whole(count)),
    };
    let told = match outcome.lost_and_told {
        0 => "<small>none told</small>".to_owned(),
        told if told == outcome.lost => "<small>all told</small>".to_owned(),
        told => format!("<small>{} told</small>", whole(told)),
    };
    plain(outcome.sent)
        + &plain(outcome.received)
        + &fault(outcome.lost, "bad", &told)
        + &fault(outcome.duplicated, "odd", "")
        + &fault(outcome.out_of_order, "odd", "")
}

/// The minimum and maximum of a spread, to show beneath its median; empty if they are equal.
fn range(spread: Spread, show: fn(f64) -> String) -> String {
    let (low, high) = (show(spread.min), show(spread.max));
    if low == high {
        return String::new();
    }
    let low = match (low.split_once('\u{a0}'), high.split_once('\u{a0}')) {
        (Some((digits, unit)), Some((_, same))) if unit == same => digits,
        _ => &low,
    };
    format!("<small>{low}–{high}</small>")
}

/// Microseconds in a suitable unit: `31.4 µs`, `1.25 s`.
pub(crate) fn duration(micros: f64) -> String {
    match micros {
        micros if !micros.is_finite() => "–".to_owned(),
        micros if micros < 999.5 => format!("{}\u{a0}µs", plain(micros)),
        micros if micros < 999_500.0 => format!("{}\u{a0}ms", plain(micros / 1e3)),
        micros => format!("{}\u{a0}s", plain(micros / 1e6)),
    }
}

/// Seconds from a configuration, without extra digits: `5 s`, `0.5 s`.
pub(crate) fn seconds(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    format!("{}\u{a0}s", (value * 1e3).round() / 1e3)
}

/// A rate per second: `1 250`, `12.5k`, `1.25M`.
pub(crate) fn rate(value: f64) -> String {
    match value {
        value if value < 9_999.5 || !value.is_finite() => plain(value),
        value if value < 999_500.0 => format!("{}k", plain(value / 1e3)),
        value => format!("{}M", plain(value / 1e6)),
    }
}

/// A number with three digits, or more if it is a thousand or more.
pub(crate) fn plain(value: f64) -> String {
    match value {
        value if !value.is_finite() => "–".to_owned(),
        0.0 => "0".to_owned(),
        value if value < 9.995 => format!("{value:.2}"),
        value if value < 99.95 => format!("{value:.1}"),
        value => whole(value.round() as u64),
    }
}

/// A count, its thousands separated by narrow spaces.
pub(crate) fn whole(count: u64) -> String {
    let digits = count.to_string();
    let mut parted = String::with_capacity(digits.len() * 2);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            parted.push('\u{202f}');
        }
        parted.push(digit);
    }
    parted
}

/// A text that is safe between tags and in quoted attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            letter => safe.push(letter),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::super::report::{Fault, Moment};
    use super::*;

    fn empty() -> Report {
        Report {
            version: "1.0.0".to_owned(),
            date: "2026-11-25 04:00 UTC".to_owned(),
            machine: Machine {
                processor: "a <fast> one".to_owned(),
                cores: 4,
                memory_mib: 512,
                kernel: "Linux 6.1".to_owned(),
                fdatasync_us: f64::NAN,
            },
            systems: vec![],
            skipped: vec![],
            workloads: vec![],
            cut_short: None,
        }
    }

    fn outcome(system: &str) -> Outcome {
        let unknown = Spread { min: f64::NAN, median: f64::NAN, max: f64::NAN };
        let micros = Spread { min: 30.0, median: 31.4, max: 1250.0 };
        Outcome {
            system: system.to_owned(),
            promise: "in memory; nobody confirms".to_owned(),
            p50_us: micros,
            p99_us: micros,
            p999_us: micros,
            max_us: unknown,
            percentiles: vec![(0.0, 30.0), (0.9, 31.4), (0.999, 1250.0), (1.0, 2000.0)],
            throughput: Spread { min: 900.0, median: 1000.0, max: 12_500.0 },
            cpu_s_per_million: unknown,
            memory_mib: unknown,
            wire_bytes: unknown,
            sent: 200,
            received: 150,
            lost: 50,
            lost_and_told: 0,
            duplicated: 0,
            out_of_order: 0,
            recovery_s: None,
            timeline: vec![
                Moment { at: 0.0, sent: 100, received: 900, lost: 0 },
                Moment { at: 0.1, sent: 100, received: 0, lost: 50 },
            ],
        }
    }

    fn faulty(results: Vec<Outcome>) -> Report {
        let fault = Fault { what: "the receiver is killed".to_owned(), from: 0.1, to: 0.2 };
        let compared = Compared {
            name: "loss".to_owned(),
            summary: "a few".to_owned(),
            seconds: 0.2,
            fault: Some(fault),
            results,
        };
        Report { workloads: vec![compared], ..empty() }
    }

    #[test]
    fn name_with_markup_is_escaped_wherever_it_stands() {
        let html = page(&faulty(vec![outcome("<script>alert(1)</script>")]));
        assert!(!html.contains("<script"));
        assert!(html.contains("&lt;script&gt;alert(1)"));
    }

    #[test]
    fn report_without_workloads_renders() {
        let html = page(&empty());
        assert!(html.contains("No workload was finished."));
        assert!(html.ends_with("</html>\n"));
    }

    #[test]
    fn every_opened_tag_is_closed() {
        let mut bare = outcome("nats");
        bare.percentiles.clear();
        bare.timeline.clear();
        for results in [vec![], vec![bare.clone()], vec![outcome("mesh"), bare]] {
            let html = page(&faulty(results));
            for tag in ["table", "tr", "svg", "g", "section", "figure", "div", "span", "small"] {
                let opened = html.matches(&format!("<{tag} ")).count();
                let opened = opened + html.matches(&format!("<{tag}>")).count();
                assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
            }
        }
    }

    #[test]
    fn what_was_not_measured_is_a_dash_and_never_nan() {
        let html = page(&faulty(vec![outcome("mesh"), outcome("nats")]));
        assert!(html.contains("<td class=\"nil\">–</td>"));
        assert!(!html.contains("NaN") && !html.contains("inf"));
    }

    #[test]
    fn numbers_are_short_and_have_their_units() {
        assert_eq!(
            [31.42, 999.7, 1_250_000.0].map(duration),
            ["31.4\u{a0}µs", "1.00\u{a0}ms", "1.25\u{a0}s"]
        );
        assert_eq!(
            [998.4, 9_999.0, 12_480.0, 2.5e6].map(rate),
            ["998", "9\u{202f}999", "12.5k", "2.50M"]
        );
        assert_eq!(whole(1_234_567), "1\u{202f}234\u{202f}567");
    }
}
