//! The way to all other nodes of a mesh, by its broker.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::Outgoing;
use super::ask::Ask;
use super::client::BrokerClient;
use crate::address::{Destination, Recipient};
use crate::core::{Core, Publication, Way};
use crate::engine::{Backlog, Path};
use crate::identity::NodeId;
use crate::message::{Header, Kind, MessageId};
use crate::report::DropReason;
use crate::wire::{Envelope, Lane, Parcel, Payload, Totals};

/// The way to all other nodes.
pub(super) struct BrokerWay {
    pub(super) core: Arc<Core>,
    pub(super) client: Arc<BrokerClient>,
}

impl BrokerWay {
    pub(super) fn parcel(&self, envelope: Envelope) -> Parcel {
        Parcel::pack(envelope, &self.core.id, None, None)
    }

    /// Broadcasts a question, or a notice that needs no answer.
    pub(super) fn ask(&self, id: MessageId, ask: &Ask) {
        let mut header = Header::new(id, Kind::Command, Destination::Node(NodeId::BROKER));
        header.reply_to = Some(self.core.id);
        let body = rmp_serde::to_vec(ask).unwrap_or_default();
        let payload = Payload::Request(body.into());
        let parcel = self.parcel(Envelope { header, payload });
        let _asked_again = self.client.send(Outgoing::Broadcast(parcel));
    }
}

impl Way for BrokerWay {
    fn path(&self) -> Path {
        Path::Broker
    }

    fn node(&self) -> NodeId {
        NodeId::BROKER
    }

    fn send(&self, call: Envelope) -> Result<(), DropReason> {
        let to = match &call.header.destination {
            Destination::Service(name) => Recipient::Service(name.clone()),
            Destination::Node(node) => Recipient::Node(*node),
            Destination::Topic(_) => return Err(DropReason::NoService),
        };
        let (id, ttl) = (call.header.id, call.header.time_to_live);
        self.client.send(Outgoing::Call(to, id, ttl, self.parcel(call)))
    }

    fn send_event(&self, event: &Publication<'_>) -> Result<Backlog, DropReason> {
        let parcel = self.parcel(event.envelope());
        self.client.send(Outgoing::Publish(event.topic.clone(), parcel)).map(|()| Backlog::Same)
    }

    fn send_event_within<'a>(
        &'a self,
        event: &'a Publication<'_>,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Backlog, DropReason>> {
        let sending = async move {
            match self.client.wait_for_room(event.body.len(), deadline).await {
                true => self.send_event(event),
                false => Err(DropReason::SlowPeer),
            }
        };
        sending.boxed()
    }

    fn take_back(&self, id: MessageId) {
        self.ask(self.core.ids.next_now(), &Ask::Cancel(id.to_bytes()));
    }

    fn give_back(&self, _: Lane, _: Totals) {}

    fn answer(&self, _: Lane, _: Totals, reply: Envelope) -> Result<(), DropReason> {
        let Destination::Node(to) = reply.header.destination else {
            return Err(DropReason::NoService);
        };
        self.client.send(Outgoing::Reply(to, self.parcel(reply)))
    }

    fn report_drop(&self, _: DropReason, _: u64) {}
}
