//! `peerbus bench load`

use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::process::{Placement, name};
use super::stats::median;
use super::stream::{Contender, Delays, Stream, Transport};
use crate::output;

/// The latency of messages sent evenly at a high rate, from a publisher to a subscriber in another
/// process, beside the bare `zeromq` crate at the same rate. Counted from the time at which each
/// message was due, so that delays of the publisher count too.
#[derive(Args)]
pub(crate) struct Load {
    /// Body size, in bytes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(8..=1024 * 1024))]
    size: u32,
    /// Transport of the messages
    #[arg(long, value_enum, default_value_t = Transport::DEFAULT)]
    transport: Transport,
    /// Messages a second [default: half of the slower contender's best rate]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Rounds
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Time for each contender in a round, in milliseconds
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..))]
    millis: u64,
    /// Placement of the two sides
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Side {
    contender: Contender,
    stream: Stream,
    peak: f64,
    rounds: Vec<Delays>,
}

impl Load {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        self.placement.pin_near();
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Runs on a worker like an embedding service's own tasks, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let body = vec![7; self.size as usize];
        let wanted = Duration::from_millis(self.millis);
        let mut sides = Vec::new();
        for contender in [Contender::Zeromq, Contender::Peerbus] {
            let mut stream = Stream::start(contender, self.transport, 1, 0, self.placement).await?;
            let (peak, _) = stream.calibrate(wanted, &body).await?;
            sides.push(Side { contender, stream, peak, rounds: Vec::new() });
        }
        let slower = sides.iter().map(|side| side.peak).fold(f64::INFINITY, f64::min);
        let rate = self.rate.map_or(slower / 2.0, f64::from);
        let count = ((rate * wanted.as_secs_f64()) as u64).max(1);
        for round in 0..=self.rounds {
            output::progress(Some(&format!("round {round} of {}", self.rounds)));
            for side in &mut sides {
                let delays = side.stream.pace(count, rate, self.size as usize).await?;
                // The first round is a warm-up.
                if round > 0 {
                    side.rounds.push(delays);
                }
            }
        }
        output::progress(None);
        self.report(&sides, rate)?;
        for side in sides {
            side.stream.end().await;
        }
        Ok(())
    }

    fn report(&self, sides: &[Side], rate: f64) -> anyhow::Result<()> {
        let mut text = format!(
            "{rate:.0} messages of {} bytes a second over {}, in turn, {} rounds of {} ms\n\n{:<48}{:>12}{:>10}{:>10}{:>10}{:>12}\n",
            self.size,
            self.transport.title(),
            self.rounds,
            self.millis,
            "",
            "at its best",
            "p50 µs",
            "p99 µs",
            "p99.9 µs",
            "p99 ratio"
        );
        let mut results = Vec::new();
        for side in sides {
            let over =
                |value: &dyn Fn(&Delays) -> f64| median(side.rounds.iter().map(value).collect());
            let (p50, p99) = (over(&|delays| delays.p50), over(&|delays| delays.p99));
            let p999 = over(&|delays| delays.p999);
            let pairs = side.rounds.iter().zip(&sides[0].rounds);
            let ratio = median(pairs.map(|(own, reference)| own.p99 / reference.p99).collect());
            let (title, peak) = (side.contender.title(), side.peak);
            text += &format!(
                "{title:<48}{peak:>12.0}{p50:>10.1}{p99:>10.1}{p999:>10.1}{ratio:>12.2}\n"
            );
            results.push(json!({
                "contender": title, "peak_per_second": peak, "p50_us": p50, "p99_us": p99,
                "p999_us": p999, "p99_ratio": ratio,
            }));
        }
        text += "\nMedians over the rounds. The ratio is the median of the p99 against the reference's in that round.";
        let value = json!({
            "size": self.size, "transport": name(self.transport), "placement": name(self.placement),
            "rate": rate, "rounds": self.rounds, "millis": self.millis, "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }
}
