use super::*;
use crate::address::Pattern;
use crate::engine::Routing;
use crate::trust::Grants;
use crate::wire::{Announcement, Hint};

const LIMITS: Limits = Limits { max_body: 1 << 20, windows: [1 << 22; 4] };

fn mesh(byte: u8, incarnation: u64) -> Mesh {
    let config = MeshConfig {
        id: NodeId::from_bytes([byte; 32]),
        incarnation: Incarnation(incarnation),
        mesh: MeshName::default(),
        name: format!("node {byte}"),
        limits: LIMITS,
        gossip: true,
        loopback_only: false,
        dials_per_second: 64,
        budget: Budget::new(u64::MAX),
    };
    Mesh::new(config, 1)
}

fn at(ms: u64) -> Time {
    Time::after_start(Duration::from_millis(ms))
}

fn address(number: u64) -> Sighting {
    Sighting { source: Source::Fixed, id: None, addresses: vec![Address::Memory(number)] }
}

fn actions(mesh: &mut Mesh) -> Vec<Action> {
    std::iter::from_fn(|| mesh.poll_action()).collect()
}

/// Returns the records that a mesh sends, and the links that it closes.
fn sent(mesh: &mut Mesh) -> (Vec<(LinkId, Control)>, Vec<LinkId>) {
    let (mut sent, mut closed) = (Vec::new(), Vec::new());
    for action in actions(mesh) {
        match action {
            Action::Send(link, control) => sent.push((link, control)),
            Action::Close { link, .. } => closed.push(link),
            _ => {}
        }
    }
    (sent, closed)
}

/// Returns the next target that a mesh dials.
fn dialled(mesh: &mut Mesh) -> Option<TargetKey> {
    actions(mesh).into_iter().find_map(|action| match action {
        Action::Dial { target, .. } => Some(target),
        _ => None,
    })
}

fn connect(mesh: &mut Mesh, link: LinkId, target: Option<TargetKey>, peer: u8) {
    let claimed = Some(NodeId::from_bytes([peer; 32]));
    mesh.handle_connected(at(1), link, Connection { claimed, target, ..Connection::default() });
}

/// Links two meshes, whichever decides.
fn linked(a: &mut Mesh, b: &mut Mesh, link: LinkId) {
    let (a_id, b_id) = (a.me.id.as_bytes()[0], b.me.id.as_bytes()[0]);
    a.handle_sighting(at(0), address(u64::from(b_id)));
    let target = dialled(a);
    connect(a, link, target, b_id);
    connect(b, link, None, a_id);
    exchange(a, b);
    assert!(a.is_linked(&b.me.id) && b.is_linked(&a.me.id));
}

/// Exchanges control records until neither side has any left.
fn exchange(a: &mut Mesh, b: &mut Mesh) {
    loop {
        let (from_a, _) = sent(a);
        let (from_b, _) = sent(b);
        if from_a.is_empty() && from_b.is_empty() {
            return;
        }
        from_a.into_iter().for_each(|(link, control)| b.handle_control(at(2), link, control));
        from_b.into_iter().for_each(|(link, control)| a.handle_control(at(2), link, control));
    }
}

#[test]
fn a_node_that_dials_itself_learns_it_and_never_does_so_again() {
    let mut me = mesh(1, 7);
    me.handle_sighting(at(0), address(1));
    let target = dialled(&mut me);
    let (near, far) = (LinkId(1), LinkId(2));
    connect(&mut me, near, target, 1);
    connect(&mut me, far, None, 1);
    for from in [near, far] {
        for (link, hello) in sent(&mut me).0 {
            assert_eq!(link, from);
            let other = if link == near { far } else { near };
            me.handle_control(at(2), other, hello);
        }
    }
    sent(&mut me);
    assert_eq!(me.poll_timeout(), None, "no timeout is pending");
    me.handle_timeout(at(100_000));
    assert_eq!(dialled(&mut me), None);
}

