//! The charts of the report's page, as SVG with colours and sizes from `report.css`.

use super::html::{duration, escape, rate, seconds, whole};
use super::report::{Compared, Fault, Moment, Outcome};

/// The width of every chart in its own units; the page scales it.
const WIDTH: f64 = 560.0;

/// The look of one system in all charts, so that neither colour nor order alone identifies it.
struct Look {
    class: String,
    dash: &'static str,
    /// The outline of its marker around the origin.
    marker: &'static str,
}

/// A broker's own client looks like its broker, dotted and hollow.
fn look(system: &str) -> Look {
    let (broker, is_bare) = match system.strip_suffix("-client") {
        Some(broker) => (broker, true),
        None => (system, false),
    };
    let (class, dash, marker) = match broker {
        "mesh" => ("mesh", "none", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z"),
        "outbox" => ("outbox", "8 4", "M-4.2-4.2h8.4v8.4h-8.4z"),
        "embedded" => ("embedded", "2 3", "M0-5.8L5.8 0 0 5.8-5.8 0z"),
        "nats" => ("nats", "16 4", "M0-5.4L5.4 4.2H-5.4z"),
        "jetstream" => ("jetstream", "9 3 2 3", "M0 5.4L5.4-4.2H-5.4z"),
        "rabbitmq" => (
            "rabbitmq",
            "14 3 2 3 2 3",
            "M-1.8-5.4h3.6v3.6h3.6v3.6h-3.6v3.6h-3.6v-3.6h-3.6v-3.6h3.6z",
        ),
        "quorum" => (
            "quorum",
            "5 3",
            "M-5-2.5L-2.5-5 0-2.5 2.5-5 5-2.5 2.5 0 5 2.5 2.5 5 0 2.5-2.5 5-5 2.5-2.5 0z",
        ),
        _ => ("other", "1 3", "M-5.5-1.8h11v3.6h-11z"),
    };
    match is_bare {
        true => Look { class: format!("{class} bare"), dash: "1 3", marker },
        false => Look { class: class.to_owned(), dash, marker },
    }
}

impl Look {
    fn mark(&self, x: f64, y: f64) -> String {
        let d = self.marker;
        format!("<path class=\"mark\" d=\"{d}\" transform=\"translate({x:.1} {y:.1})\"/>")
    }
}

/// A short line with the system's marker, to put before its name.
pub(crate) fn swatch(system: &str) -> String {
    let look = look(system);
    format!(
        "<svg class=\"swatch {}\" viewBox=\"0 0 34 14\" aria-hidden=\"true\">\
         <path class=\"line\" stroke-dasharray=\"{}\" d=\"M1 7H33\"/>{}</svg>",
        look.class,
        look.dash,
        look.mark(17.0, 7.0)
    )
}

/// The definitions that the page must contain once, for the hatching of losses in [`course`].
pub(crate) const PATTERNS: &str = "<svg class=\"patterns\" width=\"0\" height=\"0\" \
    aria-hidden=\"true\"><defs><pattern id=\"lost\" width=\"5\" height=\"5\" \
    patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
    <path class=\"hatch\" d=\"M1.25 0V5\"/></pattern></defs></svg>\n";

fn svg(id: &str, height: f64, title: &str, description: &str, body: &str) -> String {
    format!(
        "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-labelledby=\"{id}-t {id}-d\">\n<title id=\"{id}-t\">{}</title>\n\
         <desc id=\"{id}-d\">{}</desc>\n{body}</svg>\n",
        escape(title),
        escape(description)
    )
}

fn line(class: &str, from: (f64, f64), to: (f64, f64)) -> String {
    let ((x1, y1), (x2, y2)) = (from, to);
    format!("<path class=\"{class}\" d=\"M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\"/>\n")
}

fn text(class: &str, x: f64, y: f64, words: &str) -> String {
    format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>\n", escape(words))
}

/// The latencies by percentile: rarity to the right, latency upwards, both logarithmic.
pub(crate) fn latency(id: &str, compared: &Compared) -> String {
    let curves: Vec<Curve> = compared.results.iter().filter_map(Curve::of).collect();
    let Some(area) = LatencyArea::around(&curves) else {
        return "<p class=\"none\">No latencies were recorded.</p>\n".to_owned();
    };
    let mut body = area.grid();
    for (curve, label_at) in curves.iter().zip(area.label_heights(&curves)) {
        body += &area.curve(curve, label_at);
    }
    let title = format!("Latency by percentile: {}", compared.name);
    svg(id, LatencyArea::HEIGHT, &title, &latencies_in_words(&compared.results), &body)
}

fn latencies_in_words(results: &[Outcome]) -> String {
    let each = results.iter().map(|outcome| {
        format!(
            "{}: half within {}, 99.9% within {}",
            outcome.system,
            duration(outcome.p50_us.median),
            duration(outcome.p999_us.median)
        )
    });
    each.collect::<Vec<_>>().join("; ") + "."
}

/// One system's distribution: the number of nines, and the logarithm of the microseconds.
struct Curve<'a> {
    system: &'a str,
    points: Vec<(f64, f64)>,
}

