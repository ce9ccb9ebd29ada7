//! What the integration tests share: nodes in a mesh of their own.
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::time::Duration;

use peerbus::{Body, Call, Config, Event, Events, HandlerError, Node};
use tempfile::TempDir;

/// Long enough for any machine; a test that works never waits this long.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A place where the nodes of one test find each other, and nobody else does.
pub(crate) struct Host {
    dir: TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { dir: private_dir() }
    }

    /// A node that meets the others through this host's socket folder.
    pub(crate) fn config(&self, name: &str) -> Config {
        Node::builder().name(name).runtime_dir(self.dir.path()).mdns(false)
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub(crate) async fn node(&self, name: &str) -> Node {
        self.config(name).start().await.unwrap()
    }

    /// A node that talks TCP only, on loopback.
    pub(crate) fn tcp_config(&self, name: &str) -> Config {
        self.config(name).local(false)
    }
}

/// A temporary folder that only this user may enter.
pub(crate) fn private_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("pb")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .tempdir()
        .unwrap()
}

/// Waits for an event that `wanted` picks.
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
    tokio::time::timeout(SOON, wait).await.expect("the event comes")
}

/// A handler that replies with what it got.
pub(crate) async fn echo(call: Call) -> Result<Body, HandlerError> {
    Ok(call.message.body.into())
}

pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(SOON, future).await.expect("it happens in time")
}
