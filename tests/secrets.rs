//! Secrets are printed nowhere: not in logs at any level, errors, events, or `Debug`.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(unix, feature = "cli", feature = "nats"))]

mod common;

use std::fmt::{Debug, Write as _};
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use common::{Host, SOON, private_dir, wait_for};
use peerbus::{Credentials, Event, MeshKey, Node, NodeId, Secret};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Metadata, Subscriber};

const PASSWORD: &str = "hunter2-is-my-password";
const TOKEN: &str = "t0ken-in-a-query";

/// A server that speaks as much of NATS as a node without guaranteed messages needs.
struct FakeNats {
    port: u16,
    connects: Arc<Mutex<Vec<String>>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl FakeNats {
    /// A server that accepts anybody, or nobody.
    fn start(welcomes: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connects, open) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let server = Self { port, connects: connects.clone(), open: open.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                open.lock().unwrap().push(stream.try_clone().unwrap());
                let connects = connects.clone();
                std::thread::spawn(move || serve(stream, welcomes, &connects));
            }
        });
        server
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _cut_already = stream.shutdown(Shutdown::Both);
        }
    }

    /// Returns true if each client that connected so far told the server its secret.
    fn was_told(&self, secret: &str) -> bool {
        let connects = self.connects.lock().unwrap();
        !connects.is_empty() && connects.iter().all(|line| line.contains(secret))
    }
}

fn serve(stream: TcpStream, welcomes: bool, connects: &Mutex<Vec<String>>) -> Option<()> {
    let mut out = stream.try_clone().unwrap();
    let info = r#"{"server_id":"S","server_name":"fake","version":"2.10.0","proto":1,"go":"","host":"h","port":1,"headers":true,"max_payload":1048576,"client_id":1,"auth_required":true}"#;
    write!(out, "INFO {info}\r\n").ok()?;
    let mut inbox = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line.ok()?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["CONNECT", ..] => connects.lock().unwrap().push(line),
            ["PING"] if welcomes => write!(out, "PONG\r\n").ok()?,
            ["PING"] => {
                write!(out, "-ERR 'Authorization Violation'\r\n").ok()?;
                return out.shutdown(Shutdown::Both).ok();
            }
            ["SUB", subject, sid] if subject.starts_with("_INBOX") => inbox = sid.to_owned(),
            // No JetStream here.
            ["PUB" | "HPUB", subject, reply, ..] if subject.starts_with("$JS.") => {
                write!(out, "HMSG {reply} {inbox} 16 16\r\nNATS/1.0 503\r\n\r\n\r\n").ok()?;
            }
            _ => {}
        }
    }
    Some(())
}

/// All that is logged, of every crate and at every level.
static LOGGED: Mutex<String> = Mutex::new(String::new());

struct Capture;

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}

impl Subscriber for Capture {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut Line(&mut LOGGED.lock().unwrap()));
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut Line(&mut LOGGED.lock().unwrap()));
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = format!("\n{} {}", event.metadata().level(), event.metadata().target());
        event.record(&mut Line(&mut text));
        LOGGED.lock().unwrap().push_str(&text);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn assert_hidden(what: &str, text: &str) {
    for secret in [PASSWORD, TOKEN] {
        assert!(!text.contains(secret), "{what} shows {secret}: {text}");
    }
}

