//! The demo's scene of a receiver that is killed midway, without an outbox and with one.

use std::collections::HashMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use peerbus::{MeshName, Node};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{STEP, say, title};
use crate::scratch::Scratch;

const MESSAGES: u32 = 300;
/// The number of handled messages after which the receiver is killed.
const KILL_AFTER: usize = 100;

/// Shows the purpose of the outbox.
pub(super) async fn show() -> anyhow::Result<()> {
    title("A receiver is killed in mid-stream")?;
    say(&format!(
        "You send {MESSAGES} messages; after {KILL_AFTER} of them dave is killed, and restarted."
    ))?;
    for guaranteed in [false, true] {
        let scene = Scene::begin(guaranteed).await?;
        let (refused, handled) = scene.play().await?;
        let lost = MESSAGES as usize - handled.len();
        let again = handled.values().filter(|times| **times > 1).count();
        let how = if guaranteed { "With an outbox on both sides" } else { "Without an outbox" };
        let mut text = format!("  {how}: {} handled, {lost} lost", handled.len());
        if refused > 0 {
            text += &format!(", {refused} of these refused at once, while no receiver was running");
        }
        if again > 0 {
            text += &format!(", {again} handled twice, since dave died before he could record it");
        }
        say(&text)?;
        anyhow::ensure!(!guaranteed || lost == 0, "guaranteed messages were lost");
    }
    Ok(())
}

struct Scene {
    guaranteed: bool,
    mesh: String,
    stores: Scratch,
    node: Node,
    dave: Child,
    handled: UnboundedReceiver<String>,
    lines: UnboundedSender<String>,
}

impl Scene {
    async fn begin(guaranteed: bool) -> anyhow::Result<Self> {
        let mesh = format!("crash-{}-{}", std::process::id(), u8::from(guaranteed));
        let stores = Scratch::new()?;
        let name: MeshName = mesh.parse()?;
        let config = Node::builder().name("you").mesh(name).mdns(false);
        let config = config.service_grace(Duration::ZERO);
        let node = match guaranteed {
            true => config.outbox(stores.path().join("you")).start().await?,
            false => config.start().await?,
        };
        let (lines, handled) = unbounded_channel();
        let store = guaranteed.then(|| stores.path().join("dave"));
        let dave = start_dave(&mesh, store.as_deref(), &lines)?;
        node.wait_for_service("billing", STEP).await.context("dave did not start")?;
        Ok(Self { guaranteed, mesh, stores, node, dave, handled, lines })
    }

    /// Sends the messages; returns the number of refused ones, and how often each other was
    /// handled.
    async fn play(mut self) -> anyhow::Result<(u32, HashMap<String, u32>)> {
        let node = self.node.clone();
        let guaranteed = self.guaranteed;
        let sending = tokio::spawn(async move {
            let (mut refused, mut receipts) = (0, Vec::new());
            for number in 0..MESSAGES {
                let send = node.send("billing", number.to_string());
                match guaranteed {
                    true => receipts.push(send.guaranteed().await?),
                    false => refused += u32::from(send.await.is_err()),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for receipt in receipts {
                receipt.processed().await?;
            }
            Ok::<_, anyhow::Error>(refused)
        });
        let mut handled = HashMap::<String, u32>::new();
        while handled.len() < KILL_AFTER {
            let body = self.handled.recv().await.context("dave printed nothing")?;
            *handled.entry(body).or_default() += 1;
        }
        self.dave.kill().await?;
        let store = self.guaranteed.then(|| self.stores.path().join("dave"));
        self.dave = start_dave(&self.mesh, store.as_deref(), &self.lines)?;
        let refused = tokio::time::timeout(STEP, sending)
            .await
            .context("timed out: the messages were not sent or processed")???;
        // All handled messages are confirmed by now; their lines may still be in dave's pipe.
        self.node.shutdown().await;
        super::terminate(&mut self.dave, "dave").await;
        drop(self.lines);
        while let Some(body) = self.handled.recv().await {
            *handled.entry(body).or_default() += 1;
        }
        Ok((refused, handled))
    }
}

/// Starts a process that serves "billing", and reads the messages that it prints.
fn start_dave(
    mesh: &str,
    store: Option<&std::path::Path>,
    lines: &UnboundedSender<String>,
) -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "billing", "--echo", "--json", "--no-mdns"]);
    command.args(["--name", "dave", "--mesh", mesh]);
    if let Some(store) = store {
        command.arg("--outbox").arg(store);
    }
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("dave can't be started")?;
    let stdout = child.stdout.take().context("the child has no output")?;
    let lines = lines.clone();
    tokio::spawn(async move {
        let mut output = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = output.next_line().await {
            let line: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(body) = line["body"].as_str() {
                let _scene_is_over = lines.send(body.to_owned());
            }
        }
    });
    Ok(child)
}
