//! `peerbus sub`

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::bail;
use clap::Args;
use futures_util::stream::{SelectAll, StreamExt};
use peerbus::{Consumer, HandlerError, Node, Pattern, ServiceName};
use tokio::sync::mpsc::UnboundedSender;

use crate::options::{Interrupted, NodeOptions, interrupted};
use crate::output::{self, Printer};

/// Runs until Ctrl-C, or until the number of messages set by --count.
#[derive(Args)]
pub(crate) struct Subscribe {
    /// Patterns: `*` matches one token, a `>` at the end one or more
    #[arg(required = true, value_name = "PATTERN")]
    patterns: Vec<Pattern>,
    /// Receive guaranteed messages, as the durable subscription of that name; requires --outbox, or
    /// with a broker --identity
    #[arg(long, value_name = "NAME")]
    durable: Option<ServiceName>,
    /// End after this many messages; with another exit code than 0 if a signal comes first
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Print one JSON object per line
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
        let consumer = Arc::new(Mutex::new(None));
        match (&self.durable, &self.patterns[..]) {
            (Some(name), [pattern]) => {
                let limit = Limit { left: self.count, consumer: consumer.clone() };
                // Locked until it is set, so that the first message can end it.
                let mut consumer = lock(&consumer);
                *consumer = Some(durable(&node, name, pattern, self.json, limit, printed)?);
            }
            (Some(_), _) => bail!("a durable subscription has one pattern"),
            (None, patterns) => {
                for pattern in patterns {
                    messages.push(node.subscribe(pattern)?);
                }
            }
        }
        let mut end = std::pin::pin!(interrupted());
        let (mut left, mut signal) = (self.count.unwrap_or(u64::MAX), None);
        while left > 0 {
            tokio::select! {
                code = &mut end => {
                    signal = Some(code);
                    break;
                }
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
        let consumer = lock(&consumer).take();
        if let Some(consumer) = consumer {
            consumer.drain().await;
        }
        // Waits for the last handler too, even if the handler ended the subscription.
        node.shutdown().await;
        match (self.count, signal) {
            (Some(count), Some(code)) => {
                let text = format!("interrupted after {} of {count} messages", count - left);
                Err(Interrupted { text, code }.into())
            }
            _ => Ok(()),
        }
    }
}

/// Ends a durable subscription at the last wanted message, before that is acknowledged: later
/// messages are left for the next run.
struct Limit {
    left: Option<u64>,
    consumer: Arc<Mutex<Option<Consumer>>>,
}

impl Limit {
    fn count(&mut self) {
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(1);
            if *left == 0 {
                drop(lock(&self.consumer).take());
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints the messages of a durable subscription; a printed message counts as processed.
fn durable(
    node: &Node,
    name: &ServiceName,
    pattern: &Pattern,
    json: bool,
    limit: Limit,
    printed: UnboundedSender<anyhow::Result<()>>,
) -> anyhow::Result<Consumer> {
    let (limit, printer) = (Arc::new(Mutex::new(limit)), Printer::start());
    let handler = move |call: peerbus::Call| {
        let (limit, printer, printed) = (limit.clone(), printer.clone(), printed.clone());
        async move {
            let message = call.message.clone();
            let mut value = output::message(&message);
            value["attempt"] = message.attempt().into();
            value["redelivered"] = message.is_redelivered().into();
            let text = || {
                let again = if message.is_redelivered() { " (redelivered)" } else { "" };
                format!("{} {}{again}", message.header.destination, output::body(&message))
            };
            let line = printer.line(&call, json, &value, text).await;
            let is_printed = line.is_ok();
            if is_printed {
                lock(&limit).count();
            }
            let _ending = printed.send(line);
            if !is_printed {
                // This process is about to exit. The message is not at fault, and will be
                // redelivered.
                std::future::pending::<()>().await;
            }
            Ok::<(), HandlerError>(())
        }
    };
    Ok(node.consume(name.as_str(), pattern.as_str(), handler).concurrency(1).start()?)
}
