//! `peerbus sub`

use clap::Args;
use futures_util::stream::{SelectAll, StreamExt};
use peerbus::Pattern;

use crate::options::{NodeOptions, interrupted};
use crate::output;

/// Runs until Ctrl-C, or until enough messages came.
#[derive(Args)]
pub(crate) struct Subscribe {
    /// Patterns: `*` stands for one token, a last `>` for the rest
    #[arg(required = true, value_name = "PATTERN")]
    patterns: Vec<Pattern>,
    /// End after this many messages
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl Subscribe {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let node = self.node.start().await?;
        let mut messages = SelectAll::new();
        for pattern in &self.patterns {
            messages.push(node.subscribe(pattern)?);
        }
        let mut end = std::pin::pin!(interrupted());
        let mut left = self.count.unwrap_or(u64::MAX);
        while left > 0 {
            tokio::select! {
                () = &mut end => break,
                Some(message) = messages.next() => {
                    output::line(self.json, &output::message(&message), || {
                        format!("{} {}", message.header.destination, output::body(&message))
                    })?;
                    left -= 1;
                }
            }
        }
        drop(messages);
        node.shutdown().await;
        Ok(())
    }
}