#[test]
fn a_message_may_follow_the_accept_at_once() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    b.handle_sighting(at(0), address(1));
    let target = dialled(&mut b);
    connect(&mut b, LinkId(1), target, 1);
    connect(&mut a, LinkId(1), None, 2);
    let (hellos, _) = sent(&mut b);
    hellos.into_iter().for_each(|(link, hello)| a.handle_control(at(1), link, hello));
    let order: Vec<&str> = actions(&mut a)
        .iter()
        .filter_map(|action| match action {
            Action::Open { .. } => Some("open"),
            Action::Send(_, Control::Accept) => Some("accept"),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["open", "accept"]);
}

#[test]
fn a_peer_that_begins_to_speak_a_newer_version_is_down() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    a.handle_newer_version(at(3), LinkId(1), 9);
    assert!(!a.is_linked(&b.me.id));
    let told = actions(&mut a);
    let is_down = |action: &Action| matches!(action, Action::Report(MeshEvent::PeerDown { .. }));
    assert!(told.iter().any(is_down), "{told:?}");
}

#[test]
fn a_target_that_is_gone_is_forgotten_when_its_link_ends() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    a.handle_gone(&TargetKey::Address(Address::Memory(2)));
    assert!(a.is_linked(&b.me.id), "a live link is not cut by this");
    a.handle_closed(at(3), LinkId(1), DownReason::Closed);
    sent(&mut a);
    a.handle_timeout(at(60_000));
    assert_eq!(dialled(&mut a), None);
    assert!(a.unreachable().is_empty());
}

#[test]
fn a_second_life_waits_until_the_first_is_known_to_be_over() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    let mut again = mesh(2, 2);
    let newcomer = |a: &mut Mesh, again: &mut Mesh, link| {
        connect(a, link, None, 2);
        connect(again, link, Some(TargetKey::Address(Address::Memory(1))), 1);
        let (hellos, _) = sent(again);
        hellos.into_iter().for_each(|(link, hello)| a.handle_control(at(3), link, hello));
        sent(a).0
    };
    // The first incarnation answers: the newcomer is refused.
    let probes = newcomer(&mut a, &mut again, LinkId(2));
    let nonce = probes.iter().find_map(|(link, control)| match control {
        Control::Probe(nonce) if *link == LinkId(1) => Some(*nonce),
        _ => None,
    });
    a.handle_control(at(4), LinkId(1), Control::ProbeReply(nonce.expect("a probe")));
    let (sent_then, closed) = sent(&mut a);
    assert!(sent_then.contains(&(LinkId(2), Control::Bye(Bye::IdentityInUse))));
    assert_eq!(closed, [LinkId(2)]);
    // The first incarnation is silent: after a second, the newcomer replaces it.
    newcomer(&mut a, &mut again, LinkId(3));
    a.handle_timeout(at(1_500));
    let (sent_then, closed) = sent(&mut a);
    assert!(sent_then.contains(&(LinkId(3), Control::Accept)));
    assert_eq!(closed, [LinkId(1)]);
}

#[test]
fn a_node_that_stops_makes_no_new_links() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    a.stop_linking();
    connect(&mut a, LinkId(1), None, 2);
    connect(&mut b, LinkId(1), Some(TargetKey::Address(Address::Memory(1))), 1);
    let (hellos, _) = sent(&mut b);
    hellos.into_iter().for_each(|(link, hello)| a.handle_control(at(1), link, hello));
    let (sent, closed) = sent(&mut a);
    assert_eq!(sent, [(LinkId(1), Control::Bye(Bye::Shutdown))]);
    assert_eq!(closed, [LinkId(1)]);
}