impl<'a> Curve<'a> {
    /// `None` if there is no point that a logarithmic chart can show.
    fn of(outcome: &'a Outcome) -> Option<Self> {
        let shown = |(share, micros): &(f64, f64)| {
            (0.0..1.0).contains(share) && micros.is_finite() && *micros > 0.0
        };
        let points: Vec<_> = outcome
            .percentiles
            .iter()
            .filter(|point| shown(point))
            .map(|(share, micros)| (-(1.0 - share).log10(), micros.log10()))
            .filter(|(nines, _)| *nines <= 5.0)
            .collect();
        (!points.is_empty()).then_some(Self { system: &outcome.system, points })
    }

    fn last(&self) -> (f64, f64) {
        self.points.last().copied().unwrap_or_default()
    }

    /// The height of the curve over a number of nines.
    fn at(&self, nines: f64) -> Option<f64> {
        self.points.windows(2).find_map(|pair| {
            let [(x1, y1), (x2, y2)] = *pair else { return None };
            let inside = x1 <= nines && nines <= x2 && x1 < x2;
            inside.then(|| y1 + (y2 - y1) * (nines - x1) / (x2 - x1))
        })
    }
}

struct LatencyArea {
    nines: f64,
    low: f64,
    high: f64,
}

impl LatencyArea {
    const HEIGHT: f64 = 350.0;
    const LEFT: f64 = 64.0;
    const RIGHT: f64 = 430.0;
    const TOP: f64 = 14.0;
    const BOTTOM: f64 = 312.0;
    /// The distance between the labels of two curves.
    const LABEL_GAP: f64 = 20.0;

    fn around(curves: &[Curve]) -> Option<Self> {
        let points = || curves.iter().flat_map(|curve| &curve.points);
        let (_, lowest) = points().min_by(|a, b| a.1.total_cmp(&b.1))?;
        let (_, highest) = points().max_by(|a, b| a.1.total_cmp(&b.1))?;
        let rarest = points().map(|point| point.0).fold(0.0, f64::max);
        let steps = log_steps(lowest.floor() - 1.0, highest.ceil() + 1.0);
        Some(Self {
            nines: rarest.clamp(4.0, 5.0),
            low: steps.iter().copied().rfind(|step| *step < lowest - 0.02)?,
            high: steps.iter().copied().find(|step| *step > highest + 0.02)?,
        })
    }

    fn x(&self, nines: f64) -> f64 {
        Self::LEFT + (Self::RIGHT - Self::LEFT) * nines / self.nines
    }

    fn y(&self, log_micros: f64) -> f64 {
        let share = (log_micros - self.low) / (self.high - self.low);
        Self::BOTTOM - (Self::BOTTOM - Self::TOP) * share
    }

    fn grid(&self) -> String {
        let mut body = String::new();
        let powers_only = self.high - self.low > 1.7;
        for step in log_steps(self.low - 0.001, self.high + 0.001) {
            let is_power = (step - step.round()).abs() < 0.01;
            let named = is_power || !powers_only;
            let class = if named { "grid" } else { "grid faint" };
            let y = self.y(step);
            body += &line(class, (Self::LEFT, y), (Self::RIGHT, y));
            if named {
                body += &text("tick end", Self::LEFT - 8.0, y + 4.5, &tick(10_f64.powf(step)));
            }
        }
        for (nines, name) in ["0", "90%", "99%", "99.9%", "99.99%", "99.999%"].iter().enumerate() {
            if nines as f64 <= self.nines {
                let x = self.x(nines as f64);
                body += &line("grid", (x, Self::TOP), (x, Self::BOTTOM));
                body += &text("tick middle", x, Self::BOTTOM + 22.0, name);
            }
        }
        body
    }

