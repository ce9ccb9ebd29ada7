//! `peerbus serve`

use clap::Args;
use peerbus::ServiceName;
use tokio::sync::mpsc::unbounded_channel;

use crate::node::echo;
use crate::options::{NodeOptions, interrupted};

/// Serves until Ctrl-C, then finishes the running calls.
#[derive(Args)]
pub(crate) struct Serve {
    /// Name of the service
    service: ServiceName,
    /// Reply with the message's own body
    #[arg(long, required = true)]
    echo: bool,
    /// Maximum number of calls that run at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: u32,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl Serve {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let node = self.node.start().await?;
        let (told, mut unprinted) = unbounded_channel();
        let handler = echo(self.json, told);
        let service = node.serve(&self.service, handler).concurrency(self.concurrency).start()?;
        tokio::select! {
            _ = interrupted() => {}
            Some(error) = unprinted.recv() => return Err(error),
        }
        service.drain().await;
        node.shutdown().await;
        Ok(())
    }
}
