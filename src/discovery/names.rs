//! Names from the configuration: each is resolved again and again, and every address that it has is
//! dialled. A name may stand for many nodes, this one among them, such as a headless service of
//! Kubernetes.

use std::time::Duration;

use tokio::net::lookup_host;
use tokio::time::{sleep, timeout};

use super::{Discovered, Sink};
use crate::engine::Sighting;
use crate::peer::{Address, Source};

/// The interval at which a name is resolved again: in full, and while it does not resolve.
const AGAIN: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// The most addresses of a name.
const MAX_RESOLVED: usize = 256;

/// Resolves a name until it is dropped. Until it has resolved once, the name itself is the target,
/// so that the failure is reported as that of an unreachable address.
pub(crate) async fn watch(host: String, port: u16, sink: Sink) {
    let name = Address::Host(host.clone(), port);
    let mut has_resolved = false;
    loop {
        let lookup = timeout(LOOKUP_TIMEOUT, lookup_host((host.as_str(), port)));
        let found = lookup.await.ok().and_then(Result::ok);
        let found = found.into_iter().flatten().take(MAX_RESOLVED).map(Address::Tcp);
        let mut addresses: Vec<Address> = found.collect();
        addresses.sort_unstable();
        addresses.dedup();
        // A name that does not resolve for a moment keeps its addresses.
        if !addresses.is_empty() {
            has_resolved = true;
            sink(Discovered::Resolved { name: name.clone(), addresses });
        } else if !has_resolved {
            let addresses = vec![name.clone()];
            sink(Discovered::Seen(Sighting { source: Source::Fixed, id: None, addresses }));
        }
        sleep(if has_resolved { AGAIN } else { RETRY }).await;
    }
}
