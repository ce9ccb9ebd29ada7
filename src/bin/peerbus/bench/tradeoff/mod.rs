//! `peerbus bench tradeoff`

mod actor;
mod charts;
mod client;
mod compare;
mod html;
mod pace;
mod relay;
mod report;
mod round;
mod systems;
mod table;
mod tally;
mod usage;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;

pub(crate) use actor::Actor;
use compare::Comparison;
use report::{Report, Skipped};
use systems::SystemName;
use workload::Workload;

use super::process::Placement;
use crate::options::interrupted;
use crate::output;
use crate::output_file::OutputFile;

/// Runs one workload after the other over the mesh, the mesh with an outbox, the embedded broker,
/// NATS, JetStream and RabbitMQ, in turn, round after round. Unavailable systems are skipped and
/// listed. `./brokers run peerbus bench tradeoff` starts NATS and RabbitMQ.
#[derive(Args)]
pub(crate) struct Tradeoff {
    /// TOML file with the workloads [default: a standard set, which `--print` shows]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print the standard workloads, as a starting point for a file, and exit
    #[arg(long)]
    print: bool,
    /// Run only this workload of the file; repeatable
    #[arg(long, value_name = "NAME")]
    workload: Vec<String>,
    /// Run only this system; repeatable
    #[arg(long, value_enum, value_name = "NAME")]
    system: Vec<SystemName>,
    /// Number of rounds, unless a workload sets its own
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Length of each round, instead of the file's; workloads with a fault keep theirs
    #[arg(long, value_name = "TIME")]
    seconds: Option<humantime::Duration>,
    /// Folder on the disk of the stores; the run creates a folder of its own in it
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Placement of senders and receivers; the kernel places brokers
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    placement: Placement,
    /// Write the report as one page of HTML
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Tradeoff {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        if self.print {
            return output::write(workload::STANDARD.as_bytes());
        }
        let workloads = self.workloads()?;
        let (systems, skipped) = self.systems(&workloads)?;
        // An invalid path fails now, not after a quarter of an hour.
        let page = self.html.as_deref().map(OutputFile::create).transpose()?;
        let mut comparison = Comparison::new(workloads, systems, skipped, &self.dir).await?;
        let outcome = tokio::select! {
            outcome = comparison.run(self.rounds, self.placement, &self.dir) => outcome,
            _ = interrupted() => Err(anyhow::anyhow!("the run was interrupted")),
        };
        output::progress(None);
        let cut_short = outcome.as_ref().err().map(|error| format!("{error:#}"));
        let report = comparison.report(cut_short);
        self.show(&report, page)?;
        outcome.context("the comparison ended early; the finished results are above")
    }

    fn workloads(&self) -> anyhow::Result<Vec<Workload>> {
        let mut workloads = Workload::load(self.file.as_deref())?;
        for name in &self.workload {
            let known: Vec<&str> = workloads.iter().map(|it| it.name.as_str()).collect();
            ensure!(
                known.contains(&name.as_str()),
                "no workload {name:?}; choose one of {}",
                known.join(", ")
            );
        }
        workloads.retain(|it| self.workload.is_empty() || self.workload.contains(&it.name));
        if let Some(seconds) = self.seconds {
            ensure!(*seconds >= Duration::from_millis(100), "--seconds must be at least 0.1 s");
            for workload in workloads.iter_mut().filter(|it| it.fault.is_none()) {
                workload.seconds = *seconds;
            }
        }
        Ok(workloads)
    }

    /// The available systems that take part in any workload, and the unavailable ones.
    fn systems(&self, workloads: &[Workload]) -> anyhow::Result<(Vec<SystemName>, Vec<Skipped>)> {
        let wanted = SystemName::ALL.into_iter().filter(|system| {
            (self.system.is_empty() || self.system.contains(system))
                && workloads.iter().any(|workload| system.takes_part(workload))
        });
        let (mut there, mut skipped) = (Vec::new(), Vec::new());
        for system in wanted {
            match system.missing() {
                None => there.push(system),
                Some(reason) => {
                    skipped.push(Skipped { system: system.as_str().to_owned(), reason });
                }
            }
        }
        ensure!(
            !there.is_empty(),
            "none of the systems is available; start brokers by `./brokers run`"
        );
        Ok((there, skipped))
    }

    fn show(&self, report: &Report, page: Option<OutputFile>) -> anyhow::Result<()> {
        let value = serde_json::to_value(report)?;
        output::line(self.json, &value, || table::text(report))?;
        if let (Some(path), Some(page)) = (&self.html, page) {
            page.finish(&html::page(report))?;
            output::note(format_args!("the page is in {}", path.display()));
        }
        Ok(())
    }
}