#[test]
fn what_a_hello_has_no_room_for_follows_it() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    let pattern = |n| -> Pattern { format!("{}.{n:04}", "t".repeat(200)).parse().unwrap() };
    (0..1000).for_each(|n| b.subscribe(at(0), &pattern(n)).unwrap());
    b.serve(at(0), &"stock".parse().unwrap(), 1).unwrap();
    let target = Some(TargetKey::Address(Address::Memory(1)));
    connect(&mut b, LinkId(1), target, 1);
    let listed: Vec<usize> = sent(&mut b)
        .0
        .iter()
        .map(|(_, control)| match control {
            Control::Hello(hello) => hello.patterns.len(),
            Control::Announce(news) => news.subscribed.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(listed.iter().sum::<usize>(), 1000);
    assert!(
        listed.len() > 5 && listed.iter().all(|len| *len <= interests::MAX_LISTED / 200),
        "{listed:?}"
    );

    linked(&mut b, &mut a, LinkId(2));
    b.unsubscribe(at(3), &pattern(0));
    exchange(&mut a, &mut b);
    let peer = &a.peers()[0];
    assert_eq!((peer.patterns.len(), peer.services.len()), (999, 1));
}

#[test]
fn who_announces_without_end_loses_its_link() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    let subscribed = (0..=MAX_ANNOUNCED).map(|n| format!("t.{n}").parse().unwrap()).collect();
    let flood = Announcement { seq: 1, subscribed, ..Announcement::default() };
    a.handle_control(at(3), LinkId(1), Control::Announce(Box::new(flood)));
    assert!(!a.is_linked(&b.me.id));
}

/// Applies the changes of routing among a mesh's actions; returns their number.
fn apply_routes(mesh: &mut Mesh, routing: &mut Routing) -> usize {
    let routes = actions(mesh).into_iter().filter_map(|action| match action {
        Action::Route { link, peer, change } => Some((link, peer, change)),
        _ => None,
    });
    routes.map(|(link, peer, change)| routing.apply(peer, link, || Some(link), change)).count()
}

#[test]
fn what_a_peer_announced_counts_while_it_is_up_and_is_forgotten_bit_by_bit() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    let (link, mut routing) = (LinkId(1), Routing::default());
    linked(&mut a, &mut b, link);
    let up = RouteChange::Up;
    routing.apply(b.me.id, link, || Some(link), up);
    let patterns: Vec<Pattern> = (0..999).map(|n| pattern(format!("t.{n}"))).collect();
    let mut news = Announcement { seq: 1, subscribed: patterns.clone(), ..Announcement::default() };
    while let Some(part) = news.take_part(100) {
        assert_eq!(part.len(), 100);
        a.handle_part(at(3), link, part);
        apply_routes(&mut a, &mut routing);
    }
    a.handle_control(at(3), link, Control::Announce(Box::new(news)));
    apply_routes(&mut a, &mut routing);
    let subscribers = |routing: &Routing| {
        let topics = ["t.0", "t.998"].map(|topic| topic.parse().unwrap());
        topics.map(|topic| routing.subscribers(&topic).len())
    };
    assert_eq!(subscribers(&routing), [1, 1]);
    assert_eq!(a.peers()[0].patterns.len(), 999);
    let next = Announcement { seq: 2, unsubscribed: patterns[..9].to_vec(), ..Default::default() };
    a.handle_control(at(3), link, Control::Announce(Box::new(next)));
    assert_eq!(apply_routes(&mut a, &mut routing), 9, "the next announcement is in its order");

    a.handle_closed(at(4), link, DownReason::Closed);
    let mut forgotten = apply_routes(&mut a, &mut routing);
    assert_eq!(subscribers(&routing), [0, 0], "none of them counts from that moment on");
    while !routing.is_empty() {
        assert_eq!(a.poll_timeout(), Some(Time::default()), "the rest is due at once");
        a.handle_timeout(at(4));
        let more = apply_routes(&mut a, &mut routing);
        assert!((1..=1 + FORGOTTEN_AT_ONCE).contains(&more), "{more} at once");
        forgotten += more;
    }
    assert_eq!(forgotten, 991, "each of them, and the peer itself");
    a.handle_timeout(at(4));
    assert_ne!(a.poll_timeout(), Some(Time::default()));
}

