//! The journal on a disk that crashes, fails and stalls.

use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use proptest::prelude::*;

use super::crashing::{Disk, FileState, Mount, Random};
use super::queue::Append;
use super::segment::{FRAME, HEADER, Header, VERSION};
use super::stepped::{EntryKind, Stepped};
use super::*;
use crate::sync::lock_unranked as lock;

fn small() -> Options {
    Options { segment_size: 1500, ..Options::default() }
}

type Found = Vec<(Position, Vec<u8>)>;

fn open(disk: &Arc<Disk>) -> (Journal, Found, Recovery) {
    let mut found = Vec::new();
    let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
    let (journal, recovery) =
        Journal::open_on(Arc::new(Mount(disk.clone())), &small(), Box::new(|_| {}), take).unwrap();
    (journal, found, recovery)
}

fn append(journal: &Journal, payload: &[u8]) -> Result<Position, NotStored> {
    wait_for(journal.append(payload))
}

fn wait_for<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A closed journal of n entries.
fn written(entries: usize) -> (Arc<Disk>, Found) {
    let disk = Arc::new(Disk::default());
    let (journal, ..) = open(&disk);
    let mut all = Vec::new();
    for number in 0..entries {
        let payload = format!("entry {number} ").repeat(number % 7).into_bytes();
        all.push((append(&journal, &payload).unwrap(), payload));
    }
    drop(journal);
    (disk, all)
}

#[test]
fn what_was_stored_is_there_after_any_crash() {
    let seeds = std::env::var("PEERBUS_SIM_SEEDS").map_or(2000, |text| text.parse().unwrap());
    let (mut torn, mut holes, mut failed, mut unanswered) = (0, 0, 0, 0);
    // Failed appends that must not be present later.
    let mut certain = 0;
    for seed in 0..seeds {
        let mut random = Random(seed);
        let mut disk = Arc::new(Disk::default());
        let (mut stored, mut maybe) = (Found::new(), Vec::<(bool, Vec<u8>)>::new());
        for life in 0..4 {
            let (journal, found, recovery) = open(&disk);
            for Damage { file, from, missing, .. } in recovery.damaged {
                let JournalFile::Segment(segment) = file else { panic!("seed {seed}") };
                assert!(!missing, "seed {seed}, life {life}: {segment}");
                let unsure = lock(&disk.files)[&segment].unsure;
                assert!(
                    unsure.is_some_and(|unsure| unsure as u64 <= from),
                    "seed {seed}, life {life}: {from} of {segment} was synced"
                );
                holes += 1;
            }
            torn += u64::from(recovery.torn > 0);
            let (sure, more) = found.split_at(stored.len().min(found.len()));
            assert_eq!(sure, stored, "seed {seed}, life {life}");
            // Entries that failed last, or were in flight during the crash, may be present.
            let mut sent = maybe.iter();
            for (_, payload) in more {
                assert!(sent.any(|(_, sent)| sent == payload), "seed {seed}, life {life}");
            }
            for (_, payload) in maybe.iter().filter(|(answered, _)| *answered) {
                assert!(more.iter().any(|(_, found)| found == payload), "seed {seed}, life {life}");
            }
            for (position, payload) in &found {
                assert_eq!(journal.read(*position).unwrap(), *payload);
            }
            (stored, maybe) = (found, Vec::new());
            if random.below(2) == 0 {
                disk.write_fails.store(1 + random.below(12), Ordering::SeqCst);
            }
            if random.below(2) == 0 {
                disk.sync_fails.store(1 + random.below(12), Ordering::SeqCst);
            }
            if random.below(4) == 0 {
                disk.manifest_fails.store(1 + random.below(12), Ordering::SeqCst);
            }
            for number in 0..random.below(20) {
                let payload = vec![number as u8; random.below(300) as usize];
                match append(&journal, &payload) {
                    Ok(position) => {
                        stored.push((position, payload));
                        // Earlier failed entries can't reappear from here on.
                        maybe.clear();
                    }
                    Err(error) => {
                        failed += 1;
                        certain += u64::from(!error.may_turn_up);
                        if error.may_turn_up {
                            maybe.push((false, payload));
                        }
                    }
                }
            }
            for number in 0..random.below(4) {
                let payload = vec![100 + number as u8; 1 + random.below(300) as usize];
                let answer = journal.append(&payload).now_or_never();
                unanswered += usize::from(answer.is_none());
                maybe.push((answer.is_some_and(|answer| answer.is_ok()), payload));
            }
            // The machine dies at any point of the writer's work.
            let crashed = disk.crash(random.next());
            drop(journal);
            disk = crashed;
        }
    }
    println!("{torn} torn tails, {holes} holes, {failed} failures, {unanswered} unanswered");
    let failures = failed > certain && certain > 0;
    assert!(torn > 0 && failures && unanswered > 0, "the faults did not fire");
}

