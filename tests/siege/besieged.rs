//! The node under siege: a process of the command, whose lines and memory are watched.
//! `PEERBUS_SIEGE_LOG=1` shows its lines.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};

use tempfile::TempDir;

use crate::common::{SOON, private_dir};

/// Subscriptions to anything else are denied, and some attacks live on denials.
const RULES: &str = "\
*  send       *
*  publish    >
*  subscribe  open.>
";

pub(crate) struct Besieged {
    child: Child,
    pub(crate) addr: SocketAddr,
    /// The lines that are not about a call: the service prints one for each.
    lines: Arc<AtomicU64>,
    _dir: TempDir,
}

impl Besieged {
    /// A node with the service `echo`, an outbox and rules.
    pub(crate) fn start() -> Self {
        let dir = private_dir();
        std::fs::write(dir.path().join("rules"), RULES).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_peerbus"));
        command.args(["node", "--name", "besieged", "--json", "--serve", "echo"]);
        command.args(["--trust", "open", "--listen", "127.0.0.1:0", "--no-mdns", "--no-local"]);
        command.arg("--rules").arg(dir.path().join("rules"));
        command.arg("--outbox").arg(dir.path().join("store"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = Arc::new(AtomicU64::new(0));
        let (told, started) = channel();
        count(child.stdout.take().unwrap(), lines.clone(), Some(told));
        count(child.stderr.take().unwrap(), lines.clone(), None);
        let first: serde_json::Value = started
            .recv_timeout(SOON)
            .map(|line| serde_json::from_str(&line).unwrap())
            .expect("the node starts");
        let addr = first["listening"][0].as_str().unwrap().parse().unwrap();
        Self { child, addr, lines, _dir: dir }
    }

    /// The number of lines so far, on both outputs.
    pub(crate) fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }

    /// The most memory that the process had so far, in MiB.
    pub(crate) fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Besieged {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// Counts the lines of an output, in a thread that ends with it; tells the first.
fn count(output: impl Read + Send + 'static, lines: Arc<AtomicU64>, told: Option<Sender<String>>) {
    std::thread::spawn(move || {
        let mut told = told;
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if let Some(told) = told.take() {
                let _test_ended = told.send(line.clone());
            }
            if !line.contains(r#""event":"call""#) {
                lines.fetch_add(1, Ordering::Relaxed);
                if std::env::var_os("PEERBUS_SIEGE_LOG").is_some() {
                    eprintln!("{line}");
                }
            }
        }
    });
}