#[test]
fn a_flood_of_forged_announcements_is_bounded_and_holds_up_nothing_else() {
    let mut a = mesh(1, 1);
    let forged = |number: u64| {
        let mut id = [9; 32];
        id[24..].copy_from_slice(&number.to_be_bytes());
        let addresses = vec![Address::Memory(number)];
        Sighting { source: Source::Mdns, id: Some(NodeId::from_bytes(id)), addresses }
    };
    (1..=10_000).for_each(|number| a.handle_sighting(at(0), forged(number)));
    let dials = |a: &mut Mesh| -> Vec<TargetKey> {
        let dialled = actions(a).into_iter().filter_map(|action| match action {
            Action::Dial { target, .. } => Some(target),
            _ => None,
        });
        dialled.collect()
    };
    let mut dialling = dials(&mut a);
    assert_eq!(dialling.len(), 32);
    a.handle_sighting(at(1), address(77_777));
    assert_eq!(dials(&mut a), [TargetKey::Address(Address::Memory(77_777))]);

    // They fail, and repeated failures make room for others.
    let mut tried = BTreeSet::new();
    for second in 1..4_000 {
        for target in std::mem::take(&mut dialling) {
            a.handle_dial_failed(at(second * 1000), &target, "nobody there".into());
            tried.insert(target);
        }
        a.handle_timeout(at(second * 1000));
        dialling.extend(dials(&mut a));
    }
    assert_eq!(tried.len(), 4096);
    let real = forged(20_000);
    let key = real.key().unwrap();
    a.handle_sighting(at(4_000_000), real);
    for second in 4_000..5_000 {
        for target in std::mem::take(&mut dialling) {
            if target == key {
                return;
            }
            a.handle_dial_failed(at(second * 1000), &target, "nobody there".into());
        }
        a.handle_timeout(at(second * 1000));
        dialling.extend(dials(&mut a));
    }
    panic!("the real one was never dialled");
}

/// Returns the addresses that a mesh dials after a hint about node 9 over a link from there.
fn dialled_after_hint(hinted: &str, from: &str, loopback_only: bool) -> Vec<String> {
    let mut a = mesh(1, 1);
    let mut b = mesh(2, 1);
    a.me.loopback_only = loopback_only;
    let address = |text: &str| text.parse::<Address>().unwrap();
    let near = Connection { address: Some(address(from)), ..Connection::default() };
    a.handle_connected(at(1), LinkId(1), near);
    let target = Some(TargetKey::Address(address("192.0.2.1:1")));
    b.handle_connected(at(1), LinkId(1), Connection { target, ..Connection::default() });
    exchange(&mut a, &mut b);
    let addresses = hinted.split(' ').map(address).collect();
    let hint = Hint { id: NodeId::from_bytes([9; 32]), addresses };
    a.handle_control(at(3), LinkId(1), Control::Peers(vec![hint]));
    let dialled = actions(&mut a).into_iter().find_map(|action| match action {
        Action::Dial { addresses, .. } => Some(addresses),
        _ => None,
    });
    dialled.unwrap_or_default().iter().map(Address::to_string).collect()
}

#[test]
fn hearsay_leads_to_this_host_only_if_it_comes_from_it() {
    let hinted = "10.0.0.9:7 127.0.0.1:7 [::ffff:127.0.0.2]:7 0.0.0.0:7 224.0.0.1:7 10.0.0.9:0";
    assert_eq!(dialled_after_hint(hinted, "10.0.0.2:5", false), ["10.0.0.9:7"]);
    let here = ["10.0.0.9:7", "127.0.0.1:7", "[::ffff:127.0.0.2]:7"];
    assert_eq!(dialled_after_hint(hinted, "127.0.0.1:5", false), here);
    assert_eq!(dialled_after_hint(hinted, "127.0.0.1:5", true), here[1..]);
    assert_eq!(dialled_after_hint("localhost:7 10.0.0.9:0", "10.0.0.2:5", false), [""; 0]);
}

#[test]
fn two_peers_of_one_node_hear_of_each_other() {
    let mut seed = mesh(5, 1);
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    let address = |byte| Address::Tcp(([10, 0, 0, byte], 7).into());
    a.set_addresses(vec![address(1)]);
    b.set_addresses(vec![address(2)]);
    linked(&mut a, &mut seed, LinkId(1));
    linked(&mut b, &mut seed, LinkId(2));
    // The seed's hints to the first node are still queued, or were delivered.
    exchange(&mut a, &mut seed);
    b.handle_timeout(at(400));
    let heard = b.dialer.sighted_by(&a.me.id).or(a.dialer.sighted_by(&b.me.id));
    assert_eq!(heard, Some(Source::Gossip));
}

