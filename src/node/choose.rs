//! Competing consumers: who takes a call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;
use tokio::time::{Instant, timeout};

use super::broker::BROKER;
use super::counters::add;
use super::peer_link::PeerLink;
use super::service_runner::ServiceRunner;
use super::shared::Shared;
use crate::address::{Recipient, ServiceName};
use crate::engine::{Instance, least_loaded, preferred};
use crate::identity::NodeId;
use crate::message::{Body, Header, Message};
use crate::report::DropReason;
use crate::sync::lock;
use crate::wire::{Envelope, Payload};

/// Who was chosen to take a call.
pub(super) enum Chosen {
    Here,
    There(Arc<PeerLink>),
    /// The broker chooses.
    Broker,
}

impl Chosen {
    pub(super) fn link(&self) -> Option<crate::engine::LinkId> {
        match self {
            Self::Here => None,
            Self::There(cell) => Some(cell.id),
            Self::Broker => Some(BROKER),
        }
    }

    pub(super) fn node(&self, shared: &Shared) -> NodeId {
        match self {
            Self::Here => shared.id,
            Self::There(cell) => cell.peer,
            Self::Broker => NodeId::BROKER,
        }
    }
}

/// One of the nodes that could take a call.
enum Candidate<'a> {
    Here(Arc<ServiceRunner>),
    There(&'a Instance<Arc<PeerLink>>),
}

impl Candidate<'_> {
    fn node(&self, shared: &Shared) -> NodeId {
        match self {
            Self::Here(_) => shared.id,
            Self::There(instance) => instance.peer,
        }
    }

    /// Its unfinished calls, and how many it runs at once.
    fn load(&self) -> (u64, u32) {
        match self {
            Self::Here(service) => {
                let load = service.load().map_or(u64::from(u32::MAX), |load| load as u64);
                (load, service.concurrency)
            }
            Self::There(instance) => (instance.link.unfinished_calls(), instance.concurrency),
        }
    }
}

impl Shared {
    /// Chooses who takes a call; waits for the grace if nobody does.
    pub(super) async fn find(
        &self,
        recipient: &Recipient,
        ordering_key: Option<&str>,
    ) -> Option<Chosen> {
        if let Some(broker) = self.broker() {
            broker.client.wait_until_up(Instant::now() + self.config.service_grace).await;
            return Some(Chosen::Broker);
        }
        let choose = || self.choose(recipient, ordering_key);
        if let Some(chosen) = choose() {
            return Some(chosen);
        }
        if self.config.fail_fast && self.routing.load().peers() > 0 {
            return None;
        }
        let mut changes = self.routes_changed.subscribe();
        let found = async {
            loop {
                if let Some(chosen) = choose() {
                    return chosen;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        timeout(self.config.service_grace, found).await.ok()
    }

    fn choose(&self, recipient: &Recipient, ordering_key: Option<&str>) -> Option<Chosen> {
        let routing = self.routing.load();
        match recipient {
            Recipient::Node(node) => {
                let inbox = ServiceName::node_inbox();
                if *node == self.id {
                    return self.service(&inbox).map(|_| Chosen::Here);
                }
                let instance = routing.instance(&inbox, node)?;
                Some(Chosen::There(instance.link.clone()))
            }
            Recipient::Service(name) => {
                let here = self.service(name).filter(|service| service.load().is_some());
                let there = routing.instances(name).map(Candidate::There);
                // This node is one competitor among the others.
                let all: SmallVec<[_; 4]> = there.chain(here.map(Candidate::Here)).collect();
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                let chosen = match (&all[..], ordering_key) {
                    (all, Some(key)) => {
                        let chosen = preferred(all, key, |candidate| candidate.node(self))?;
                        self.note_taker(name, key, chosen.node(self));
                        chosen
                    }
                    ([only], None) => only,
                    (all, None) => least_loaded(all, turn, Candidate::load)?,
                };
                Some(match chosen {
                    Candidate::Here(_) => Chosen::Here,
                    Candidate::There(instance) => Chosen::There(instance.link.clone()),
                })
            }
        }
    }

    /// Counts and tells it when a key's messages go to another instance than before.
    fn note_taker(&self, service: &ServiceName, key: &str, taker: NodeId) {
        let moved_from = lock(&self.affinity).note(service, key, taker);
        if let Some(from) = moved_from
            && self.counters.moved(service, from, taker)
        {
            self.unreported.notify_one();
        }
    }

    pub(super) fn hand_over(
        self: &Arc<Self>,
        to: &Chosen,
        header: Header,
        body: Body,
        wants_reply: bool,
    ) -> Result<(), DropReason> {
        match to {
            Chosen::There(cell) => {
                let payload = match wants_reply {
                    true => Payload::Request(body.bytes),
                    false => Payload::Call(body.bytes),
                };
                cell.send_message(Envelope { header, payload })?;
                add(&self.counters.queued, 1);
            }
            Chosen::Broker => {
                let broker = self.broker().ok_or(DropReason::LinkLost)?;
                self.call_by_broker(broker, header, body, wants_reply)?;
            }
            Chosen::Here => {
                let held = self.local_bytes.load(Ordering::Relaxed);
                if held > 0 && held + body.len() as u64 > self.config.send_queue {
                    return Err(DropReason::SlowPeer);
                }
                let mut message = Message::new(self.id, header, body.bytes);
                message.wants_reply = wants_reply;
                self.admit(message, None);
            }
        }
        Ok(())
    }
}
