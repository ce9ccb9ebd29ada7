//! `peerbus bench`
mod latency;
mod reference;
mod stats;

use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Round trips of small requests, beside plain TCP and the bare zeromq crate in the same run
    Latency(latency::Latency),
    /// The far side of a benchmark
    #[command(hide = true)]
    Echo(latency::Echo),
}

impl Bench {
    /// What has to be done before there are threads.
    pub(crate) fn prepare(&self) {
        match self {
            Self::Latency(latency) => latency.prepare(),
            Self::Echo(echo) => echo.prepare(),
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Latency(latency) => latency.run().await,
            Self::Echo(echo) => echo.run().await,
        }
    }
}
