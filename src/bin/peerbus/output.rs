//! Output, as text or JSON.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::pin::pin;
use std::time::Duration;

use anyhow::Context;
use peerbus::text::{Json, Line, Lines};
use peerbus::{Call, Event, Message};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

/// Writes a line to stdout: `value` as JSON if `as_json`, else the result of `text`.
pub(crate) fn line(
    as_json: bool,
    value: &Value,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    write(&shown_line(as_json, value, text))
}

fn shown_line(as_json: bool, value: &Value, text: impl FnOnce() -> String) -> Vec<u8> {
    match as_json {
        true => shown(Json(value)),
        false => shown(text()),
    }
}

/// Returns one or more lines without hidden characters.
fn shown(text: impl Display) -> Vec<u8> {
    format!("{}\n", Lines(text)).into_bytes()
}

/// The interval at which a call's lease is renewed while its line waits.
const RENEWED_EVERY: Duration = Duration::from_secs(5);

/// Writes lines to stdout for tasks that must not block: who reads them may have stopped.
#[derive(Clone)]
pub(crate) struct Printer(mpsc::Sender<(Vec<u8>, oneshot::Sender<anyhow::Result<()>>)>);

impl Printer {
    /// Starts a thread that writes one line after the other, until no printer is left.
    pub(crate) fn start() -> Self {
        let (lines, mut unwritten) = mpsc::channel::<(Vec<u8>, oneshot::Sender<_>)>(64);
        std::thread::spawn(move || {
            while let Some((line, told)) = unwritten.blocking_recv() {
                let _nobody_waits = told.send(write(&line));
            }
        });
        Self(lines)
    }

    /// Writes a line about a call as [`line`] does; returns once it is written. The call's lease is
    /// renewed meanwhile: who reads the lines may take a break.
    pub(crate) async fn line(
        &self,
        call: &Call,
        as_json: bool,
        value: &Value,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let mut written = pin!(self.write(shown_line(as_json, value, text)));
        loop {
            tokio::select! {
                written = &mut written => return written,
                () = sleep(RENEWED_EVERY) => call.extend(),
            }
        }
    }

    async fn write(&self, line: Vec<u8>) -> anyhow::Result<()> {
        let (told, written) = oneshot::channel();
        let ended = "the thread that prints has ended";
        self.0.send((line, told)).await.context(ended)?;
        written.await.context(ended)?
    }
}

/// Writes one or more lines to stdout, without hidden characters. Text of others that must stay on
/// its line needs a [`Line`] besides.
pub(crate) fn say(text: impl Display) -> anyhow::Result<()> {
    write(&shown(text))
}

/// Writes a body to stdout: unchanged to a file or a pipe, and as text that can't control it to a
/// terminal.
pub(crate) fn write_body(body: &[u8]) -> anyhow::Result<()> {
    if std::io::stdout().is_terminal() {
        let text = String::from_utf8_lossy(body);
        return say(text.strip_suffix('\n').unwrap_or(&text));
    }
    let end: &[u8] = if body.ends_with(b"\n") { b"" } else { b"\n" };
    write(&[body, end].concat())
}

/// Writes bytes to stdout, unchanged.
pub(crate) fn write(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.context("can't write to the standard output")
}

/// Writes a line to stderr; errors are ignored.
pub(crate) fn note(text: impl Display) {
    let _nobody_reads = writeln!(std::io::stderr(), "{}", Lines(text));
}

pub(crate) fn message(message: &Message) -> Value {
    let header = &message.header;
    let headers = header.user_headers().map(|(key, value)| (key.to_owned(), json!(value)));
    let headers: serde_json::Map<String, Value> = headers.collect();
    json!({
        "event": "message",
        "id": header.id,
        "kind": header.kind,
        "from": message.from,
        "to": header.destination.to_string(),
        "correlation_id": header.correlation_id,
        "reply_to": header.reply_to,
        "content_type": header.content_type(),
        "key": header.ordering_key(),
        "headers": headers,
        "body": body_text(message),
        "body_hex": std::str::from_utf8(&message.body).is_err().then(|| hex(&message.body)),
    })
}

