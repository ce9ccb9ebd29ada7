//! The strings of a TXT record, as mDNS brings them. `cargo +nightly fuzz run txt`
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| peerbus::fuzzing::txt(bytes));
