//! `peerbus bench`
mod by_hand;
mod durable;
mod latency;
mod load;
mod process;
mod reference;
mod requests;
mod restart;
mod scale;
mod stats;
mod stream;
mod throughput;
mod tradeoff;

use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Round trips of small requests, beside plain TCP and the bare zeromq crate in the same run
    Latency(latency::Latency),
    /// Latency of messages at a high, even rate, beside the bare zeromq crate in the same run
    Load(load::Load),
    /// Messages a second, to one or many, beside the bare zeromq crate in the same run
    Throughput(throughput::Throughput),
    /// Requests a second with many in flight, beside plain TCP in the same run
    Requests(requests::Requests),
    /// Cost of guaranteed delivery, beside the disk's own fdatasync in the same run
    Durable(durable::Durable),
    /// Restart time of a node with many messages in its outbox
    Restart(restart::Restart),
    /// Many node processes: time until all are linked, memory and CPU at rest
    Scale(scale::Scale),
    /// The same workloads over the mesh and over brokers, side by side
    Tradeoff(tradeoff::Tradeoff),
    /// The remote side of `latency` and `requests`
    #[command(hide = true)]
    Echo(latency::Echo),
    /// The remote side of `throughput` and `load`
    #[command(hide = true)]
    Sink(stream::Sink),
    /// The remote side of `durable`
    #[command(hide = true)]
    Keeper(durable::Keeper),
    /// The process that `restart` starts
    #[command(hide = true)]
    Restarted(restart::Restarted),
    /// One of the processes of `tradeoff`
    #[command(hide = true)]
    Actor(tradeoff::Actor),
    /// One of the nodes of `scale`
    #[command(hide = true)]
    Member(scale::Member),
}

impl Bench {
    /// Sets up what must precede other threads.
    pub(crate) fn prepare(&self) {
        match self {
            Self::Latency(latency) => latency.prepare(),
            Self::Load(load) => load.prepare(),
            Self::Throughput(throughput) => throughput.prepare(),
            Self::Requests(requests) => requests.prepare(),
            Self::Sink(sink) => sink.prepare(),
            Self::Echo(echo) => echo.prepare(),
            Self::Durable(durable) => durable.prepare(),
            Self::Keeper(keeper) => keeper.prepare(),
            Self::Actor(actor) => actor.prepare(),
            Self::Restart(_)
            | Self::Restarted(_)
            | Self::Scale(_)
            | Self::Member(_)
            | Self::Tradeoff(_) => {}
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Latency(latency) => latency.run().await,
            Self::Load(load) => load.run().await,
            Self::Throughput(throughput) => throughput.run().await,
            Self::Requests(requests) => requests.run().await,
            Self::Sink(sink) => sink.run().await,
            Self::Echo(echo) => echo.run().await,
            Self::Durable(durable) => durable.run().await,
            Self::Keeper(keeper) => keeper.run().await,
            Self::Restart(restart) => restart.run().await,
            Self::Restarted(restarted) => restarted.run().await,
            Self::Scale(scale) => scale.run().await,
            Self::Member(member) => member.run().await,
            Self::Tradeoff(tradeoff) => tradeoff.run().await,
            Self::Actor(actor) => actor.run().await,
        }
    }
}
