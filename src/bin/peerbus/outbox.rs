//! `peerbus outbox`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use peerbus::{ClosedOutbox, DamagedPart, InboxReport, NodeId, ServiceName, StoredMessage, Target};
use serde_json::{Value, json};

use crate::output;

/// Inspects and changes a node's outbox. The node must not run meanwhile.
#[derive(Subcommand)]
pub(crate) enum Outbox {
    /// Count the messages by destination, and list them
    List(List),
    /// Print one message
    Show(Show),
    /// Retry dead letters at the node's next start; they no longer expire
    Replay(Chosen<false>),
    /// Remove messages permanently, for all their destinations
    Purge(Chosen<true>),
    /// Take messages to a service from the node that they were assigned to, which may have
    /// processed them
    Reassign(Reassign),
    /// Remove a durable subscription whose node is gone for good, with its messages
    Forget(Forget),
    /// Read all of the outbox and its inbox, and report damage
    Verify(Folder),
}

#[derive(Args)]
pub(crate) struct Folder {
    /// The folder of the node's --outbox
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Folder {
    fn open(&self) -> anyhow::Result<ClosedOutbox> {
        Ok(ClosedOutbox::open(&self.dir)?)
    }

    /// Opens the outbox for reading only.
    fn look(&self) -> anyhow::Result<ClosedOutbox> {
        let outbox = ClosedOutbox::look(&self.dir)?;
        if let Some(problem) = outbox.identity_problem() {
            output::note(format_args!("peerbus: the node can't start: {problem}"));
        }
        Ok(outbox)
    }
}

#[derive(Args)]
pub(crate) struct List {
    #[command(flatten)]
    folder: Folder,
    /// Only dead letters
    #[arg(long)]
    dead: bool,
    /// Maximum number of messages to list, oldest first
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: usize,
}

#[derive(Args)]
pub(crate) struct Show {
    #[command(flatten)]
    folder: Folder,
    /// Message number, as shown by `list`
    number: u64,
}

/// Chosen messages, or all.
#[derive(Args)]
#[group(skip)]
pub(crate) struct Chosen<const ANY: bool> {
    #[command(flatten)]
    folder: Folder,
    /// Message numbers, as shown by `list`
    #[arg(value_name = "NUMBER", required_unless_present = "all")]
    numbers: Vec<u64>,
    /// All dead letters
    #[arg(long, conflicts_with = "numbers")]
    all: bool,
}

#[derive(Args)]
pub(crate) struct Reassign {
    #[command(flatten)]
    folder: Folder,
    /// Message numbers, as shown by `list`
    #[arg(value_name = "NUMBER", required_unless_present = "from")]
    numbers: Vec<u64>,
    /// All messages assigned to this node
    #[arg(long, value_name = "NODE", conflicts_with = "numbers")]
    from: Option<NodeId>,
    /// Node to assign them to [default: any that serves the name]
    #[arg(long, value_name = "NODE")]
    to: Option<NodeId>,
}

#[derive(Args)]
pub(crate) struct Forget {
    #[command(flatten)]
    folder: Folder,
    /// The subscriber's id or a prefix of it, as shown by `list`
    node: String,
    /// The subscription's name
    name: ServiceName,
}

impl Outbox {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List(list) => list.run(),
            Self::Show(show) => show.run(),
            Self::Replay(some) => some.each("replayed", ClosedOutbox::replay),
            Self::Purge(some) => some.each("purged", ClosedOutbox::purge),
            Self::Reassign(reassign) => reassign.run(),
            Self::Forget(forget) => forget.run(),
            Self::Verify(folder) => verify(&folder),
        }
    }
}

/// The messages for one destination.
#[derive(Default)]
struct Line {
    pending: u64,
    dead: u64,
    bytes: u64,
    oldest: Option<SystemTime>,
}

