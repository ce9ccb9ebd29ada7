//! The head of a message, as brokers carry it. `cargo +nightly fuzz run parcel`
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| peerbus::fuzzing::parcel(bytes));
