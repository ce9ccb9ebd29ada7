use super::*;

fn ip(text: &str) -> Option<IpAddr> {
    Some(text.parse().unwrap())
}

type Admitted = (Place, oneshot::Receiver<()>);

fn is_evicted((_, evicted): &mut Admitted) -> bool {
    evicted.try_recv().is_ok()
}

fn prove(admitted: &Admitted) {
    admitted.0.standing().prove();
}

fn count(admissions: &Admissions) -> (usize, usize) {
    let table = lock(&admissions.table);
    (table.pending.count, table.open.count)
}

#[test]
fn places_are_given_back() {
    let admissions = Admissions::new(Most { open: 2, pending: 2 });
    let first = admissions.admit(ip("10.0.0.1"));
    let second = admissions.admit(ip("10.0.0.1"));
    first.0.open().unwrap();
    assert_eq!(count(&admissions), (1, 1));
    drop((first, second));
    assert_eq!(count(&admissions), (0, 0));
    let table = lock(&admissions.table);
    assert!(table.pending.sites.is_empty() && table.open.sites.is_empty());
}

#[test]
fn idle_strangers_make_room_for_newcomers_the_oldest_of_the_heaviest_address_first() {
    let admissions = Admissions::new(Most { open: 9, pending: 4 });
    let mut idle: Vec<_> = (0..3).map(|_| admissions.admit(ip("10.0.0.1"))).collect();
    let mut other = admissions.admit(ip("10.0.0.2"));
    let mut newcomers: Vec<_> =
        (3..5).map(|n| admissions.admit(ip(&format!("10.0.0.{n}")))).collect();
    assert_eq!(idle.iter_mut().map(is_evicted).collect::<Vec<_>>(), [true, true, false]);
    assert!(!is_evicted(&mut other) && !newcomers.iter_mut().any(is_evicted));
    assert_eq!(idle[0].0.open(), Err(Refusal::MadeRoom), "an evicted place is gone");
}

#[test]
fn a_flood_from_one_network_of_ipv6_evicts_itself() {
    let admissions = Admissions::new(Most { open: 9, pending: 8 });
    let mut honest = admissions.admit(ip("fd00:0:0:1::1"));
    let mut neighbour = admissions.admit(ip("fd00::2"));
    // One address of the site that the neighbour shares.
    let flood: Vec<_> = (0..100).map(|_| admissions.admit(ip("fd00::bad"))).collect();
    assert!(!is_evicted(&mut honest) && !is_evicted(&mut neighbour));
    drop(flood);
    // All addresses of that site.
    let flood: Vec<_> = (0..100).map(|n| admissions.admit(ip(&format!("fd00::{n:x}:3")))).collect();
    assert!(!is_evicted(&mut honest));
    drop(flood);
}

#[test]
fn open_connections_that_carried_nothing_make_room_and_others_do_not() {
    let admissions = Admissions::new(Most { open: 3, pending: 9 });
    let mut idle: Vec<_> = (0..3).map(|_| admissions.admit(ip("10.0.0.1"))).collect();
    idle.iter().for_each(|(place, _)| place.open().unwrap());
    prove(&idle[0]);
    let newcomer = admissions.admit(ip("10.0.0.1"));
    newcomer.0.open().unwrap();
    assert!(!is_evicted(&mut idle[0]));
    assert_eq!(idle[1..].iter_mut().filter_map(|it| is_evicted(it).then_some(())).count(), 1);
    idle.iter().for_each(prove);
    prove(&newcomer);
    let late = admissions.admit(ip("10.0.0.1"));
    assert_eq!(late.0.open(), Err(Refusal::Connections), "all places are in use");
    assert_eq!(count(&admissions), (0, 3));
    let others: Vec<_> = (2..5).map(|n| admissions.admit(ip(&format!("10.0.0.{n}")))).collect();
    others.iter().for_each(prove);
    let opened = others.iter().filter(|(place, _)| place.open().is_ok()).count();
    assert_eq!(opened, 2, "others take places until no address has more than half of them");
}

#[test]
fn strangers_make_room_before_known_sites() {
    let admissions = Admissions::new(Most { open: 9, pending: 3 });
    let before = admissions.admit(ip("10.0.0.1"));
    prove(&before);
    drop(before);
    let mut known: Vec<_> = (0..2).map(|_| admissions.admit(ip("10.0.0.1"))).collect();
    let mut stranger = admissions.admit(ip("10.0.0.2"));
    let _newcomer = admissions.admit(ip("10.0.0.3"));
    assert!(is_evicted(&mut stranger));
    assert!(!known.iter_mut().any(is_evicted));
}

#[test]
fn known_sites_are_bounded() {
    let mut known = Known::default();
    for n in 0..3 * MOST_KNOWN as u32 {
        known.insert(Some(IpAddr::from(n.to_be_bytes())));
    }
    assert_eq!((known.sites.len(), known.in_order.len()), (MOST_KNOWN, MOST_KNOWN));
}
