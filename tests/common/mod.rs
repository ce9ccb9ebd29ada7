//! The shared part of the integration tests: nodes in a mesh of their own.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub(crate) mod wire;

use std::time::Duration;

use peerbus::{Body, Call, Config, Event, Events, HandlerError, Node};
use tempfile::TempDir;

/// Long enough for any machine; a test that works never waits this long.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A place where the nodes of one test, and only these, find each other.
pub(crate) struct Host {
    dir: TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        log::check();
        Self { dir: private_dir() }
    }

    /// A node that finds the others through this host's socket folder.
    pub(crate) fn config(&self, name: &str) -> Config {
        Node::builder().name(name).runtime_dir(self.dir.path()).mdns(false)
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub(crate) async fn node(&self, name: &str) -> Node {
        self.config(name).start().await.unwrap()
    }

    /// A node that uses TCP on loopback only.
    pub(crate) fn tcp_config(&self, name: &str) -> Config {
        self.config(name).local(false)
    }
}

/// Ends the test program if a node logs under a lock: threads that want the lock would wait for the
/// terminal.
mod log {
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    struct Checker;

    pub(super) fn check() {
        let _set_already = tracing::subscriber::set_global_default(Checker);
    }

    impl Subscriber for Checker {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, event: &Event<'_>) {
            #[cfg(debug_assertions)]
            if peerbus::holds_lock() {
                eprintln!("logged under a lock: {event:?}");
                std::process::abort();
            }
            let _ = event;
        }
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }
}

/// A temporary folder with access for this user only.
pub(crate) fn private_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("pb")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .tempdir()
        .unwrap()
}

/// Waits for an event that `wanted` accepts.
pub(crate) async fn wait_for<T>(
    events: &mut Events,
    mut wanted: impl FnMut(Event) -> Option<T>,
) -> T {
    let wait = async {
        loop {
            let event = events.recv().await.expect("the node is alive");
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("timed out after 30 s: the event did not come")
}

/// A handler that echoes the message.
pub(crate) async fn echo(call: Call) -> Result<Body, HandlerError> {
    Ok(call.message.body.into())
}

pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(SOON, future).await.expect("timed out: the expected event did not happen")
}
