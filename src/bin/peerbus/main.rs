//! The `peerbus` command: nodes to run, messages to send, a demo and a benchmark.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod bridge;
mod broker;
mod demo;
mod keygen;
mod log;
mod node;
mod options;
mod outbox;
mod output;
mod output_file;
mod peers;
mod publish;
mod request;
mod scratch;
mod secrets;
mod send;
mod serve;
mod subscribe;
mod trust;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Brokerless messaging: nodes that find each other and talk directly.
#[derive(Parser)]
#[command(name = "peerbus", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Demonstrate a mesh of three node processes
    Demo(demo::Demo),
    /// Run a node that prints its events and messages
    Node(node::NodeCommand),
    /// Publish a message on a topic
    #[command(name = "pub")]
    Publish(publish::Publish),
    /// Print the messages on topics
    #[command(name = "sub")]
    Subscribe(subscribe::Subscribe),
    /// Send a one-way message to a service or a node
    Send(send::Send),
    /// Serve a name
    Serve(serve::Serve),
    /// Send a request to a service or a node, and print the reply
    Request(request::Request),
    /// Run a broker, for comparison with brokerless messaging
    Broker(broker::BrokerCommand),
    /// Join a mesh to a broker
    Bridge(bridge::BridgeCommand),
    /// Make an identity: a key pair whose public half is a node's id
    Keygen(keygen::Keygen),
    /// List the peers that can be reached
    Peers(peers::Peers),
    /// Inspect and repair the outbox of a stopped node
    #[command(subcommand)]
    Outbox(outbox::Outbox),
    /// Run benchmarks on this machine
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log::begin();
    if let Command::Bench(bench) = &cli.command {
        bench.prepare();
    }
    raise_descriptors();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Raises the limit of file descriptors as far as this user may: the usual one is meant for
/// programs that use `select`, and each connection takes one.
fn raise_descriptors() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        // The node fits its connections to whatever the limit is.
        let _refused = setrlimit(Resource::Nofile, limit);
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo(demo) => demo.run().await,
        Command::Node(node) => node.run().await,
        Command::Publish(publish) => publish.run().await,
        Command::Subscribe(subscribe) => subscribe.run().await,
        Command::Send(send) => send.run().await,
        Command::Serve(serve) => serve.run().await,
        Command::Request(request) => request.run().await,
        Command::Broker(broker) => broker.run().await,
        Command::Bridge(bridge) => bridge.run().await,
        Command::Keygen(keygen) => keygen.run(),
        Command::Peers(peers) => peers.run().await,
        // The command blocks on the disk.
        Command::Outbox(outbox) => tokio::task::spawn_blocking(|| outbox.run()).await?,
        Command::Bench(bench) => bench.run().await,
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // A closed pipe (`peerbus sub … | head`) is not a failure.
    let gone = error.downcast_ref::<std::io::Error>();
    if gone.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    output::note(format_args!("peerbus: {}", in_full(error)));
    if let Some(interrupted) = error.downcast_ref::<options::Interrupted>() {
        return ExitCode::from(interrupted.code);
    }
    ExitCode::FAILURE
}

/// An error and its causes, each once: some error texts include their cause.
fn in_full(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| match cause.to_string() {
        cause if told.is_empty() => cause,
        cause if told.contains(&cause) => told,
        cause => format!("{told}: {cause}"),
    })
}
