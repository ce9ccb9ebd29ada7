//! Truncated, flipped and deleted bytes of stored data are reported, with the messages lost.

use std::sync::atomic::Ordering;

use super::crashing::{Disk, Mount, Random};
use super::queue::Append;
use super::segment::{FRAME, HEADER, Header, MARK, entry_tag, record_size};
use super::stepped::{EntryKind, Stepped};
use super::*;
use crate::sync::lock_unranked as lock;

type Found = Vec<(Position, Vec<u8>)>;

fn small() -> Options {
    Options { segment_size: 1500, ..Options::default() }
}

fn open(disk: &Arc<Disk>) -> (Journal, Found, Recovery) {
    let mut found = Vec::new();
    let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
    let storage = Arc::new(Mount(disk.clone()));
    let (journal, recovery) = Journal::open_on(storage, &small(), Box::new(|_| {}), take).unwrap();
    (journal, found, recovery)
}

fn look(disk: &Arc<Disk>) -> (Found, Recovery) {
    let mut found = Vec::new();
    let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
    let (recovery, _) = recover(&Mount(disk.clone()), take).unwrap();
    (found, recovery)
}

/// Stores an entry that counts as one message.
fn store(journal: &Journal, payload: &[u8]) -> Position {
    let (waiter, wait) = oneshot::channel();
    let append = Append { messages: 1, ..Append::new(Done::Waiter(waiter)) };
    journal.queue.append(payload, append);
    wait.blocking_recv().unwrap().unwrap()
}

fn payload(number: usize) -> Vec<u8> {
    format!("entry {number} ").repeat(number % 7).into_bytes()
}

/// A closed journal of n messages in several segments.
fn closed(messages: usize) -> (Arc<Disk>, Found) {
    let disk = Arc::new(Disk::default());
    let (journal, ..) = open(&disk);
    let all = (0..messages).map(|number| (store(&journal, &payload(number)), payload(number)));
    let all = all.collect();
    drop(journal);
    assert!(numbers(&disk).len() >= 3, "several segments");
    (disk, all)
}

fn numbers(disk: &Disk) -> Vec<u64> {
    lock(&disk.files).keys().copied().collect()
}

fn bytes(disk: &Disk, segment: u64) -> Vec<u8> {
    lock(&disk.files)[&segment].bytes.clone()
}

/// Asserts that missing entries are reported and counted.
fn assert_told(disk: &Arc<Disk>, all: &Found, what: &str) {
    let (found, recovery) = look(disk);
    let lost = all.iter().filter(|entry| !found.contains(entry)).count();
    assert_eq!(found.len() + lost, all.len(), "{what}: nothing is made up");
    assert!(!recovery.damaged.is_empty(), "{what}: nothing is reported");
    assert_eq!((recovery.lost, recovery.torn), (Some(lost as u64), 0), "{what}");
}

#[test]
fn whatever_is_cut_off_a_closed_journal_is_damage() {
    let (disk, all) = closed(60);
    for segment in numbers(&disk) {
        let whole = bytes(&disk, segment);
        assert!(whole.len() > 200);
        for length in 0..whole.len() {
            disk.change(segment, |bytes| bytes.truncate(length));
            assert_told(&disk, &all, &format!("segment {segment} cut at {length}"));
            disk.change(segment, |bytes| bytes.clone_from(&whole));
        }
    }
}

#[test]
fn a_segment_that_is_deleted_is_damage_until_what_comes_behind_it_is_removed() {
    let (disk, all) = closed(60);
    let segments = numbers(&disk);
    for segment in &segments {
        let copy = Arc::new(disk.copy());
        lock(&copy.files).remove(segment);
        assert_told(&copy, &all, &format!("segment {segment} deleted"));
        for _ in 0..2 {
            // The damage stays reported, and the segment's number is not reused.
            let (journal, found, recovery) = open(&copy);
            let file = JournalFile::Segment(*segment);
            let told = recovery.damaged.iter().any(|damage| damage.file == file && damage.missing);
            assert!(told, "{recovery:?}");
            assert!(found.iter().all(|entry| all.contains(entry)));
            drop(journal);
            assert!(!numbers(&copy).contains(segment));
        }
        let (journal, ..) = open(&copy);
        let last = *numbers(&copy).last().unwrap();
        assert!(last > *segments.last().unwrap());
        journal.remove_before(last);
        drop(journal);
        let (found, recovery) = look(&copy);
        assert_eq!((found, recovery.damaged, recovery.lost), (vec![], vec![], Some(0)));
    }
}

