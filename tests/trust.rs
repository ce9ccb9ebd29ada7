//! Authentication over a network, and what eavesdroppers can see there.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use common::{Host, SOON, soon, wait_for};
use peerbus::{
    Action, Address, Call, Config, DownCause, DropReason, Event, Identity, MeshKey, Node, NodeId,
    Rules, Trust,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const OPEN: Trust = Trust::Open { anywhere: false };

/// A node that listens on loopback and echoes.
async fn server(config: Config) -> (Node, SocketAddr) {
    let node = config.listen("127.0.0.1:0".parse().unwrap()).start().await.unwrap();
    let echo = |call: Call| async { Ok(call.message.body) };
    std::mem::forget(node.serve("echo", echo).start().unwrap());
    let addr = node.listening()[0];
    (node, addr)
}

async fn client(config: Config, addr: SocketAddr) -> Node {
    let config = config.listen("127.0.0.1:0".parse().unwrap());
    config.peer(Address::Tcp(addr)).start().await.unwrap()
}

async fn can_ask(node: &Node) {
    node.wait_for_service("echo", SOON).await.unwrap();
    assert_eq!(node.request("echo", "hello").await.unwrap().text(), "hello");
}

/// The error with which a node can't link to an address.
async fn unreachable(node: &Node) -> String {
    soon(async {
        loop {
            if let Some(unreachable) = node.unreachable().first() {
                return unreachable.last_error.clone();
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

async fn refusal(events: &mut peerbus::Events) -> String {
    let refused = |event| match event {
        Event::Refused { reason, .. } => Some(reason),
        _ => None,
    };
    wait_for(events, refused).await
}

#[tokio::test]
async fn holders_of_a_mesh_key_talk_and_nobody_else_gets_in() {
    let host = Host::new();
    let key = MeshKey::generate();
    let keyed = |name: &str, key: &MeshKey| host.tcp_config(name).mesh_key(key.clone());
    let (node, addr) = server(keyed("server", &key)).await;
    let friend = client(keyed("friend", &key), addr).await;
    can_ask(&friend).await;

    let mut events = node.events();
    let stranger = client(keyed("stranger", &MeshKey::generate()), addr).await;
    assert!(unreachable(&stranger).await.contains("did not prove the mesh key"));
    assert!(refusal(&mut events).await.contains("did not prove the mesh key"));
    for trust in [Trust::ThisHost, OPEN] {
        let outsider = client(host.tcp_config("outsider").trust(trust), addr).await;
        unreachable(&outsider).await;
        assert!(outsider.peers().is_empty());
    }
    let refused = node.counters().refused;
    assert!(refused["mesh_key"] >= 2 && refused["clear_text"] >= 1, "{refused:?}");
    assert_eq!(node.peers().len(), 1);
    can_ask(&friend).await;
}

#[tokio::test]
async fn a_mesh_goes_from_one_key_to_the_next_without_a_pause() {
    let host = Host::new();
    let (old, new) = (MeshKey::generate(), MeshKey::generate());
    let (_first, addr) = server(host.tcp_config("old").mesh_key(old.clone())).await;
    let both = client(host.tcp_config("both").mesh_key(old).mesh_key(new.clone()), addr).await;
    can_ask(&both).await;
    let moved = client(host.tcp_config("new").mesh_key(new), both.listening()[0]).await;
    both.wait_for_peers(2, SOON).await.unwrap();
    moved.wait_for_peers(1, SOON).await.unwrap();
    assert_eq!(moved.peers()[0].id, both.id());
}

/// Rules that allow everything to every peer.
fn anything() -> Rules {
    "* * >".parse().unwrap()
}

/// An identity file, and its id.
fn identity(host: &Host, name: &str) -> (PathBuf, NodeId) {
    let path = host.path().join(name);
    let identity = Identity::create(&path).unwrap();
    (path, identity.node_id())
}

#[tokio::test]
async fn trusted_keys_are_let_in_by_name_and_lose_their_link_when_they_are_removed() {
    let host = Host::new();
    let (server_file, server_id) = identity(&host, "server.id");
    let (friend_file, friend_id) = identity(&host, "friend.id");
    let known = host.path().join("known");
    let server_only = host.path().join("server-only");
    std::fs::write(&server_only, format!("server {server_id}\n")).unwrap();
    std::fs::write(&known, "").unwrap();

    let trusting = host.tcp_config("server").identity(server_file).rules(anything());
    let (node, addr) = server(trusting.trust(Trust::TrustedKeys(known.clone()))).await;
    let mut events = node.events();
    let friend = host.tcp_config("friend").identity(friend_file).rules(anything());
    let friend = client(friend.trust(Trust::TrustedKeys(server_only.clone())), addr).await;
    assert!(refusal(&mut events).await.contains("not among the trusted keys"));
    assert!(unreachable(&friend).await.contains("does not trust this node's key"));

    std::fs::write(&known, format!("# now it may\nfriend {friend_id}\n")).unwrap();
    can_ask(&friend).await;

    let mut friends_events = friend.events();
    std::fs::write(&known, "# no longer\n").unwrap();
    let down = |event| match event {
        Event::PeerDown { reason, .. } => Some(reason),
        _ => None,
    };
    assert_eq!(wait_for(&mut events, down).await, DownCause::Distrusted);
    assert_eq!(wait_for(&mut friends_events, down).await, DownCause::Distrusted);
    assert!(refusal(&mut events).await.contains("not among the trusted keys"));
}

/// A proxy in front of a node, which keeps a copy of the bytes.
struct Tap {
    addr: SocketAddr,
    dialler_said: Arc<Mutex<Vec<u8>>>,
    listener_said: Arc<Mutex<Vec<u8>>>,
}

impl Tap {
    async fn before(node: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tap = Self {
            addr: listener.local_addr().unwrap(),
            dialler_said: Arc::default(),
            listener_said: Arc::default(),
        };
        let copies = [tap.dialler_said.clone(), tap.listener_said.clone()];
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (from_near, to_near) = near.into_split();
                let (from_far, to_far) = TcpStream::connect(node).await.unwrap().into_split();
                tokio::spawn(pump(from_near, to_far, copies[0].clone()));
                tokio::spawn(pump(from_far, to_near, copies[1].clone()));
            }
        });
        tap
    }

    fn saw(&self, secret: &[u8]) -> bool {
        let saw = |bytes: &Mutex<Vec<u8>>| {
            bytes.lock().unwrap().windows(secret.len()).any(|window| window == secret)
        };
        saw(&self.dialler_said) || saw(&self.listener_said)
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    copy: Arc<Mutex<Vec<u8>>>,
) {
    let mut buffer = vec![0; 4096];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        copy.lock().unwrap().extend_from_slice(&buffer[..len]);
        if to.write_all(&buffer[..len]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn what_is_said_can_be_read_on_the_way_in_open_mode_only() {
    let host = Host::new();
    let (server_file, server_id) = identity(&host, "server.id");
    let (client_file, client_id) = identity(&host, "client.id");
    let known = host.path().join("known");
    std::fs::write(&known, format!("server {server_id}\nclient {client_id}\n")).unwrap();
    let modes = [
        (Trust::ThisHost, false),
        (Trust::MeshKey(vec![MeshKey::generate()]), false),
        (Trust::TrustedKeys(known), false),
        (OPEN, true),
    ];
    for (trust, readable) in modes {
        let mode = trust.as_str();
        let config = |name: &str, file: &PathBuf| {
            let config = host.tcp_config(name).trust(trust.clone()).identity(file);
            config.gossip(false).mesh(mode.parse().unwrap()).rules(anything())
        };
        let (_node, addr) = server(config("server", &server_file)).await;
        let tap = Tap::before(addr).await;
        let client = client(config("client", &client_file), tap.addr).await;
        client.wait_for_service("echo", SOON).await.unwrap();
        let secret = "the treasure is under the old oak";
        assert_eq!(client.request("echo", secret).await.unwrap().text(), secret);
        assert_eq!(tap.saw(secret.as_bytes()), readable, "{mode}");
        assert_eq!(tap.saw(b"echo"), readable, "{mode}: the names of services");
    }
}

#[tokio::test]
async fn a_recorded_handshake_opens_nothing_when_it_is_played_again() {
    let host = Host::new();
    let key = MeshKey::generate();
    let (node, addr) = server(host.tcp_config("server").mesh_key(key.clone())).await;
    let tap = Tap::before(addr).await;
    let friend = client(host.tcp_config("friend").mesh_key(key), tap.addr).await;
    can_ask(&friend).await;
    friend.shutdown().await;
    let recorded = tap.dialler_said.lock().unwrap().clone();

    let mut events = node.events();
    let mut replay = TcpStream::connect(addr).await.unwrap();
    replay.write_all(&recorded).await.unwrap();
    refusal(&mut events).await;
    let mut rest = Vec::new();
    let _reset = soon(replay.read_to_end(&mut rest)).await;
    assert_eq!(node.counters().refused["tls"], 1);
    assert!(node.peers().iter().all(|peer| peer.id == friend.id()));
}

/// A server with these rules for the role `tills`, and a node that has the role and allows the
/// server everything.
async fn till_and_server(host: &Host, rules: Option<&str>) -> (Node, Node) {
    let parsed = rules.map(|rules| rules.parse::<Rules>().unwrap());
    till_and_ruled_server(host, |config| match parsed {
        Some(rules) => config.rules(rules),
        None => config,
    })
    .await
}

async fn till_and_ruled_server(host: &Host, ruled: impl FnOnce(Config) -> Config) -> (Node, Node) {
    let (server_file, server_id) = identity(host, "server.id");
    let (till_file, till_id) = identity(host, "till.id");
    let known = host.path().join("known");
    std::fs::write(&known, format!("server {server_id}\ntill-1 {till_id} tills,readers\n"))
        .unwrap();
    let config = |name: &str, file: &PathBuf| {
        let config = host.tcp_config(name).identity(file).outbox(host.path().join(name));
        config.trust(Trust::TrustedKeys(known.clone()))
    };
    let (server, addr) = server(ruled(config("server", &server_file))).await;
    let till = client(config("till", &till_file).rules(anything()), addr).await;
    (till, server)
}

#[tokio::test]
async fn a_role_may_do_what_the_rules_say_and_nothing_else() {
    let host = Host::new();
    let rules = "
        tills    publish    orders.>
        readers  subscribe  prices.*
        tills    send       echo
        tills    serve      drawer.*";
    let (till, server) = till_and_server(&host, Some(rules)).await;
    can_ask(&till).await;
    let secret = |call: Call| async { Ok(call.message.body) };
    let _secret = server.serve("secret", secret).start().unwrap();
    till.wait_for_service("secret", SOON).await.unwrap();
    let error = till.request("secret", "let me in").await.unwrap_err();
    assert!(error.to_string().contains("not_allowed"), "{error}");
    let receipt = till.send("secret", "keep this").guaranteed().await.unwrap();
    let error = soon(receipt.processed()).await.unwrap_err();
    assert!(error.to_string().contains("rules don't allow it"), "{error}");

    // Its published events arrive, or their drops are counted here.
    let mut heard = server.subscribe(">").unwrap();
    till.wait_for_subscribers("orders.new", 1, SOON).await.unwrap();
    till.publish("secrets.all", "psst").await.unwrap();
    till.publish("orders.new", "3 apples").await.unwrap();
    assert_eq!(soon(heard.recv()).await.unwrap().text(), "3 apples");
    let mut events = till.events();
    till.publish("secrets.all", "psst").await.unwrap();
    let dropped = |event| match event {
        Event::Dropped { reason: DropReason::NotAllowed, count, .. } => Some(count),
        _ => None,
    };
    wait_for(&mut events, dropped).await;

    // Its subscriptions and services are accepted, or it is notified that they are denied.
    let (mut prices, mut all) =
        (till.subscribe("prices.*").unwrap(), till.subscribe("prices.>").unwrap());
    let _drawer = till.serve("drawer.1", secret).start().unwrap();
    let _billing = till.serve("billing", secret).start().unwrap();
    let denied = |event| match event {
        Event::Denied { action, name, .. } => Some((action, name)),
        _ => None,
    };
    assert_eq!(wait_for(&mut events, denied).await, (Action::Subscribe, "prices.>".into()));
    assert_eq!(wait_for(&mut events, denied).await, (Action::Serve, "billing".into()));
    server.wait_for_service("drawer.1", SOON).await.unwrap();
    assert!(server.request("billing", "mine").await.is_err());
    server.publish("prices.apples", "2").await.unwrap();
    server.publish("prices.eu.apples", "3").await.unwrap();
    server.publish("prices.pears", "4").await.unwrap();
    for price in ["2", "4"] {
        assert_eq!(soon(prices.recv()).await.unwrap().text(), price);
    }
    // One link serves both subscriptions, so the wider one receives only the allowed events.
    assert_eq!(soon(all.recv()).await.unwrap().text(), "2");
    assert_eq!(soon(all.recv()).await.unwrap().text(), "4");
}

#[tokio::test]
async fn trusted_keys_may_do_nothing_without_a_rule() {
    let host = Host::new();
    let (till, server) = till_and_server(&host, None).await;
    till.wait_for_service("echo", SOON).await.unwrap();
    let error = till.request("echo", "hello").await.unwrap_err();
    assert!(error.to_string().contains("not_allowed"), "{error}");
    let echo = |call: Call| async { Ok(call.message.body) };
    let mut events = till.events();
    let _service = till.serve("mine", echo).start().unwrap();
    wait_for(&mut events, |event| matches!(event, Event::Denied { .. }).then_some(())).await;
    assert!(server.peers()[0].services.is_empty());
}

#[tokio::test]
async fn a_change_of_the_rules_file_changes_the_rights_of_a_linked_peer() {
    let host = Host::new();
    let rules = host.path().join("rules");
    std::fs::write(&rules, "tills send other").unwrap();
    let (till, server) = till_and_ruled_server(&host, |config| config.rules_file(&rules)).await;
    till.wait_for_service("echo", SOON).await.unwrap();
    let error = till.request("echo", "hello").await.unwrap_err();
    assert!(error.to_string().contains("not_allowed"), "{error}");

    let mut events = till.events();
    let down = |event| match event {
        Event::PeerDown { reason, .. } => Some(reason),
        _ => None,
    };
    let up = |event| matches!(event, Event::PeerUp(_)).then_some(());
    std::fs::write(&rules, "tills send echo\ntills subscribe prices").unwrap();
    assert_eq!(wait_for(&mut events, down).await, DownCause::Distrusted);
    wait_for(&mut events, up).await;
    let mut prices = till.subscribe("prices").unwrap();
    server.wait_for_subscribers("prices", 1, SOON).await.unwrap();
    can_ask(&till).await;
    server.publish("prices", "2").await.unwrap();
    assert_eq!(soon(prices.recv()).await.unwrap().text(), "2");

    std::fs::write(&rules, "tills subscribe prices").unwrap();
    assert_eq!(wait_for(&mut events, down).await, DownCause::Distrusted);
    wait_for(&mut events, up).await;
    till.wait_for_service("echo", SOON).await.unwrap();
    let error = till.request("echo", "hello").await.unwrap_err();
    assert!(error.to_string().contains("not_allowed"), "{error}");
}

#[tokio::test]
async fn rules_that_can_bind_nobody_are_refused_with_what_to_do() {
    let host = Host::new();
    let id = NodeId::from_bytes([7; 32]);
    let keyed = || Trust::MeshKey(vec![MeshKey::generate()]);
    for (trust, rules, told) in [
        (OPEN, format!("{id} send >"), "don't prove their ids"),
        (OPEN, "tills send >".into(), "use * as subject"),
        (keyed(), "tills send >".into(), "--trusted-keys"),
        (Trust::ThisHost, "* send >".into(), "--mesh-key-file"),
    ] {
        let file = host.path().join("rules");
        std::fs::write(&file, &rules).unwrap();
        let config = || host.config("x").trust(trust.clone());
        for config in [config().rules(rules.parse().unwrap()), config().rules_file(&file)] {
            let error = config.start().await.err().unwrap().to_string();
            assert!(error.contains(told), "{rules} in {trust:?}: {error}");
        }
    }
    for (trust, rules) in [(OPEN, "* send >".into()), (keyed(), format!("{id} send >"))] {
        host.config("x").trust(trust).rules(rules.parse().unwrap()).start().await.unwrap();
    }
    let (_, id) = identity(&host, "till.id");
    let known = host.path().join("known");
    std::fs::write(&known, format!("till {id}\n")).unwrap();
    let loose = host.path().join("loose");
    std::fs::write(&loose, "* * >").unwrap();
    for (path, told) in [(&known, "trusted keys"), (&loose, "rules")] {
        std::fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
        let config = host.config("x").trust(Trust::TrustedKeys(known.clone()));
        let error = config.rules_file(&loose).start().await.err().unwrap().to_string();
        assert!(error.contains(told) && error.contains("chmod go-w"), "{error}");
        std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    }
}
