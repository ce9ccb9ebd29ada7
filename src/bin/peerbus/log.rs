//! The log, on standard error.

use std::io::IsTerminal;

use tracing::Metadata;
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::prelude::*;

/// Begins to log. `PEERBUS_LOG` chooses levels and targets among those of this crate.
pub(crate) fn begin() {
    let chosen = EnvFilter::try_from_env("PEERBUS_LOG").unwrap_or_else(|_| "warn".into());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    tracing_subscriber::registry().with(chosen).with(filter_fn(is_ours)).with(lines).init();
}

/// Returns true for the lines of this crate. Other crates, such as the brokers' clients, log
/// credentials and bodies, so no setting lets their lines through.
fn is_ours(line: &Metadata<'_>) -> bool {
    line.target() == "peerbus" || line.target().starts_with("peerbus::")
}
