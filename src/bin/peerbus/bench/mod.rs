//! `peerbus bench`
mod latency;
mod process;
mod reference;
mod requests;
mod stats;
mod throughput;

use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Round trips of small requests, beside plain TCP and the bare zeromq crate in the same run
    Latency(latency::Latency),
    /// Messages a second, beside the bare zeromq crate and plain TCP in the same run
    Throughput(throughput::Throughput),
    /// Requests a second with many in flight, beside plain TCP in the same run
    Requests(requests::Requests),
    /// The far side of `latency` and `requests`
    #[command(hide = true)]
    Echo(latency::Echo),
    /// The far side of `throughput`
    #[command(hide = true)]
    Sink(throughput::Sink),
}

impl Bench {
    /// What has to be done before there are threads.
    pub(crate) fn prepare(&self) {
        match self {
            Self::Latency(latency) => latency.prepare(),
            Self::Throughput(throughput) => throughput.prepare(),
            Self::Requests(requests) => requests.prepare(),
            Self::Sink(sink) => sink.prepare(),
            Self::Echo(echo) => echo.prepare(),
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Latency(latency) => latency.run().await,
            Self::Throughput(throughput) => throughput.run().await,
            Self::Requests(requests) => requests.run().await,
            Self::Sink(sink) => sink.run().await,
            Self::Echo(echo) => echo.run().await,
        }
    }
}
