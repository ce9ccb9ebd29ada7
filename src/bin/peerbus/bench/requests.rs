//! `peerbus bench requests`

use std::time::Instant;

use clap::Args;
use serde_json::json;
use tokio::task::JoinSet;

use super::latency::{Client, Contender, Side};
use super::process::{Placement, name};
use super::stats::median;
use crate::options::LatencyOption;
use crate::output;
use crate::scratch::Scratch;

/// Requests a second with many in flight, beside a plain TCP echo with one in flight. The
/// contenders run in turn, round after round.
#[derive(Args)]
pub(crate) struct Requests {
    /// Body size, in bytes
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024 * 1024))]
    size: u32,
    /// Requests in flight
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    in_flight: u32,
    /// Rounds
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Requests of each caller in a round
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Placement of the two sides
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Requests {
    /// Pins this process, before it starts other threads.
    pub(crate) fn prepare(&self) {
        self.placement.pin_near();
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Runs on a worker like an embedding service's own tasks, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let dir = Scratch::new()?;
        let unix = cfg!(unix).then_some(Contender::PeerbusUnix);
        let contenders = [
            Some(Contender::TcpEcho),
            unix,
            Some(Contender::PeerbusTcp),
            Some(Contender::PeerbusTls),
        ];
        let mut sides = Vec::new();
        for contender in contenders.into_iter().flatten() {
            let (size, latency) = (self.size as usize, LatencyOption::Balanced);
            let side = Side::start(contender, size, self.placement, latency, &dir).await?;
            sides.push((side, Vec::new()));
        }
        for round in 0..=self.rounds {
            output::progress(Some(&format!("round {round} of {}", self.rounds)));
            for (side, rates) in &mut sides {
                let rate = self.round(&mut side.client).await?;
                // The first round is a warm-up.
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        output::progress(None);
        let reference = sides[0].1.clone();
        let mut text = format!(
            "Requests of {} bytes, {} in flight, the reference one; in turn, {} rounds\n\n{:<36}{:>12}{:>10}\n",
            self.size, self.in_flight, self.rounds, "", "requests/s", "ratio"
        );
        let mut results = Vec::new();
        for (side, rates) in &sides {
            let ratios = rates.iter().zip(&reference).map(|(a, b)| a / b).collect();
            let (rate, ratio) = (median(rates.clone()), median(ratios));
            let title = side.contender.title();
            text += &format!("{title:<36}{rate:>12.0}{ratio:>10.2}\n");
            results
                .push(json!({ "contender": title, "requests_per_second": rate, "ratio": ratio }));
        }
        text += "\nThe ratio is the median, over the rounds, of the rate against the reference's in that round.";
        let value = json!({
            "size": self.size, "in_flight": self.in_flight, "rounds": self.rounds,
            "placement": name(self.placement), "results": results,
        });
        output::line(self.json, &value, || text)?;
        Ok(())
    }

    /// Runs a round; returns the requests per second.
    async fn round(&self, client: &mut Client) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let count = self.count as usize;
        let Client::Peerbus { node, service, body } = client else {
            for _ in 0..count * 10 {
                client.trip().await?;
            }
            return Ok(count as f64 * 10.0 / begun.elapsed().as_secs_f64());
        };
        let mut callers = JoinSet::new();
        for _ in 0..self.in_flight {
            let (node, service, body) = (node.clone(), service.clone(), body.clone());
            callers.spawn(async move {
                for _ in 0..count {
                    node.request(&service, body.as_slice()).await?;
                }
                Ok::<_, anyhow::Error>(())
            });
        }
        while let Some(ended) = callers.join_next().await {
            ended??;
        }
        Ok(count as f64 * f64::from(self.in_flight) / begun.elapsed().as_secs_f64())
    }
}
