//! `peerbus bench restart`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use peerbus::{Call, HandlerError, Node};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::unconstrained;

use super::process::{Far, usage};
use crate::output;
use crate::scratch::Scratch;

/// The restart time of a node with many messages in its outbox: until the first of them reaches its
/// handler, and until all are processed; and the node's memory meanwhile.
#[derive(Args)]
pub(crate) struct Restart {
    /// Messages in the outbox
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pending: u64,
    /// Body size, in bytes
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// Folder on the disk to measure; the run creates a folder of its own in it
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

async fn node(runtime_dir: &Path, store: &Path) -> anyhow::Result<Node> {
    let config = Node::builder().runtime_dir(runtime_dir).mdns(false).outbox(store);
    Ok(config.outbox_messages(u64::MAX).outbox_bytes(u64::MAX).start().await?)
}

impl Restart {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let stores = Scratch::inside(&self.dir)?;
        let (runtime, store) = (Scratch::new()?, stores.path().join("near"));
        self.fill(runtime.path(), &store).await?;

        let receiver = node(runtime.path(), &stores.path().join("far")).await?;
        let (count, first, all) =
            (Arc::new(AtomicU64::new(0)), Arc::new(Notify::new()), Arc::new(Notify::new()));
        let pending = self.pending;
        let (counted, came, done) = (count.clone(), first.clone(), all.clone());
        let handler = move |_: Call| {
            match counted.fetch_add(1, Ordering::Relaxed) + 1 {
                1 => came.notify_one(),
                n if n == pending => done.notify_one(),
                _ => {}
            }
            std::future::ready(Ok::<_, HandlerError>(""))
        };
        let _service = receiver.serve("work", handler).start()?;
        let begun = Instant::now();
        let args = [
            "--runtime-dir".to_owned(),
            runtime.path().display().to_string(),
            "--store".to_owned(),
            store.display().to_string(),
        ];
        let mut sender = Far::start("restarted", args).await?;
        first.notified().await;
        let to_first = begun.elapsed();
        let (_, at_first) = sender.usage().await?;
        let limit = Duration::from_secs(600);
        tokio::time::timeout(limit, all.notified())
            .await
            .context("timed out after 600 s: not all messages arrived")?;
        let to_all = begun.elapsed();
        let (_, at_last) = sender.usage().await?;
        let mib = |bytes: u64| bytes as f64 / (1024.0 * 1024.0);
        let value = json!({
            "pending": self.pending, "size": self.size,
            "results": [
                { "what": "first", "s": to_first.as_secs_f64(), "resident": at_first },
                { "what": "all", "s": to_all.as_secs_f64(), "resident": at_last },
            ],
        });
        output::line(self.json, &value, || {
            format!(
                "{} messages of {} bytes in the outbox: the first at its handler {:.2} s after the \
                 start of the process, with {:.0} MiB resident; all after {:.1} s, with {:.0} MiB",
                self.pending,
                self.size,
                to_first.as_secs_f64(),
                mib(at_first),
                to_all.as_secs_f64(),
                mib(at_last)
            )
        })?;
        Ok(())
    }

    /// Stores messages that no node accepts yet.
    async fn fill(&self, runtime_dir: &Path, store: &Path) -> anyhow::Result<()> {
        let node = node(runtime_dir, store).await?;
        let body = vec![7; self.size];
        let mut storing = FuturesUnordered::new();
        for number in 0..self.pending {
            if number % 100_000 == 0 {
                output::progress(Some(&format!("{number} of {} stored", self.pending)));
            }
            storing.push(node.send("work", &body[..]).guaranteed().into_future());
            if storing.len() >= 4096
                && let Some(stored) = unconstrained(storing.next()).await
            {
                stored?;
            }
        }
        while let Some(stored) = unconstrained(storing.next()).await {
            stored?;
        }
        output::progress(None);
        node.shutdown_within(Duration::ZERO).await;
        Ok(())
    }
}

/// The process that restarts.
#[derive(Args)]
pub(crate) struct Restarted {
    #[arg(long)]
    runtime_dir: PathBuf,
    #[arg(long)]
    store: PathBuf,
}

impl Restarted {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        output::say("here")?;
        let _node = node(&self.runtime_dir, &self.store).await?;
        let answering = tokio::task::spawn_blocking(|| {
            for line in std::io::stdin().lines() {
                line?;
                let (cpu, resident) = usage()?;
                output::say(format_args!("{} {resident}", cpu.as_nanos()))?;
            }
            Ok(())
        });
        answering.await?
    }
}
