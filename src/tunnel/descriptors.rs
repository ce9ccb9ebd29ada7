//! The limits of connections under the process's limit of file descriptors.

use super::admissions::Most;

/// Lowers the limits of a network's and this host's connections so that descriptors are left for
/// dialling, for files, and for the program around the node: at most half of them are for the
/// network, a quarter for this host.
pub(super) fn share([network, local]: [Most; 2]) -> [Most; 2] {
    let Some(limit) = limit() else { return [network, local] };
    let shared = [lower(network, limit / 2), lower(local, limit / 4)];
    if shared[0].open < network.open {
        tracing::info!(
            descriptors = limit,
            wanted = network.open,
            connections = shared[0].open,
            "fewer connections are accepted: the limit of file descriptors is low (ulimit -n)"
        );
    }
    shared
}

/// Fits open and pending connections, at most a quarter of them pending, into `room`.
fn lower(most: Most, room: usize) -> Most {
    let pending = most.pending.min((room / 4).max(1));
    Most { open: most.open.min((room - room / 4).max(1)), pending }
}

/// The number of descriptors that the process may open, if it is limited.
#[cfg(unix)]
fn limit() -> Option<usize> {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.and_then(|limit| limit.try_into().ok())
}

#[cfg(not(unix))]
fn limit() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_rest_of_the_process() {
        let wanted = Most { open: 1024, pending: 512 };
        let lowered = lower(wanted, 512);
        assert_eq!((lowered.open, lowered.pending), (384, 128));
        let plenty = lower(wanted, 1 << 19);
        assert_eq!((plenty.open, plenty.pending), (1024, 512));
        let least = lower(wanted, 1);
        assert_eq!((least.open, least.pending), (1, 1));
    }
}