#[test]
fn a_log_cut_anywhere_gives_back_what_came_before() {
    let (disk, all) = written(120);
    let last = *lock(&disk.files).keys().next_back().unwrap();
    let whole = lock(&disk.files)[&last].bytes.clone();
    assert!(all.first().unwrap().0.segment < last, "several segments");
    for length in 0..whole.len() {
        disk.change(last, |bytes| *bytes = whole[..length].to_vec());
        let mut found = Found::new();
        let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
        recover(&Mount(disk.clone()), take).unwrap();
        let reached = |(position, payload): &&(Position, Vec<u8>)| {
            let end = position.offset + FRAME + payload.len() as u64;
            position.segment < last || end.next_multiple_of(8) <= length as u64
        };
        let wanted: Found = all.iter().take_while(reached).cloned().collect();
        assert_eq!(found, wanted, "cut at {length}");
    }
}

#[test]
fn a_flipped_bit_is_reported_and_costs_one_entry_at_most() {
    let (disk, all) = written(60);
    let numbers: Vec<u64> = lock(&disk.files).keys().copied().collect();
    for number in numbers {
        let whole = lock(&disk.files)[&number].bytes.clone();
        for at in 0..whole.len() {
            for bit in [0, 7] {
                disk.change(number, |bytes| bytes[at] ^= 1 << bit);
                let mut found = Found::new();
                let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
                let (recovery, _) = recover(&Mount(disk.clone()), take).unwrap();
                let lost: Vec<_> = all.iter().filter(|entry| !found.contains(entry)).collect();
                assert_eq!(found.len() + lost.len(), all.len(), "nothing is made up");
                assert!(lost.len() <= 1, "bit {bit} at {at} of {number} lost {}", lost.len());
                for (position, _) in lost {
                    let named = recovery.damaged.iter().any(|damage| {
                        damage.file == JournalFile::Segment(position.segment)
                            && (damage.from..damage.to).contains(&position.offset)
                    });
                    assert!(named, "bit {bit} at {at} of {number}: {recovery:?}");
                }
                disk.change(number, |bytes| bytes[at] ^= 1 << bit);
            }
        }
    }
}

/// A journal of three writes of n entries each, whose process was killed.
fn killed(entries: usize) -> (Arc<Disk>, u64, Found) {
    let disk = Arc::new(Disk::default());
    let (mut journal, _) = Stepped::open(&disk, &Options::default(), |_| {}).unwrap();
    let payload = |number: usize| format!("entry {number} ").repeat(number % 7).into_bytes();
    let payloads: Vec<_> = (0..3 * entries).map(payload).collect();
    let mut all = Found::new();
    for together in payloads.chunks(entries) {
        let writes = together.iter().cloned().map(|payload| (payload, EntryKind::Synced));
        let stored = journal.write(writes).into_iter().map(Result::unwrap);
        all.extend(stored.zip(together.iter().cloned()));
    }
    let segment = all[0].0.segment;
    (disk, segment, all)
}

#[test]
fn a_flipped_bit_in_a_write_of_many_entries_costs_one_of_them() {
    let (disk, segment, all) = killed(8);
    let whole = lock(&disk.files)[&segment].bytes.clone();
    for at in HEADER as usize..whole.len() {
        disk.change(segment, |bytes| bytes[at] ^= 1 << (at % 8));
        let mut found = Found::new();
        let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
        let (recovery, _) = recover(&Mount(disk.clone()), take).unwrap();
        let lost: Vec<_> = all.iter().filter(|entry| !found.contains(entry)).collect();
        assert!(lost.len() <= 1 && found.len() + lost.len() == all.len(), "at {at}: {lost:?}");
        for (position, _) in lost {
            let named = recovery
                .damaged
                .iter()
                .any(|damage| (damage.from..damage.to).contains(&position.offset));
            assert!(named && recovery.torn == 0, "at {at}: {recovery:?}");
        }
        disk.change(segment, |bytes| bytes[at] ^= 1 << (at % 8));
    }
}

