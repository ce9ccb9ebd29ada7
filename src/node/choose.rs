//! Competing consumers: who takes a call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::timeout;

use super::cell::LinkCell;
use super::counters::add;
use super::shared::Shared;
use crate::address::{Recipient, ServiceName};
use crate::engine::{Instance, least_loaded};
use crate::identity::NodeId;
use crate::message::{Body, Header, Message};
use crate::report::DropReason;
use crate::wire::{Envelope, Payload};

/// Who was chosen to take a call.
pub(super) enum Chosen {
    Here,
    There(Arc<LinkCell>),
}

impl Chosen {
    pub(super) fn link(&self) -> Option<crate::engine::LinkId> {
        match self {
            Self::Here => None,
            Self::There(cell) => Some(cell.id),
        }
    }

    pub(super) fn node(&self, shared: &Shared) -> NodeId {
        match self {
            Self::Here => shared.id,
            Self::There(cell) => cell.peer,
        }
    }
}

impl Shared {
    /// Chooses who takes a call; waits for the grace if nobody does.
    pub(super) async fn find(&self, recipient: &Recipient) -> Option<Chosen> {
        if let Some(chosen) = self.choose(recipient) {
            return Some(chosen);
        }
        if self.config.fail_fast && self.routing.load().peers() > 0 {
            return None;
        }
        let mut changes = self.routing_version.subscribe();
        let found = async {
            loop {
                if let Some(chosen) = self.choose(recipient) {
                    return chosen;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        timeout(self.config.service_grace, found).await.ok()
    }

    fn choose(&self, recipient: &Recipient) -> Option<Chosen> {
        let routing = self.routing.load();
        match recipient {
            Recipient::Node(node) if *node == self.id => {
                self.service(&ServiceName::node_inbox()).map(|_| Chosen::Here)
            }
            Recipient::Node(node) => {
                let inbox = routing.instances(&ServiceName::node_inbox());
                let instance = inbox.iter().find(|instance| instance.peer == *node)?;
                instance.link.clone().map(Chosen::There)
            }
            Recipient::Service(name) => {
                let there = routing.instances(name);
                let here = self.service(name);
                let here = here.and_then(|here| Some((here.load()? as u64, here.concurrency)));
                let best = self.choose_among(there);
                let (Some(here), Some(Chosen::There(cell))) = (here, &best) else {
                    return here.map_or(best, |_| Some(Chosen::Here));
                };
                // This node is one competitor among the others.
                let of = there.iter().find(|instance| instance.peer == cell.peer)?.concurrency;
                let load = cell.unfinished_calls();
                let takes_it = if (here.0, load) == (0, 0) {
                    self.turn.load(Ordering::Relaxed).is_multiple_of(there.len() + 1)
                } else {
                    here.0 * u64::from(of) <= load * u64::from(here.1)
                };
                if takes_it { Some(Chosen::Here) } else { best }
            }
        }
    }

    fn choose_among(&self, instances: &[Instance<Option<Arc<LinkCell>>>]) -> Option<Chosen> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if let [only] = instances {
            return only.link.clone().map(Chosen::There);
        }
        let chosen = least_loaded(instances, turn, |instance| {
            let load = instance.link.as_ref().map(|cell| cell.unfinished_calls());
            (load.unwrap_or(u64::from(u32::MAX)), instance.concurrency)
        });
        chosen?.link.clone().map(Chosen::There)
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
