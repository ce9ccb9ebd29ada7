//! A test's nodes, over every carrier of messages: the mesh, or a broker.
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::sync::atomic::{AtomicUsize, Ordering};

use peerbus::{Call, Config, EmbeddedBroker, HandlerError, Node};
use tokio::sync::mpsc;

use crate::common::Host;

/// The carrier of a test's messages.
pub(crate) enum Carrier {
    Mesh,
    Embedded(EmbeddedBroker),
    /// The address of the broker.
    Real(String),
}

pub(crate) struct World {
    pub(crate) host: Host,
    pub(crate) mesh: String,
    pub(crate) carrier: Carrier,
}

impl World {
    pub(crate) fn new(carrier: Carrier) -> Self {
        // Tests share a broker, and meshes on one broker are separate.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mesh = format!("t{}-{number}", std::process::id());
        Self { host: Host::new(), mesh, carrier }
    }

    pub(crate) async fn mesh() -> Option<Self> {
        Some(Self::new(Carrier::Mesh))
    }

    pub(crate) async fn embedded() -> Option<Self> {
        let broker = EmbeddedBroker::start("127.0.0.1:0".parse().unwrap()).await.unwrap();
        Some(Self::new(Carrier::Embedded(broker)))
    }

    #[cfg(feature = "nats")]
    pub(crate) async fn nats() -> Option<Self> {
        Self::real("PEERBUS_NATS")
    }

    #[cfg(feature = "rabbitmq")]
    pub(crate) async fn rabbitmq() -> Option<Self> {
        Self::real("PEERBUS_RABBITMQ")
    }

    #[cfg(feature = "nats")]
    pub(crate) async fn nats_over_tls() -> Option<Self> {
        Self::real("PEERBUS_NATS_TLS")
    }

    #[cfg(feature = "rabbitmq")]
    pub(crate) async fn rabbitmq_over_tls() -> Option<Self> {
        Self::real("PEERBUS_RABBITMQ_TLS")
    }

    #[cfg(any(feature = "nats", feature = "rabbitmq"))]
    pub(crate) fn real(variable: &str) -> Option<Self> {
        match std::env::var(variable) {
            Ok(url) => Some(Self::new(Carrier::Real(url))),
            Err(_) => {
                println!("SKIPPED: {variable} is not set (./brokers run cargo test …)");
                None
            }
        }
    }

    pub(crate) fn config(&self, name: &str) -> Config {
        let config = self.host.config(name).mesh(self.mesh.parse().unwrap());
        let Some(url) = self.url() else { return config };
        match (self.is_encrypted(), std::env::var("PEERBUS_BROKER_CA")) {
            (true, Ok(ca)) => config.broker(url).broker_ca(ca),
            _ => config.broker(url),
        }
    }

    fn is_encrypted(&self) -> bool {
        self.url().is_some_and(|url| url.starts_with("tls://") || url.starts_with("amqps://"))
    }

    pub(crate) fn url(&self) -> Option<String> {
        match &self.carrier {
            Carrier::Mesh => None,
            Carrier::Embedded(broker) => Some(broker.url()),
            Carrier::Real(url) => Some(url.clone()),
        }
    }

    pub(crate) async fn node(&self, name: &str) -> Node {
        self.config(name).start().await.unwrap()
    }

    /// A node that can send and receive guaranteed messages, and restarts as the same node.
    pub(crate) async fn durable(&self, name: &str) -> Node {
        self.durable_config(name).start().await.unwrap()
    }

    pub(crate) fn durable_config(&self, name: &str) -> Config {
        let path = self.host.path().join(name);
        let config = self.config(name);
        match self.carrier {
            Carrier::Mesh => config.outbox(path),
            Carrier::Embedded(_) | Carrier::Real(_) => config.identity(path),
        }
    }

    pub(crate) fn is_mesh(&self) -> bool {
        matches!(self.carrier, Carrier::Mesh)
    }
}

/// A handler that passes its messages on to the test.
pub(crate) fn collect() -> (
    impl Fn(Call) -> std::future::Ready<Result<(), HandlerError>> + Send + Sync + 'static,
    mpsc::UnboundedReceiver<peerbus::Message>,
) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let handler = move |call: Call| {
        sender.send(call.message).unwrap();
        std::future::ready(Ok(()))
    };
    (handler, receiver)
}