impl List {
    fn run(self) -> anyhow::Result<()> {
        let outbox = self.folder.look()?;
        let mut lines = BTreeMap::<Target, Line>::new();
        let (mut listed, mut more) = (Vec::new(), 0u64);
        for message in outbox.messages() {
            let line = lines.entry(message.target.clone()).or_default();
            match message.dead {
                Some(_) => line.dead += 1,
                None => line.pending += 1,
            }
            line.bytes += u64::from(message.size);
            if line.oldest.is_none() {
                // Messages come in the order in which they were stored.
                line.oldest = outbox.read(&message).ok().map(|(header, _)| header.sent_at());
            }
            if self.dead && message.dead.is_none() {
                continue;
            }
            match listed.len() < self.limit {
                true => listed.push(message),
                false => more += 1,
            }
        }
        if self.folder.json {
            return self.print_json(&outbox, &lines, &listed);
        }
        let subscription =
            |(node, name, pattern)| format!("durable subscription {name} to {pattern} of {node}");
        let mut text: Vec<String> = outbox.subscriptions().map(subscription).collect();
        if lines.is_empty() {
            text.push(format!("no messages in {}", self.folder.dir.display()));
            return output::say(text.join("\n"));
        }
        let [to, pending, dead, bytes, oldest] = ["TO", "PENDING", "DEAD", "BYTES", "OLDEST"];
        text.push(format!("{to:<32} {pending:>9} {dead:>9} {bytes:>12} {oldest:>10}"));
        for (target, line) in &lines {
            let oldest = line.oldest.map_or("?".into(), age);
            let (target, Line { pending, dead, bytes, .. }) = (target.to_string(), line);
            text.push(format!("{target:<32} {pending:>9} {dead:>9} {bytes:>12} {oldest:>10}"));
        }
        text.push(String::new());
        for message in &listed {
            let at = outbox.read(message).ok().map(|(header, _)| header.sent_at());
            text.push(describe(message, at));
        }
        if more > 0 {
            text.push(format!("… and {more} more (--limit)"));
        }
        output::say(text.join("\n"))
    }

    fn print_json(
        &self,
        outbox: &ClosedOutbox,
        lines: &BTreeMap<Target, Line>,
        listed: &[StoredMessage],
    ) -> anyhow::Result<()> {
        let lines: Vec<Value> = lines
            .iter()
            .map(|(target, line)| {
                let oldest = line.oldest.and_then(|at| at.elapsed().ok());
                json!({
                    "to": target.to_string(), "pending": line.pending, "dead": line.dead,
                    "bytes": line.bytes, "oldest_s": oldest.map(|age| age.as_secs_f64()),
                })
            })
            .collect();
        let subscriptions: Vec<Value> = outbox
            .subscriptions()
            .map(|(node, name, pattern)| {
                json!({ "node": node, "name": name.as_str(), "pattern": pattern.as_str() })
            })
            .collect();
        let listed: Vec<Value> = listed.iter().map(|message| as_json(outbox, message)).collect();
        let value = json!({
            "destinations": lines, "subscriptions": subscriptions, "messages": listed,
        });
        output::line(true, &value, String::new)
    }
}

fn as_json(outbox: &ClosedOutbox, message: &StoredMessage) -> Value {
    let read = outbox.read(message).ok();
    json!({
        "number": message.number, "part": message.part, "to": message.target.to_string(),
        "given_to": message.node, "failures": message.failures, "size": message.size,
        "id": read.as_ref().map(|(header, _)| header.id),
        "dead": message.dead.as_ref().map(ToString::to_string),
        "body": read.and_then(|(_, body)| String::from_utf8(body.into()).ok()),
    })
}

fn age(at: SystemTime) -> String {
    let age = at.elapsed().unwrap_or_default();
    humantime::format_duration(Duration::from_secs(age.as_secs())).to_string()
}

fn describe(message: &StoredMessage, at: Option<SystemTime>) -> String {
    let mut text = format!("#{:<8} {}", message.number, message.target);
    if let Some(at) = at {
        text += &format!(", {} old", age(at));
    }
    if let (Target::Service(_), Some(node)) = (&message.target, message.node) {
        text += &format!(", assigned to {}", node.short());
    }
    if message.failures > 0 {
        text += &format!(", failed {} times", message.failures);
    }
    if let Some(reason) = &message.dead {
        text += &format!(", dead: {reason}");
    }
    text
}