#[test]
fn stale_bytes_of_another_segment_are_nothing() {
    let (disk, all) = written(60);
    let first = all[0].0.segment;
    let old = lock(&disk.files)[&first].bytes[HEADER as usize..].to_vec();
    let last = *lock(&disk.files).keys().next_back().unwrap();
    disk.change(last, |bytes| bytes.extend_from_slice(&old));
    let (_, found, recovery) = open(&disk);
    assert_eq!(found, all);
    assert_eq!(recovery.torn, old.len() as u64);
    assert_eq!(recovery.damaged, []);
}

#[test]
fn a_segment_that_is_missing_between_others_is_reported() {
    let (disk, all) = written(60);
    let numbers: Vec<u64> = lock(&disk.files).keys().copied().collect();
    let missing = numbers[1];
    let end = lock(&disk.files).remove(&missing).unwrap().bytes.len() as u64;
    let (_, found, recovery) = open(&disk);
    let wanted: Found = all.iter().filter(|(at, _)| at.segment != missing).cloned().collect();
    assert_eq!(found, wanted);
    let file = JournalFile::Segment(missing);
    assert_eq!(recovery.damaged, [Damage { file, from: 0, to: end, missing: true }]);
    assert!(recovery.damaged[0].to > HEADER);
}

#[test]
fn a_damaged_header_of_the_only_segment_costs_no_entry() {
    let (disk, segment, all) = killed(8);
    disk.change(segment, |bytes| bytes[20] ^= 1);
    let (journal, found, recovery) = open(&disk);
    assert_eq!((found, recovery.torn, recovery.lost), (all, 0, Some(0)));
    assert_eq!(recovery.damaged, [Damage::part(segment, 0, HEADER)]);
    append(&journal, b"it goes on").unwrap();
    drop(journal);
    let (_, found, recovery) = open(&disk);
    assert_eq!((found.len(), recovery.damaged.is_empty()), (25, false), "and stays reported");
}

#[test]
fn without_manifest_the_only_segment_with_a_damaged_header_is_reported_as_a_whole() {
    let (disk, segment, _) = killed(8);
    let length = lock(&disk.files)[&segment].bytes.len() as u64;
    disk.change(segment, |bytes| bytes[20] ^= 1);
    *lock(&disk.manifest) = None;
    let (journal, found, recovery) = open(&disk);
    assert_eq!((found.len(), recovery.torn, recovery.lost), (0, 0, None));
    assert_eq!(recovery.damaged, [Damage::part(segment, 0, length)]);
    append(&journal, b"it goes on").unwrap();
    drop(journal);
    let (_, found, recovery) = open(&disk);
    assert_eq!((found.len(), recovery.damaged.is_empty()), (1, false), "and stays reported");
}

#[test]
fn segments_are_removed_and_numbers_are_never_used_again() {
    let (disk, all) = written(60);
    let (journal, ..) = open(&disk);
    let oldest = all[0].0.segment;
    journal.remove_before(oldest + 1);
    drop(journal);
    let (_, found, recovery) = open(&disk);
    let wanted: Found = all.iter().filter(|(at, _)| at.segment > oldest).cloned().collect();
    assert_eq!((found, recovery.damaged), (wanted, vec![]));
}

#[test]
fn a_crash_while_segments_are_removed_leaves_all_of_them_or_none() {
    let (mut kept_all, mut left_over) = (0, 0);
    for seed in 0..300 {
        let mut random = Random(seed);
        let (disk, all) = written(60);
        let numbers: Vec<u64> = lock(&disk.files).keys().copied().collect();
        let gone: Vec<u64> = numbers.iter().copied().filter(|_| random.below(2) == 0).collect();
        // Any step may be the last: later steps have no effect.
        disk.steps_left.store(random.below(12 + gone.len() as u64), Ordering::SeqCst);
        let (journal, ..) = open(&disk);
        journal.remove(gone.clone());
        drop(journal);
        let crashed = lock(&disk.left).take().unwrap_or_else(|| disk.crash(random.next()));
        let files: Vec<u64> = lock(&crashed.files).keys().copied().collect();
        let (journal, found, recovery) = open(&crashed);
        assert_eq!((recovery.damaged, recovery.lost), (vec![], Some(0)), "seed {seed}");
        let wanted: Found =
            all.iter().filter(|(at, _)| !gone.contains(&at.segment)).cloned().collect();
        assert!(found == all || found == wanted, "seed {seed}");
        if found == all {
            kept_all += u64::from(!gone.is_empty());
        } else {
            left_over += u64::from(gone.iter().any(|segment| files.contains(segment)));
            // They are removed along with the next removal.
            journal.remove(Vec::new());
            drop(journal);
            let files = lock(&crashed.files);
            assert!(gone.iter().all(|segment| !files.contains_key(segment)), "seed {seed}");
        }
    }
    assert!(kept_all > 0 && left_over > 0, "no crash came at the right time");
}

