//! Any bytes in place of a journal's second segment, the first of them aside: what is read back is
//! what was written, or it is reported, and nothing panics. If the first byte is odd, the checksums
//! of the others are corrected before. `cargo +nightly fuzz run journal`
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use peerbus::journal::{Journal, Options};

/// Small segments have little room kept for when the disk is full, which is filled at each start.
fn options() -> Options {
    Options { segment_size: 64 * 1024, ..Options::default() }
}

fn entries(path: &Path) -> Option<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    Journal::open(path, &options(), |entry| found.push(entry.payload.to_vec())).ok()?;
    Some(found)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let (correct, mut bytes) = (first % 2 == 1, bytes.to_vec());
    if correct {
        peerbus::journal::correct_checksums(&mut bytes);
    }
    let dir = tempfile::tempdir().expect("there is room for a folder");
    let path = dir.path().join("journal");
    let (journal, _) = Journal::open(&path, &options(), |_| {}).expect("it is new");
    // Dropping the future doesn't undo it.
    drop(journal.append(b"what was written"));
    drop(journal);
    let segment = path.join("0000000000000002.segment");
    std::fs::write(segment, &bytes).expect("the folder is ours");
    // Either it is refused as a whole, or what was written is still there: only a header that is
    // valid can say that the segment before it ended earlier.
    if let Some(found) = entries(&path)
        && !correct
    {
        assert_eq!(found.first().map(Vec::as_slice), Some(&b"what was written"[..]));
    }
    // The inner formats, which a valid checksum would let through.
    peerbus::fuzzing::journal_record(&bytes);
});