impl Show {
    fn run(self) -> anyhow::Result<()> {
        let outbox = self.folder.look()?;
        let found: Vec<StoredMessage> =
            outbox.messages().filter(|message| message.number == self.number).collect();
        let first = found.first().with_context(|| {
            format!("no message {}; `peerbus outbox list` shows the numbers", self.number)
        })?;
        let (header, body) = outbox.read(first)?;
        if self.folder.json {
            let parts: Vec<Value> = found.iter().map(|part| as_json(&outbox, part)).collect();
            return output::line(true, &json!(parts), String::new);
        }
        let sent_at = Some(header.sent_at());
        let mut text: Vec<_> = found.iter().map(|part| describe(part, sent_at)).collect();
        text.push(format!("id          {}", header.id));
        text.push(format!("destination {}", header.destination));
        if let Some(key) = header.ordering_key() {
            text.push(format!("key         {}", peerbus::text::Line(key)));
        }
        for (name, value) in header.user_headers() {
            text.push(format!(
                "header      {}",
                peerbus::text::Line(format_args!("{name}={value}"))
            ));
        }
        match first.expires_at.map(|at| at.duration_since(SystemTime::now())) {
            Some(Ok(left)) => {
                text.push(format!("expires in  {}", humantime::format_duration(left)))
            }
            Some(Err(_)) => text.push("expires     expired".into()),
            None => {}
        }
        text.push(format!("body        {} bytes", body.len()));
        text.push(format!("{}", String::from_utf8_lossy(&body)));
        output::say(text.join("\n"))
    }
}

impl<const ANY: bool> Chosen<ANY> {
    fn each(
        self,
        done: &str,
        act: impl Fn(&mut ClosedOutbox, &StoredMessage) -> Result<bool, peerbus::StoreError>,
    ) -> anyhow::Result<()> {
        let mut outbox = self.folder.open()?;
        let wanted = |message: &StoredMessage| match self.all {
            true => message.dead.is_some(),
            false => self.numbers.contains(&message.number),
        };
        let found: Vec<StoredMessage> = outbox.messages().filter(wanted).collect();
        for number in &self.numbers {
            let there = found.iter().any(|message| message.number == *number);
            ensure!(there, "no message {number}; `peerbus outbox list` shows the numbers");
        }
        let mut count = 0;
        for number in &self.numbers {
            let mut parts = found.iter().filter(|message| message.number == *number);
            ensure!(
                ANY || parts.any(|part| part.dead.is_some()),
                "message {number} is not a dead letter"
            );
        }
        for message in found.iter().filter(|message| ANY || message.dead.is_some()) {
            count += u64::from(act(&mut outbox, message)?);
        }
        let value = json!({ done: count });
        output::line(self.folder.json, &value, || format!("{done} {count}"))
    }
}

impl Reassign {
    fn run(self) -> anyhow::Result<()> {
        let mut outbox = self.folder.open()?;
        let wanted = |message: &StoredMessage| match self.from {
            Some(node) => {
                message.node == Some(node) && matches!(message.target, Target::Service(_))
            }
            None => self.numbers.contains(&message.number),
        };
        let found: Vec<StoredMessage> = outbox.messages().filter(wanted).collect();
        for number in &self.numbers {
            let mut parts = found.iter().filter(|message| message.number == *number).peekable();
            ensure!(
                parts.peek().is_some(),
                "no message {number}; `peerbus outbox list` shows the numbers"
            );
            let dead = parts.any(|part| part.dead.is_some());
            ensure!(!dead, "message {number} is a dead letter: replay it first");
        }
        for message in &found {
            let moved = outbox.reassign(message, self.to)?;
            ensure!(
                moved,
                "message {} is for {} alone and can't be reassigned",
                message.number,
                message.target
            );
        }
        let value = json!({ "reassigned": found.len() });
        output::line(self.folder.json, &value, || format!("reassigned {}", found.len()))
    }
}

