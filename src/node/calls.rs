//! Outgoing calls: one-way messages and requests.

use std::sync::Arc;

use tokio::time::timeout;

use super::Inner;
use crate::address::Recipient;
use crate::carrier::{Capability, Choice, Unsupported};
use crate::core::{Way, add};
use crate::engine::Path;
use crate::message::{Body, Header};
use crate::report::DropReason;
use crate::wire::{Envelope, Payload};

impl Inner {
    /// Checks that the carrier keeps the order of keyed calls, if there is a key.
    pub(super) fn check_key(&self, key: Option<&str>) -> Result<(), Unsupported> {
        match key {
            Some(_) => self.carrier.require(Capability::OrderedServices),
            None => Ok(()),
        }
    }

    /// Chooses the instance that takes a call. Waits up to the grace period if there is none yet.
    pub(super) async fn find(
        &self,
        recipient: &Recipient,
        key: Option<&str>,
    ) -> Option<Arc<dyn Way>> {
        let otherwise = match self.carrier.choose(recipient, key) {
            Choice::Found(way) => return Some(way),
            Choice::Nobody => return None,
            Choice::Later { otherwise } => otherwise,
        };
        let mut changes = self.core.routes.subscribe();
        let found = async {
            loop {
                if let Choice::Found(way) = self.carrier.choose(recipient, key) {
                    return way;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        timeout(self.core.config.service_grace, found).await.ok().or(otherwise)
    }

    /// Queues a call on its way, and counts it or its drop.
    pub(super) fn hand_over(
        &self,
        way: &Arc<dyn Way>,
        header: Header,
        body: Body,
        wants_reply: bool,
    ) -> Result<(), DropReason> {
        let payload = match wants_reply {
            true => Payload::Request(body.bytes),
            false => Payload::Call(body.bytes),
        };
        let reporter = &self.core.reporter;
        match way.send(Envelope { header, payload }) {
            Ok(()) if way.path() == Path::Local => Ok(()),
            Ok(()) => {
                add(&reporter.counters.queued, 1);
                Ok(())
            }
            Err(reason) => {
                reporter.count_drop(way.node(), reason, 1);
                Err(reason)
            }
        }
    }
}
