//! Hosts on real networks: namespaces, veth, a bridge with multicast DNS, and a router without.
//!
//! Requires root and `ip netns`; otherwise the test prints that it is skipped, and passes.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(target_os = "linux", feature = "cli"))]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

/// Longer than the detection of a dead peer and a late redial together.
const SOON: Duration = Duration::from_secs(60);

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split_whitespace()).output();
    let output = output.map_err(|error| format!("ip can't be run: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Hosts and the network between them, each a namespace; removed on drop.
struct Lan {
    between: String,
    /// The mesh key of the test's nodes.
    mesh_key: String,
    hosts: Vec<Host>,
}

struct Host {
    namespace: String,
    ip: String,
}

impl Lan {
    /// Namespaces of this process, with a cable from each host.
    fn new(kind: &str, ips: &[&str]) -> Result<Self, String> {
        let tag = format!("{kind}{}", std::process::id());
        let host = |(number, ip): (usize, &&str)| Host {
            namespace: format!("pb{number}{tag}"),
            ip: (*ip).to_owned(),
        };
        let hosts = ips.iter().enumerate().map(host).collect();
        let mesh_key = peerbus::MeshKey::generate().reveal();
        let lan = Self { between: format!("pb{tag}"), mesh_key, hosts };
        let between = &lan.between;
        ip(&format!("netns add {between}"))?;
        for (number, Host { namespace, ip: address }) in lan.hosts.iter().enumerate() {
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
            ip(&format!(
                "-n {namespace} link add eth0 type veth peer name port{number} netns {between}"
            ))?;
            ip(&format!("-n {namespace} addr add {address}/24 dev eth0"))?;
            ip(&format!("-n {namespace} link set eth0 up"))?;
            ip(&format!("-n {between} link set port{number} up"))?;
        }
        Ok(lan)
    }

    /// Two hosts on one switch.
    fn switched() -> Result<Self, String> {
        let lan = Self::new("s", &["10.77.0.1", "10.77.0.2"])?;
        let switch = &lan.between;
        ip(&format!("-n {switch} link add br0 type bridge mcast_snooping 0"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for number in 0..lan.hosts.len() {
            ip(&format!("-n {switch} link set port{number} master br0"))?;
        }
        Ok(lan)
    }

    /// Three hosts, each in a subnet of its own, and a router that doesn't forward multicast.
    fn routed() -> Result<Self, String> {
        let lan = Self::new("r", &["10.77.1.2", "10.77.2.2", "10.77.3.2"])?;
        let router = &lan.between;
        let forward =
            ["netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"];
        let forwards = Command::new("ip").args(forward).status();
        if !forwards.is_ok_and(|status| status.success()) {
            return Err("packets can't be forwarded".into());
        }
        for (number, host) in lan.hosts.iter().enumerate() {
            let gateway = format!("10.77.{}.1", number + 1);
            ip(&format!("-n {router} addr add {gateway}/24 dev port{number}"))?;
            ip(&format!("-n {} route add default via {gateway}", host.namespace))?;
        }
        Ok(lan)
    }

    /// Unplugs or plugs in the first host's cable.
    fn cable(&self, state: &str) {
        ip(&format!("-n {} link set port0 {state}", self.between)).unwrap();
    }

    fn command(&self, host: usize, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        let namespace = &self.hosts[host].namespace;
        command.args(["netns", "exec", namespace, env!("CARGO_BIN_EXE_peerbus")]);
        command.args(args).arg("--no-local").env("PEERBUS_MESH_KEY", &self.mesh_key);
        command.stdin(Stdio::null());
        command
    }

    fn node(&self, host: usize, name: &str, more: &[&str]) -> Running {
        let args = ["node", "--json", "--name", name, "--serve", name, "--subscribe", "news"];
        let mut child =
            self.command(host, &[&args, more].concat()).stdout(Stdio::piped()).spawn().unwrap();
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
        for name in self.hosts.iter().map(|host| &host.namespace).chain([&self.between]) {
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
    let lan = match Lan::switched() {
        Ok(lan) => lan,
        Err(error) => return eprintln!("SKIPPED: no network namespaces here ({error})"),
    };
    let (left, right) = (lan.node(0, "left", &[]), lan.node(1, "right", &[]));
    let mut means = Vec::new();
    for (node, other) in [(&left, "right"), (&right, "left")] {
        let up = node.wait_for("peer_up");
        assert_eq!(up["name"], other);
        means.push(up["found_by"].as_str().unwrap().to_owned());
    }
    // One node saw the other's announcement and dialled; the other may not have seen one yet.
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
    assert!(gone(&left, "right")["reason"].as_str().unwrap().contains("silent"));
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

#[test]
fn one_reachable_peer_joins_nodes_to_each_other_across_subnets() {
    let lan = match Lan::routed() {
        Ok(lan) => lan,
        Err(error) => return eprintln!("SKIPPED: no network namespaces here ({error})"),
    };
    let seed = lan.node(2, "seed", &[]);
    let started = seed.wait_for("started");
    let (_, port) = started["listening"][0].as_str().unwrap().split_once(':').unwrap();
    let address = &format!("{}:{port}", lan.hosts[2].ip);
    let left = lan.node(0, "left", &["--peer", address]);
    assert_eq!(left.wait_for("peer_up")["name"], "seed");
    let right = lan.node(1, "right", &["--peer", address]);
    let mut means = Vec::new();
    for (node, other) in [(&left, "right"), (&right, "left")] {
        let up = loop {
            let up = node.wait_for("peer_up");
            if up["name"] == other {
                break up;
            }
        };
        means.push(up["found_by"].as_str().unwrap().to_owned());
    }
    assert!(means.contains(&"gossip".to_owned()), "{means:?}");
}
