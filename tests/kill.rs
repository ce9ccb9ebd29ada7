//! Sender and receiver are real processes that are killed repeatedly. `PEERBUS_KILL_ROUNDS=n` kills
//! n times instead of 200 times.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::private_dir;
use peerbus::{Call, HandlerError, Node};

const ROLE: &str = "PEERBUS_TEST_ROLE";
const DIR: &str = "PEERBUS_TEST_DIR";
const LIFE: &str = "PEERBUS_TEST_LIFE";
/// The minimum number of stored messages.
const MESSAGES: usize = 100_000;
/// The limit of queued messages: a larger store would take longer to open than a process lives.
const BACKLOG: u64 = 2_000;

fn env(name: &str) -> String {
    std::env::var(name).unwrap()
}

/// A file to which many runs append whole lines.
fn log(dir: &Path, name: &str) -> File {
    OpenOptions::new().create(true).append(true).open(dir.join(name)).unwrap()
}

fn lines(dir: &Path, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn start(dir: &Path, name: &str) -> Node {
    let config = Node::builder().name(name).runtime_dir(dir.join("run")).mdns(false);
    let node = config.outbox(dir.join(name)).start().await.unwrap();
    for part in &node.store_report().unwrap().damaged {
        log(dir, "damaged").write_all(format!("{part}\n").as_bytes()).unwrap();
    }
    node
}

/// The role of this test's processes: the same program, started with a role.
#[test]
fn role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let dir = PathBuf::from(env(DIR));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        match role.as_str() {
            "sender" => send(&dir, true).await,
            "last sender" => send(&dir, false).await,
            _ => receive(&dir).await,
        }
    });
}

/// Stores messages and records each receipt, until it is killed; or only sends stored messages,
/// until none is left.
async fn send(dir: &Path, more: bool) {
    let node = start(dir, "sender").await;
    let mut stored = log(dir, "stored");
    for round in 0.. {
        if !more {
            if node.outbox_size().pending == 0 {
                return;
            }
        } else if node.outbox_size().pending < BACKLOG {
            let bodies: Vec<String> =
                (0..64).map(|n| format!("{}-{}", env(LIFE), round * 64 + n)).collect();
            let sent = bodies.iter().map(|body| {
                let message = node.send("work", body);
                let message = match body.ends_with('7') {
                    true => message.key(&body[body.len() - 2..]),
                    false => message,
                };
                message.guaranteed().into_future()
            });
            for receipt in futures_util::future::join_all(sent).await {
                receipt.unwrap();
            }
            stored.write_all((bodies.join("\n") + "\n").as_bytes()).unwrap();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Records the begin and the end of each message's handler.
async fn receive(dir: &Path) {
    let node = start(dir, "receiver").await;
    let handled = Arc::new(log(dir, "handled"));
    let life = env(LIFE);
    let handler = move |call: Call| {
        let (handled, life) = (handled.clone(), life.clone());
        async move {
            let (message, mut file) = (call.message, &*handled);
            let (body, again) = (message.text(), message.is_redelivered());
            let mut note =
                |line: String| file.write_all(line.as_bytes()).map_err(HandlerError::from_error);
            note(format!("begin {life} {body} {again}\n"))?;
            tokio::task::yield_now().await;
            note(format!("end {life} {body}\n"))?;
            Ok::<_, HandlerError>(())
        }
    };
    let _service = node.serve("work", handler).start().unwrap();
    std::future::pending::<()>().await;
}

struct Process(Child);

impl Process {
    fn start(dir: &Path, role: &str, life: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["role", "--exact", "--nocapture"]);
        command.env(ROLE, role).env(DIR, dir).env(LIFE, life.to_string());
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[test]
fn processes_that_are_killed_lose_nothing_and_process_nothing_twice_unknowingly() {
    let rounds = std::env::var("PEERBUS_KILL_ROUNDS").map_or(200, |text| text.parse().unwrap());
    let temp = private_dir();
    let dir = temp.path();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut sender = Process::start(dir, "sender", 0);
    let mut receiver = Process::start(dir, "receiver", 0);
    let mut life = 0;
    while life < rounds || lines(dir, "stored").len() < MESSAGES {
        life += 1;
        assert!(life < 50 * rounds, "the sender stores too little: {}", lines(dir, "stored").len());
        // Long enough for some of them to make progress, at any point.
        std::thread::sleep(Duration::from_millis(20 + random(150)));
        let which = random(3);
        if which != 0 {
            drop(sender);
            sender = Process::start(dir, "sender", life);
        }
        if which != 1 {
            drop(receiver);
            receiver = Process::start(dir, "receiver", life);
        }
    }
    drop(sender);
    let mut last = Process::start(dir, "last sender", life + 1);
    assert!(last.0.wait().unwrap().success());
    drop(receiver);
    assert_eq!(lines(dir, "damaged"), [""; 0], "a kill damages nothing");
    check(&lines(dir, "stored"), &lines(dir, "handled"), life);
}

fn check(stored: &[String], handled: &[String], lives: usize) {
    let mut ended = HashSet::new();
    // The run in which each message was last begun, and whether it ended there.
    let mut begun = HashMap::<&str, (&str, bool)>::new();
    let (mut again, mut after_its_end) = (0, 0);
    for line in handled {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["begin", life, body, redelivered] => {
                let before = begun.insert(body, (life, false));
                let Some((earlier, had_ended)) = before else { continue };
                assert_ne!(earlier, life, "{body} was processed twice in one life");
                assert_eq!(redelivered, "true", "{body} came again and didn't say so");
                again += 1;
                after_its_end += u32::from(had_ended);
            }
            ["end", life, body] => {
                begun.insert(body, (life, true));
                ended.insert(body);
            }
            // The last line of a run that was killed while writing.
            _ => {}
        }
    }
    let lost = stored.iter().filter(|body| !ended.contains(body.as_str())).count();
    println!(
        "{lives} kills, {} messages stored, {again} handled again, {after_its_end} of these \
         after their handler had returned, {lost} lost",
        stored.len()
    );
    assert_eq!(lost, 0);
    assert!(again > 0, "no kill hit a handler");
}
