//! Two hosts on one LAN: network namespaces, veth and a bridge, and real multicast DNS.
//!
//! Needs root and `ip netns`; where that isn't possible, the test says so and passes.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(target_os = "linux", feature = "cli"))]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

/// Longer than a dead peer and a late redial take together.
const SOON: Duration = Duration::from_secs(60);

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split_whitespace()).output();
    let output = output.map_err(|error| format!("ip can't be run: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// A switch and two hosts, each a namespace; removed in the end.
struct Lan {
    switch: String,
    hosts: [String; 2],
}

impl Lan {
    fn new() -> Result<Self, String> {
        let tag = std::process::id();
        let lan =
            Self { switch: format!("pbs{tag}"), hosts: [format!("pba{tag}"), format!("pbb{tag}")] };
        let switch = &lan.switch;
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add br0 type bridge mcast_snooping 0"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for (number, host) in lan.hosts.iter().enumerate() {
            ip(&format!("netns add {host}"))?;
            ip(&format!("-n {host} link set lo up"))?;
            ip(&format!(
                "-n {host} link add eth0 type veth peer name port{number} netns {switch}"
            ))?;
            ip(&format!("-n {host} addr add 10.77.0.{}/24 dev eth0", number + 1))?;
            ip(&format!("-n {host} link set eth0 up"))?;
            ip(&format!("-n {switch} link set port{number} master br0"))?;
            ip(&format!("-n {switch} link set port{number} up"))?;
        }
        Ok(lan)
    }

    /// Pulls or plugs in the first host's cable.
    fn cable(&self, state: &str) {
        ip(&format!("-n {} link set port0 {state}", self.switch)).unwrap();
    }

    fn command(&self, host: usize, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.hosts[host], env!("CARGO_BIN_EXE_peerbus")]);
        command.args(args).args(["--no-local", "--listen", &format!("10.77.0.{}:0", host + 1)]);
        command.stdin(Stdio::null());
        command
    }

    fn node(&self, host: usize, name: &str) -> Running {
        let args = ["node", "--json", "--name", name, "--serve", name, "--subscribe", "news"];
        let mut child = self.command(host, &args).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _test_is_over = sender.send(serde_json::from_str(&line).unwrap());
            }
        });
        Running { child, lines }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.switch]) {
            let _never_made = ip(&format!("netns del {name}"));
        }
    }
}

struct Running {
    child: Child,
    lines: Receiver<Value>,
}

impl Running {
    fn wait_for(&self, event: &str) -> Value {
        loop {
            let line = self.lines.recv_timeout(SOON).unwrap_or_else(|_| panic!("no {event}"));
            if line["event"] == event {
                return line;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

#[test]
fn two_hosts_meet_by_mdns_lose_each_other_with_the_network_and_meet_again() {
    let lan = match Lan::new() {
        Ok(lan) => lan,
        Err(error) => return eprintln!("SKIPPED: no network namespaces here ({error})"),
    };
    let (left, right) = (lan.node(0, "left"), lan.node(1, "right"));
    let mut means = Vec::new();
    for (node, other) in [(&left, "right"), (&right, "left")] {
        let up = node.wait_for("peer_up");
        assert_eq!(up["name"], other);
        means.push(up["found_by"].as_str().unwrap().to_owned());
    }
    // One saw the other's announcement and dialled it; the other may not have seen one yet.
    assert!(means.contains(&"mdns".to_owned()), "{means:?}");
    assert!(means.iter().all(|by| by == "mdns" || by == "inbound"), "{means:?}");
    let reply =
        lan.command(1, &["request", "left", "over the wire", "--wait", "20s"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&reply.stdout), "over the wire\n", "{reply:?}");
    assert_eq!(left.wait_for("call")["body"], "over the wire");

    lan.cable("down");
    let gone = |node: &Running, other: &str| loop {
        let down = node.wait_for("peer_down");
        if down["name"] == other {
            return down;
        }
    };
    assert!(gone(&left, "right")["reason"].as_str().unwrap().contains("heard"));
    gone(&right, "left");

    lan.cable("up");
    left.wait_for("peer_up");
    right.wait_for("peer_up");
    let publish = ["pub", "news", "again", "--subscribers", "2", "--wait", "30s"];
    let published = lan.command(1, &publish).output().unwrap();
    assert!(published.status.success(), "{published:?}");
    assert_eq!(left.wait_for("message")["body"], "again");
    assert_eq!(right.wait_for("message")["body"], "again");
}
