//! Messages to the embedded broker. `cargo +nightly fuzz run hub`
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| peerbus::fuzzing::hub(bytes));