#[test]
fn a_crash_while_it_is_opened_changes_nothing() {
    let (first, all) = written(20);
    for seed in 0..200 {
        let mut random = Random(seed);
        let mut disk = first.crash(random.next());
        for _ in 0..3 {
            let countdown = match random.below(2) {
                0 => &disk.write_fails,
                _ => &disk.sync_fails,
            };
            countdown.store(1 + random.below(2), Ordering::SeqCst);
            let take = |_: Entry<'_>| {};
            let storage = Arc::new(Mount(disk.clone()));
            let opened = Journal::open_on(storage, &small(), Box::new(|_| {}), take);
            let crashed = disk.crash(random.next());
            drop(opened);
            disk = crashed;
        }
        let (_, found, recovery) = open(&disk);
        assert_eq!((found, recovery.damaged), (all.clone(), vec![]), "seed {seed}");
    }
}

#[test]
fn a_full_disk_still_takes_what_frees_room() {
    let disk = Arc::new(Disk::default());
    let options = Options { segment_size: 4000, ..Options::default() };
    let open = || {
        let mut found = Found::new();
        let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
        let storage = Arc::new(Mount(disk.clone()));
        let opened = Journal::open_on(storage, &options, Box::new(|_| {}), take);
        let (journal, recovery) = opened.unwrap();
        assert_eq!(recovery.damaged, []);
        (journal, found)
    };
    // An entry that need not be stored.
    let offer = |journal: &Journal| {
        let (waiter, wait) = oneshot::channel();
        let append = Append { need: Need::None, ..Append::new(Done::Waiter(waiter)) };
        journal.queue.append(&[1; 300], append);
        wait_for(wait).unwrap()
    };
    let spare = || disk.spare.load(Ordering::SeqCst);
    disk.capacity.store(45_000, Ordering::SeqCst);
    let (journal, _) = open();
    let mut all = Found::new();
    while let Ok(position) = offer(&journal) {
        all.push((position, vec![1; 300]));
    }
    assert!(all.len() > 40 && spare() == 0, "{} of them, {} spare", all.len(), spare());
    let settled = append(&journal, b"settled").unwrap();
    all.push((settled, b"settled".to_vec()));
    assert!(offer(&journal).is_err());

    // A restart on an equally full disk.
    drop(journal);
    let (journal, found) = open();
    assert_eq!(found, all);
    assert!(offer(&journal).is_err());
    let last = append(&journal, b"more is settled").unwrap();
    journal.remove_before(last.segment);
    append(&journal, b"by now they are removed").unwrap();
    assert!(spare() > 0);
    offer(&journal).unwrap();
}

#[test]
fn a_reserve_that_cant_be_released_is_reported_to_who_needs_it() {
    let disk = Arc::new(Disk::default());
    let (mut journal, _) = Stepped::open(&disk, &Options::default(), |_| {}).unwrap();
    let mut urgent = |text: &str| {
        let entry = std::iter::once((text.as_bytes().to_vec(), EntryKind::Synced));
        journal.write(entry).remove(0)
    };
    urgent("first").unwrap();
    disk.fill();
    disk.give_fails.store(1, Ordering::SeqCst);
    let error = urgent("no room").unwrap_err().to_string();
    assert!(error.contains("its reserve can't be released: permission denied"), "{error}");
}

