//! What a comparison found, as the terminal, JSON and HTML show it.

use serde::Serialize;

/// One run of `bench tradeoff`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// The version of this program.
    pub(crate) version: String,
    /// When the run began, by the clock on the wall: `2026-11-25 04:00 UTC`.
    pub(crate) date: String,
    pub(crate) machine: Machine,
    pub(crate) systems: Vec<System>,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) workloads: Vec<Compared>,
    /// Why the run ended before its time; what is finished is there all the same.
    pub(crate) cut_short: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    /// The median of an `fdatasync` after 1 KiB on the disk of the stores, in microseconds.
    pub(crate) fdatasync_us: f64,
}

/// A system that was compared.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct System {
    /// A short name: `mesh`, `outbox`, `embedded`, `nats`, `jetstream`, `rabbitmq`, `quorum`.
    pub(crate) name: String,
    /// For people: `RabbitMQ, quorum queue`.
    pub(crate) title: String,
    /// `nats-server 2.15.1`
    pub(crate) version: String,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Skipped {
    pub(crate) system: String,
    pub(crate) reason: String,
}

/// A workload, and what became of it over each system.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Compared {
    pub(crate) name: String,
    /// What the workload is, in a line: `1 KiB published at 1,000/s, one to one, over TCP`.
    pub(crate) summary: String,
    /// How long each round ran, in seconds.
    pub(crate) seconds: f64,
    /// From when to when the fault lasted, in seconds from the start of a round, and what it was:
    /// `the receiver is killed`.
    pub(crate) fault: Option<Fault>,
    pub(crate) results: Vec<Outcome>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Fault {
    pub(crate) what: String,
    pub(crate) from: f64,
    pub(crate) to: f64,
}

/// One system's part in a workload.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    /// The [`System::name`].
    pub(crate) system: String,
    /// What it promised: `in memory; nobody confirms`.
    pub(crate) promise: String,
    /// From when a message was due until it was received, or its reply was, in microseconds;
    /// each over the rounds.
    pub(crate) p50_us: Spread,
    pub(crate) p99_us: Spread,
    pub(crate) p999_us: Spread,
    pub(crate) max_us: Spread,
    /// The distribution over all rounds: the share of messages, from 0 to 1, and the latency that
    /// they did not exceed, in microseconds.
    pub(crate) percentiles: Vec<(f64, f64)>,
    /// Messages received a second, or replies.
    pub(crate) throughput: Spread,
    /// Processor seconds of all processes of the system for a million messages.
    pub(crate) cpu_s_per_million: Spread,
    /// Resident memory of all processes of the system, at its highest, in MiB.
    pub(crate) memory_mib: Spread,
    /// Bytes on the network for each message, all headers counted.
    pub(crate) wire_bytes: Spread,
    /// Over all rounds.
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) lost: u64,
    /// Of the lost, how many the system told its sender of.
    pub(crate) lost_and_told: u64,
    pub(crate) duplicated: u64,
    pub(crate) out_of_order: u64,
    /// From the end of the fault to the first message received, in seconds.
    pub(crate) recovery_s: Option<Spread>,
    /// The course of the last round.
    pub(crate) timeline: Vec<Moment>,
}

/// The lowest, the middle and the highest over the rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// A tenth of a second.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Moment {
    /// Since the start of the round, in seconds.
    pub(crate) at: f64,
    /// Messages that were due then.
    pub(crate) sent: u64,
    /// Messages that were received then, whenever they were due.
    pub(crate) received: u64,
    /// Of those that were due then, how many were never received.
    pub(crate) lost: u64,
}
