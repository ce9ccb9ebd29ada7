//! Unpacks messages from the broker.

use super::Via;
use crate::address::Destination;
use crate::core::Core;
use crate::identity::NodeId;
use crate::message::{Header, Kind};
use crate::wire::{Envelope, Parcel, Payload, Unpacked};

/// Unpacks a parcel. One without a head is from another program.
pub(super) fn unpack(core: &Core, via: &Via, parcel: Parcel) -> Option<Unpacked> {
    if parcel.head.is_empty() {
        let (destination, kind) = match via {
            Via::Topic(topic, _) => (Destination::Topic(topic.clone()), Kind::Event),
            Via::Service(name) => (Destination::Service(name.clone()), Kind::Command),
            Via::Inbox => (Destination::Node(core.id), Kind::Command),
            Via::All => return None,
        };
        let header = Header::new(core.ids.next_now(), kind, destination);
        let payload = match kind {
            Kind::Event => Payload::Event(parcel.body),
            Kind::Command | Kind::Document => Payload::Call(parcel.body),
        };
        let (from, envelope) = (NodeId::BROKER, Envelope { header, payload });
        return Some(Unpacked { from, envelope, expires_at: None, not_before: None });
    }
    let unpacked = parcel.unpack(&core.id, core.config.max_body);
    if let Err(error) = &unpacked {
        tracing::debug!(%error, "a message from the broker can't be read");
        core.reporter.counters.refused("protocol");
    }
    unpacked.ok()
}

/// Returns true if a message arrived over the channel that its header names.
pub(super) fn is_for(core: &Core, via: &Via, header: &Header) -> bool {
    match (via, &header.destination) {
        (Via::Topic(topic, _), Destination::Topic(named)) => topic == named,
        (Via::Service(name), Destination::Service(named)) => name == named,
        (Via::Inbox, Destination::Node(node)) => *node == core.id,
        _ => false,
    }
}