#[test]
fn what_was_written_before_a_failure_and_may_be_gone_is_told_by_the_next_entry() {
    let disk = Arc::new(Disk::default());
    let (mut journal, _) = Stepped::open(&disk, &Options::default(), |_| {}).unwrap();
    let entry = |text: &str, kind| std::iter::once((text.as_bytes().to_vec(), kind));
    assert!(journal.write(entry("may wait for its sync", EntryKind::Note))[0].is_ok());
    disk.write_fails.store(1, Ordering::SeqCst);
    disk.sync_fails.store(1, Ordering::SeqCst);
    // The reserve has space for it, but the waiter of the first entry must get an error.
    assert!(journal.write(entry("urgent", EntryKind::Synced))[0].is_err());
    assert!(journal.write(entry("the next", EntryKind::Synced))[0].is_ok());
}

#[test]
fn a_full_disk_takes_what_begins_a_segment_though_it_has_grown() {
    let disk = Arc::new(Disk::default());
    let (mut journal, _) = Stepped::open(&disk, &Options::default(), |_| {}).unwrap();
    let mut write = |bytes: u64, kind| {
        let payload = vec![1; bytes as usize];
        journal.write(std::iter::once((payload, kind))).remove(0)
    };
    let mib = 1024 * 1024;
    let before = write(5 * mib, EntryKind::First).unwrap();
    assert_eq!(disk.spare.load(Ordering::SeqCst), 15 * mib);
    disk.fill();
    for _ in 0..4 {
        write(mib, EntryKind::Synced).unwrap();
    }
    let snapshot = write(9 * mib, EntryKind::First).unwrap();
    assert!(snapshot.segment > before.segment && snapshot.offset < HEADER + 100, "{snapshot:?}");
    write(100, EntryKind::Synced).unwrap();
    drop(journal);
    let mut found = Vec::new();
    Stepped::open(&disk, &Options::default(), |entry| found.push(entry.position)).unwrap();
    assert_eq!(found.len(), 7);
}

#[test]
fn what_takes_the_place_of_removed_segments_outlasts_them_though_nothing_needs_a_sync() {
    for durability in [Durability::OsBuffer, Durability::Interval(Duration::MAX)] {
        let options = Options { durability, ..Options::default() };
        for seed in 0..20 {
            let disk = Arc::new(Disk::default());
            let (mut journal, _) = Stepped::open(&disk, &options, |_| {}).unwrap();
            let mut write = |text: &str, kind| {
                let payload = text.as_bytes().to_vec();
                journal.write(std::iter::once((payload, kind))).remove(0).unwrap()
            };
            write("all of it", EntryKind::First);
            write("one more", EntryKind::Synced);
            let all = write("all of it again", EntryKind::First);
            journal.remove_before(all.segment);
            let mut found = Vec::new();
            let take = |entry: Entry<'_>| found.push(entry.payload.to_vec());
            Stepped::open(&disk.crash(seed), &options, take).unwrap();
            assert_eq!(found.last().map(Vec::as_slice), Some(&b"all of it again"[..]), "{seed}");
        }
    }
}

#[test]
fn an_interval_without_end_is_one() {
    let disk = Arc::new(Disk::default());
    let options = Options { durability: Durability::Interval(Duration::MAX), ..small() };
    let storage = Arc::new(Mount(disk));
    let (journal, _) = Journal::open_on(storage, &options, Box::new(|_| {}), |_| {}).unwrap();
    for _ in 0..3 {
        append(&journal, b"never synced").unwrap();
    }
}

