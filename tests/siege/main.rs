//! A real node under siege: while hostile processes do what they can, an honest peer's requests are
//! answered over the link that it has, and the node's memory and log stay within their bounds.
//! `PEERBUS_SIEGE_SECONDS=n` attacks for n seconds each instead of 1;
//! `PEERBUS_SIEGE_ATTACK=name` makes one attack only.
//!
//! The attackers run at idle priority: the test is about what they make the node do, not about the
//! processor's time that they take themselves.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(target_os = "linux", feature = "cli"))]

mod attacks;
mod besieged;
#[path = "../common/mod.rs"]
mod common;

use std::io::Read;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use attacks::{ATTACKS, Field, SPINNER};
use besieged::Besieged;
use common::{Host, SOON, soon};
use futures_util::FutureExt;
use futures_util::future::join_all;
use peerbus::{Address, Event, Events, Node, Trust};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::sleep;

const ATTACK: &str = "PEERBUS_TEST_ATTACK";
const NODE: &str = "PEERBUS_TEST_NODE";
const THIRD_PARTY: &str = "PEERBUS_TEST_THIRD_PARTY";

/// The most memory, in MiB: the budget of what peers make a node keep (`Config::peer_memory`), and
/// what the node itself and its allocator take.
const MOST_MEMORY: u64 = 512 + 188;
/// The most lines of a node on both outputs, per second and at once.
const LINES_A_SECOND: u64 = 100;
const LINES_AT_ONCE: u64 = 200;
/// The most connections to a third party, per second and at once.
const DIALS_A_SECOND: u64 = 100;
const DIALS_AT_ONCE: u64 = 256;

/// The role of the hostile processes: the same program, started with an attack. Each ends with its
/// input. It prints a line once it has begun, and the number of its strikes in the end.
#[test]
fn attacker() {
    let Ok(attack) = std::env::var(ATTACK) else { return };
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let all = rustix::process::Rlimit { current: limit.maximum, ..limit };
    let _refused = rustix::process::setrlimit(rustix::process::Resource::Nofile, all);
    let node = std::env::var(NODE).unwrap().parse().unwrap();
    let third_party = std::env::var(THIRD_PARTY).unwrap();
    let third_party = third_party.split_terminator(',').map(str::to_owned).collect();
    let field = Arc::new(Field::new(node, third_party));
    let ending = field.clone();
    std::thread::spawn(move || {
        let _siege_lasts = std::io::stdin().read_to_end(&mut Vec::new());
        println!("{STRUCK}{}", ending.struck());
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let begun = async {
            field.began().await;
            println!("{BEGAN}");
        };
        tokio::join!(field.attack(&attack), begun);
    });
}

const BEGAN: &str = "attack: begun";
const STRUCK: &str = "attack: strikes ";

/// A hostile process.
struct Attacker {
    _child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Attacker {
    fn start(attack: &str, node: SocketAddr, third_party: &str) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut idle = Command::new("chrt");
        idle.args(["--idle", "0"]).arg(&program);
        let start = |mut command: Command| {
            command.args(["attacker", "--exact", "--nocapture", "--test-threads=1"]);
            command.env(ATTACK, attack).env(NODE, node.to_string()).env(THIRD_PARTY, third_party);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn()
        };
        let mut child = start(idle).or_else(|_| start(Command::new(&program))).unwrap();
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { _child: child, stdin, lines }
    }

    /// Waits for a line of the attack, and returns what follows its beginning.
    async fn wait_for(&mut self, head: &str) -> String {
        let wait = async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("the attack lives");
                // The test runner's own words may stand before it.
                if let Some((_, rest)) = line.split_once(head) {
                    return rest.to_owned();
                }
            }
        };
        soon(wait).await
    }

    async fn begun(&mut self) {
        self.wait_for(BEGAN).await;
    }

    /// Ends the attack; returns the number of its strikes.
    async fn end(mut self) -> u64 {
        drop(self.stdin.take());
        self.wait_for(STRUCK).await.parse().unwrap()
    }
}

/// Listeners at addresses that hostile peers call those of nodes. They count who comes.
struct ThirdParty {
    addresses: Vec<String>,
    dialled: Arc<AtomicU64>,
}