#[test]
fn a_manifest_that_is_deleted_or_no_longer_one_is_damage_and_costs_nothing() {
    let (disk, all) = closed(60);
    for deleted in [true, false] {
        let copy = Arc::new(disk.copy());
        match deleted {
            true => *lock(&copy.manifest) = None,
            false => lock(&copy.manifest).as_mut().unwrap().bytes.fill(0xff),
        }
        let (found, recovery) = look(&copy);
        assert_eq!((found, recovery.lost, recovery.torn), (all.clone(), None, 0));
        let [damage] = recovery.damaged[..] else { panic!("{recovery:?}") };
        assert_eq!((damage.file, damage.missing), (JournalFile::Manifest, deleted));
        // Opening the journal writes a new manifest.
        drop(open(&copy));
        let (found, recovery) = look(&copy);
        assert_eq!((found, recovery.damaged, recovery.lost), (all.clone(), vec![], Some(0)));
    }
}

#[test]
fn no_flipped_bit_goes_unnoticed() {
    let (disk, all) = closed(60);
    // Padding between a payload and the next record is never read.
    let padding = |segment, at: u64| {
        all.iter().any(|(position, _)| {
            let end = position.offset + FRAME + u64::from(position.length);
            let next = position.offset + record_size(u64::from(position.length));
            position.segment == segment && (end..next).contains(&at)
        })
    };
    let mut random = Random(1);
    for segment in numbers(&disk) {
        for _ in 0..200 {
            let at = random.below(bytes(&disk, segment).len() as u64);
            let bit = 1 << random.below(8);
            disk.change(segment, |bytes| bytes[at as usize] ^= bit);
            if !padding(segment, at) {
                assert_told(&disk, &all, &format!("bit {bit} at {at} of {segment}"));
            }
            disk.change(segment, |bytes| bytes[at as usize] ^= bit);
        }
    }
    // One intact list detects all damage.
    let last = *numbers(&disk).last().unwrap();
    let whole = lock(&disk.manifest).clone().unwrap().bytes;
    for _ in 0..200 {
        let written: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
        let at = written[random.below(written.len() as u64) as usize];
        lock(&disk.manifest).as_mut().unwrap().bytes[at] ^= 1 << random.below(8);
        let (found, recovery) = look(&disk);
        assert_eq!((found, recovery.damaged), (all.clone(), vec![]), "{at}");
        let copy = Arc::new(disk.copy());
        copy.change(last, |bytes| bytes.truncate(bytes.len() - 1));
        assert!(!look(&copy).1.damaged.is_empty(), "{at}");
        lock(&disk.manifest).as_mut().unwrap().bytes.clone_from(&whole);
    }
}

#[test]
fn of_a_killed_process_what_was_synced_is_damage_and_what_was_not_is_torn() {
    let disk = Arc::new(Disk::default());
    let (mut journal, _) = Stepped::open(&disk, &small(), |_| {}).unwrap();
    let mut all = Found::new();
    let mut write = |number: usize, kind| {
        let stored = journal.write(std::iter::once((payload(number), kind))).remove(0).unwrap();
        all.push((stored, payload(number)));
    };
    (0..50).for_each(|number| write(number, EntryKind::Synced));
    let last = *numbers(&disk).last().unwrap();
    let synced = bytes(&disk, last).len();
    (50..54).for_each(|number| write(number, EntryKind::Note));
    let whole = bytes(&disk, last);
    assert!(numbers(&disk).last() == Some(&last) && synced > 200 && whole.len() > synced + 100);
    drop(journal);
    for length in 0..whole.len() {
        disk.change(last, |bytes| bytes.truncate(length));
        let (found, recovery) = look(&disk);
        assert!(all.starts_with(&found));
        assert_eq!(!recovery.damaged.is_empty(), length < synced, "cut at {length}");
        if length < synced {
            let lost = 50 - found.len().min(50);
            assert_eq!((recovery.lost, recovery.torn), (Some(lost as u64), 0), "cut at {length}");
        }
        disk.change(last, |bytes| bytes.clone_from(&whole));
    }
}

