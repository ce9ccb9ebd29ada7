//! Addresses from the configuration.

use super::{Discovered, Sink};
use crate::engine::Sighting;
use crate::peer::{Address, Source};

/// Reports each address once; the dialler never gives up on it.
pub(crate) fn announce(addresses: &[Address], sink: &Sink) {
    for address in addresses {
        let addresses = vec![address.clone()];
        sink(Discovered::Seen(Sighting { source: Source::Fixed, id: None, addresses }));
    }
}