#[test]
fn a_journal_of_a_newer_format_is_refused_and_left_alone() {
    let (disk, all) = written(3);
    let segment = all[0].0.segment;
    let header =
        Header { version: VERSION, salt: 1, number: segment, previous: 0, previous_end: 0 };
    let mut newer = header.encode();
    newer[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
    let crc = crc32c::crc32c(&newer[..44]);
    newer[44..].copy_from_slice(&crc.to_le_bytes());
    disk.change(segment, |bytes| bytes[..48].copy_from_slice(&newer));
    let before = lock(&disk.files).clone();
    let opened =
        Journal::open_on(Arc::new(Mount(disk.clone())), &small(), Box::new(|_| {}), |_| {});
    assert!(matches!(opened, Err(JournalError::Version(version)) if version == VERSION + 1));
    let after = lock(&disk.files).clone();
    assert!(
        before
            .iter()
            .map(|(n, file)| (n, &file.bytes))
            .eq(after.iter().map(|(n, file)| (n, &file.bytes)))
    );
}

#[test]
fn a_directory_serves_one_journal_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let open = || Journal::open(&path, &Options::default(), |_| {});
    let (journal, _) = open().unwrap();
    let position = append(&journal, b"kept").unwrap();
    let second = open().err().unwrap();
    assert!(matches!(second, JournalError::Directory(DirectoryError::InUse)), "{second}");
    drop(journal);
    let mut found = Vec::new();
    let take = |entry: Entry<'_>| found.push(entry.payload.to_vec());
    let (journal, recovery) = Journal::open(&path, &Options::default(), take).unwrap();
    assert_eq!((found, recovery.entries), (vec![b"kept".to_vec()], 1));
    assert_eq!(journal.read(position).unwrap(), b"kept");
    let wrong = Position { length: position.length + 1, ..position };
    assert!(journal.read(wrong).is_err() || journal.read(wrong).unwrap() == b"kept");
    drop(journal);

    let foreign = tempfile::tempdir().unwrap();
    std::fs::write(foreign.path().join("thesis.txt"), "mine").unwrap();
    let refused = Journal::open(foreign.path(), &Options::default(), |_| {}).err().unwrap();
    assert!(refused.to_string().contains("thesis.txt"), "{refused}");
    assert_eq!(std::fs::read_dir(foreign.path()).unwrap().count(), 1, "nothing was left behind");
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        with_header in any::<bool>(),
    ) {
        let disk = Arc::new(Disk::default());
        let header = Header { version: VERSION, salt: 1, number: 1, previous: 0, previous_end: 0 }.encode();
        let start = if with_header { header } else { Vec::new() };
        lock(&disk.files).insert(1, FileState::default());
        disk.change(1, |file| *file = [start, bytes].concat());
        let (recovery, _) = recover(&Mount(disk), |_| {}).unwrap();
        prop_assert_eq!(recovery.entries, 0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_has_room_for_more_until_it_is_closed_and_that_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (there, killed) = (dir.path().join("there"), dir.path().join("killed"));
    let open = |path| {
        let mut found = Found::new();
        let take = |entry: Entry<'_>| found.push((entry.position, entry.payload.to_vec()));
        let (journal, recovery) = Journal::open(path, &Options::default(), take).unwrap();
        (journal, found, recovery)
    };
    let (journal, ..) = open(&there);
    let last = append(&journal, b"some").unwrap();
    let file = there.join(storage::file_name(last.segment));
    let before = std::fs::read(&file).unwrap();
    assert_eq!(before.len(), 1024 * 1024);
    // The state after a kill.
    std::fs::create_dir(&killed).unwrap();
    for name in ["journal.lock", "manifest", &storage::file_name(last.segment)] {
        std::fs::copy(there.join(name), killed.join(name)).unwrap();
    }
    drop(journal);
    let after = std::fs::read(&file).unwrap();
    assert!(after.len() < 200 && after.starts_with(&before[..last.offset as usize]));
    for path in [&there, &killed] {
        for _ in 0..2 {
            let (_, found, recovery) = open(path);
            assert_eq!(found, [(last, b"some".to_vec())]);
            assert_eq!((recovery.damaged, recovery.torn), (vec![], 0));
        }
    }
}

#[test]
fn what_can_be_written_later_is_written_with_what_comes_next_or_at_the_end() {
    let disk = Arc::new(Disk::default());
    let (told, stored) = std::sync::mpsc::channel();
    let sink: Sink =
        Box::new(move |ended| ended.for_each(|(number, _)| told.send(number).unwrap()));
    let storage = Arc::new(Mount(disk.clone()));
    let (journal, _) = Journal::open_on(storage, &small(), sink, |_| {}).unwrap();
    // From here on, the writer waits with a timeout.
    append(&journal, b"first").unwrap();
    journal.append_for_sink(1, b"later", 0, Persist::Lazy, Need::Urgent);
    journal.append_for_sink(2, b"now", 0, Persist::Sync, Need::Urgent);
    assert_eq!([stored.recv(), stored.recv()], [Ok(1), Ok(2)]);
    journal.append_for_sink(3, b"at the end", 0, Persist::Lazy, Need::Urgent);
    drop(journal);
    assert_eq!(stored.recv(), Ok(3));
    let (_, found, _) = open(&disk);
    let payloads: Vec<_> = found.iter().map(|(_, payload)| &payload[..]).collect();
    assert_eq!(payloads, [&b"first"[..], b"later", b"now", b"at the end"]);
}