    /// The height of the label of each curve, so that no label covers another.
    fn label_heights(&self, curves: &[Curve]) -> Vec<f64> {
        let mut order: Vec<usize> = (0..curves.len()).collect();
        let mut heights: Vec<f64> = curves.iter().map(|curve| self.y(curve.last().1)).collect();
        order.sort_by(|a, b| heights[*a].total_cmp(&heights[*b]));
        let mut free = Self::TOP;
        for place in &order {
            heights[*place] = heights[*place].max(free);
            free = heights[*place] + Self::LABEL_GAP;
        }
        let mut free = Self::BOTTOM;
        for place in order.iter().rev() {
            heights[*place] = heights[*place].min(free);
            free = heights[*place] - Self::LABEL_GAP;
        }
        heights
    }

    fn curve(&self, curve: &Curve, label_at: f64) -> String {
        let look = look(curve.system);
        let place = |(nines, log): (f64, f64)| (self.x(nines), self.y(log));
        let path = curve.points.iter().map(|point| {
            let (x, y) = place(*point);
            format!("{x:.1} {y:.1}")
        });
        let mut path: Vec<String> = path.collect();
        path.dedup();
        let end = place(curve.last());
        let mut body = format!("<g class=\"{}\">", look.class);
        body += &line("leader", end, (Self::RIGHT + 14.0, label_at));
        body += &format!(
            "<path class=\"line\" stroke-dasharray=\"{}\" d=\"M{}\"/>",
            look.dash,
            path.join("L")
        );
        for nines in 0..=self.nines as usize {
            if let Some(log) = curve.at(nines as f64) {
                body += &look.mark(self.x(nines as f64), self.y(log));
            }
        }
        body += &look.mark(Self::RIGHT + 18.0, label_at);
        body + "</g>" + &text("name", Self::RIGHT + 28.0, label_at + 4.5, curve.system)
    }
}

/// The logarithms of 1, 2, 5, 10, 20 … between two logarithms.
fn log_steps(from: f64, to: f64) -> Vec<f64> {
    let powers = from.floor() as i32..=to.ceil() as i32;
    powers
        .flat_map(|power| [1.0, 2.0, 5.0].map(|digit: f64| digit.log10() + f64::from(power)))
        .filter(|step| (from..=to).contains(step))
        .collect()
}

/// A round latency without the digits that [`duration`] would add.
fn tick(micros: f64) -> String {
    let (value, unit) = match micros {
        micros if micros < 999.0 => (micros, "µs"),
        micros if micros < 999_000.0 => (micros / 1e3, "ms"),
        micros => (micros / 1e6, "s"),
    };
    format!("{}\u{a0}{unit}", (value * 1e3).round() / 1e3)
}

/// Messages per second as bars from zero, with the promise under each.
pub(crate) fn throughput(id: &str, compared: &Compared) -> String {
    const ROW: f64 = 51.0;
    let most = compared.results.iter().flat_map(|outcome| {
        let spread = outcome.throughput;
        [spread.median, spread.max].into_iter().filter(|value| value.is_finite())
    });
    let most = most.fold(0.0, f64::max);
    let bottom = ROW * compared.results.len() as f64;
    let mut body = line("axis", (BARS_FROM, 2.0), (BARS_FROM, bottom));
    for (row, outcome) in compared.results.iter().enumerate() {
        body += &bar(outcome, row as f64 * ROW + 15.0, most);
    }
    let words = compared.results.iter().map(|outcome| {
        format!("{}: {} messages a second", outcome.system, rate(outcome.throughput.median))
    });
    let words = words.collect::<Vec<_>>().join("; ") + ".";
    svg(id, bottom + 4.0, &format!("Messages a second: {}", compared.name), &words, &body)
}

const BARS_FROM: f64 = 108.0;

fn bar(outcome: &Outcome, middle: f64, most: f64) -> String {
    const LONGEST: f64 = 366.0;
    let to = |value: f64| BARS_FROM + LONGEST * if most > 0.0 { value / most } else { 0.0 };
    let spread = outcome.throughput;
    let mut body = text("name end", BARS_FROM - 8.0, middle + 4.5, &outcome.system);
    let mut end = BARS_FROM;
    if spread.median.is_finite() {
        end = to(spread.median);
        body += &format!(
            "<rect class=\"bar {}\" x=\"{BARS_FROM}\" y=\"{:.1}\" width=\"{:.1}\" height=\"18\"/>\n",
            look(&outcome.system).class,
            middle - 9.0,
            end - BARS_FROM
        );
    }
    if spread.min.is_finite() && spread.max.is_finite() && spread.min < spread.max {
        let (low, high) = (to(spread.min), to(spread.max));
        let (top, bottom) = (middle - 5.0, middle + 5.0);
        let whisker = format!(
            "M{low:.1} {middle:.1}H{high:.1}M{low:.1} {top:.1}V{bottom:.1}M{high:.1} {top:.1}V{bottom:.1}"
        );
        body += &format!(
            "<path class=\"halo\" d=\"{whisker}\"/><path class=\"whisker\" d=\"{whisker}\"/>\n"
        );
        end = end.max(high);
    }
    body += &text("value", end + 8.0, middle + 4.5, &rate(spread.median));
    body + &text("promise", BARS_FROM + 1.0, middle + 26.0, &shortened(&outcome.promise, 54))
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most).collect();
    let whole_words = kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words);
    format!("{whole_words} …")
}