#[test]
fn hearsay_is_bounded_and_forgotten() {
    let mut me = mesh(1, 1);
    let id = |n: u32| {
        let mut bytes = [9; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        NodeId::from_bytes(bytes)
    };
    let address = vec![Address::Tcp(([192, 0, 2, 1], 7).into())];
    for n in 0..10_000 {
        me.dialer.handle_hint(at(0), id(n), address.clone());
    }
    me.handle_timeout(at(1_000));
    let busy = actions(&mut me);
    me.handle_sighting(at(1_000), self::address(7));
    assert!(dialled(&mut me).is_some(), "gossip does not delay other targets");
    let mut now = 1_000;
    let mut attempts = 0;
    for action in busy {
        let Action::Dial { target, .. } = action else { panic!("{action:?}") };
        attempts += 1;
        me.handle_dial_failed(at(now), &target, "nobody there".into());
    }
    loop {
        while let Some(action) = me.poll_action() {
            let Action::Dial { target, .. } = action else { panic!("{action:?}") };
            attempts += 1;
            me.handle_dial_failed(at(now), &target, "nobody there".into());
        }
        let Some(due) = me.poll_timeout() else { break };
        assert!(due < at(now + 60_000));
        now += 1_000;
        me.handle_timeout(at(now));
    }
    assert_eq!(attempts, 4096 * 5, "each target is tried that often");
    assert!(me.unreachable().is_empty());
    me.dialer.handle_hint(at(now), id(1), address);
    assert!(me.poll_timeout().is_some(), "a new target is taken");
}

/// The dials that a mesh makes in ten seconds while a peer names over a thousand unknown
/// nodes a second, all at one address, and no dial succeeds.
fn dials_for_hints(grants: Grants) -> usize {
    let (mut me, mut peer) = (mesh(1, 1), mesh(2, 1));
    let target = Some(TargetKey::Address(Address::Memory(1)));
    me.handle_connected(at(1), LinkId(1), Connection { grants, ..Connection::default() });
    peer.handle_connected(at(1), LinkId(1), Connection { target, ..Connection::default() });
    exchange(&mut me, &mut peer);
    assert!(me.is_linked(&peer.me.id));
    let victim = vec![Address::Tcp(([192, 0, 2, 1], 7).into()); 8];
    let mut dials = 0;
    for ms in (0..10_000_u64).step_by(10) {
        for record in 0..1_u64 {
            let hints = (0..16).map(|n| {
                let mut id = [9; 32];
                id[..8].copy_from_slice(&(ms << 16 | record << 8 | n).to_be_bytes());
                Hint { id: NodeId::from_bytes(id), addresses: victim.clone() }
            });
            me.handle_control(at(ms), LinkId(1), Control::Peers(hints.collect()));
        }
        me.handle_timeout(at(ms));
        for action in actions(&mut me) {
            if let Action::Dial { target, addresses } = action {
                dials += addresses.len();
                me.handle_dial_failed(at(ms), &target, "nobody there".into());
            }
        }
    }
    dials
}

#[test]
fn a_peer_s_hints_make_no_flood_of_dials() {
    let dials = dials_for_hints(Grants::Everything);
    assert!((500..=256 + 8 + 64 * 10).contains(&dials), "{dials}");
    assert_eq!(dials_for_hints(Grants::nothing()), 0, "it is allowed nothing");
}

#[test]
fn a_forged_announcement_leads_to_its_forger_and_no_further() {
    let mut a = mesh(1, 1);
    let victim = NodeId::from_bytes([2; 32]);
    let addresses = vec![Address::Memory(66)];
    a.handle_sighting(at(0), Sighting { source: Source::Mdns, id: Some(victim), addresses });
    let target = dialled(&mut a);
    assert_eq!(target, Some(TargetKey::Node(victim)));
    // The node that answers there holds another key than the announced one.
    let mut forger = mesh(66, 1);
    connect(&mut a, LinkId(1), target, 66);
    connect(&mut forger, LinkId(1), None, 1);
    exchange(&mut a, &mut forger);
    assert_eq!((a.peer_count(), forger.peer_count()), (0, 0));
    assert!(a.unreachable()[0].last_error.contains("another node than the announced one"));
}

#[test]
fn addresses_that_keep_changing_are_dialled_once_a_second_at_most() {
    let mut a = mesh(1, 1);
    let id = Some(NodeId::from_bytes([2; 32]));
    let mut dials = 0;
    for ms in 0..10_000 {
        let addresses = vec![Address::Memory(ms)];
        a.handle_sighting(at(ms), Sighting { source: Source::Mdns, id, addresses });
        a.handle_timeout(at(ms));
        if let Some(target) = dialled(&mut a) {
            dials += 1;
            a.handle_dial_failed(at(ms), &target, "refused".into());
        }
    }
    assert!((5..=20).contains(&dials), "{dials}");
}

fn pattern(text: String) -> Pattern {
    text.parse().unwrap()
}

#[test]
fn what_peers_would_not_accept_is_refused_here_and_the_links_stay() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    b.serve(at(2), &"work".parse().unwrap(), 1).unwrap();
    for n in 1..MAX_ANNOUNCED {
        b.subscribe(at(2), &pattern(format!("t.{n}"))).unwrap();
    }
    assert_eq!(b.subscribe(at(2), &pattern("one.more".into())), Err(TooMany));
    assert_eq!(b.serve(at(2), &"more".parse().unwrap(), 1), Err(TooMany));
    b.subscribe(at(2), &pattern("t.1".into())).expect("it is announced already");
    b.serve(at(2), &"work".parse().unwrap(), 8).expect("a change of what is announced");
    b.unsubscribe(at(2), &pattern("t.2".into()));
    b.subscribe(at(2), &pattern("one.more".into())).expect("there is room again");
    run(&mut b, &mut a, Duration::from_secs(20));
    let peer = &a.peers()[0];
    assert_eq!((peer.patterns.len(), peer.services.len()), (MAX_ANNOUNCED - 1, 1));
    assert_eq!(peer.services[0].concurrency, 8);

    // A new link lists all of it.
    a.handle_closed(at(30_000), LinkId(1), DownReason::Closed);
    b.handle_closed(at(30_000), LinkId(1), DownReason::Closed);
    sent(&mut a);
    sent(&mut b);
    connect(&mut b, LinkId(2), Some(TargetKey::Address(Address::Memory(1))), 1);
    connect(&mut a, LinkId(2), None, 2);
    exchange(&mut a, &mut b);
    assert_eq!(a.peers()[0].patterns.len(), MAX_ANNOUNCED - 1);
}

