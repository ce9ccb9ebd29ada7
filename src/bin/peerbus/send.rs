//! `peerbus send`

use clap::Args;
use peerbus::Node;
use serde_json::json;

use crate::options::{BodyArg, NodeOptions, To, finish, settle};
use crate::output;

/// Sends one-way messages, and ends when the remote handler is done. With --outbox, the messages
/// are stored first; unprocessed ones are kept there, and sent by the next run. With a broker that
/// keeps messages, --guaranteed stores them at the broker, and the command ends when they are.
#[derive(Args)]
pub(crate) struct Send {
    #[command(flatten)]
    to: To,
    #[command(flatten)]
    body: BodyArg,
    /// Number of messages
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Ordering key: all messages of a key go to the same one of the known instances
    #[arg(long)]
    key: Option<String>,
    /// User header NAME=VALUE; repeatable
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = crate::publish::header)]
    headers: Vec<(String, String)>,
    /// Store the message until it is processed, in the outbox or at the broker; implied by --outbox
    #[arg(long)]
    guaranteed: bool,
    /// Expiry of a guaranteed message, from now [default: never]
    #[arg(long, value_name = "TIME")]
    expires: Option<humantime::Duration>,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl Send {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let body = self.body.read()?;
        let node = self.node.start().await?;
        if self.guaranteed || self.node.outbox.is_some() {
            return self.store(&node, &body).await;
        }
        anyhow::ensure!(self.expires.is_none(), "--expires requires --outbox or --guaranteed");
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

    async fn store(&self, node: &Node, body: &[u8]) -> anyhow::Result<()> {
        let to = self.to.parse()?;
        let mut receipts = Vec::new();
        for _ in 0..self.count {
            let mut send = node.send(to.clone(), body);
            if let Some(key) = &self.key {
                send = send.key(key);
            }
            for (name, value) in &self.headers {
                send = send.header(name, value);
            }
            let mut message = send.guaranteed();
            if let Some(time) = self.expires {
                message = message.expires_in(*time);
            }
            let receipt = message.await?;
            let value = json!({ "stored": receipt.id() });
            output::line(self.json, &value, || format!("stored {}", receipt.id()))?;
            receipts.push(receipt);
        }
        settle(node, receipts, *self.to.wait, self.json).await
    }
}
