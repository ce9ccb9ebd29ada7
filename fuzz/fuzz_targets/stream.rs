//! A connection's bytes: greeting, READY, frames. `cargo +nightly fuzz run stream`
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| peerbus::fuzzing::stream(bytes));