#[test]
fn a_manifest_that_has_outgrown_its_file_gets_a_larger_one_if_there_is_room() {
    let disk = Arc::new(Disk::default());
    let options = Options { segment_size: 1, ..Options::default() };
    let (mut journal, _) = Stepped::open(&disk, &options, |_| {}).unwrap();
    let size = || lock(&disk.manifest).as_ref().unwrap().bytes.len();
    let first = size();
    let mut write = |number| {
        let payload = vec![number as u8; 100];
        let stored = journal.write(std::iter::once((payload, EntryKind::Synced))).remove(0);
        stored.unwrap().segment
    };
    let segments: Vec<u64> = (0..1000).map(&mut write).collect();
    assert!(size() > first);
    for kill in [false, true] {
        let copy = if kill { disk.crash(1) } else { Arc::new(disk.copy()) };
        assert_eq!(look(&copy).1.damaged, []);
        lock(&copy.files).remove(&segments[700]);
        let (_, recovery) = look(&copy);
        assert_eq!((recovery.damaged.len(), recovery.lost), (1, Some(1)));
    }
    // On a full disk the existing list stays correct for its segments, and can shrink.
    let before = size();
    disk.fill();
    disk.capacity.fetch_add(110_000, Ordering::SeqCst);
    let more: Vec<u64> = (0..400).map(&mut write).collect();
    assert_eq!(look(&disk).1.damaged, []);
    journal.remove(segments[1..].to_vec());
    assert_eq!(size(), before);
    drop(journal);
    let (found, recovery) = look(&disk);
    let kept: Vec<u64> = found.iter().map(|(position, _)| position.segment).collect();
    assert_eq!((kept, recovery.damaged), ([&segments[..1], &more].concat(), vec![]));
}

#[test]
fn writes_of_the_manifest_that_fail_cost_nothing_and_raise_no_alarm() {
    let mut removed = 0;
    for seed in 0..300 {
        let mut random = Random(seed);
        let disk = Arc::new(Disk::default());
        let (journal, ..) = open(&disk);
        disk.manifest_fails.store(1 + random.below(60), Ordering::SeqCst);
        let mut all = Found::new();
        for number in 0..40 {
            all.push((store(&journal, &payload(number)), payload(number)));
            if random.below(12) == 0 {
                let gone = all[random.below(all.len() as u64) as usize].0.segment;
                journal.remove(vec![gone]);
                if gone < all.last().unwrap().0.segment {
                    // They are gone whether or not the removal could be written.
                    all.retain(|(position, _)| position.segment != gone);
                    removed += 1;
                }
            }
        }
        let crashed = disk.crash(random.next());
        drop(journal);
        for disk in [crashed, disk] {
            let (found, recovery) = look(&disk);
            assert_eq!(recovery.damaged, [], "seed {seed}");
            assert!(all.iter().all(|entry| found.contains(entry)), "seed {seed}");
        }
    }
    assert!(removed > 100);
}

#[test]
fn a_journal_of_version_1_is_read_as_it_was_and_goes_on_in_the_new_form() {
    let disk = Arc::new(Disk::default());
    let (mut all, mut previous, mut previous_end) = (Found::new(), 0, 0);
    for number in 3..6 {
        let header = Header { version: 1, salt: 9, number, previous, previous_end };
        let (mut bytes, mut synced) = (header.encode(), HEADER);
        for entry in 0..5 {
            header.encode_record(bytes.len() as u64, MARK, &synced.to_le_bytes(), &mut bytes);
            let (offset, payload) = (bytes.len() as u64, payload(entry + number as usize));
            header.encode_record(offset, entry_tag(0), &payload, &mut bytes);
            synced = bytes.len() as u64;
            let length = payload.len() as u32;
            all.push((Position { segment: number, offset, length }, payload));
        }
        (previous, previous_end) = (number, synced);
        lock(&disk.files).insert(number, Default::default());
        disk.change(number, |file| *file = bytes);
    }
    let broken = Arc::new(disk.copy());
    broken.change(4, |bytes| bytes[100] ^= 1);
    assert_eq!((look(&broken).1.damaged.len(), look(&broken).1.lost), (1, None));
    lock(&broken.files).remove(&4);
    assert_eq!(look(&broken).1.damaged.len(), 1);

    let (journal, found, recovery) = open(&disk);
    assert_eq!((found, recovery.damaged, recovery.torn), (all.clone(), vec![], 0));
    all.push((store(&journal, b"it goes on"), b"it goes on".to_vec()));
    drop(journal);
    let (found, recovery) = look(&disk);
    assert_eq!((found, recovery.damaged, recovery.lost), (all, vec![], Some(0)));
    for (segment, lost) in [(3, None), (5, None), (6, Some(1))] {
        let broken = Arc::new(disk.copy());
        lock(&broken.files).remove(&segment);
        let (_, recovery) = look(&broken);
        assert_eq!((recovery.damaged.len(), recovery.lost), (1, lost));
    }
}

#[test]
fn segments_without_an_entry_go_with_those_that_are_removed() {
    let (disk, _) = closed(60);
    let before = numbers(&disk);
    for _ in 0..3 {
        drop(open(&disk));
    }
    let (journal, ..) = open(&disk);
    let kept = store(&journal, b"kept");
    journal.remove(before);
    drop(journal);
    assert_eq!(numbers(&disk), [kept.segment]);
    let (found, recovery) = look(&disk);
    assert_eq!((found.len(), recovery.damaged), (1, vec![]));
}
