//! `peerbus node`: a demo node that prints its events and messages.

use std::future;
use std::time::Duration;

use clap::Args;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{SelectAll, StreamExt};
use peerbus::{Body, Call, HandlerError, Node, Pattern, ServiceName, Topic};
use serde_json::json;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{Interval, interval};

use crate::options::{NodeOptions, interrupted};
use crate::output::{self, Printer};

/// Runs until Ctrl-C.
#[derive(Args)]
pub(crate) struct NodeCommand {
    /// Pattern to subscribe to; repeatable
    #[arg(long, value_name = "PATTERN")]
    subscribe: Vec<Pattern>,
    /// Service to offer; it echoes each message; repeatable
    #[arg(long, value_name = "SERVICE")]
    serve: Vec<ServiceName>,
    /// Topic to publish on repeatedly
    #[arg(long, value_name = "TOPIC")]
    publish: Option<Topic>,
    /// Interval between messages
    #[arg(long, value_name = "TIME", default_value = "1s")]
    every: humantime::Duration,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: NodeOptions,
}

impl NodeCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let node = self.node.start().await?;
        let mut events = node.events();
        let value = json!({
            "event": "started", "id": node.id(), "name": node.name(), "listening": node.listening(),
        });
        output::line(self.json, &value, || {
            let listening: Vec<String> = node.listening().iter().map(ToString::to_string).collect();
            let tcp =
                if listening.is_empty() { "this host only".into() } else { listening.join(", ") };
            format!("{} is up as {} ({tcp})", node.name(), node.id())
        })?;
        if let Some(hint) = self.node.hint() {
            output::note(hint);
        }
        let mut messages = SelectAll::new();
        for pattern in &self.subscribe {
            messages.push(node.subscribe(pattern)?);
        }
        let mut services = Vec::new();
        let (told, mut unprinted) = unbounded_channel();
        for name in &self.serve {
            services.push(node.serve(name, echo(self.json, told.clone())).start()?);
        }
        let mut ticks = interval((*self.every).max(Duration::from_millis(1)));
        let mut number = 0u64;
        let mut pace = Pace::new();
        let mut end = std::pin::pin!(interrupted());
        loop {
            tokio::select! {
                _ = &mut end => break,
                Some(error) = unprinted.recv() => return Err(error),
                Some(message) = messages.next(), if !messages.is_empty() => {
                    output::line(self.json, &output::message(&message), || {
                        format!("{}: {}", message.header.destination, output::body(&message))
                    })?;
                }
                Some(event) = events.recv() => {
                    let (value, text) = output::event(&event);
                    if pace.take() {
                        output::line(self.json, &value, || text)?;
                    }
                }
                skipped = pace.skipped() => {
                    let value = json!({ "event": "skipped", "count": skipped });
                    output::line(self.json, &value, || format!("{skipped} more events"))?;
                }
                _ = ticks.tick(), if self.publish.is_some() => {
                    number += 1;
                    publish(&node, self.publish.as_ref(), number).await?;
                }
            }
        }
        drop(services);
        let report = node.shutdown().await;
        let value = json!({
            "event": "stopped", "undelivered": report.undelivered, "in_doubt": report.in_doubt,
            "aborted": report.aborted, "pending": report.pending, "counters": report.counters,
        });
        output::line(self.json, &value, || {
            let kept = match report.pending {
                0 => String::new(),
                kept => format!(", {kept} kept in the outbox"),
            };
            format!(
                "stopped; {} not delivered, {} in doubt{kept}",
                report.undelivered, report.in_doubt
            )
        })?;
        Ok(())
    }
}

/// The most events that are printed in a second: strangers can cause any number.
const EVENTS_A_SECOND: u32 = 25;

/// Limits printed events per second, and counts the others.
struct Pace {
    second: Interval,
    left: u32,
    skipped: u64,
}

impl Pace {
    fn new() -> Self {
        Self { second: interval(Duration::from_secs(1)), left: EVENTS_A_SECOND, skipped: 0 }
    }

    /// Returns true if an event may be printed.
    fn take(&mut self) -> bool {
        match self.left.checked_sub(1) {
            Some(left) => self.left = left,
            None => self.skipped += 1,
        }
        self.skipped == 0
    }

    /// Waits for the end of a second in which events were skipped; returns their number.
    async fn skipped(&mut self) -> u64 {
        loop {
            self.second.tick().await;
            self.left = EVENTS_A_SECOND;
            match std::mem::take(&mut self.skipped) {
                0 => {}
                skipped => return skipped,
            }
        }
    }
}

async fn publish(node: &Node, topic: Option<&Topic>, number: u64) -> anyhow::Result<()> {
    if let Some(topic) = topic {
        node.publish(topic, format!("{} says {number}", node.name())).await?;
    }
    Ok(())
}

/// A handler that prints each call and echoes it. If the output fails, it reports the error and
/// leaves the call open: the process then exits, and the caller is notified that the node is gone.
pub(crate) fn echo(
    json: bool,
    unprinted: UnboundedSender<anyhow::Error>,
) -> impl Fn(Call) -> BoxFuture<'static, Result<Body, HandlerError>> {
    let printer = Printer::start();
    move |call| {
        let (printer, unprinted) = (printer.clone(), unprinted.clone());
        let echo = async move {
            let message = call.message.clone();
            let mut value = output::message(&message);
            value["event"] = json!("call");
            let text =
                || format!("call to {}: {}", message.header.destination, output::body(&message));
            match printer.line(&call, json, &value, text).await {
                Ok(()) => Ok(message.body.into()),
                Err(error) => {
                    let _ending = unprinted.send(error);
                    future::pending().await
                }
            }
        };
        echo.boxed()
    }
}
