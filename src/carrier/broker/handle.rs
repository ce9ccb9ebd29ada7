//! The broker as the node sees it: the verbs of the seam.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{self, BoxFuture};
use smallvec::SmallVec;
use tokio::time::Instant;

use super::ask::Ask;
use super::carrier::BrokerCarrier;
use super::client::State;
use crate::address::{Recipient, Topic};
use crate::carrier::{
    CannotKeep, Capability, Carrier, Choice, Condition, NewGuaranteed, NotMet, OutboxError,
    Submission, Unsupported, Wish, WishEnd,
};
use crate::core::Way;
use crate::engine::TooMany;
use crate::identity::NodeId;
use crate::peer::{PeerInfo, Source, Unreachable};

/// The carrier, as the node owns it.
pub(crate) struct BrokerHandle(pub(crate) Arc<BrokerCarrier>);

impl Carrier for BrokerHandle {
    fn require(&self, capability: Capability) -> Result<(), Unsupported> {
        self.0.client().url().adapter().require(capability)
    }

    fn check_store(&self) -> Result<(), CannotKeep> {
        self.require(Capability::Guaranteed).map_err(CannotKeep::Unsupported)
    }

    fn check_consumer(&self) -> Result<(), CannotKeep> {
        self.require(Capability::DurableSubscriptions).map_err(CannotKeep::Unsupported)?;
        // The broker identifies a durable subscription by the node's id.
        match self.0.core.config.identity {
            Some(_) => Ok(()),
            None => Err(CannotKeep::NoIdentity),
        }
    }

    fn wish(&self, wish: Wish) -> Result<(), TooMany> {
        self.0.client().wish(wish);
        Ok(())
    }

    fn end_wish(&self, wish: Wish, end: WishEnd) {
        self.0.client().end_wish(wish, end);
    }

    /// Passes the one way to the broker, which delivers to this node's own subscriptions too.
    fn subscribers(&self, _: &Topic, each: &mut dyn FnMut(&Arc<dyn Way>)) -> bool {
        each(&self.0.way());
        false
    }

    fn choose(&self, _: &Recipient, _: Option<&str>) -> Choice {
        match self.0.client().is_up() {
            true => Choice::Found(self.0.way()),
            false => Choice::Later { otherwise: Some(self.0.way()) },
        }
    }

    fn store(&self, messages: SmallVec<[NewGuaranteed; 1]>) -> Result<Submission, OutboxError> {
        let mut messages = messages.into_iter();
        match (messages.next(), messages.next()) {
            (Some(only), None) => {
                let storing = self.0.clone().store_one(only);
                Ok(Submission::ToBroker(Box::pin(storing)))
            }
            _ => Err(self
                .require(Capability::Transactions)
                .err()
                .map_or(OutboxError::NoOutbox, OutboxError::Unsupported)),
        }
    }

    fn wait<'a>(
        &'a self,
        condition: Condition,
        within: Duration,
    ) -> BoxFuture<'a, Result<(), NotMet>> {
        let (ask, count) = match condition {
            Condition::Subscribers(topic, n) => (Ask::Subscribers(topic.to_string()), n),
            Condition::Consumers(topic, n) | Condition::PresentConsumers(topic, n) => {
                (Ask::Consumers(topic.to_string()), n)
            }
            Condition::Instances(name, n) => (Ask::Instances(name.to_string()), n),
            Condition::Peers(0) => return future::ready(Ok(())).boxed(),
            Condition::Peers(1) => {
                let up = self.0.client().wait_until_up(Instant::now() + within);
                return up.map(|up| if up { Ok(()) } else { Err(NotMet::TimedOut) }).boxed();
            }
            Condition::Peers(_) => {
                let lacks = self.require(Capability::PeerCount);
                return future::ready(lacks.map_err(NotMet::Unsupported)).boxed();
            }
        };
        let waiting = async move {
            match self.0.wait_for_answers(&ask, count, within).await {
                true => Ok(()),
                false => Err(NotMet::TimedOut),
            }
        };
        waiting.boxed()
    }

    /// Returns the broker, as the only peer of this node.
    fn peers(&self) -> Vec<PeerInfo> {
        match self.0.client().state() {
            State::Up { title } => vec![self.0.info(title)],
            State::Down { .. } | State::Closed => Vec::new(),
        }
    }

    fn unreachable(&self) -> Vec<Unreachable> {
        let State::Down { error } = self.0.client().state() else { return Vec::new() };
        vec![Unreachable {
            address: self.0.address(),
            id: Some(NodeId::BROKER),
            source: Source::Fixed,
            failures: 1,
            last_error: error,
        }]
    }

    fn queued_bytes(&self, peer: &NodeId) -> u64 {
        match *peer == NodeId::BROKER {
            true => self.0.client().queued_bytes(),
            false => 0,
        }
    }

    fn stop_linking(&self) {}

    fn settle(&self) -> BoxFuture<'_, ()> {
        future::ready(()).boxed()
    }

    fn close(&self, deadline: Instant) -> BoxFuture<'_, u64> {
        let closing = async move {
            self.0.client().close(deadline).await;
            self.0.core.end_tasks().await;
            0
        };
        closing.boxed()
    }

    fn abandon(&self) {
        self.0.client().abandon();
    }
}
