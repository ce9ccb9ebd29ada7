//! Invalid input from a network, and a node that must keep working.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::net::SocketAddr;

use common::wire::{
    GREETING, PREAMBLE, Record, announcement, batch, batch_of, frame, hello, hello_with, ready,
};
use common::{Host, SOON, soon, wait_for};
use peerbus::{Call, Event, Node, Trust};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A node with a front door, and a peer that must not be affected.
struct Target {
    node: Node,
    friend: Node,
    addr: SocketAddr,
    _service: peerbus::Service,
    host: Host,
}

/// The trust mode in which a test can talk to a node without TLS.
const OPEN: Trust = Trust::Open { anywhere: false };

impl Target {
    async fn new() -> Self {
        Self::with(|config| config).await
    }

    async fn with(change: impl FnOnce(peerbus::Config) -> peerbus::Config) -> Self {
        let host = Host::new();
        let node = change(host.config("target").trust(OPEN).listen("127.0.0.1:0".parse().unwrap()));
        let node = node.start().await.unwrap();
        let addr = node.listening()[0];
        let service =
            node.serve("echo", |call: Call| async { Ok(call.message.body) }).start().unwrap();
        let friend = host.node("friend").await;
        friend.wait_for_service("echo", SOON).await.unwrap();
        Self { node, friend, addr, _service: service, host }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// The rest of the node works, and the node counted the refusal.
    async fn is_unharmed(&self, counted: &str) {
        assert_eq!(
            self.friend.request("echo", "still there?").await.unwrap().text(),
            "still there?"
        );
        assert_eq!(self.node.peers().len(), 1);
        let refused = self.node.counters().refused;
        assert!(refused.get(counted).is_some_and(|count| *count > 0), "{counted}: {refused:?}");
    }
}

/// Waits until the other side closes the connection.
async fn cut(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // A reset is an end as well.
    let _reset = soon(stream.read_to_end(&mut rest)).await;
}

/// A connection after its ZMTP handshake.
async fn shaken(target: &Target) -> TcpStream {
    let mut stream = target.connect().await;
    stream.write_all(&[&GREETING[..], &ready(&[5; 48])].concat()).await.unwrap();
    stream
}

/// Says hello and accepts the link: the smallest of ids decides.
const MEMBER: [u8; 32] = {
    let mut id = [0; 32];
    id[31] = 5;
    id
};

/// A peer with a link of its own. Its hello subscribes to the topic `bait`.
async fn member(target: &Target) -> TcpStream {
    let mut events = target.node.events();
    let mut stream = target.connect().await;
    let identity = [&MEMBER[..], &[0; 16]].concat();
    stream.write_all(&[&GREETING[..], &ready(&identity)].concat()).await.unwrap();
    let record = hello_with("default", MEMBER, &["bait"], &[]);
    stream.write_all(&batch(&PREAMBLE, &record)).await.unwrap();
    stream.write_all(&batch(&PREAMBLE, &[0x91, 2])).await.unwrap();
    wait_for(&mut events, |event| match event {
        Event::PeerUp(peer) if peer.id.as_bytes() == &MEMBER => Some(()),
        _ => None,
    })
    .await;
    stream
}

/// Waits until the hostile member has lost its link; returns the reason.
async fn lost(target: &Target, events: &mut peerbus::Events) -> String {
    let reason = wait_for(events, |event| match event {
        Event::PeerDown { id, reason, .. } if id.as_bytes() == &MEMBER => Some(reason),
        _ => None,
    });
    let reason = reason.await.to_string();
    target.is_unharmed("protocol").await;
    reason
}

#[tokio::test]
async fn a_member_that_lies_about_lengths_loses_its_link() {
    let target = Target::new().await;
    let mut stream = member(&target).await;
    let mut events = target.node.events();
    let mut lying = batch(&PREAMBLE, b"x");
    let at = lying.len() - 5;
    lying[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
    stream.write_all(&lying).await.unwrap();
    let reason = lost(&target, &mut events).await;
    assert!(reason.contains("cut short"), "{reason}");
}

#[tokio::test]
async fn a_member_whose_credit_goes_backwards_loses_its_link() {
    let target = Target::new().await;
    let mut stream = member(&target).await;
    let mut events = target.node.events();
    target.node.publish("bait", "").await.unwrap();
    // One event of 128 bytes is consumed; then the counter goes back.
    for consumed in [&[0x97, 1, 1, 0xcc, 128, 0, 0, 0, 0][..], &PREAMBLE] {
        stream.write_all(&batch(consumed, &[0x92, 8, 0])).await.unwrap();
    }
    let reason = lost(&target, &mut events).await;
    assert!(reason.contains("credit"), "{reason}");
}

#[tokio::test]
async fn a_member_with_more_patterns_than_allowed_loses_its_link() {
    let target = Target::new().await;
    let mut stream = member(&target).await;
    let mut events = target.node.events();
    for seq in 1..=2 {
        let patterns: Vec<_> = (0..6000).map(|n| format!("p{seq}.{n}")).collect();
        stream.write_all(&batch(&PREAMBLE, &announcement(seq, &patterns, &[]))).await.unwrap();
    }
    let reason = lost(&target, &mut events).await;
    assert!(reason.contains("announces too much"), "{reason}");
}

#[tokio::test]
async fn a_member_that_floods_with_announcements_loses_its_link() {
    let target = Target::new().await;
    let stream = member(&target).await;
    let mut events = target.node.events();
    let (mut reading, mut writing) = stream.into_split();
    let flood = async move {
        let one = ["x.y".to_owned()];
        for seq in 1.. {
            let change = match seq % 2 {
                1 => announcement(seq, &one, &[]),
                _ => announcement(seq, &[], &one),
            };
            if writing.write_all(&batch(&PREAMBLE, &change)).await.is_err() {
                return;
            }
        }
    };
    // The target's answers must be read.
    let drain = async move { _ = tokio::io::copy(&mut reading, &mut tokio::io::sink()).await };
    let hostile = tokio::spawn(async move { tokio::join!(flood, drain) });
    let reason = lost(&target, &mut events).await;
    assert!(reason.contains("change too often"), "{reason}");
    soon(hostile).await.unwrap();
}

#[tokio::test]
async fn a_reply_goes_to_who_asked_whatever_return_address_is_claimed() {
    let target = Target::new().await;
    let mut stream = member(&target).await;
    for victim in [*target.node.id().as_bytes(), *target.friend.id().as_bytes()] {
        // [20, id, "echo", body, nil, nil, reply_to]
        let mut request = vec![0x97, 20, 0xc4, 16];
        request.extend_from_slice(&victim[..16]);
        request.extend_from_slice(b"\xa4echo\xc4\x05forge\xc0\xc0\xc4\x20");
        request.extend_from_slice(&victim);
        stream.write_all(&batch(&PREAMBLE, &request)).await.unwrap();
        let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
        while !seen.windows(5).any(|bytes| bytes == b"forge") {
            let read = soon(stream.read(&mut chunk)).await.unwrap();
            assert_ne!(read, 0, "the link stays");
            seen.extend_from_slice(&chunk[..read]);
        }
    }
}

#[tokio::test]
async fn the_73_bytes_that_abort_the_socket_library_are_cut() {
    let target = Target::new().await;
    let mut stream = target.connect().await;
    let mut bytes = GREETING.to_vec();
    bytes.push(2);
    bytes.extend_from_slice(&(1_u64 << 45).to_be_bytes());
    assert_eq!(bytes.len(), 73);
    stream.write_all(&bytes).await.unwrap();
    cut(&mut stream).await;
    target.is_unharmed("ready").await;
    // The same frame after a good handshake.
    let mut stream = shaken(&target).await;
    stream.write_all(&bytes[64..]).await.unwrap();
    cut(&mut stream).await;
    target.is_unharmed("too_large").await;
}

#[tokio::test]
async fn the_73_bytes_are_cut_on_the_dialling_side_too() {
    let host = Host::new();
    let trap = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = peerbus::Address::Tcp(trap.local_addr().unwrap());
    let node = host.config("dialler").trust(OPEN).peer(address).start().await.unwrap();
    let (mut stream, _) = soon(trap.accept()).await.unwrap();
    let mut events = node.events();
    let mut bytes = GREETING.to_vec();
    bytes.push(2);
    bytes.extend_from_slice(&(1_u64 << 45).to_be_bytes());
    stream.write_all(&bytes).await.unwrap();
    wait_for(&mut events, |event| matches!(event, Event::Refused { .. }).then_some(())).await;
    assert_eq!(node.counters().refused["ready"], 1);
}

#[tokio::test]
async fn garbage_and_other_protocols_are_cut() {
    let target = Target::new().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 200], &[0xff; 200]] {
        let mut stream = target.connect().await;
        stream.write_all(bytes).await.unwrap();
        cut(&mut stream).await;
    }
    target.is_unharmed("not_zmtp").await;
}

