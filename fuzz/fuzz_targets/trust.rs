//! A file of mesh keys, trusted keys or rules. `cargo +nightly fuzz run trust`
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| peerbus::fuzzing::trust(bytes));