impl Forget {
    fn run(self) -> anyhow::Result<()> {
        let mut outbox = self.folder.open()?;
        let named = |node: &NodeId| node.to_string().starts_with(&self.node);
        let known = outbox.subscriptions().filter(|(_, name, _)| **name == self.name);
        let found: Vec<NodeId> = known.map(|(node, ..)| node).filter(named).collect();
        let [node] = found[..] else {
            match found.len() {
                0 => bail!("no subscription {} of a node {}", self.name, self.node),
                n => bail!(
                    "{n} nodes begin with {:?} and have a subscription {}",
                    self.node,
                    self.name
                ),
            }
        };
        let messages = outbox.forget(&node, &self.name)?.unwrap_or_default();
        let value = json!({ "forgotten": self.name.as_str(), "node": node, "messages": messages });
        let text = || format!("forgot {} of {}, with {messages} messages", self.name, node.short());
        output::line(self.folder.json, &value, text)
    }
}

fn verify(folder: &Folder) -> anyhow::Result<()> {
    let outbox = ClosedOutbox::look(&folder.dir)?;
    let (mut messages, mut unreadable) = (0u64, Vec::new());
    for message in outbox.messages() {
        messages += 1;
        if outbox.read(&message).is_err() {
            unreadable.push(message.number);
        }
    }
    let (damaged, lost, torn) = (outbox.damaged(), outbox.lost(), outbox.torn());
    let inbox = outbox.check_inbox()?;
    let identity = outbox.identity_problem().map(ToString::to_string);
    let value = json!({
        "messages": messages,
        "unreadable": unreadable,
        "damaged": parts_as_json(damaged),
        "lost": lost,
        "torn": torn,
        "inbox": inbox.as_ref().map(|inbox| json!({
            "entries": inbox.entries, "damaged": parts_as_json(&inbox.damaged),
            "forgotten": inbox.forgotten, "torn": inbox.torn,
        })),
        "identity": identity,
    });
    let printed = output::line(folder.json, &value, || {
        let text = match (damaged.len(), unreadable.len()) {
            (0, 0) => format!("{messages} messages, all readable"),
            (_, gone) => {
                let cost = cost(lost, "lost");
                format!("{messages} messages, {gone} unreadable{}{cost}", parts_as_text(damaged))
            }
        };
        let inbox = inbox.as_ref().map(describe_inbox).unwrap_or_default();
        let identity = identity.iter().map(|problem| format!("\nthe node can't start: {problem}"));
        text + &torn_end(torn) + &inbox + &identity.collect::<String>()
    });
    ensure!(damaged.is_empty() && unreadable.is_empty(), "the outbox is damaged");
    ensure!(inbox.is_none_or(|inbox| inbox.damaged.is_empty()), "the inbox is damaged");
    ensure!(identity.is_none(), "the identity file can't be used");
    printed
}

fn describe_inbox(inbox: &InboxReport) -> String {
    let InboxReport { entries, damaged, forgotten, torn, .. } = inbox;
    let text = match damaged.len() {
        0 => format!("\nthe inbox: {entries} entries, all readable"),
        _ => {
            let cost = cost(*forgotten, "processed once more");
            format!("\nthe inbox: {entries} entries{}{cost}", parts_as_text(damaged))
        }
    };
    text + &torn_end(*torn)
}

/// The cost of damage: the number of messages that are, for example, lost.
fn cost(messages: Option<u64>, what: &str) -> String {
    match messages {
        Some(messages) => format!("; at most {messages} messages are {what}"),
        None => format!("; an unknown number of messages are {what}"),
    }
}

fn parts_as_json(parts: &[DamagedPart]) -> Value {
    parts.iter().map(part_as_json).collect()
}

fn part_as_json(part: &DamagedPart) -> Value {
    json!({ "file": part.file, "from": part.from, "to": part.to, "missing": part.missing })
}

fn parts_as_text(parts: &[DamagedPart]) -> String {
    parts.iter().map(|part| format!("; damaged: {part}")).collect()
}

fn torn_end(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        _ => format!("; a crash tore the last write ({bytes} bytes), which is ignored"),
    }
}