#[tokio::test]
async fn a_client_that_shows_its_signature_first_is_greeted() {
    // Like libzmq, which sends the rest of its greeting once it has received ours.
    let target = Target::new().await;
    let mut stream = target.connect().await;
    stream.write_all(&GREETING[..10]).await.unwrap();
    let mut greeting = [0; 64];
    soon(stream.read_exact(&mut greeting)).await.unwrap();
    // Its minor version is the node's own.
    assert_eq!(greeting[..11], GREETING[..11]);
    stream.write_all(&[&GREETING[10..], &ready(&[5; 48])].concat()).await.unwrap();
    let mut command = [0; 2];
    soon(stream.read_exact(&mut command)).await.unwrap();
    assert_eq!(command[0], 4, "a READY of ours");
}

#[tokio::test]
async fn endless_multipart_is_cut() {
    let target = Target::new().await;
    let mut stream = shaken(&target).await;
    let part = frame(true, b"");
    let flood = async { while stream.write_all(&part.repeat(100)).await.is_ok() {} };
    soon(flood).await;
    target.is_unharmed("too_many_frames").await;
}

#[tokio::test]
async fn a_stranger_may_not_send_much_before_its_hello() {
    let target = Target::new().await;
    let mut stream = shaken(&target).await;
    let head = [&[2u8][..], &(64 * 1024 + 1u64).to_be_bytes()].concat();
    stream.write_all(&head).await.unwrap();
    cut(&mut stream).await;
    target.is_unharmed("too_large").await;
}