#[tokio::test]
async fn the_library_never_shows_a_secret() {
    let _set_already = tracing::subscriber::set_global_default(Capture);
    let host = Host::new();
    let server = FakeNats::start(true);
    let url = format!("nats://127.0.0.1:{}?token={TOKEN}", server.port);
    let with_password = format!("nats://me:{PASSWORD}@127.0.0.1:{}?token={TOKEN}", server.port);
    let apart = Credentials::user("me", PASSWORD);
    let mut shown = String::new();
    let mut show = |it: &dyn Debug| writeln!(shown, "{it:?}").unwrap();
    for config in [
        host.config("a").broker(with_password.clone()),
        host.config("a").broker(url.clone()).broker_credentials(apart.clone()),
    ] {
        show(&config);
        let node = config.start().await.unwrap();
        let mut events = node.events();
        node.wait_for_peers(1, SOON).await.unwrap();
        server.cut();
        let is_down = |event| match event {
            Event::PeerDown { id: NodeId::BROKER, .. } => Some(format!("{event:?}")),
            _ => None,
        };
        show(&wait_for(&mut events, is_down).await);
        show(&(node.unreachable(), node.peers(), &node));
        node.wait_for_peers(1, SOON).await.unwrap();
        node.shutdown().await;
    }
    assert!(server.was_told(PASSWORD), "it had the credentials each time, and from them alone");

    let refusing = FakeNats::start(false);
    let refused = format!("nats://me:{PASSWORD}@127.0.0.1:{}?token={TOKEN}", refusing.port);
    let error = host.config("b").broker(refused).start().await.err().unwrap();
    show(&(&error, error.to_string()));
    assert!(error.to_string().contains("wrong credentials"), "{error}");
    for wrong in [
        format!("me:{PASSWORD}@127.0.0.1"),
        format!("{PASSWORD}@127.0.0.1"),
        format!("nats://me:{PASSWORD}@127.0.0.1:port"),
        format!("nats://me:1/{PASSWORD}@127.0.0.1"),
        format!("peerbus://me:{PASSWORD}@127.0.0.1"),
    ] {
        let config = host.config("c").broker(wrong);
        show(&config);
        let error = config.start().await.err().unwrap();
        show(&(&error, error.to_string()));
    }
    let key = MeshKey::generate();
    show(&(&apart, Secret::from(PASSWORD), Node::builder().mesh_key(key.clone()), &key));
    assert!(!shown.contains(&key.reveal()["peerbus-mesh-".len()..][..12]));
    assert_hidden("what the API returns", &shown);
    let logged = LOGGED.lock().unwrap();
    assert!(logged.contains("TRACE async_nats"), "the broker's client was watched too");
    assert_hidden("the log", &logged);
}

/// A server that asks for credentials as RabbitMQ does, and refuses them. Returns its port, and what
/// it was told.
#[cfg(feature = "rabbitmq")]
fn fake_rabbitmq() -> (u16, std::sync::mpsc::Receiver<Vec<u8>>) {
    use std::io::Read;
    /// A frame with a method of the class *connection* (AMQP 0-9-1, 4.2).
    fn frame(method: u16, arguments: &[u8]) -> Vec<u8> {
        let payload = [&10_u16.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        let head = [&[1, 0, 0][..], &(payload.len() as u32).to_be_bytes()].concat();
        [&head[..], &payload, &[0xCE]].concat()
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 8];
            stream.read_exact(&mut head).unwrap();
            let start = b"\x00\x09\0\0\0\0\0\0\0\x05PLAIN\0\0\0\x05en_US";
            stream.write_all(&frame(10, start)).unwrap();
            let mut head = [0; 7];
            stream.read_exact(&mut head).unwrap();
            let length = u32::from_be_bytes(head[3..].try_into().unwrap());
            let mut start_ok = vec![0; length as usize + 1];
            stream.read_exact(&mut start_ok).unwrap();
            tell.send(start_ok).unwrap();
            let close = [&403_u16.to_be_bytes()[..], b"\x07REFUSED", &[0; 4]].concat();
            stream.write_all(&frame(50, &close)).unwrap();
            let _rest = stream.read_to_end(&mut Vec::new());
        }
    });
    (port, told)
}

#[cfg(feature = "rabbitmq")]
#[tokio::test]
async fn the_client_of_rabbitmq_is_given_its_credentials_and_logs_none() {
    let _set_already = tracing::subscriber::set_global_default(Capture);
    let host = Host::new();
    let (port, told) = fake_rabbitmq();
    let url = format!("amqp://127.0.0.1:{port}/%2f?heartbeat=5&password={TOKEN}");
    for config in [
        host.config("a").broker(url.replace("//", &format!("//me:{PASSWORD}@"))),
        host.config("a").broker(url.clone()).broker_credentials(Credentials::user("me", PASSWORD)),
    ] {
        let error = config.start().await.err().unwrap();
        let start_ok = told.recv_timeout(SOON).unwrap();
        let sent = format!("\0me\0{PASSWORD}");
        assert!(start_ok.windows(sent.len()).any(|window| window == sent.as_bytes()));
        assert_hidden("the error", &format!("{error} {error:?}"));
        assert!(error.to_string().contains("REFUSED"), "{error}");
    }
    assert_hidden("the log", &LOGGED.lock().unwrap());
}

