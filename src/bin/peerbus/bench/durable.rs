//! `peerbus bench durable`

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use peerbus::journal::{Journal, Options};
use serde_json::json;

use super::stats::{Samples, median};
use crate::output;

const SIZES: [usize; 2] = [100, 1024];
const WINDOWS: [usize; 4] = [1, 16, 256, 4096];

/// What it takes to store messages in a journal, synced to the disk, beside the machine's own
/// `fdatasync` of as many bytes in the same run: how long one takes, and how many go in a second
/// when so many wait at a time.
#[derive(Args)]
pub(crate) struct Durable {
    /// Folder on the disk to be measured, which is given a folder of its own for this run
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each is measured in a round, in milliseconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..))]
    millis: u64,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// One line of the report, round by round.
#[derive(Default)]
struct Line {
    rates: Vec<f64>,
    p50s: Vec<f64>,
    p99s: Vec<f64>,
}

impl Line {
    fn add(&mut self, samples: &Samples, took: Duration) {
        self.rates.push(samples.len() as f64 / took.as_secs_f64());
        self.p50s.push(samples.percentile(500));
        self.p99s.push(samples.percentile(990));
    }
}

impl Durable {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Where an embedding service's own tasks run: on a worker, not on the main thread.
        tokio::spawn(self.measure()).await?
    }

    async fn measure(self) -> anyhow::Result<()> {
        let dir = self.dir.join(format!("peerbus-bench-durable-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("{} can't be made", dir.display()))?;
        let dir = Removed(dir);
        let mut journals = Vec::new();
        for size in SIZES {
            let path = dir.0.join(size.to_string());
            journals.push(Journal::open(&path, &Options::default(), |_| {})?.0);
        }
        let mut raw: [Line; 2] = Default::default();
        let mut lines: [[Line; 4]; 2] = Default::default();
        for round in 0..=self.rounds {
            output::progress(Some(&format!("round {round} of {}", self.rounds)));
            for (place, size) in SIZES.into_iter().enumerate() {
                let (samples, took) = self.sync_raw(&dir.0.join(format!("raw-{size}")), size)?;
                // The first round is for warming up.
                if round > 0 {
                    raw[place].add(&samples, took);
                }
                for (window, line) in WINDOWS.into_iter().zip(&mut lines[place]) {
                    let (samples, took) = self.store(&journals[place], size, window).await?;
                    if round > 0 {
                        line.add(&samples, took);
                    }
                }
            }
        }
        output::progress(None);
        self.report(&raw, &lines)
    }

    /// The reference: the same bytes, written and synced by hand.
    fn sync_raw(&self, path: &std::path::Path, size: usize) -> anyhow::Result<(Samples, Duration)> {
        let mut file = File::options().create(true).append(true).open(path)?;
        let (body, mut samples, begun) = (vec![7; size], Samples::default(), Instant::now());
        while begun.elapsed() < Duration::from_millis(self.millis) {
            let sent = Instant::now();
            file.write_all(&body)?;
            file.sync_data()?;
            samples.add(sent.elapsed());
        }
        Ok((samples, begun.elapsed()))
    }

    /// Stores messages, `window` at a time.
    async fn store(
        &self,
        journal: &Journal,
        size: usize,
        window: usize,
    ) -> anyhow::Result<(Samples, Duration)> {
        let (mut samples, begun) = (Samples::default(), Instant::now());
        let append = || {
            let (sent, stored) = (Instant::now(), journal.append(vec![7; size]));
            async move { stored.await.map(|_| sent.elapsed()) }
        };
        let mut waiting: FuturesUnordered<_> = (0..window).map(|_| append()).collect();
        while let Some(took) = waiting.next().await {
            samples.add(took?);
            if begun.elapsed() < Duration::from_millis(self.millis) {
                waiting.push(append());
            }
        }
        Ok((samples, begun.elapsed()))
    }

    fn report(&self, raw: &[Line; 2], lines: &[[Line; 4]; 2]) -> anyhow::Result<()> {
        let mut text = format!(
            "Messages stored and synced, in turn, {} rounds of {} ms\n\n{:<40}{:>12}{:>12}{:>12}{:>10}\n",
            self.rounds, self.millis, "", "messages/s", "p50 µs", "p99 µs", "p50 ratio"
        );
        let mut results = Vec::new();
        for ((size, raw), lines) in SIZES.into_iter().zip(raw).zip(lines) {
            let reference = (format!("{size} B, write and fdatasync (reference)"), raw);
            let journal = WINDOWS.into_iter().zip(lines);
            let journal =
                journal.map(|(window, line)| (format!("{size} B, {window} at a time"), line));
            for (title, line) in std::iter::once(reference).chain(journal) {
                let ratios = line.p50s.iter().zip(&raw.p50s).map(|(own, raw)| own / raw).collect();
                let (rate, p50) = (median(line.rates.clone()), median(line.p50s.clone()));
                let (p99, ratio) = (median(line.p99s.clone()), median(ratios));
                text += &format!("{title:<40}{rate:>12.0}{p50:>12.0}{p99:>12.0}{ratio:>10.2}\n");
                results.push(json!({
                    "what": title, "size": size, "per_second": rate, "p50_us": p50,
                    "p99_us": p99, "p50_ratio": ratio,
                }));
            }
        }
        text +=
            "\nMedians over the rounds; the ratio is against the reference's p50 in that round.";
        let value = json!({ "rounds": self.rounds, "millis": self.millis, "results": results });
        output::line(self.json, &value, || text)?;
        Ok(())
    }
}

/// A folder that goes with this.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _left_behind = std::fs::remove_dir_all(&self.0);
    }
}