#[tokio::test]
async fn garbage_in_place_of_a_hello_ends_the_link_with_a_reason() {
    let target = Target::new().await;
    let records: [&[u8]; 6] = [
        b"not messagepack",
        // A truncated hello, a message before the hello, an array that claims 2^32 values.
        &hello("default", [5; 32])[..20],
        &[0x94, 16, 0xc4, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xa1, b'a', 0xc4, 0],
        &[0xdd, 0xff, 0xff, 0xff, 0xff],
        &[0x92, 4, 0xdd, 0xff, 0xff, 0xff, 0xff],
        &[],
    ];
    for record in records {
        let mut stream = shaken(&target).await;
        stream.write_all(&batch(&PREAMBLE, record)).await.unwrap();
        cut(&mut stream).await;
    }
    // A record length beyond its frame, an unannounced body frame.
    let mut lying = batch(&PREAMBLE, b"x");
    let at = lying.len() - 5;
    lying[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
    let extra = [frame(true, &PREAMBLE), frame(true, b""), frame(false, b"surplus")].concat();
    for bytes in [lying, extra] {
        let mut stream = shaken(&target).await;
        stream.write_all(&bytes).await.unwrap();
        cut(&mut stream).await;
    }
    target.is_unharmed("protocol").await;
}

#[tokio::test]
async fn credit_that_was_never_earned_ends_the_link() {
    let target = Target::new().await;
    let mut stream = shaken(&target).await;
    let generous = [0x97, 1, 9, 9, 0, 0, 0, 0];
    stream.write_all(&batch(&generous, &hello("default", [5; 32]))).await.unwrap();
    cut(&mut stream).await;
    target.is_unharmed("protocol").await;
}

#[tokio::test]
async fn strangers_are_refused_with_a_reason_that_an_operator_sees() {
    let target = Target::new().await;
    let newer = [0x97, 9, 0, 0, 0, 0, 0, 0];
    let cases = [
        (batch(&newer, &hello("default", [5; 32])), "protocol version 9"),
        (batch(&PREAMBLE, &hello("other", [5; 32])), "mesh"),
    ];
    for (bytes, want) in cases {
        let mut events = target.node.events();
        let mut stream = shaken(&target).await;
        stream.write_all(&bytes).await.unwrap();
        let reason = wait_for(&mut events, |event| match event {
            Event::Refused { reason, .. } => Some(reason),
            _ => None,
        });
        let reason = reason.await;
        assert!(reason.contains(want), "{reason}");
        cut(&mut stream).await;
    }
    // A hello whose node id is not that of its connection.
    let mut stream = shaken(&target).await;
    stream.write_all(&batch(&PREAMBLE, &hello("default", [6; 32]))).await.unwrap();
    cut(&mut stream).await;
    assert_eq!(target.node.peers().len(), 1);
}

#[tokio::test]
async fn a_thousand_slow_handshakes_do_not_keep_a_real_peer_out() {
    // The head of a TLS record, and of a ClientHello that never ends.
    let mut client_hello = [0; 64];
    client_hello[..11].copy_from_slice(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
    for (trust, says) in [(OPEN, GREETING), (Trust::ThisHost, client_hello)] {
        let impatient = std::time::Duration::from_millis(300);
        let change =
            |config: peerbus::Config| config.trust(trust.clone()).max_pending_handshakes(32);
        let target = Target::with(|config| change(config).handshake_timeout(impatient)).await;
        let mut slow = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let mut stream = target.connect().await;
            slow.spawn(async move {
                for byte in says {
                    if stream.write_all(&[byte]).await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
                cut(&mut stream).await;
            });
        }
        // At most 32 handshakes may be pending; the oldest of an address make room for others.
        let late = change(target.host.tcp_config("late"));
        let late = late.peer(peerbus::Address::Tcp(target.addr)).start().await.unwrap();
        late.wait_for_service("echo", SOON).await.unwrap();
        assert_eq!(late.request("echo", "made it").await.unwrap().text(), "made it");
        soon(slow.join_all()).await;
        drop(late);
        let refused = target.node.counters().refused;
        assert!(refused.contains_key("made_room"), "{refused:?}");
    }
}

#[tokio::test]
async fn idle_strangers_at_the_door_do_not_keep_a_real_peer_out() {
    let target = Target::with(|config| config.max_pending_handshakes(16)).await;
    let mut idle = Vec::new();
    for _ in 0..64 {
        idle.push(target.connect().await);
    }
    let late = target.host.tcp_config("late").trust(OPEN);
    let late = late.peer(peerbus::Address::Tcp(target.addr)).start().await.unwrap();
    late.wait_for_service("echo", SOON).await.unwrap();
    assert_eq!(late.request("echo", "made it").await.unwrap().text(), "made it");
    target.friend.request("echo", "still there").await.unwrap();
    let refused = target.node.counters().refused;
    assert!(refused["made_room"] >= 48, "{refused:?}");
}

#[tokio::test]
async fn idle_members_make_room_for_newcomers_and_those_in_use_stay() {
    let target = Target::with(|config| config.max_connections(2)).await;
    let host = Host::new();
    let node = async |name| {
        let address = peerbus::Address::Tcp(target.addr);
        let node = host.tcp_config(name).trust(OPEN).peer(address).gossip(false).start();
        let node = node.await.unwrap();
        node.wait_for_service("echo", SOON).await.unwrap();
        node
    };
    let first = node("first").await;
    first.request("echo", "here").await.unwrap();
    let mut events = first.events();
    let mut idle = member(&target).await;
    // The newcomer takes the place of the member that has said nothing.
    let mut refusals = target.node.events();
    let second = node("second").await;
    cut(&mut idle).await;
    second.request("echo", "here too").await.unwrap();
    let mut refused = async |why: &str| {
        wait_for(&mut refusals, |event| match event {
            Event::Refused { reason, .. } => reason.contains(why).then_some(()),
            _ => None,
        })
        .await;
    };
    refused("made room").await;
    // Both places are in use now.
    let mut third = shaken(&target).await;
    cut(&mut third).await;
    refused("in use").await;
    assert_eq!(first.request("echo", "unmoved").await.unwrap().text(), "unmoved");
    second.request("echo", "unmoved").await.unwrap();
    while let Some(Some(event)) = futures_util::FutureExt::now_or_never(events.recv()) {
        assert!(!matches!(event, Event::PeerDown { .. }), "{event:?}");
    }
}

#[tokio::test]
async fn a_member_that_causes_records_and_reads_nothing_loses_its_link() {
    let rules = "* publish x".parse().unwrap();
    let target = Target::with(|config| config.rules(rules)).await;
    let mut stream = member(&target).await;
    let mut events = target.node.events();
    // [12, epoch, [[name, pattern]; 256]]: each is answered by a denial of 256 long names.
    let mut inbox = vec![0x93, 12, 1, 0xdc, 1, 0];
    for n in 0..=255_u8 {
        inbox.extend_from_slice(&[0x92, 0xa2, b'a' + n / 16, b'a' + n % 16, 0xd9, 250]);
        inbox.extend_from_slice(&[b'x'; 250]);
    }
    let flood = batch(&PREAMBLE, &inbox);
    let flood = async { while stream.write_all(&flood).await.is_ok() {} };
    soon(flood).await;
    let reason = lost(&target, &mut events).await;
    assert!(reason.contains("reads nothing"), "{reason}");
}

#[tokio::test]
async fn a_batch_that_takes_long_is_handled_to_its_end() {
    // Other tasks have their turn in between.
    const EVENTS: usize = 6000;
    let target = Target::new().await;
    let mut inbox = target.node.subscribe("bait").unwrap();
    let mut stream = member(&target).await;
    let first = Record::new(4, 16).bin(&[7; 16]).str("bait").bin(b"");
    // The id and the topic are those of the event before.
    let next = Record::new(4, 16).uint(0).nils(1).bin(b"");
    let cancel = Record::new(2, 5).bin(&[9; 16]);
    let rest = (1..EVENTS).flat_map(|_| [cancel.clone(), next.clone()]);
    let records = std::iter::once(first).chain(rest);
    stream.write_all(&batch_of(&PREAMBLE, records)).await.unwrap();
    for _ in 0..EVENTS {
        soon(inbox.recv()).await.unwrap();
    }
    assert_eq!(target.node.peers().len(), 2, "the link stays");
}

#[tokio::test]
async fn a_port_in_use_and_a_name_that_does_not_resolve_are_named() {
    let target = Target::new().await;
    let host = Host::new();
    let error = host.config("second").listen(target.addr).start().await.err().unwrap();
    assert!(error.to_string().contains(&target.addr.to_string()), "{error}");
    let nowhere = "no-such-host.invalid:4000".parse().unwrap();
    let node = host.config("seeker").peer(nowhere).start().await.unwrap();
    soon(async {
        while node.unreachable().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(node.unreachable()[0].last_error.contains("does not resolve"));
}

#[tokio::test]
async fn nothing_beyond_loopback_is_dialled_or_listened_on_without_keys() {
    let host = Host::new();
    // TEST-NET-1 (RFC 5737) is unreachable; the refusal comes before any packet is sent.
    let node =
        host.config("careful").peer("192.0.2.1:4000".parse().unwrap()).start().await.unwrap();
    soon(async {
        while node.unreachable().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(node.unreachable()[0].last_error.contains("--mesh-key"));
    for trust in [Trust::ThisHost, OPEN] {
        let beyond = host.config("bold").trust(trust).listen("0.0.0.0:0".parse().unwrap());
        let error = beyond.start().await.err().unwrap().to_string();
        assert!(error.contains("beyond this host"), "{error}");
    }
}

#[tokio::test]
async fn what_makes_no_sense_in_a_configuration_is_refused() {
    let host = Host::new();
    let error = host.config("x").window(1000).start().await.err().unwrap();
    assert!(error.to_string().contains("524288"), "{error}");
    let error = host.config("x").max_body(3 << 20).start().await.err().unwrap();
    assert!(error.to_string().contains("half of the window"), "{error}");
    let error = host.config("x").trust(Trust::MeshKey(vec![])).start().await.err().unwrap();
    assert!(error.to_string().contains("one to 8"), "{error}");
    let error = host.config("line\nbreak").start().await.err().unwrap();
    assert!(error.to_string().contains("control characters"), "{error}");
}

/// A process of another user that has reached the socket all the same: this program, started with
/// the path of the socket.
#[test]
fn stranger() {
    use std::io::{Read, Write};
    let Ok(path) = std::env::var("PEERBUS_TEST_SOCKET") else { return };
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    let _cut_already = stream.write_all(&[&GREETING[..], &ready(&[5; 48])].concat());
    let mut rest = Vec::new();
    let _reset = stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "it was answered");
}

#[tokio::test]
async fn a_process_of_another_user_is_cut_though_the_folder_lets_it_in() {
    use std::os::unix::fs::PermissionsExt;
    let target = Target::new().await;
    let open = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    let folder = target.host.path().join("default");
    open(target.host.path());
    open(&folder);
    let mut events = target.node.events();
    let own = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    for socket in own.collect::<Vec<_>>() {
        open(&socket);
        let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
        command.args(["stranger", "--exact"]).env("PEERBUS_TEST_SOCKET", &socket).uid(65534);
        let Ok(output) = soon(command.output()).await else {
            return println!("SKIPPED: this program can't be run as another user here");
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let reason = wait_for(&mut events, |event| match event {
        Event::Refused { address: None, reason, .. } => Some(reason),
        _ => None,
    });
    assert!(reason.await.contains("another user"));
    target.is_unharmed("other_user").await;
}