/// The course of the last round around a fault: a strip for each system, all on the same scales.
pub(crate) fn course(id: &str, compared: &Compared, fault: &Fault) -> String {
    let area = CourseArea::around(compared);
    let strips = compared.results.iter().enumerate().map(|(place, outcome)| {
        let lost: u64 = outcome.timeline.iter().map(|moment| moment.lost).sum();
        let count = match lost {
            0 => "<span class=\"kept\">none lost</span>".to_owned(),
            lost => format!("<span class=\"lost\">{} lost</span>", whole(lost)),
        };
        format!(
            "<figure class=\"strip\"><figcaption>{}<b>{}</b> {count}\
             <small>{}</small></figcaption>\n{}</figure>\n",
            swatch(&outcome.system),
            escape(&outcome.system),
            escape(&outcome.promise),
            area.strip(&format!("{id}-{place}"), outcome, fault, lost)
        )
    });
    strips.collect()
}

struct CourseArea {
    seconds: f64,
    /// Messages per second at the upper edge; higher values are cut off and labelled.
    top: f64,
}

impl CourseArea {
    const LEFT: f64 = 62.0;
    const RIGHT: f64 = 548.0;
    const TOP: f64 = 26.0;
    const BOTTOM: f64 = 118.0;
    const HEIGHT: f64 = 146.0;
    const MOMENT: f64 = 0.1;

    fn around(compared: &Compared) -> Self {
        let moments = || compared.results.iter().flat_map(|outcome| &outcome.timeline);
        let most = |count: fn(&Moment) -> u64| moments().map(count).max().unwrap_or(0) as f64;
        let sent = most(|moment| moment.sent).max(most(|moment| moment.lost));
        let received = most(|moment| moment.received);
        let top = if sent > 0.0 { received.min(sent * 2.5).max(sent) } else { received };
        Self {
            seconds: moments().map(|m| m.at + Self::MOMENT).fold(compared.seconds, f64::max),
            top: (top / Self::MOMENT).max(1.0) * 1.08,
        }
    }

    fn x(&self, at: f64) -> f64 {
        let share = if self.seconds > 0.0 { at / self.seconds } else { 0.0 };
        Self::LEFT + (Self::RIGHT - Self::LEFT) * share.clamp(0.0, 1.0)
    }

    fn y(&self, per_second: f64) -> f64 {
        Self::BOTTOM - (Self::BOTTOM - Self::TOP) * (per_second / self.top).clamp(0.0, 1.0)
    }

    fn strip(&self, id: &str, outcome: &Outcome, fault: &Fault, lost: u64) -> String {
        let moments = &outcome.timeline;
        if moments.is_empty() {
            return "<p class=\"none\">No time line was recorded.</p>\n".to_owned();
        }
        let mut body = self.fault(fault) + &self.grid();
        let received = self.steps(moments, |moment| moment.received, Self::BOTTOM);
        body += &format!("<g class=\"{}\">", look(&outcome.system).class);
        body += &format!(
            "<path class=\"area\" d=\"M{} {bottom}V{received}V{bottom}z\"/>",
            Self::LEFT,
            bottom = Self::BOTTOM
        );
        body += &format!("<path class=\"received\" d=\"M{} {received}\"/></g>\n", Self::LEFT);
        let sent = self.steps(moments, |moment| moment.sent, Self::BOTTOM);
        body += &format!("<path class=\"sent\" d=\"M{} {sent}\"/>\n", Self::LEFT);
        body += &self.lost(moments);
        body += &self.peak(moments);
        let title = format!("{} while {}", outcome.system, fault.what);
        let words = format!(
            "The fault lasted from {:.1} to {:.1} seconds. {} of the messages of this round were lost.",
            fault.from,
            fault.to,
            if lost == 0 { "None".to_owned() } else { whole(lost) }
        );
        svg(id, Self::HEIGHT, &title, &words, &body)
    }