/// Lets time pass for a node, and delivers what it sends to its peer.
fn run(from: &mut Mesh, to: &mut Mesh, span: Duration) {
    let (mut now, end) = (at(3), at(3) + span);
    while now < end {
        now = from.poll_timeout().filter(|due| *due < end).unwrap_or(end).max(now);
        from.handle_timeout(now);
        for (link, control) in sent(from).0 {
            to.handle_control(now, link, control);
        }
        sent(to);
    }
}

#[test]
fn a_node_whose_subscriptions_come_and_go_without_end_keeps_its_links() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    let mut records = 0;
    // Two changes each millisecond, 2.5 times as many as are announced, and all delayed by 5 s.
    for n in 0_u64..60_000 {
        let now = at(10 + n);
        b.subscribe(now, &pattern(format!("reply.{n}"))).unwrap();
        if n >= 3_000 {
            b.unsubscribe(now, &pattern(format!("reply.{}", n - 3_000)));
        }
        b.handle_timeout(now);
        for (link, control) in sent(&mut b).0 {
            records += 1;
            a.handle_control(at(5_000 + n / 5_000 * 5_000), link, control);
        }
        sent(&mut a);
        assert!(a.is_linked(&b.me.id), "cut at {n}");
    }
    assert!(records > 1_000, "changes were announced: {records}");
    assert!(b.poll_timeout().is_some(), "and some wait");
    for n in 0..60_000 {
        b.unsubscribe(at(70_000), &pattern(format!("reply.{n}")));
    }
    b.subscribe(at(70_000), &pattern("last".into())).unwrap();
    let mut now = at(70_000);
    while let Some(due) = b.poll_timeout().filter(|due| *due < at(90_000)) {
        now = due.max(now);
        b.handle_timeout(now);
        sent(&mut b).0.into_iter().for_each(|(link, news)| a.handle_control(now, link, news));
    }
    assert_eq!(a.peers()[0].patterns, [pattern("last".into())]);
}

