//! `peerbus pub`

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use peerbus::{Body, Node, Topic, WaitError};
use serde_json::json;

use crate::options::{BodyArg, NodeOptions, broker_trouble, finish, settle};
use crate::output;

/// Waits for a subscriber, publishes, and ends when the message is accepted. With --outbox, the
/// message is stored for the durable subscriptions known to this outbox, and kept there until they
/// have processed it.
#[derive(Args)]
pub(crate) struct Publish {
    /// Topic, such as orders.eu.placed
    topic: Topic,
    #[command(flatten)]
    body: BodyArg,
    /// Number of messages
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Number of subscribing nodes to wait for; with --outbox, durable subscriptions that accept
    /// messages now
    #[arg(long, value_name = "N", default_value_t = 1)]
    subscribers: usize,
    /// Time to wait for them
    #[arg(long, value_name = "TIME", default_value = "3s")]
    wait: humantime::Duration,
    /// Ordering key
    #[arg(long)]
    key: Option<String>,
    /// User header NAME=VALUE; repeatable
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Store the message until all durable subscriptions have processed it: in the outbox, or at
    /// the broker; implied by --outbox
    #[arg(long)]
    guaranteed: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

pub(crate) fn header(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}

impl Publish {
    /// Waits for durable subscriptions that accept messages now. Known ones that are away will do
    /// after the wait: the message is kept for them.
    async fn wait_for_consumers(&self, node: &Node) -> Result<(), WaitError> {
        let (topic, wanted) = (&self.topic, self.subscribers);
        if node.wait_for_present_consumers(topic, wanted, *self.wait).await.is_ok() {
            return Ok(());
        }
        node.wait_for_consumers(topic, wanted, Duration::ZERO).await?;
        output::note(format_args!(
            "timed out after {}: of the durable subscriptions to {topic}, not {wanted} accept \
             messages now; the message is kept for those that are away",
            self.wait
        ));
        Ok(())
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let body: Body = self.body.read()?.into();
        let node = self.node.start().await?;
        let durable = self.guaranteed || self.node.outbox.is_some();
        let waited = match durable {
            // The broker keeps the message for absent subscribers.
            true if self.node.broker.is_some() => Ok(()),
            true => self.wait_for_consumers(&node).await,
            false => node.wait_for_subscribers(&self.topic, self.subscribers, *self.wait).await,
        };
        if waited.is_err() {
            let met = node.peers().len();
            let broker = broker_trouble(&node);
            node.shutdown().await;
            if let Some(trouble) = broker {
                bail!(trouble);
            }
            let who = match self.subscribers {
                1 if durable => "no durable subscription is known".to_owned(),
                1 => "no node subscribes".to_owned(),
                wanted => format!("fewer than {wanted} nodes subscribe"),
            };
            bail!("timed out after {}: {who} to {} (met {met} nodes)", self.wait, self.topic);
        }
        let (mut queued, mut dropped, mut receipts) = (0, 0, Vec::new());
        for _ in 0..self.count {
            let mut publish = node.publish(&self.topic, body.clone());
            if let Some(key) = &self.key {
                publish = publish.key(key);
            }
            for (name, value) in &self.headers {
                publish = publish.header(name, value);
            }
            if durable {
                let receipt = publish.guaranteed().await?;
                let value = json!({ "stored": receipt.id(), "for": receipt.destinations() });
                output::line(self.json, &value, || {
                    format!("stored {} for {}", receipt.id(), receipt.destinations())
                })?;
                receipts.push(receipt);
                continue;
            }
            let report = publish.await?;
            queued += report.queued;
            dropped += report.dropped.len();
        }
        if durable {
            return settle(&node, receipts, *self.wait, self.json).await;
        }
        let value = json!({ "queued": queued, "dropped": dropped });
        output::line(self.json, &value, || {
            format!("queued for {queued} nodes, dropped for {dropped}")
        })?;
        finish(&node).await
    }
}