impl ThirdParty {
    async fn new() -> Self {
        let (mut addresses, dialled) = (Vec::new(), Arc::new(AtomicU64::new(0)));
        for _ in 0..4 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap().to_string());
            let dialled = dialled.clone();
            tokio::spawn(async move {
                while listener.accept().await.is_ok() {
                    dialled.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { addresses, dialled }
    }
}

/// What an honest peer saw during a siege.
struct Seen {
    latencies: Vec<Duration>,
    strikes: u64,
    memory: u64,
    lines: u64,
    dials: u64,
    lasted: Duration,
}

impl Seen {
    fn percentile(&self, percent: usize) -> Duration {
        self.latencies[self.latencies.len().saturating_sub(1) * percent / 100]
    }
}

/// Lays siege to a new node; panics if an honest peer's link breaks, or a request is not answered.
async fn siege(attacks: &[&str], length: Duration) -> Seen {
    let besieged = Besieged::start();
    let host = Host::new();
    let honest = host.tcp_config("honest").trust(Trust::Open { anywhere: false }).gossip(false);
    let honest = honest.peer(Address::Tcp(besieged.addr)).start().await.unwrap();
    honest.wait_for_service("echo", SOON).await.unwrap();
    let mut honest = Honest { events: honest.events(), node: honest, attacks: attacks.join(", ") };
    let third_party = ThirdParty::new().await;

    let (start, lines) = (Instant::now(), besieged.lines());
    let addresses = third_party.addresses.join(",");
    let attackers = attacks.iter().map(|attack| Attacker::start(attack, besieged.addr, &addresses));
    let mut attackers: Vec<_> = attackers.collect();
    let begun = join_all(attackers.iter_mut().map(Attacker::begun));
    honest.ask_until(begun).await;
    let mut latencies = honest.ask_until(sleep(length)).await;
    latencies.sort_unstable();
    let seen = Seen {
        latencies,
        memory: besieged.peak(),
        lines: besieged.lines() - lines,
        dials: third_party.dialled.load(Ordering::Relaxed),
        lasted: start.elapsed(),
        strikes: join_all(attackers.into_iter().map(Attacker::end)).await.into_iter().sum(),
    };
    assert_eq!(honest.lost(), None, "the link of the honest pair under {}", honest.attacks);
    seen
}

/// A peer that means well.
struct Honest {
    node: Node,
    events: Events,
    attacks: String,
}

impl Honest {
    /// Makes one request after the other; returns how long each took.
    async fn ask_until(&mut self, end: impl Future) -> Vec<Duration> {
        let mut latencies = Vec::new();
        let mut end = std::pin::pin!(end);
        while end.as_mut().now_or_never().is_none() {
            let asked = Instant::now();
            let answer = self.node.request("echo", "unmoved?").deadline(SOON).await;
            latencies.push(asked.elapsed());
            match answer {
                Ok(answer) => assert_eq!(answer.text(), "unmoved?"),
                Err(error) => {
                    let lost = self.lost();
                    panic!("under {}: {error} ({lost:?})", self.attacks);
                }
            }
        }
        latencies
    }

    /// Why its link was lost.
    fn lost(&mut self) -> Option<String> {
        while let Some(event) = self.events.recv().now_or_never()? {
            if let Event::PeerDown { reason, .. } = event {
                return Some(reason.to_string());
            }
        }
        None
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_honest_pair_is_unmoved_by_each_attack_and_by_all_together() {
    let seconds = std::env::var("PEERBUS_SIEGE_SECONDS").ok().map(|text| text.parse().unwrap());
    let length = Duration::from_secs(seconds.unwrap_or(1));
    let only = std::env::var("PEERBUS_SIEGE_ATTACK").ok();
    let mut sieges: Vec<(&str, &[&str])> = vec![("(quiet)", &[SPINNER])];
    sieges.extend(ATTACKS.iter().map(|attack| (*attack, std::slice::from_ref(attack))));
    sieges.push(("all together", &ATTACKS));
    if let Some(only) = &only {
        sieges.retain(|(name, _)| name == only || *name == "(quiet)");
    }
    println!(
        "{:18} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7} {:>8} {:>8}",
        "attack", "strikes", "requests", "p50", "p99", "×quiet", "MiB", "lines/s", "dials/s"
    );
    let (mut quiet, mut faults) = (None, Vec::new());
    for (name, attacks) in sieges {
        let seen = siege(attacks, length).await;
        let (p50, p99) = (seen.percentile(50), seen.percentile(99));
        let quiet = *quiet.get_or_insert(p99);
        let each = |count: u64| count as f64 / seen.lasted.as_secs_f64();
        println!(
            "{name:18} {:9} {:9} {:>9} {:>9} {:7.1} {:7} {:8.1} {:8.1}",
            seen.strikes,
            seen.latencies.len(),
            format!("{:.2} ms", p50.as_secs_f64() * 1e3),
            format!("{:.2} ms", p99.as_secs_f64() * 1e3),
            p99.as_secs_f64() / quiet.as_secs_f64(),
            seen.memory,
            each(seen.lines),
            each(seen.dials),
        );
        let bound =
            |a_second, at_once| at_once + (a_second as f64 * seen.lasted.as_secs_f64()) as u64;
        for (what, count, most) in [
            ("MiB of memory", seen.memory, MOST_MEMORY),
            ("lines", seen.lines, bound(LINES_A_SECOND, LINES_AT_ONCE)),
            ("connections to a third party", seen.dials, bound(DIALS_A_SECOND, DIALS_AT_ONCE)),
        ] {
            if count > most {
                faults.push(format!("{name}: {count} {what}, at most {most} are allowed"));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