fn body_text(message: &Message) -> Option<&str> {
    std::str::from_utf8(&message.body).ok()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A body for a line: text with its hidden characters escaped, anything else as a short hex dump.
pub(crate) fn body(message: &Message) -> String {
    match body_text(message) {
        Some(text) => Line(text).to_string(),
        None => format!(
            "<{} bytes: {}…>",
            message.body.len(),
            hex(&message.body[..message.body.len().min(16)])
        ),
    }
}

/// An event as JSON, and as one line.
pub(crate) fn event(event: &Event) -> (Value, String) {
    let (value, text) = described(event);
    (value, Line(text).to_string())
}

fn described(event: &Event) -> (Value, String) {
    match event {
        Event::PeerUp(peer) => (
            json!({
                "event": "peer_up",
                "id": peer.id,
                "name": peer.name,
                "found_by": peer.source,
                "address": peer.address,
            }),
            format!("peer up: {} ({}), found by {}", peer.name, peer.id.short(), peer.source),
        ),
        Event::PeerDown { id, name, reason } => (
            json!({ "event": "peer_down", "id": id, "name": name, "reason": reason.to_string() }),
            format!("peer down: {name} ({}): {reason}", id.short()),
        ),
        Event::Dropped { peer, reason, count } => (
            json!({ "event": "dropped", "peer": peer, "reason": reason, "count": count }),
            format!("dropped {count} for {}: {reason}", peer.short()),
        ),
        Event::KeysMoved { service, from, to, count } => (
            json!({
                "event": "keys_moved", "service": service.to_string(),
                "from": from, "to": to, "count": count,
            }),
            format!("{count} keys of {service} moved from {} to {}", from.short(), to.short()),
        ),
        Event::Denied { peer, action, name, count } => (
            json!({
                "event": "denied", "peer": peer, "action": action, "name": name, "count": count,
            }),
            format!("{} does not allow this node to {action} {name}", peer.short())
                + &times(*count),
        ),
        Event::Refused { address, reason, count } => (
            json!({ "event": "refused", "address": address, "reason": reason, "count": count }),
            match address {
                Some(address) => format!("refused {address}: {reason}"),
                None => format!("refused a connection: {reason}"),
            } + &times(*count),
        ),
        Event::Paused { duration } => (
            json!({ "event": "paused", "seconds": duration.as_secs_f64() }),
            format!("this node did not run for {:.1} s", duration.as_secs_f64()),
        ),
        Event::IdentityConflict { address } => (
            json!({ "event": "identity_conflict", "address": address }),
            "another live node has this node's identity".to_owned(),
        ),
        Event::DeadLetter { number, reason } => (
            json!({ "event": "dead_letter", "number": number, "reason": reason.to_string() }),
            format!("message {number} is a dead letter: {reason}"),
        ),
        Event::OutboxIsOlder { peer } => (
            json!({ "event": "outbox_is_older", "peer": peer }),
            format!(
                "{} knows a later state of this outbox, which is an older copy; what is in it may be \
                 processed again",
                peer.short()
            ),
        ),
        Event::SubscriptionLapsed { peer, name, reason, messages } => (
            json!({
                "event": "subscription_lapsed", "peer": peer, "name": name.as_str(),
                "reason": reason.to_string(), "messages": messages,
            }),
            format!(
                "the durable subscription {name} of {} was ended, with {messages} messages: {reason}",
                peer.short()
            ),
        ),
        Event::InboxFull { newcomer, forgotten, refused } => (
            json!({
                "event": "inbox_full", "newcomer": newcomer, "forgotten": forgotten,
                "refused": refused,
            }),
            format!(
                "the inbox is full: {forgotten} senders forgotten and {refused} messages refused, \
                 the last for {}",
                newcomer.short()
            ),
        ),
        Event::InboxLost { peer } => (
            json!({ "event": "inbox_lost", "peer": peer }),
            format!("{} has lost its inbox, and may process messages again", peer.short()),
        ),
        Event::PeerGone { peer, messages } => (
            json!({ "event": "peer_gone", "peer": peer, "messages": messages }),
            format!(
                "{} has been gone for long; {messages} messages are queued for it",
                peer.short()
            ),
        ),
        other => (json!({ "event": "other" }), format!("{other:?}")),
    }
}

fn times(count: u64) -> String {
    match count {
        1 => String::new(),
        count => format!(" ({count} times)"),
    }
}

/// Shows the progress of a long command on a terminal; `None` clears it.
pub(crate) fn progress(text: Option<&str>) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _nobody_reads = write!(stderr, "\r\x1b[K{}", Line(text.unwrap_or_default()));
    }
}
