//! `peerbus sub`

use anyhow::bail;
use clap::Args;
use futures_util::stream::{SelectAll, StreamExt};
use peerbus::{Consumer, HandlerError, Node, Pattern, ServiceName};
use tokio::sync::mpsc::UnboundedSender;

use crate::options::{NodeOptions, interrupted};
use crate::output;

/// Runs until Ctrl-C, or until enough messages came.
#[derive(Args)]
pub(crate) struct Subscribe {
    /// Patterns: `*` stands for one token, a last `>` for the rest
    #[arg(required = true, value_name = "PATTERN")]
    patterns: Vec<Pattern>,
    /// Take guaranteed messages, as the durable subscription of that name; needs --outbox
    #[arg(long, value_name = "NAME", requires = "outbox")]
    durable: Option<ServiceName>,
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
        let (printed, mut from_handler) = tokio::sync::mpsc::unbounded_channel();
        let mut consumer = None;
        match (&self.durable, &self.patterns[..]) {
            (Some(name), [pattern]) => {
                consumer = Some(durable(&node, name, pattern, self.json, printed)?);
            }
            (Some(_), _) => bail!("a durable subscription has one pattern"),
            (None, patterns) => {
                for pattern in patterns {
                    messages.push(node.subscribe(pattern)?);
                }
            }
        }
        let mut end = std::pin::pin!(interrupted());
        let mut left = self.count.unwrap_or(u64::MAX);
        while left > 0 {
            tokio::select! {
                () = &mut end => break,
                Some(printed) = from_handler.recv() => {
                    printed?;
                    left -= 1;
                }
                Some(message) = messages.next() => {
                    output::line(self.json, &output::message(&message), || {
                        format!("{} {}", message.header.destination, output::body(&message))
                    })?;
                    left -= 1;
                }
            }
        }
        drop(messages);
        if let Some(consumer) = consumer {
            consumer.drain().await;
        }
        node.shutdown().await;
        Ok(())
    }
}

/// Prints what a durable subscription gets, and counts a message as processed when it is printed.
fn durable(
    node: &Node,
    name: &ServiceName,
    pattern: &Pattern,
    json: bool,
    printed: UnboundedSender<std::io::Result<()>>,
) -> anyhow::Result<Consumer> {
    let handler = move |call: peerbus::Call| {
        let message = call.message;
        let mut value = output::message(&message);
        value["attempt"] = message.attempt().into();
        value["redelivered"] = message.is_redelivered().into();
        let line = output::line(json, &value, || {
            let again = if message.is_redelivered() { " (redelivered)" } else { "" };
            format!("{} {}{again}", message.header.destination, output::body(&message))
        });
        let is_printed = line.is_ok();
        let _ending = printed.send(line);
        async move {
            if !is_printed {
                // This process is about to end. It is no fault of the message, which comes again.
                std::future::pending::<()>().await;
            }
            Ok::<(), HandlerError>(())
        }
    };
    Ok(node.consume(name.as_str(), pattern.as_str(), handler).concurrency(1).start()?)
}
