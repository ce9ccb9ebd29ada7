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
    cargo clippy --all-targets --all-features -- -D warnings
    cargo clippy --no-default-features --lib -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

# Three real nodes show what the mesh does
demo:
    cargo run --release -- demo

# Round trips and rates, beside plain TCP and the bare zeromq crate
bench:
    cargo run --release -- bench latency
    cargo run --release -- bench throughput
    cargo run --release -- bench load
    cargo run --release -- bench requests
    cargo run --release -- bench durable
    cargo run --release -- bench restart
    cargo run --release -- bench scale

# The databases' tests, with a PostgreSQL of their own
databases:
    .ci/with-postgres cargo test --features sqlite,postgres --test database

# Broker mode over NATS and RabbitMQ, which it installs if they are missing
brokers:
    ./brokers run cargo test --all-features --test broker --test broker_crash --test bridge

# The comparison's page in a real browser, which it installs if there is none
page:
    .ci/with-browser cargo test --test report_page

# A plain ZeroMQ client in Python, with a Python of its own
plain-client:
    .ci/with-python cargo test --test plain_client

# Processes that are killed more often than in CI: just kill 5000
kill rounds="2000":
    PEERBUS_KILL_ROUNDS={{rounds}} cargo test --release --test kill -- --nocapture

# Nodes that are killed and come back, for longer than in CI: just churn 600
churn seconds="110":
    PEERBUS_CHURN_SECONDS={{seconds}} cargo test --test churn -- --nocapture

# A node under siege by hostile processes, for longer than in CI: just siege 60
siege seconds="60":
    PEERBUS_SIEGE_SECONDS={{seconds}} cargo test --release --test siege -- --nocapture

# Any bytes for everything that reads what strangers write: just fuzz 3600
fuzz seconds="600":
    .ci/fuzz {{seconds}}

# Many more simulated runs than CI does: just simulate 100000
simulate seeds="20000":
    PEERBUS_SIM_SEEDS={{seeds}} cargo test --release --lib sim -- --nocapture
