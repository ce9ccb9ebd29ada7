//! The client over a node, on the mesh or a broker.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use peerbus::{
    Address, Call, Config, Consumer, HandlerError, Node, Overflow, Publisher, Service, Trust,
};
use tokio::task::unconstrained;

use super::{Note, PATIENCE, SERVICE, TOPIC};
use crate::bench::tradeoff::actor::Part;
use crate::bench::tradeoff::workload::Pattern;

const SUBSCRIPTION: &str = "bench";
/// The time limit for the receivers to appear.
const MEETING: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub(in super::super) struct Client {
    node: Node,
    pattern: Pattern,
    guaranteed: bool,
    /// The overflow of a subscription; only a mesh can hold back publishers.
    overflow: Overflow,
    /// The running service or consumer.
    serving: Arc<Mutex<Option<Serving>>>,
}

#[expect(dead_code, reason = "it serves until it is dropped")]
enum Serving {
    Service(Service),
    Consumer(Consumer),
}

impl Client {
    pub(super) async fn connect(part: &Part) -> anyhow::Result<Self> {
        let config = Node::builder()
            .mesh(part.mesh.parse()?)
            .runtime_dir(&part.runtime)
            .request_deadline(PATIENCE)
            // A node that receives at full speed must not lose messages to its own queue.
            .subscription_queue(256 * 1024 * 1024);
        let (config, overflow) = match &part.broker {
            Some(url) => (over_broker(part, config, url), Overflow::DropNewest),
            None => (over_mesh(part, config), Overflow::HoldBack),
        };
        Ok(Self {
            node: config.start().await?,
            pattern: part.pattern,
            guaranteed: part.guaranteed,
            overflow,
            serving: Arc::default(),
        })
    }

    pub(super) async fn receive(&self, note: Note) -> anyhow::Result<Option<SocketAddr>> {
        let noting = note.clone();
        let handler = move |call: Call| {
            noting(&call.message.body);
            let reply = if call.wants_reply() { call.message.body } else { Bytes::new() };
            std::future::ready(Ok::<_, HandlerError>(reply))
        };
        let serving = match (self.pattern, self.guaranteed) {
            (Pattern::Publish, false) => {
                let mut events = self.node.subscribe_with(TOPIC, self.overflow)?;
                tokio::spawn(unconstrained(async move {
                    while let Some(message) = events.recv().await {
                        note(&message.body);
                    }
                }));
                None
            }
            (Pattern::Publish, true) => {
                Some(Serving::Consumer(self.node.consume(SUBSCRIPTION, TOPIC, handler).start()?))
            }
            (Pattern::Work | Pattern::Request, _) => {
                Some(Serving::Service(self.node.serve(SERVICE, handler).start()?))
            }
        };
        *self.serving.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = serving;
        Ok(self.node.listening().first().copied())
    }

    pub(super) async fn meet(&self, receivers: usize) -> anyhow::Result<()> {
        match (self.pattern, self.guaranteed) {
            (Pattern::Publish, true) => {
                self.node.wait_for_consumers(TOPIC, receivers, MEETING).await
            }
            (Pattern::Publish, false) => {
                self.node.wait_for_subscribers(TOPIC, receivers, MEETING).await
            }
            (Pattern::Work | Pattern::Request, _) => {
                self.node.wait_for_instances(SERVICE, receivers, MEETING).await
            }
        }
        .context("the receivers were not found")
    }

    pub(super) fn publisher(&self) -> anyhow::Result<Publisher> {
        Ok(self.node.publisher(TOPIC)?)
    }

    pub(super) async fn send(&self, body: Vec<u8>) -> anyhow::Result<()> {
        match (self.pattern, self.guaranteed) {
            (Pattern::Publish, _) => {
                self.node.publish(TOPIC, body).guaranteed().await?;
            }
            (Pattern::Work, true) => {
                self.node.send(SERVICE, body).guaranteed().await?;
            }
            (Pattern::Work, false) => {
                self.node.send(SERVICE, body).await?;
            }
            (Pattern::Request, _) => {
                self.node.request(SERVICE, body).deadline(PATIENCE).await?;
            }
        }
        Ok(())
    }

    pub(super) fn told(&self) -> u64 {
        let counters = self.node.counters();
        counters.dropped_total() + counters.in_doubt
    }

    pub(super) async fn close(self) {
        drop(self.serving.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
        self.node.shutdown_within(Duration::from_secs(1)).await;
    }
}

fn over_broker(part: &Part, config: Config, url: &str) -> Config {
    let config = config.broker(url).identity(part.dir.join("identity"));
    match part.ca() {
        Some(ca) => config.broker_ca(ca),
        None => config,
    }
}

fn over_mesh(part: &Part, config: Config) -> Config {
    let trust = match part.tls {
        true => Trust::ThisHost,
        false => Trust::Open { anywhere: false },
    };
    let config = config.trust(trust).local(false).mdns(false).gossip(false);
    let config = part.listen.into_iter().fold(config, Config::listen);
    let config = part.peers.iter().map(|addr| Address::Tcp(*addr)).fold(config, Config::peer);
    match part.guaranteed {
        true => config.outbox(part.dir.join("store")).outbox_messages(10_000_000),
        false => config,
    }
}