fn credentials_file(dir: &std::path::Path) -> std::path::PathBuf {
    let path = dir.join("credentials");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&path).unwrap();
    writeln!(file, "me:{PASSWORD}").unwrap();
    path
}

#[test]
fn the_command_never_shows_a_secret_whatever_it_logs() {
    let dir = private_dir();
    let (welcoming, refusing) = (FakeNats::start(true), FakeNats::start(false));
    let file = credentials_file(dir.path());
    for server in [&welcoming, &refusing] {
        let bare = format!("nats://127.0.0.1:{}?token={TOKEN}", server.port);
        let full = bare.replace("//", &format!("//me:{PASSWORD}@"));
        let ways = [
            ("PEERBUS_BROKER", full.as_str(), None),
            ("PEERBUS_BROKER_CREDENTIALS", &format!("me:{PASSWORD}"), Some(&bare)),
            ("PEERBUS_BROKER_CREDENTIALS_FILE", file.to_str().unwrap(), Some(&bare)),
        ];
        for (variable, value, url) in ways {
            for args in [
                ["pub", "a", "b", "--wait", "100ms"].as_slice(),
                &["peers", "--wait", "100ms", "--json"],
                &["bridge", "--no-mdns", "--export", ">"],
            ] {
                let mut command = Command::new(env!("CARGO_BIN_EXE_peerbus"));
                command.args(args).env(variable, value).env("XDG_RUNTIME_DIR", dir.path());
                command.env("PEERBUS_LOG", "trace,async_nats=trace").env("RUST_LOG", "trace");
                command.envs(url.map(|url| ("PEERBUS_BROKER", url)));
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
                let mut child = command.spawn().unwrap();
                if args[0] == "bridge" {
                    // It runs until it is stopped, unless the broker refuses it.
                    let mut line = String::new();
                    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
                    assert_eq!(line.contains("is a bridge"), server.port == welcoming.port);
                    let _ended_already = child.kill();
                }
                let output = child.wait_with_output().unwrap();
                let text = format!("{args:?} with {variable}: {output:?}");
                assert_hidden(&text, &text);
                let stderr = String::from_utf8_lossy(&output.stderr);
                let logs = stderr.contains("DEBUG") || server.port == refusing.port;
                assert!(logs, "{text}");
                assert!(!stderr.contains("command line"), "it isn't there: {text}");
            }
        }
        assert!(server.was_told(PASSWORD));
    }
}

#[test]
fn a_secret_on_the_command_line_is_warned_of() {
    let dir = private_dir();
    let server = FakeNats::start(true);
    let url = format!("nats://me:{PASSWORD}@127.0.0.1:{}", server.port);
    let key = MeshKey::generate().reveal();
    for (flag, secret, instead) in [
        ("--broker", url.as_str(), "--broker-credentials-file"),
        ("--mesh-key", key.as_str(), "--mesh-key-file"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peerbus"));
        command.args(["peers", "--wait", "10ms", "--no-mdns", flag, secret]);
        let output = command.env("XDG_RUNTIME_DIR", dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("other users of this host can read"), "{stderr}");
        assert!(stderr.contains(instead) && !stderr.contains(secret), "{stderr}");
    }
}

#[test]
fn credentials_are_given_in_one_way() {
    let dir = private_dir();
    let file = credentials_file(dir.path());
    let fails = |url: &str, told: &str, env: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peerbus"));
        command.args(["peers", "--broker", url]).envs(env.iter().copied());
        command.env("PEERBUS_BROKER_CREDENTIALS_FILE", &file);
        let output = command.env("XDG_RUNTIME_DIR", dir.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(told) && !output.status.success(), "{told}: {stderr}");
        assert_hidden("the error", &stderr);
    };
    fails("nats://x:y@h", "the broker's address has credentials", &[]);
    fails("nats://h", "leave out one", &[("PEERBUS_BROKER_CREDENTIALS", "me:too")]);
    fails("peerbus://127.0.0.1:1", "knows no users", &[]);
    std::fs::write(&file, "two\nlines").unwrap();
    fails("nats://h", "expected one line", &[]);
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    fails("nats://h", "chmod 600", &[]);
}
