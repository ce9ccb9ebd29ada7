//! The results of a comparison, as shown on the terminal, in JSON and in HTML.

use serde::Serialize;

/// One run of `bench tradeoff`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// The version of this program.
    pub(crate) version: String,
    /// The start of the run, by the wall clock: `2026-11-25 04:00 UTC`.
    pub(crate) date: String,
    pub(crate) machine: Machine,
    pub(crate) systems: Vec<System>,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) workloads: Vec<Compared>,
    /// The reason the run ended early, if it did; the report holds the finished results.
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

/// A compared system.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct System {
    /// A short name: `mesh`, `outbox`, `embedded`, `nats`, `jetstream`, `rabbitmq`, `quorum`.
    pub(crate) name: String,
    /// The title for people: `RabbitMQ, quorum queue`.
    pub(crate) title: String,
    /// The version of the server: `nats-server 2.15.1`
    pub(crate) version: String,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Skipped {
    pub(crate) system: String,
    pub(crate) reason: String,
}

/// A workload, and its outcome over each system.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Compared {
    pub(crate) name: String,
    /// The workload in one line: `1 KiB published at 1,000/s, one to one, over TCP`.
    pub(crate) summary: String,
    /// The length of each round, in seconds.
    pub(crate) seconds: f64,
    /// The fault, such as `the receiver is killed`, with its begin and end in seconds from the
    /// start of a round.
    pub(crate) fault: Option<Fault>,
    pub(crate) results: Vec<Outcome>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Fault {
    pub(crate) what: String,
    pub(crate) from: f64,
    pub(crate) to: f64,
}

/// One system's outcome in a workload.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    /// The [`System::name`].
    pub(crate) system: String,
    /// The system's promise: `in memory; nobody confirms`.
    pub(crate) promise: String,
    /// The time from when a message was due to the receipt of it, or of its reply, in
    /// microseconds; over the rounds.
    pub(crate) p50_us: Spread,
    pub(crate) p99_us: Spread,
    pub(crate) p999_us: Spread,
    pub(crate) max_us: Spread,
    /// The distribution over all rounds: the share of messages, from 0 to 1, and the latency that
    /// they did not exceed, in microseconds.
    pub(crate) percentiles: Vec<(f64, f64)>,
    /// Messages or replies received per second.
    pub(crate) throughput: Spread,
    /// CPU seconds of all processes of the system for a million messages.
    pub(crate) cpu_s_per_million: Spread,
    /// The peak resident memory of all processes of the system, in MiB.
    pub(crate) memory_mib: Spread,
    /// Bytes on the network for each message, including all headers.
    pub(crate) wire_bytes: Spread,
    /// The number of messages sent; like the counts below, over all rounds.
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) lost: u64,
    /// The number of lost messages that the system reported to their sender.
    pub(crate) lost_and_told: u64,
    pub(crate) duplicated: u64,
    pub(crate) out_of_order: u64,
    /// The time from the end of the fault to the first message received, in seconds.
    pub(crate) recovery_s: Option<Spread>,
    /// The course of the last round.
    pub(crate) timeline: Vec<Moment>,
}

/// The minimum, median and maximum over the rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// A tenth of a second.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Moment {
    /// The time since the start of the round, in seconds.
    pub(crate) at: f64,
    /// Messages due in this moment.
    pub(crate) sent: u64,
    /// Messages received in this moment, whenever they were due.
    pub(crate) received: u64,
    /// Messages due in this moment that were never received.
    pub(crate) lost: u64,
}