#[test]
fn of_a_subscription_that_ends_while_it_waits_peers_hear_nothing() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    linked(&mut a, &mut b, LinkId(1));
    (0..9_000).for_each(|n| b.subscribe(at(3), &pattern(format!("t.{n}"))).unwrap());
    sent(&mut b);
    b.subscribe(at(3), &pattern("brief".into())).unwrap();
    b.unsubscribe(at(3), &pattern("brief".into()));
    let mut now = at(3);
    while let Some(due) = b.poll_timeout().filter(|due| *due < at(20_000)) {
        now = due.max(now);
        b.handle_timeout(now);
        for (_, control) in sent(&mut b).0 {
            if let Control::Announce(news) = control {
                assert!(!news.subscribed.contains(&pattern("brief".into())));
            }
        }
    }
    assert!(now < at(8_000), "4,000 that waited, at 800 a second: {now:?}");
}

#[test]
fn of_a_name_with_many_addresses_the_own_one_stands_for_no_other() {
    let mut me = mesh(1, 1);
    let name = Address::Host("mesh.headless".into(), 4000);
    let addresses = |numbers: &[u64]| numbers.iter().map(|it| Address::Memory(*it)).collect();
    let targets = |me: &mut Mesh| -> Vec<TargetKey> {
        let dialled = actions(me).into_iter().filter_map(|action| match action {
            Action::Dial { target, .. } => Some(target),
            _ => None,
        });
        dialled.collect()
    };
    let key = |number| TargetKey::Address(Address::Memory(number));
    me.handle_resolved(at(0), name.clone(), addresses(&[1, 2, 3]));
    assert_eq!(targets(&mut me), [key(1), key(2), key(3)], "each is dialled");
    // The first is this node itself.
    let (near, far) = (LinkId(1), LinkId(2));
    connect(&mut me, near, Some(key(1)), 1);
    connect(&mut me, far, None, 1);
    for (link, hello) in sent(&mut me).0 {
        assert_eq!(link, near);
        me.handle_control(at(2), far, hello);
    }
    sent(&mut me).0.into_iter().for_each(|(_, hello)| me.handle_control(at(2), near, hello));
    me.handle_dial_failed(at(3), &key(2), "refused".into());
    me.handle_dial_failed(at(3), &key(3), "refused".into());
    me.handle_timeout(at(10_000));
    assert_eq!(targets(&mut me), [key(2), key(3)], "the others are dialled again, it is not");
    assert_eq!(me.unreachable().len(), 2);

    // It is resolved again: one is gone, one is new.
    me.handle_dial_failed(at(10_001), &key(2), "refused".into());
    me.handle_resolved(at(10_002), name, addresses(&[1, 3, 4]));
    assert_eq!(targets(&mut me), [key(4)]);
    me.handle_dial_failed(at(10_003), &key(3), "refused".into());
    me.handle_dial_failed(at(10_003), &key(4), "refused".into());
    me.handle_timeout(at(30_000));
    let mut again = targets(&mut me);
    again.sort_unstable();
    assert_eq!(again, [key(3), key(4)]);
}

#[test]
fn a_pause_of_this_node_is_not_held_against_a_connection() {
    let (mut a, mut b) = (mesh(1, 1), mesh(2, 1));
    a.handle_sighting(at(0), address(2));
    let target = dialled(&mut a);
    connect(&mut a, LinkId(1), target, 2);
    connect(&mut b, LinkId(1), None, 1);
    a.handle_pause(Duration::from_secs(60));
    a.handle_timeout(at(60_000));
    exchange(&mut a, &mut b);
    assert!(a.is_linked(&b.me.id));
}
