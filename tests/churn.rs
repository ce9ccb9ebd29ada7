//! Real nodes, each a process with two workers, publish while others are killed and restarted: none
//! may hang. `PEERBUS_CHURN_SECONDS=n` runs for n seconds instead of 20.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::private_dir;
use peerbus::{Call, HandlerError, Node};
use tokio::time::{Instant, interval, sleep_until};

const DIR: &str = "PEERBUS_TEST_DIR";
const NAME: &str = "PEERBUS_TEST_NAME";
const NODES: usize = 24;
/// The interval at which a quarter of the nodes is killed and restarted.
const KILL_EVERY: Duration = Duration::from_secs(2);
/// The interval at which each node publishes.
const PUBLISH_EVERY: Duration = Duration::from_millis(10);
/// The time limit for a node to answer, and to find all others, after the last kill.
const PATIENCE: Duration = Duration::from_secs(60);

/// The role of this test's processes: the same program, started with a name. Each ends with its
/// parent.
#[test]
fn member() {
    let (Ok(name), Ok(dir)) = (std::env::var(NAME), std::env::var(DIR)) else { return };
    std::thread::spawn(|| {
        let _parent_lives = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().unwrap().block_on(take_part(&name, &dir));
}

async fn take_part(name: &str, dir: &str) {
    let node = Node::builder().name(name).runtime_dir(dir).mdns(false).start().await.unwrap();
    let mut heard = node.subscribe("churn.>").unwrap();
    tokio::spawn(async move { while heard.recv().await.is_some() {} });
    // The service answers once the node is linked to all others and to the requester.
    let asked = node.clone();
    let answer = move |_: Call| {
        let asked = asked.clone();
        async move {
            asked.wait_for_peers(NODES, PATIENCE).await.map_err(HandlerError::from_error)?;
            Ok::<_, HandlerError>(())
        }
    };
    let _service = node.serve(format!("complete.{name}"), answer).start().unwrap();
    let mut ticks = interval(PUBLISH_EVERY);
    loop {
        ticks.tick().await;
        node.publish(format!("churn.{name}"), "here").await.unwrap();
    }
}

/// The process of a node.
struct Member(Child);

impl Member {
    fn start(number: usize, dir: &Path) -> Self {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.args(["member", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(NAME, format!("n{number}")).env(DIR, dir);
        Self(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_killed_and_come_back_leave_none_hanging() {
    let seconds = std::env::var("PEERBUS_CHURN_SECONDS").ok().map(|text| text.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(20));
    let dir = private_dir();
    let path = PathBuf::from(dir.path());
    let mut members: Vec<_> = (0..NODES).map(|number| Member::start(number, &path)).collect();
    let watcher = Node::builder().runtime_dir(&path).mdns(false).start().await.unwrap();

    let mut next = Instant::now() + KILL_EVERY;
    let (mut starts, mut victim) = (NODES, 0);
    while next < end {
        sleep_until(next).await;
        for _ in 0..NODES / 4 {
            // Steps of 7 reach all of 24, and neighbours at different times.
            victim = (victim + 7) % NODES;
            members[victim] = Member::start(victim, &path);
            starts += 1;
        }
        next += KILL_EVERY;
    }

    for number in 0..NODES {
        let service = format!("complete.n{number}");
        let answered = async {
            watcher.wait_for_service(&service, PATIENCE).await.is_ok()
                && watcher.request(&service, "").deadline(PATIENCE).await.is_ok()
        };
        assert!(answered.await, "node {number} is silent or alone after {starts} starts");
    }
    drop(members);
}
