//! The adapters: one for each kind of broker, with the capabilities that it lacks as data.
//!
//! A new broker needs a kind in `kind.rs`, a file with a [`Session`](super::session::Session), and a
//! line in [`ADAPTERS`].

use std::sync::Arc;

use super::kind::BrokerKind;
use super::session::Connecting;
use super::url::BrokerUrl;
use super::{Incoming, Me};
use crate::carrier::capability::{Capability, Unsupported};

/// Connects to a broker.
pub(super) type Connect =
    for<'a> fn(&'a BrokerUrl, &'a Me, &'a Arc<dyn Incoming>) -> Connecting<'a>;

/// The adapter of one kind of broker in this build.
pub(crate) struct Adapter {
    pub(super) kind: BrokerKind,
    /// The schemes of its URLs, each with its default port.
    pub(super) schemes: &'static [(&'static str, u16)],
    /// The Cargo feature that includes it.
    pub(super) feature: &'static str,
    pub(super) lacks: &'static [Capability],
    /// `None` if this build does not include it.
    pub(super) connect: Option<Connect>,
}

/// All kinds of brokers.
pub(super) static ADAPTERS: &[Adapter] = &[
    Adapter {
        kind: BrokerKind::Embedded,
        schemes: &[("peerbus", 4333)],
        feature: "default",
        lacks: &[
            Capability::Guaranteed,
            Capability::DurableSubscriptions,
            Capability::Transactions,
            Capability::NotBefore,
            Capability::Once,
            Capability::ProcessedReceipts,
            Capability::OrderedServices,
            Capability::HoldBack,
            Capability::PeerCount,
        ],
        connect: Some(super::embedded::connect),
    },
    Adapter {
        kind: BrokerKind::Nats,
        schemes: &[("nats", 4222), ("tls", 4222)],
        feature: "nats",
        lacks: &[
            Capability::Transactions,
            Capability::ProcessedReceipts,
            Capability::OrderedServices,
            Capability::HoldBack,
            Capability::PeerCount,
        ],
        #[cfg(feature = "nats")]
        connect: Some(super::nats::connect),
        #[cfg(not(feature = "nats"))]
        connect: None,
    },
    Adapter {
        kind: BrokerKind::RabbitMq,
        schemes: &[("amqp", 5672), ("amqps", 5671)],
        feature: "rabbitmq",
        lacks: &[
            Capability::Transactions,
            Capability::NotBefore,
            Capability::Once,
            Capability::ProcessedReceipts,
            Capability::OrderedServices,
            Capability::HoldBack,
            Capability::PeerCount,
        ],
        #[cfg(feature = "rabbitmq")]
        connect: Some(super::rabbitmq::connect),
        #[cfg(not(feature = "rabbitmq"))]
        connect: None,
    },
];

impl Adapter {
    pub(super) fn of(kind: BrokerKind) -> &'static Self {
        let found = ADAPTERS.iter().find(|adapter| adapter.kind == kind);
        found.expect("each kind has an adapter, by the test below")
    }

    /// Returns the default port of one of its schemes.
    pub(super) fn port(&self, scheme: &str) -> Option<u16> {
        self.schemes.iter().find(|(own, _)| *own == scheme).map(|(_, port)| *port)
    }

    /// Checks that this kind of broker has an ability.
    ///
    /// # Errors
    /// [`Unsupported`] if it lacks the ability.
    pub(super) fn require(&self, capability: Capability) -> Result<(), Unsupported> {
        match self.lacks.contains(&capability) {
            true => Err(Unsupported { carrier: self.kind.as_str(), capability }),
            false => Ok(()),
        }
    }
}

impl BrokerKind {
    /// Returns true if this build supports it.
    pub fn is_built_in(self) -> bool {
        Adapter::of(self).connect.is_some()
    }

    /// Returns true if brokers of this kind have that ability.
    pub fn has(self, capability: Capability) -> bool {
        !Adapter::of(self).lacks.contains(&capability)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_one_adapter_and_each_scheme_one_kind() {
        for kind in [BrokerKind::Embedded, BrokerKind::Nats, BrokerKind::RabbitMq] {
            assert_eq!(ADAPTERS.iter().filter(|adapter| adapter.kind == kind).count(), 1);
        }
        let schemes = ADAPTERS.iter().flat_map(|adapter| adapter.schemes);
        let mut schemes: Vec<_> = schemes.map(|(scheme, _)| scheme).collect();
        let all = schemes.len();
        schemes.sort_unstable();
        schemes.dedup();
        assert_eq!(schemes.len(), all);
    }
}
