//! The command as its users run it: real processes, right and wrong input.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(unix, feature = "cli"))]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use common::private_dir;
use tempfile::TempDir;

/// A host for the processes of one test.
struct Shell {
    dir: TempDir,
}

impl Shell {
    fn new() -> Self {
        Self { dir: private_dir() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peerbus"));
        command.args(args).env("XDG_RUNTIME_DIR", self.dir.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn start(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Running { child, lines }
    }
}

/// A process that is killed at the end of the test.
struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn fails(output: &Output, with: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    assert!(stderr.contains(with), "{stderr:?} does not say {with:?}");
}

#[test]
fn a_published_message_is_printed_by_a_subscriber() {
    let shell = Shell::new();
    let mut subscriber = shell.start(&["sub", "orders.>", "--count", "1", "--json"]);
    let published = shell.run(&["pub", "orders.new", "17 apples", "--key", "k", "--header", "a=b"]);
    assert!(stdout(&published).contains("queued for 1 nodes"));
    let line: serde_json::Value = serde_json::from_str(&subscriber.line()).unwrap();
    assert_eq!(line["body"], "17 apples");
    assert_eq!((&line["to"], &line["key"]), (&"orders.new".into(), &"k".into()));
    assert_eq!(line["headers"]["a"], "b");
    assert!(subscriber.child.wait().unwrap().success());
}

#[test]
fn what_others_wrote_can_neither_control_a_terminal_nor_forge_a_line() {
    let shell = Shell::new();
    let mut text = shell.start(&["sub", "orders.>", "--count", "1"]);
    let mut json = shell.start(&["sub", "orders.>", "--count", "1", "--json"]);
    let evil = "\u{1b}[2J\u{9b}31m\r\norders.real forged\u{202e}";
    stdout(&shell.run(&["pub", "orders.new", evil, "--subscribers", "2"]));
    let shown = r"\u{1b}[2J\u{9b}31m\r\norders.real forged\u{202e}";
    assert_eq!(text.line(), format!("orders.new {shown}\n"));
    let line = json.line();
    assert!(line.is_ascii(), "{line}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap()["body"], evil);
    // A program that reads a reply has it unchanged.
    let _server = shell.start(&["serve", "echo", "--echo"]);
    assert_eq!(stdout(&shell.run(&["request", "echo", evil])), format!("{evil}\n"));
    fails(&shell.run(&["pub", "a\u{202e}b", "x"]), "visible character");
    fails(
        &shell.run(&["send", "--node", &peerbus::NodeId::BROKER.to_string(), "x"]),
        "small order",
    );
}

#[test]
fn a_service_answers_requests_and_takes_one_way_messages() {
    let shell = Shell::new();
    let mut server = shell.start(&["serve", "echo", "--echo"]);
    assert_eq!(stdout(&shell.run(&["request", "echo", "hello"])), "hello\n");
    assert_eq!(server.line(), "call to echo: hello\n");
    assert!(stdout(&shell.run(&["send", "echo", "one way"])).starts_with("sent "));
    assert_eq!(server.line(), "call to echo: one way\n");
}

/// Who reads the lines of a node may stop, as a pager does, or a terminal after Ctrl-S.
#[test]
fn a_node_whose_lines_nobody_reads_stays_with_its_peers() {
    let shell = Shell::new();
    let _unread = shell.start(&["serve", "echo", "--echo", "--name", "unread"]);
    let threads = std::thread::available_parallelism().unwrap().get();
    let body = "x".repeat(100_000);
    let calls = (0..threads + 4).map(|_| shell.start(&["send", "echo", &body]));
    // Those whose lines have no room are in doubt.
    calls.collect::<Vec<_>>().iter_mut().for_each(|call| _ = call.child.wait().unwrap());
    let output = shell.run(&["peers", "--count", "1", "--wait", "20s", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(value["peers"][0]["name"], "unread");
}

#[test]
fn peers_lists_who_is_there() {
    let shell = Shell::new();
    let mut node = shell.start(&["node", "--name", "box", "--serve", "s", "--subscribe", "t.>"]);
    assert!(node.line().starts_with("box is up as "));
    let output = shell.run(&["peers", "--count", "1", "--wait", "20s", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let peer = &value["peers"][0];
    assert_eq!((&peer["name"], &peer["found_by"]), (&"box".into(), &"local".into()));
    assert_eq!((&peer["services"][0], &peer["subscriptions"][0]), (&"s".into(), &"t.>".into()));
}

#[test]
fn the_demo_runs_to_its_end() {
    let shell = Shell::new();
    let said = stdout(&shell.run(&["demo"]));
    for part in
        ["found", "received", "replies", "alice", "carol is killed", "bob noticed", "That was"]
    {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}

#[test]
fn wrong_input_is_explained_and_fails() {
    let shell = Shell::new();
    fails(&shell.run(&["pub", "a..b", "x"]), "empty token");
    fails(&shell.run(&["sub", "a.>.b"]), "wildcard");
    fails(&shell.run(&["pub", "lonely", "x", "--wait", "50ms"]), "no node subscribes to lonely");
    fails(&shell.run(&["request", "nobody", "x", "--wait", "50ms"]), "no node serves nobody");
    fails(&shell.run(&["send", "--node", "xyz", "x"]), "not a node id");
    fails(&shell.run(&["peers", "--mesh", "a/b"]), "mesh name");
    fails(&shell.run(&["peers", "--peer", "nowhere"]), "HOST:PORT");
    fails(&shell.run(&["peers", "--count", "9", "--wait", "50ms"]), "found 0 of 9 peers");
    fails(&shell.run(&["serve", "x"]), "--echo");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    fails(&shell.run(&["node", "--listen", &taken]), "can't listen on");
    let open = ["--trust", "open", "--anywhere"];
    let no_interface = ["peers", "--no-local", "--interface", "nope0"];
    fails(&shell.run(&[&no_interface[..], &open].concat()), "no network interface \"nope0\"");
    fails(&shell.run(&["peers", "--listen", "0.0.0.0:0"]), "peerbus keygen --mesh");
    fails(&shell.run(&["peers", "--anywhere"]), "--trust open");
    fails(&shell.run(&["peers", "--trust", "mesh-key"]), "--mesh-key KEY");
    fails(&shell.run(&["peers", "--trusted-keys", "/nowhere"]), "trusted keys /nowhere");
    let rules = shell.dir.path().join("rules");
    std::fs::write(&rules, "* read orders").unwrap();
    fails(
        &shell.run(&["peers", "--rules", rules.to_str().unwrap()]),
        "line 1: \"read\" is none of",
    );
    std::fs::write(&rules, "* * >").unwrap();
    fails(&shell.run(&["peers", "--rules", rules.to_str().unwrap()]), "rules would bind nobody");
    for mode in ["open", "this-host"] {
        let unused = ["peers", "--trust", mode, "--mesh-key-file", "k"];
        fails(&shell.run(&unused), &format!("--trust {mode} uses none"));
    }
    let typo = shell.run(&["peers", "--mesh-key", "peerbus-mesh-my-secret"]);
    fails(&typo, "not a mesh key");
    assert!(!String::from_utf8_lossy(&typo.stderr).contains("my-secret"), "{typo:?}");
    let notes = shell.dir.path().join("notes");
    std::fs::write(&notes, "x").unwrap();
    fails(&shell.run(&["node", "--identity", notes.to_str().unwrap()]), "identity file");
}

#[test]
fn each_benchmark_runs_and_names_its_reference() {
    let shell = Shell::new();
    let dir = shell.dir.path().to_str().unwrap();
    let quick = [
        ["bench", "throughput", "--rounds=1", "--millis=10", "--subscribers=2", "--stalled=1"]
            .as_slice(),
        &["bench", "load", "--rounds=1", "--millis=10", "--rate=1000"],
        &["bench", "requests", "--rounds=1", "--count=10", "--in-flight=4"],
        &["bench", "durable", "--rounds=1", "--millis=10", "--dir", dir],
        &["bench", "restart", "--pending=100", "--dir", dir],
        &["bench", "scale", "--rounds=1", "--rest=1", "--nodes=3", "--by=gossip"],
    ];
    // CPU time and memory of a process can be measured on Linux only.
    let here =
        |args: &&&[&str]| cfg!(target_os = "linux") || !matches!(args[1], "scale" | "restart");
    for args in quick.iter().filter(here) {
        let output = shell.run(&[*args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let results = report["results"].as_array().unwrap();
        assert!(results.len() >= 2, "{args:?}: {report}");
        for result in results {
            let numbers = result.as_object().unwrap().values().filter_map(|it| it.as_f64());
            assert!(numbers.clone().count() > 0 && numbers.clone().all(f64::is_finite), "{report}");
        }
    }
    let nobody_reads = shell.run(&["bench", "throughput", "--subscribers=2", "--stalled=2"]);
    let error = String::from_utf8_lossy(&nobody_reads.stderr).into_owned();
    assert!(!nobody_reads.status.success() && error.contains("--stalled must be less"), "{error}");
}

const COMPARED: &str = r#"
[[workload]]
name = "ask"
pattern = "request"
seconds = 0.1

[[workload]]
name = "work"
pattern = "work"
rate = 500
workers = 2
seconds = 0.2

[[workload]]
name = "kept"
guaranteed = "both"
rate = 500
seconds = "600ms"
fault = { kill = "receiver", after = "200ms", for = "100ms" }
"#;

#[cfg(target_os = "linux")]
#[test]
fn the_comparison_counts_what_each_system_does_and_makes_a_page() {
    let shell = Shell::new();
    let (dir, file) = (shell.dir.path().to_str().unwrap(), shell.dir.path().join("w.toml"));
    let page = shell.dir.path().join("page.html");
    std::fs::write(&file, COMPARED).unwrap();
    let output = shell
        .command(&["bench", "tradeoff", file.to_str().unwrap(), "--rounds=1", "--json"])
        .args(["--system=mesh", "--system=outbox", "--system=embedded", "--system=nats"])
        .args(["--dir", dir, "--html", page.to_str().unwrap()])
        .env_remove("PEERBUS_NATS")
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(report["skipped"][0]["system"], "nats");
    let of = |workload: usize, system: &str| {
        let results = report["workloads"][workload]["results"].as_array().unwrap();
        results.iter().find(|it| it["system"] == system).cloned()
    };
    for system in ["mesh", "embedded"] {
        let (asked, worked) = (of(0, system).unwrap(), of(1, system).unwrap());
        assert!(asked["p50_us"]["median"].as_f64().unwrap() > 0.0, "{asked}");
        assert_eq!((&worked["lost"], &worked["duplicated"]), (&0.into(), &0.into()), "{worked}");
        let killed = of(2, system).unwrap();
        assert!(killed["lost"].as_u64().unwrap() > 0, "nobody was there: {killed}");
    }
    assert!(of(0, "outbox").is_none(), "a request is not guaranteed");
    let kept = of(2, "outbox").unwrap();
    // Messages that were handled, but whose processed records were not stored, are redelivered.
    assert_eq!(&kept["lost"], &0, "{kept}");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("the receiver is killed") && page.ends_with("</html>\n"));
}

/// The child processes of a process.
#[cfg(target_os = "linux")]
fn children(pid: u32) -> Vec<(u32, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids = lists.flat_map(|list| {
        list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    });
    pids.map(|pid| {
        (pid, std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default())
    })
    .collect()
}

#[cfg(target_os = "linux")]
#[test]
fn a_comparison_whose_broker_ends_keeps_what_was_finished() {
    let shell = Shell::new();
    let (dir, file) = (shell.dir.path().to_str().unwrap(), shell.dir.path().join("w.toml"));
    let long =
        COMPARED.replace("rate = 500\nworkers = 2\nseconds = 0.2", "rate = 5\nseconds = 600");
    std::fs::write(&file, long).unwrap();
    let bench = shell
        .command(&["bench", "tradeoff", file.to_str().unwrap(), "--rounds=1", "--json"])
        .args(["--system=embedded", "--dir", dir])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The second broker, once its nodes are running.
    let mut first = None;
    let second = loop {
        let children = children(bench.id());
        let named = |name: &str| {
            children.iter().find(|(_, command)| command.contains(name)).map(|(pid, _)| *pid)
        };
        if let Some(broker) = named("\0broker\0")
            && named("\0actor\0").is_some()
            && *first.get_or_insert(broker) != broker
        {
            break broker;
        }
        std::thread::yield_now();
    };
    let killed = Command::new("kill").args(["-9", &second.to_string()]).status().unwrap();
    assert!(killed.success());
    let output = bench.wait_with_output().unwrap();
    fails(&output, "work over the embedded broker, round 1: the broker ended");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["workloads"][0]["results"][0]["system"], "embedded");
    assert_eq!(report["workloads"][1]["results"], serde_json::json!([]));
    assert!(report["cut_short"].as_str().unwrap().contains("the broker ended"));
    // None of its processes are left.
    let left: Vec<_> = std::fs::read_dir(shell.dir.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_wrong_broker_or_workload_is_explained() {
    let shell = Shell::new();
    fails(&shell.run(&["pub", "a", "b", "--broker", "nast://x"]), "peerbus, nats, tls, amqp or");
    if !cfg!(feature = "nats") {
        fails(&shell.run(&["pub", "a", "b", "--broker", "nats://x"]), "--features nats");
    }
    if !cfg!(feature = "rabbitmq") {
        fails(&shell.run(&["pub", "a", "b", "--broker", "amqp://x"]), "--features rabbitmq");
    }
    // No process listens on this address any more.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("peerbus://{}", listener.local_addr().unwrap());
    drop(listener);
    let output = shell.run(&["pub", "a", "b", "--wait", "500ms", "--broker", &nowhere]);
    fails(&output, "can't be reached");
    let told = String::from_utf8_lossy(&output.stderr).matches("can't be reached").count();
    assert_eq!(told, 2, "once in the log, and by the command: {output:?}");
    fails(&shell.run(&["broker", "--listen", "0.0.0.0:0"]), "loopback address");
    fails(&shell.run(&["bridge", "--export", "a"]), "--broker URL");
    fails(&shell.run(&["bridge", "--broker", &nowhere]), "nothing to bridge");
    fails(&shell.run(&["bench", "tradeoff", "nofile.toml"]), "nofile.toml");
    fails(&shell.run(&["bench", "tradeoff", "--workload", "nope"]), "choose one of request,");
    let file = shell.dir.path().join("w.toml");
    for (line, wanted) in [
        ("sized = 5", "unknown field `sized`"),
        ("size = 5", "24 to 1048576"),
        ("rate = 0", "above 0"),
        ("pattern = \"request\"\nguaranteed = true", "is not guaranteed"),
        ("fault = { kill = \"link\", after = 1, for = 5 }", "the fault lasts until"),
    ] {
        std::fs::write(&file, format!("[[workload]]\nname = \"w\"\n{line}\n")).unwrap();
        fails(&shell.run(&["bench", "tradeoff", file.to_str().unwrap()]), wanted);
    }
}

#[test]
fn an_outbox_keeps_what_is_sent_and_tells_of_it() {
    let shell = Shell::new();
    let folder = |name: &str| shell.dir.path().join(name).to_str().unwrap().to_owned();
    let (sender, receiver) = (folder("sender"), folder("receiver"));
    let send = |body: &str, more: &[&str]| {
        let args = ["send", "billing", body, "--no-mdns", "--outbox", &sender];
        stdout(&shell.run(&[&args, more].concat()))
    };
    assert!(send("one", &["--wait", "0s"]).contains("0 processed; 1 kept"));
    let retries = ["--max-attempts", "3", "--backoff", "10ms..1m"];
    let more = [&["--wait", "0s", "--key", "k"], &retries[..]].concat();
    assert!(send("two", &more).contains("0 processed; 2 kept"));
    let listed = stdout(&shell.run(&["outbox", "list", &sender]));
    assert!(listed.contains("billing") && listed.contains("#2"), "{listed}");
    let shown = stdout(&shell.run(&["outbox", "show", &sender, "2"]));
    assert!(shown.contains("key         k") && shown.ends_with("two\n"), "{shown}");
    for (flag, value, wanted) in [
        ("--max-attempts", "0", "0 is not in 1"),
        ("--backoff", "10ms", "it is two times, such as 200ms..60s"),
        ("--backoff", "10ms..late", "\"late\": expected number"),
        ("--backoff", "2s..1s", "backoff begins with 2s, above its longest, 1s"),
    ] {
        let args = ["send", "billing", "x", "--no-mdns", "--outbox", &sender, flag, value];
        fails(&shell.run(&args), wanted);
    }
    fails(&shell.run(&["outbox", "show", &sender, "9"]), "no message 9");
    fails(&shell.run(&["outbox", "replay", &sender, "1"]), "is not a dead letter");
    fails(&shell.run(&["outbox", "list", &folder("nothing")]), "it holds no outbox");
    assert!(stdout(&shell.run(&["outbox", "verify", &sender])).contains("2 messages"));
    assert_eq!(
        stdout(&shell.run(&["outbox", "purge", &sender, "2"])),
        "purged 2\n".replace('2', "1")
    );

    let args = ["serve", "billing", "--echo", "--no-mdns", "--outbox", &receiver];
    let mut service = shell.start(&args);
    assert!(send("three", &["--wait", "30s"]).contains("1 processed"));
    let mut calls = [service.line(), service.line()];
    calls.sort();
    assert_eq!(calls, ["call to billing: one\n", "call to billing: three\n"]);
    fails(&shell.run(&["outbox", "list", &receiver]), "another process uses it");
    assert!(stdout(&shell.run(&["outbox", "list", &sender])).contains("no messages in"));

    // An expired message is a dead letter, which can be replayed.
    let args = ["send", "nobody", "late", "--no-mdns", "--outbox", &sender];
    let expired = shell.run(&[&args[..], &["--expires", "1ms", "--wait", "30s"]].concat());
    fails(&expired, "expired before it was processed");
    let listed = stdout(&shell.run(&["outbox", "list", &sender, "--dead", "--json"]));
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["destinations"][0]["dead"], 1);
    assert_eq!(listed["messages"][0]["body"], "late");
    assert_eq!(stdout(&shell.run(&["outbox", "replay", &sender, "--all"])), "replayed 1\n");
    assert_eq!(stdout(&shell.run(&["outbox", "reassign", &sender, "4"])), "reassigned 1\n");
    fails(&shell.run(&["outbox", "reassign", &sender, "5"]), "no message 5");
}

#[test]
fn damage_to_an_inbox_is_found_as_that_to_an_outbox_is() {
    let shell = Shell::new();
    let store = shell.dir.path().join("store");
    let dir = store.to_str().unwrap();
    let args = ["send", "billing", "one", "--no-mdns", "--wait", "0s", "--outbox", dir];
    stdout(&shell.run(&args));
    let verify = || shell.run(&["outbox", "verify", dir]);
    let sound = stdout(&verify());
    assert_eq!(sound, "1 messages, all readable\nthe inbox: 1 entries, all readable\n");

    let segment = store.join("inbox/0000000000000001.segment");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[90] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    fails(&verify(), "the inbox is damaged");
    let verified = shell.run(&["outbox", "verify", dir, "--json"]);
    let verified: serde_json::Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!((&verified["messages"], &verified["damaged"]), (&1.into(), &serde_json::json!([])));
    let damaged = &verified["inbox"]["damaged"][0];
    assert_eq!(damaged["file"], "inbox/0000000000000001.segment", "{verified}");
    assert!(damaged["from"].as_u64() <= Some(90) && damaged["to"].as_u64() > Some(90));
}

#[test]
fn what_is_damaged_is_told_with_what_it_costs() {
    let shell = Shell::new();
    let store = shell.dir.path().join("store");
    let dir = store.to_str().unwrap();
    for body in ["one", "two"] {
        let args = ["send", "billing", body, "--no-mdns", "--wait", "0s", "--outbox", dir];
        stdout(&shell.run(&args));
    }
    let verify = || shell.run(&["outbox", "verify", dir]);
    let last = store.join("outbox/0000000000000002.segment");
    let whole = std::fs::read(&last).unwrap();
    std::fs::write(&last, &whole[..60]).unwrap();
    let verified = verify();
    fails(&verified, "the outbox is damaged");
    let text = String::from_utf8(verified.stdout).unwrap();
    assert!(text.contains("1 messages") && text.contains("at most 1 messages"), "{text}");
    std::fs::remove_file(&last).unwrap();
    let text = String::from_utf8(verify().stdout).unwrap();
    assert!(text.contains("which is missing; at most 1 messages are lost"), "{text}");
    std::fs::write(&last, &whole).unwrap();

    let identity = store.join("identity");
    std::fs::write(&identity, "").unwrap();
    fails(&verify(), "the identity file can't be used");
    let listed = shell.run(&["outbox", "list", dir]);
    assert!(String::from_utf8(listed.stderr).unwrap().contains("the node can't start"));
    assert!(String::from_utf8(listed.stdout).unwrap().contains("#2"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_goes_away_and_a_full_disk_are_no_reason_to_panic() {
    let shell = Shell::new();
    let store = shell.dir.path().join("store");
    let dir = store.to_str().unwrap();
    let args = ["send", "billing", "one", "--no-mdns", "--wait", "0s", "--outbox", dir];
    stdout(&shell.run(&args));
    let commands: [&[&str]; 6] = [
        &["outbox", "list", dir],
        &["outbox", "list", dir, "--json"],
        &["outbox", "show", dir, "1"],
        &["outbox", "verify", dir],
        &["keygen", "--mesh"],
        &["bench", "tradeoff", "--print"],
    ];
    for args in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = shell.command(args).stdout(writer).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = shell.command(args).stdout(full.try_clone().unwrap()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains("standard output") && told.contains("No space"), "{args:?}: {told}");
        assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
        // The error can't be printed either.
        let mut command = shell.command(args);
        let output = command.stdout(full.try_clone().unwrap()).stderr(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
    }
}

#[test]
fn a_durable_subscription_takes_what_was_published_while_it_was_away() {
    let shell = Shell::new();
    let folder = |name: &str| shell.dir.path().join(name).to_str().unwrap().to_owned();
    let (publisher, subscriber) = (folder("publisher"), folder("subscriber"));
    let sub = |count| {
        let durable = ["--durable", "billing", "--outbox", &subscriber, "--no-mdns"];
        shell.start(&[&["sub", "orders.>", "--count", count], &durable[..]].concat())
    };
    let publish = |body: &str, wait: &str| {
        let args = ["pub", "orders.new", body, "--no-mdns", "--outbox", &publisher];
        shell.run(&[&args[..], &["--wait", wait]].concat())
    };
    fails(&publish("early", "0s"), "no durable subscription is known");
    let mut first = sub("1");
    assert!(stdout(&publish("one", "30s")).contains("1 processed"));
    assert_eq!(first.line(), "orders.new one\n");
    first.child.wait().unwrap();
    assert!(stdout(&publish("two", "0s")).contains("1 kept"));
    let mut second = sub("2");
    assert!(stdout(&publish("three", "30s")).contains("1 processed"));
    assert_eq!([second.line(), second.line()], ["orders.new two\n", "orders.new three\n"]);
    second.child.wait().unwrap();

    // The subscriber receives only as many messages as requested, and leaves the rest for the next
    // run.
    for kept in ["1 kept", "2 kept"] {
        assert!(stdout(&publish("again", "0s")).contains(kept));
    }
    let last = ["pub", "orders.new", "last", "--no-mdns", "--outbox", &publisher, "--wait", "60s"];
    let mut publishing = shell.start(&last);
    for (count, bodies) in [("1", &["again"][..]), ("2", &["again", "last"])] {
        let mut taking = sub(count);
        for body in bodies {
            // A message in flight when the first run ended may have been handled there.
            let line = taking.line().replace(" (redelivered)", "");
            assert_eq!(line, format!("orders.new {body}\n"));
        }
        assert_eq!(taking.line(), "");
        assert!(taking.child.wait().unwrap().success());
    }
    assert!(publishing.line().starts_with("stored "));
    assert_eq!(publishing.line(), "1 processed\n");
    publishing.child.wait().unwrap();

    assert!(stdout(&publish("four", "0s")).contains("1 kept"));
    let listed = stdout(&shell.run(&["outbox", "list", &publisher]));
    let known = listed.lines().next().unwrap();
    assert!(known.starts_with("durable subscription billing to orders.> of "), "{listed}");
    let node = known.rsplit(' ').next().unwrap();
    let forget = |node: &str| shell.run(&["outbox", "forget", &publisher, node, "billing"]);
    fails(&forget("nobody"), "no subscription billing of a node nobody");
    let forgot = stdout(&forget(&node[..8]));
    assert!(forgot.starts_with("forgot billing of ") && forgot.ends_with(", with 1 messages\n"));
    assert_eq!(
        stdout(&shell.run(&["outbox", "list", &publisher])).lines().next(),
        Some(&*format!("no messages in {publisher}"))
    );
    fails(&publish("five", "0s"), "no durable subscription is known");
}

#[test]
fn keygen_makes_an_identity_once_and_never_writes_over_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("till.pem");
    let file = path.to_str().unwrap();
    let shell = Shell::new();
    let made = stdout(&shell.run(&["keygen", file]));
    assert_eq!(made.trim().len(), 52, "{made}");
    assert_eq!(stdout(&shell.run(&["keygen", "--show", file])), made);
    fails(&shell.run(&["keygen", file]), "File exists");
    assert_eq!(stdout(&shell.run(&["keygen", "--show", file])), made, "it is as it was");
    fails(&shell.run(&["keygen", "--show", "/nowhere/at/all"]), "No such file");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        fails(&shell.run(&["keygen", "--show", file]), "chmod 600");
    }
}

#[test]
fn a_reader_that_goes_away_makes_no_dead_letter() {
    let shell = Shell::new();
    let folder = |name: &str| shell.dir.path().join(name).to_str().unwrap().to_owned();
    let (publisher, subscriber) = (folder("publisher"), folder("subscriber"));
    let durable = ["sub", "orders.>", "--durable", "audit", "--no-mdns", "--outbox", &subscriber];
    let publish = |body: &str| {
        let args = ["pub", "orders.new", body, "--no-mdns", "--outbox", &publisher];
        shell.run(&[&args[..], &["--wait", "30s"]].concat())
    };
    let mut first = shell.command(&durable).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(first.stdout.take().unwrap());
    assert!(stdout(&publish("one")).contains("1 processed"));
    lines.read_line(&mut String::new()).unwrap();
    drop(lines);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| publish("two"));
        assert!(first.wait().unwrap().success(), "like any command whose reader is gone");
        let mut again = shell.start(&durable);
        assert!(again.line().starts_with("orders.new two"));
        assert!(stdout(&second.join().unwrap()).contains("1 processed"));
    });
}

/// A node's keys, and all that it and other nodes have logged about them.
#[test]
fn secrets_are_in_no_log_at_any_level() {
    let shell = Shell::new();
    let path = |name: &str| shell.dir.path().join(name).to_str().unwrap().to_owned();
    let (key_file, other_file, id_file) = (path("mesh.key"), path("other.key"), path("node.id"));
    for args in [["--mesh", &key_file], ["--mesh", &other_file]] {
        stdout(&shell.run(&[&["keygen"], &args[..]].concat()));
    }
    stdout(&shell.run(&["keygen", &id_file]));
    let log = std::fs::File::create(path("log")).unwrap();
    let loud = |args: &[&str]| {
        let mut command = shell.command(args);
        command.env("PEERBUS_LOG", "trace").stderr(log.try_clone().unwrap());
        command
    };
    let keyed = ["--mesh-key-file", &key_file, "--no-local", "--no-mdns"];
    let serve = ["node", "--serve", "echo", "--identity", &id_file, "--listen", "127.0.0.1:0"];
    let mut node = loud(&[&serve, &keyed[..]].concat()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(node.stdout.take().unwrap());
    let mut node = Running { child: node, lines };
    let up = node.line();
    let (_, address) = up.trim().trim_end_matches(')').rsplit_once('(').unwrap();
    let peer = ["--peer", address];
    let asked = loud(&[&["request", "echo", "hello"], &keyed[..], &peer].concat()).output();
    assert_eq!(stdout(&asked.unwrap()), "hello\n");
    let wrong = ["peers", "--mesh-key-file", &other_file, "--no-local", "--no-mdns"];
    let refused = loud(&[&wrong[..], &peer, &["--wait", "300ms"]].concat()).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(told.contains("did not prove the mesh key"), "{told}");

    let logged = std::fs::read(path("log")).unwrap();
    let all = [&logged, up.as_bytes(), told.as_bytes()].concat();
    assert!(logged.len() > 1000, "the log is on");
    let holds = |needle: &[u8]| all.windows(needle.len()).any(|window| window == needle);
    for file in [&key_file, &other_file] {
        let text = std::fs::read_to_string(file).unwrap();
        let secret = text.trim().rsplit_once('-').unwrap().1;
        let bytes = data_encoding::BASE32_NOPAD.decode(secret.to_uppercase().as_bytes()).unwrap();
        assert!(!holds(secret.as_bytes()), "as text");
        assert!(!holds(&bytes[..16]), "as bytes");
        let hex = data_encoding::HEXLOWER.encode(&bytes[..16]);
        assert!(!holds(hex.as_bytes()), "in hexadecimal");
        assert!(
            !holds(format!("{:?}", &bytes[..8]).trim_matches(['[', ']']).as_bytes()),
            "as numbers"
        );
    }
    let identity = std::fs::read_to_string(&id_file).unwrap();
    assert!(!holds(identity.lines().nth(1).unwrap().as_bytes()), "the node's own key");
}

#[cfg(target_os = "linux")]
#[test]
fn a_node_out_of_file_descriptors_waits_and_takes_connections_again() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let shell = Shell::new();
    let serve = ["node", "--serve", "echo", "--listen", "127.0.0.1:0", "--no-local", "--no-mdns"];
    let mut node = shell.command(&serve);
    let mut node = node.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut errors = BufReader::new(node.stderr.take().unwrap()).lines();
    let lines = BufReader::new(node.stdout.take().unwrap());
    let mut node = Running { child: node, lines };
    let up = node.line();
    let (_, address) = up.trim().trim_end_matches(')').rsplit_once('(').unwrap();

    let open = std::fs::read_dir(format!("/proc/{}/fd", node.child.id())).unwrap().count() as u64;
    let room = Rlimit { current: Some(open + 2), maximum: Some(open + 2) };
    prlimit(Some(Pid::from_child(&node.child)), Resource::Nofile, room).unwrap();
    let crowd: Vec<_> = (0..6).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    let said = errors.find(|line| line.as_ref().unwrap().contains("can't accept connections"));
    assert!(said.is_some());
    drop(crowd);
    let ask = ["request", "echo", "still here?", "--no-local", "--no-mdns", "--wait", "30s"];
    let asked = shell.run(&[&ask[..], &["--peer", address]].concat());
    assert_eq!(stdout(&asked), "still here?\n");
}

#[test]
fn a_command_that_a_signal_ends_before_its_work_is_done_fails() {
    let shell = Shell::new();
    for (args, signal, code) in [
        (&["sub", "a.b", "--count", "2", "--no-mdns"][..], "-INT", Some(130)),
        (&["sub", "a.b", "--count", "2", "--no-mdns"][..], "-TERM", Some(143)),
        (&["sub", "a.b", "--no-mdns"][..], "-INT", Some(0)),
    ] {
        let mut subscriber = shell.start(args);
        // It handles signals once it has a message.
        let published = shell.run(&["pub", "a.b", "one", "--no-mdns", "--wait", "30s"]);
        assert!(stdout(&published).contains("queued for 1"));
        assert_eq!(subscriber.line(), "a.b one\n");
        let id = subscriber.child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
        assert_eq!(subscriber.child.wait().unwrap().code(), code, "{args:?} {signal}");
    }
}

#[test]
fn a_standard_input_longer_than_a_body_is_not_read_to_its_end() {
    let shell = Shell::new();
    for command in [&["pub", "a.b"][..], &["send", "work"], &["request", "work"]] {
        let endless = std::fs::File::open("/dev/zero").unwrap();
        let output = shell.command(command).stdin(endless).output().unwrap();
        fails(&output, "longer than a body may be (1048576 bytes)");
    }
}

#[test]
fn no_output_of_a_command_panics() {
    let shell = Shell::new();
    let store = shell.dir.path().join("o").to_str().unwrap().to_owned();
    let body = "x".repeat(100_000);
    stdout(&shell.run(&["send", "nobody", &body, "--outbox", &store, "--wait", "0s", "--no-mdns"]));
    for args in [
        &["outbox", "list", &store][..],
        &["outbox", "show", &store, "1"],
        &["outbox", "verify", &store],
        &["peers", "--wait", "0s", "--no-mdns"],
        &["keygen", "--mesh"],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = shell.command(args).stdout(full).output().unwrap();
        fails(&output, "can't write to the standard output");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = shell.command(args).stdout(writer).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !told.contains("panic"), "{args:?}: {told}");
    }
}

#[test]
fn a_dead_durable_subscription_does_not_stand_for_a_live_one() {
    let shell = Shell::new();
    let path = |name: &str| shell.dir.path().join(name).to_str().unwrap().to_owned();
    let (out, dead, live) = (path("out"), path("dead"), path("live"));
    let subscribe = |store| ["sub", "e.>", "--durable", "d", "--outbox", store, "--no-mdns"];
    let publish = |body| ["pub", "e.x", body, "--outbox", &out, "--no-mdns", "--wait", "30s"];
    {
        let _subscriber = shell.start(&subscribe(&dead));
        assert!(stdout(&shell.run(&publish("m0"))).contains("for 1"));
    }
    let mut subscriber = shell.start(&subscribe(&live));
    let mut publisher = shell.start(&publish("m1"));
    assert!(publisher.line().ends_with("for 2\n"), "for the live one too");
    assert_eq!(subscriber.line(), "e.x m1\n");
}