    fn grid(&self) -> String {
        let mut body = String::new();
        for value in even_steps(self.top, 3.0) {
            let y = self.y(value);
            let class = if value == 0.0 { "axis" } else { "grid" };
            body += &line(class, (Self::LEFT, y), (Self::RIGHT, y));
            body += &text("tick end", Self::LEFT - 7.0, y + 4.5, &round_rate(value));
        }
        for at in even_steps(self.seconds, 5.0) {
            let class = if at == 0.0 { "tick" } else { "tick middle" };
            let x = self.x(at);
            body += &line("axis", (x, Self::BOTTOM), (x, Self::BOTTOM + 4.0));
            let x = if at + 0.3 > self.seconds { x - 10.0 } else { x };
            body += &text(class, x, Self::BOTTOM + 22.0, &seconds(at));
        }
        body
    }

    fn fault(&self, fault: &Fault) -> String {
        let (from, to) = (self.x(fault.from), self.x(fault.to).max(self.x(fault.from) + 2.0));
        let name = if fault.what.chars().count() > 34 { "the fault" } else { &fault.what };
        // Wide enough for the longest name in the letters of a phone.
        let half = name.chars().count() as f64 * 4.8;
        let middle = f64::midpoint(from, to).clamp(Self::LEFT + half, Self::RIGHT - half);
        let (top, height) = (Self::TOP - 4.0, Self::BOTTOM - Self::TOP + 4.0);
        let width = to - from;
        format!(
            "<rect class=\"fault\" x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{height}\"/>\n"
        ) + &text("fault-name middle", middle, Self::TOP - 10.0, name)
    }

    /// The rest of a path from the left: one level step per moment, none beneath `low`.
    fn steps(&self, moments: &[Moment], count: fn(&Moment) -> u64, low: f64) -> String {
        let steps = moments.iter().map(|moment| {
            let y = self.y(count(moment) as f64 / Self::MOMENT).min(low);
            format!("{y:.1}H{:.1}", self.x(moment.at + Self::MOMENT))
        });
        steps.collect::<Vec<_>>().join("V")
    }

    fn lost(&self, moments: &[Moment]) -> String {
        let mut path = String::new();
        for run in moments.chunk_by(|a, b| (a.lost > 0) == (b.lost > 0)) {
            let [first, ..] = run else { continue };
            if first.lost > 0 {
                let (from, bottom) = (self.x(first.at), Self::BOTTOM);
                // High enough to be visible, even for one message among thousands.
                let low = bottom - 7.0;
                let steps = self.steps(run, |moment| moment.lost, low);
                path += &format!("M{from:.1} {bottom}V{steps}V{bottom}z");
            }
        }
        if path.is_empty() {
            return path;
        }
        format!("<path class=\"lost-ground\" d=\"{path}\"/><path class=\"lost\" d=\"{path}\"/>\n")
    }

    /// An arrow at the upper edge where the rate exceeds the strip.
    fn peak(&self, moments: &[Moment]) -> String {
        let per_second = |moment: &Moment| moment.received as f64 / Self::MOMENT;
        let mut above = moments.iter().filter(|moment| per_second(moment) > self.top);
        let Some(first) = above.next() else { return String::new() };
        let last = above.next_back().unwrap_or(first);
        let (from, to) = (self.x(first.at), self.x(last.at + Self::MOMENT));
        let (class, label_at) =
            if to > 415.0 { ("tick end", from - 7.0) } else { ("tick", to + 7.0) };
        let most = moments.iter().map(per_second).fold(0.0, f64::max);
        let (x, y) = (f64::midpoint(from, to), Self::TOP);
        format!("<path class=\"peak\" d=\"M{x:.1} {}l5 8h-10z\"/>\n", y - 4.0)
            + &text(class, label_at, y + 11.0, &format!("up to {}/s", rate(most)))
    }
}

/// Zero and the round steps up to `most`; about as many as requested.
fn even_steps(most: f64, about: f64) -> Vec<f64> {
    let rough = most / about;
    let power = 10_f64.powf(rough.log10().floor());
    let digit = [1.0, 2.0, 5.0, 10.0].into_iter().find(|digit| digit * power >= rough * 0.999);
    let step = digit.unwrap_or(10.0) * power;
    (0..=12)
        .map(|count| f64::from(count) * step)
        .take_while(|value| *value <= most * 1.001)
        .collect()
}

/// A round number of messages per second: `500`, `2k`.
fn round_rate(value: f64) -> String {
    match value {
        value if value < 1e4 => whole(value as u64),
        value if value < 1e6 => format!("{}k", value / 1e3),
        value => format!("{}M", value / 1e6),
    }
}
