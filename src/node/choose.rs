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
                let Some(here) = self.service(name) else {
                    return self.choose_among(there);
                };
                // This node is one competitor among the others.
                let local = (here.running() as u64, here.concurrency);
                let best = self.choose_among(there);
                match best {
                    Some(Chosen::There(cell)) => {
                        let of =
                            there.iter().find(|instance| instance.peer == cell.peer)?.concurrency;
                        let load = cell.unfinished_calls();
                        let here_is_freer = local.0 * u64::from(of) <= load * u64::from(local.1);
                        let tie = local.0 == 0 && load == 0;
                        let turn =
                            self.turn.load(Ordering::Relaxed).is_multiple_of(there.len() + 1);
                        let here = if tie { turn } else { here_is_freer };
                        Some(if here { Chosen::Here } else { Chosen::There(cell) })
                    }
                    _ => Some(Chosen::Here),
                }
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
    ) -> Result<(), DropReason> {
        match to {
            Chosen::There(cell) => {
                cell.send_message(Envelope { header, payload: Payload::Call(body.bytes) })?;
                add(&self.counters.queued, 1);
            }
            Chosen::Here => self.admit(Message { from: self.id, header, body: body.bytes }, None),
        }
        Ok(())
    }
}
