//! `peerbus send`

use clap::Args;
use serde_json::json;

use crate::options::{BodyArg, NodeOptions, To, finish};
use crate::output;

/// Sends one way, and ends when the far handler is done.
#[derive(Args)]
pub(crate) struct Send {
    #[command(flatten)]
    to: To,
    #[command(flatten)]
    body: BodyArg,
    /// How many times
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Ordering key: of the instances that are known, the same one takes all of a key's messages
    #[arg(long)]
    key: Option<String>,
    /// User header NAME=VALUE; repeatable
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = crate::publish::header)]
    headers: Vec<(String, String)>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl Send {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let body = self.body.read()?;
        let node = self.node.start().await?;
        let to = self.to.find(&node).await?;
        for _ in 0..self.count {
            let mut send = node.send(to.clone(), &body);
            if let Some(key) = &self.key {
                send = send.key(key);
            }
            for (name, value) in &self.headers {
                send = send.header(name, value);
            }
            let sent = send.await?;
            let value = json!({ "id": sent.id, "to": sent.to });
            output::line(self.json, &value, || format!("sent {} to {}", sent.id, sent.to.short()))?;
        }
        finish(&node).await?;
        let failed = node.counters().dropped_total();
        anyhow::ensure!(failed == 0, "{failed} of {} messages were not handled", self.count);
        Ok(())
    }
}
