//! `peerbus bench throughput`

use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::process::{Placement, name};
use super::stats::median;
use super::stream::{Contender, Stream, Transport};
use crate::output;

/// The rate of messages from a publisher to its subscribers, each a process of its own. The
/// contenders run in turn, round after round. A message counts once its subscriber has received it
/// from its stream; none may be lost.
#[derive(Args)]
pub(crate) struct Throughput {
    /// Body size, in bytes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024 * 1024))]
    size: u32,
    /// Transport of the messages
    #[arg(long, value_enum, default_value_t = Transport::DEFAULT)]
    transport: Transport,
    /// Subscribers, each in a process of its own; the reference has one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    subscribers: u32,
    /// Measure also with this many of the subscribers not reading, whose queues drop messages; only
    /// the deliveries to the others count
    #[arg(long, default_value_t = 0)]
    stalled: u32,
    /// Rounds
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Time for each contender in a round, in milliseconds
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..))]
    millis: u64,
    /// Placement of the publisher and the subscribers
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Side {
    title: String,
    stream: Stream,
    /// Messages per round, so that a round lasts as long as requested.
    count: u64,
    /// Deliveries per second, round by round.
    rates: Vec<f64>,
}

impl Throughput {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        self.placement.pin_near();
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.stalled < self.subscribers,
            "--stalled must be less than the number of subscribers, {}",
            self.subscribers
        );
        // Runs on a worker like an embedding service's own tasks, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let reference = match self.transport {
            // The reference shows the cost of encryption.
            Transport::Tls => self.start_over(Transport::Tcp, Contender::Peerbus, 1, 0).await?,
            _ => self.start(Contender::Zeromq, 1, 0).await?,
        };
        let mut sides = vec![reference];
        sides.push(self.start(Contender::Peerbus, 1, 0).await?);
        if self.subscribers > 1 {
            sides.push(self.start(Contender::Peerbus, self.subscribers, 0).await?);
        }
        if self.stalled > 0 {
            sides.push(self.start(Contender::Peerbus, self.subscribers, self.stalled).await?);
        }
        let body = vec![7; self.size as usize];
        for side in &mut sides {
            let wanted = Duration::from_millis(self.millis);
            (_, side.count) = side.stream.calibrate(wanted, &body).await?;
        }
        for round in 1..=self.rounds {
            output::progress(Some(&format!("round {round} of {}", self.rounds)));
            for side in &mut sides {
                let rate = side.stream.rush(side.count, &body).await?;
                side.rates.push(rate);
            }
        }
        output::progress(None);
        self.report(&sides)?;
        for side in sides {
            side.stream.end().await;
        }
        Ok(())
    }

    async fn start(
        &self,
        contender: Contender,
        subscribers: u32,
        stalled: u32,
    ) -> anyhow::Result<Side> {
        self.start_over(self.transport, contender, subscribers, stalled).await
    }

    async fn start_over(
        &self,
        transport: Transport,
        contender: Contender,
        subscribers: u32,
        stalled: u32,
    ) -> anyhow::Result<Side> {
        let mut title = contender.title().to_owned();
        if transport != self.transport {
            title += ", in clear text (reference)";
        }
        if subscribers > 1 {
            title += &format!(" to {subscribers} subscribers");
        }
        if stalled > 0 {
            title += &format!(", {stalled} stalled");
        }
        let stream =
            Stream::start(contender, transport, subscribers, stalled, self.placement).await?;
        Ok(Side { title, stream, count: 0, rates: Vec::new() })
    }

    fn report(&self, sides: &[Side]) -> anyhow::Result<()> {
        let reference = &sides[0];
        let mut text = format!(
            "Messages of {} bytes over {}, in turn, {} rounds of {} ms\n\n{:<48}{:>14}{:>14}{:>12}{:>10}\n",
            self.size,
            self.transport.title(),
            self.rounds,
            self.millis,
            "",
            "deliveries/s",
            "each reader",
            "MiB/s",
            "ratio"
        );
        let mut results = Vec::new();
        for side in sides {
            let ratios = side.rates.iter().zip(&reference.rates).map(|(a, b)| a / b).collect();
            let (rate, ratio) = (median(side.rates.clone()), median(ratios));
            let readers = side.stream.sinks.len();
            let each = rate / readers as f64;
            let mib = rate * f64::from(self.size) / 1024.0 / 1024.0;
            text +=
                &format!("{:<48}{rate:>14.0}{each:>14.0}{mib:>12.1}{ratio:>10.2}\n", side.title);
            results.push(json!({
                "contender": side.title, "readers": readers, "deliveries_per_second": rate,
                "each_reader_per_second": each, "ratio": ratio, "rounds": side.rates,
            }));
        }
        text += "\nThe ratio is the median, over the rounds, of the rate against the reference's in that round.";
        let value = json!({
            "size": self.size, "transport": name(self.transport), "placement": name(self.placement),
            "rounds": self.rounds, "millis": self.millis, "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }
}
