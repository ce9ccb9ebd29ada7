# What one does here every day. `just` lists it.

default:
    @just --list

# The whole suite
test:
    cargo test

# What CI runs
ci:
    .ci/run

# Formatting, lints and docs, as CI wants them
check:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    cargo clippy --no-default-features --lib -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

# Three real nodes show what the mesh does
demo:
    cargo run --release -- demo

# Round trips and rates, beside plain TCP and the bare zeromq crate
bench:
    cargo run --release -- bench latency
    cargo run --release -- bench throughput
    cargo run --release -- bench load
    cargo run --release -- bench requests
    cargo run --release -- bench scale

# Many more simulated runs than CI does: just simulate 100000
simulate seeds="20000":
    PEERBUS_SIM_SEEDS={{seeds}} cargo test --release --lib sim -- --nocapture
