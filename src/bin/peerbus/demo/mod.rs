//! `peerbus demo`: the main features in one command.

mod crash;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use peerbus::{MeshName, Node};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::output;

/// Starts three node processes and demonstrates messaging between them. Takes a few seconds.
#[derive(Args)]
pub(crate) struct Demo {}

const STEP: Duration = Duration::from_secs(20);
const NAMES: [&str; 3] = ["alice", "bob", "carol"];

/// A node process with its name.
struct Process {
    name: &'static str,
    child: Child,
}

/// The printed lines of the processes, with the name of the process.
type Lines = mpsc::UnboundedReceiver<(&'static str, Value)>;

impl Demo {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let mesh = format!("demo-{}", std::process::id());
        say("Three processes are started: alice, bob and carol. No server, no configuration.")?;
        let (sender, mut lines) = mpsc::unbounded_channel();
        let mut processes = Vec::new();
        for name in NAMES {
            processes.push(start(name, &mesh, sender.clone())?);
        }
        let result = show(&mesh, &mut processes, &mut lines).await;
        for process in &mut processes {
            terminate(&mut process.child, process.name).await;
        }
        result?;
        crash::show().await?;
        say("")?;
        say("That was the mesh. `peerbus --help` lists the other commands.")?;
        Ok(())
    }
}

async fn show(mesh: &str, processes: &mut [Process], lines: &mut Lines) -> anyhow::Result<()> {
    meet(lines).await?;

    let mesh: MeshName = mesh.parse()?;
    let node = Node::builder().name("you").mesh(mesh).mdns(false).start().await?;
    node.wait_for_peers(3, STEP).await.context("the demo did not find its nodes")?;
    let names: BTreeMap<_, _> = node.peers().into_iter().map(|peer| (peer.id, peer.name)).collect();
    say("This command joins them as a fourth node, called \"you\".")?;

    title("Publish and subscribe")?;
    node.wait_for_subscribers("news.today", 3, STEP).await?;
    let report = node.publish("news.today", "the sun shines").await?;
    say(&format!(
        "You publish on news.today. It is queued for {} nodes that subscribe to news.>",
        report.queued
    ))?;
    let mut heard = Vec::new();
    while heard.len() < 3 {
        let (name, line) = next(lines, "message").await?;
        say(&format!("  {name} received {}", line["body"]))?;
        heard.push(name);
    }

    title("Request and reply")?;
    node.wait_for_service("work", STEP).await?;
    let reply = node.request("work", "how are you?").await?;
    let who = names.get(&reply.from).map_or("somebody", String::as_str);
    say(&format!("You ask the service \"work\"; {who} replies {:?}.", reply.text()))?;

    title("Competing consumers")?;
    say("All three serve \"work\". Twelve requests, each handled by exactly one of them:")?;
    share(&node, &names).await?;

    title("A node dies")?;
    let carol = &mut processes[2];
    carol.child.start_kill().context("carol can't be killed")?;
    carol.child.wait().await?;
    say("carol is killed, without a goodbye.")?;
    let mut noticed = 0;
    while noticed < 2 {
        let (name, line) = next(lines, "peer_down").await?;
        if line["name"] == "carol" {
            say(&format!("  {name} noticed: {}", line["reason"].as_str().unwrap_or_default()))?;
            noticed += 1;
        }
    }
    while node.peers().len() > 2 {
        tokio::task::yield_now().await;
    }
    say("The remaining nodes continue the work:")?;
    share(&node, &names).await?;
    let report = node.shutdown().await;
    say(&format!(
        "You leave. Messages dropped: {}, in doubt: {}.",
        report.counters.dropped_total(),
        report.counters.in_doubt
    ))?;
    Ok(())
}

/// Waits until each of the three nodes has found the two others.
async fn meet(lines: &mut Lines) -> anyhow::Result<()> {
    let mut met = 0;
    while met < NAMES.len() * (NAMES.len() - 1) {
        let (name, line) = next(lines, "peer_up").await?;
        let means = match line["found_by"].as_str() {
            Some("local") => "on this host, by its socket folder",
            Some("mdns") => "on the network, by mDNS",
            Some("fixed") => "by its address",
            _ => "when it was dialled by it",
        };
        if let Some(other) = line["name"].as_str().filter(|other| NAMES.contains(other)) {
            say(&format!("  {name} found {other} {means}"))?;
            met += 1;
        }
    }
    Ok(())
}

async fn share(node: &Node, names: &BTreeMap<peerbus::NodeId, String>) -> anyhow::Result<()> {
    let mut shares = BTreeMap::new();
    for number in 1..=12 {
        let reply = node.request("work", format!("job {number}")).await?;
        let name = names.get(&reply.from).map_or("somebody", String::as_str);
        *shares.entry(name).or_insert(0) += 1;
    }
    for (name, count) in shares {
        say(&format!("  {name:<6} {}", "▪".repeat(count)))?;
    }
    Ok(())
}

/// The next line with that `event`.
async fn next(lines: &mut Lines, event: &str) -> anyhow::Result<(&'static str, Value)> {
    let wait = async {
        while let Some((name, line)) = lines.recv().await {
            if line["event"] == event {
                return Ok((name, line));
            }
        }
        bail!("the nodes ended too early")
    };
    let waited = timeout(STEP, wait).await;
    waited.with_context(|| format!("timed out after {STEP:?}: no {event}"))?
}

fn start(
    name: &'static str,
    mesh: &str,
    lines: mpsc::UnboundedSender<(&'static str, Value)>,
) -> anyhow::Result<Process> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["node", "--json", "--no-mdns", "--subscribe", "news.>", "--serve", "work"])
        .args(["--name", name, "--mesh", mesh])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{name} can't be started"))?;
    let stdout = child.stdout.take().context("the child has no output")?;
    tokio::spawn(async move {
        let mut output = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = output.next_line().await {
            if let Ok(value) = serde_json::from_str(&line) {
                let _demo_is_over = lines.send((name, value));
            }
        }
    });
    Ok(Process { name, child })
}

/// Requests a process to end, and kills it if it doesn't.
async fn terminate(child: &mut Child, name: &str) {
    #[cfg(unix)]
    if let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
        let _gone_already = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        if timeout(Duration::from_secs(5), child.wait()).await.is_ok() {
            return;
        }
        output::note(format_args!("{name} had to be killed"));
    }
    let _gone_already = child.kill().await;
}

fn title(text: &str) -> anyhow::Result<()> {
    say(&format!("\n{text}"))
}

fn say(text: &str) -> anyhow::Result<()> {
    output::say(text)
}
