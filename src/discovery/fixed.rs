//! Addresses from the configuration.

use super::{Discovered, Sink};
use crate::engine::Sighting;
use crate::peer::{Address, Source};

/// Reports each address once; the dialler never gives up on it. Names are left to
/// [`names`](super::names).
pub(crate) fn announce(addresses: &[Address], sink: &Sink) {
    for address in addresses.iter().filter(|address| name(address).is_none()) {
        let addresses = vec![address.clone()];
        sink(Discovered::Seen(Sighting { source: Source::Fixed, id: None, addresses }));
    }
}

/// Returns the host and port of an address that has to be resolved and may have many addresses.
pub(crate) fn name(address: &Address) -> Option<(&str, u16)> {
    match address {
        // With a zone it is one address.
        Address::Host(host, port) if !host.contains('%') => Some((host, *port)),
        _ => None,
    }
}
