//! Brokerless messaging: nodes that find each other and exchange messages directly.
//!
//! Each process embeds a [`Node`]. Nodes of one mesh find each other on this host by a folder of
//! Unix sockets, on a LAN by multicast DNS, elsewhere by an address; then they publish,
//! subscribe, send, serve and make requests, with no server between them.
//!
//! ```text
//!    service A                      service B                     service C
//!  ┌───────────┐   publish /      ┌───────────┐    request /    ┌───────────┐
//!  │   Node    │◀─ subscribe ────▶│   Node    │◀── reply ──────▶│   Node    │
//!  └───────────┘                  └───────────┘                 └───────────┘
//!        ▲                                                            ▲
//!        └────────────── one link for each pair of nodes ─────────────┘
//! ```
//!
//! # Example
//!
//! ```
//! use peerbus::{Call, HandlerError, Node};
//!
//! # async fn stock(call: Call) -> Result<String, HandlerError> {
//! #     match call.message.text().as_ref() {
//! #         "apples" => Ok("17".into()),
//! #         other => Err(HandlerError::new("not_found", format!("no {other} here"))),
//! #     }
//! # }
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let mesh = "doctest-lib".parse()?;
//! # let node = Node::builder().mesh(mesh).start().await?;
//! # #[cfg(any())]
//! let node = Node::builder().start().await?;
//!
//! let mut orders = node.subscribe("orders.*")?;
//! let _service = node.serve("stock", stock).start()?;
//!
//! let report = node.publish("orders.new", "3 apples").await?;
//! println!("queued for {} nodes", report.queued);
//! println!("heard: {}", orders.recv().await.unwrap().text());
//!
//! let reply = node.request("stock", "apples").await?;
//! println!("in stock: {}", reply.text());
//! # assert_eq!(reply.text(), "17");
//! node.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What is promised
//!
//! * **No silent loss.** Every send reports its outcome. Every drop is counted, with a reason, at
//!   its sender: [`Node::counters`], [`Event::Dropped`]. Messages in flight when a link broke are
//!   counted as in doubt.
//! * **At most once, in order.** On one link a message is delivered at most once, and messages
//!   of one topic arrive in the order in which they were published. A link that breaks may lose
//!   messages; they are not resent.
//! * **Bounded memory.** Every queue has a limit in bytes. A slow peer loses messages, costs a
//!   fixed amount of memory, and holds up no other peer.
//!
//! An awaited send promises `Queued`: the message is accepted here and on its way. A reply to a
//! [`request`](Node::request) confirms that a handler ran.
//!
//! **Guaranteed messages** ([`builder::Send::guaranteed`], [`builder::Publish::guaranteed`],
//! [`Config::outbox`])
//! promise more, and cost more: awaiting one confirms that it is `Stored`, synced to this node's
//! disk, and [`Receipt::processed`] that the remote handler returned Ok. They are delivered at
//! least once, in order for each key, and duplicates are suppressed while the stores of both sides
//! survive. These are the guaranteed delivery, the durable subscriber and the dead letter channel
//! of Hohpe and Woolf's *Enterprise Integration Patterns*.
//!
//! # Security
//!
//! By default a node connects only to processes of the same user on this host. A mesh key
//! ([`Config::mesh_key`]) or a file of public keys ([`Trust::TrustedKeys`]) admits it to networks,
//! where all traffic is encrypted and both sides are authenticated: TLS 1.3, between the key pairs
//! that are the nodes' ids. [`Trust::Open`] turns that off.

mod address;
mod bridge;
#[cfg_attr(
    not(all(feature = "nats", feature = "rabbitmq")),
    allow(dead_code, reason = "the embedded broker has no use for what the real ones can do")
)]
mod carrier;
mod clock;
mod config;
mod core;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub mod database;
mod delivery_id;
mod discovery;
mod engine;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod identity;
#[doc(hidden)]
pub mod journal;
mod link;
mod message;
mod node;
mod opaque;
mod outbox;
mod peer;
mod private;
mod report;
mod secret;
mod sync;
pub mod text;
mod trust;
mod tunnel;
mod wire;

/// The calls of a [`Node`] before they are made: each has setters, and is then awaited or started.
///
/// They are rarely named. They stand here, so that `use peerbus::*` leaves [`std::marker::Send`]
/// and the rest of the prelude alone.
pub mod builder {
    pub use crate::node::{Consume, Guaranteed, Publish, Request, Send, Serve, Storing};
}

#[doc = include_str!("wire/protocol.md")]
pub mod protocol {}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use address::{
    AddressError, Destination, IntoRecipient, MAX_ADDRESS_LEN, MAX_TOKENS, MeshName, Pattern,
    Recipient, ServiceName, Topic,
};
pub use bridge::{Bridge, BridgeBuilder, BridgeError, Crossed};
pub use carrier::broker::{
    BrokerKind, BrokerReport, BrokerUrl, BrokerUrlError, Credentials, CredentialsError,
    EmbeddedBroker, EmbeddedBrokerError,
};
pub use carrier::mesh::store::{DamagedPart, StoreError, StoreProblem, StoreReport};
pub use carrier::{Capability, DeliveryError, OutboxError, Receipt, Unsupported};
pub use config::Config;
pub use core::{Call, DownCause, Event, Events, HandlerError, NotStored, Reply};
pub use engine::Overflow;
pub use engine::delivery::{DeadLetterReason, Lapse, Target};
pub use identity::{Identity, IdentityError, Incarnation, NodeId, NodeIdError};
pub use journal::Durability;
pub use link::memory::MemoryNetwork;
pub use message::{
    Body, BodyError, DecodeError, EncodeError, Header, Kind, MESSAGEPACK, Message, MessageId,
    MessageIdError,
};
pub use node::{
    Consumer, Node, OutboxSize, PublishError, Publisher, RequestError, SendError, Sent, ServeError,
    Service, ShutdownReport, StartError, SubscribeError, Subscription, Transaction, WaitError,
};
pub use outbox::{ClosedOutbox, InboxReport, StoredMessage};
pub use peer::{Address, ParseAddressError, PeerInfo, ServiceInfo, Source, Unreachable};
pub use report::{Counters, DropReason, PublishReport};
pub use secret::Secret;
pub use trust::{
    Action, MeshKey, MeshKeyError, MeshKeyFileError, ParseRulesError, Rules, RulesError,
    SubjectError, Trust, TrustedKeysError, TrustedLine,
};
pub use tunnel::Latency;

#[cfg(debug_assertions)]
#[doc(hidden)]
pub use sync::holds_lock;
