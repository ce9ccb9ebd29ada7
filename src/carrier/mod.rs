//! The carriers of a node's messages: a mesh of its own links, or a broker.
//!
//! ```text
//!   node/ ── a dozen verbs ──▶ dyn Carrier ─┬─ mesh/     links, discovery, outbox and inbox
//!                                           └─ broker/   one connection, one adapter a broker
//! ```
//!
//! A carrier passes received messages to the node's [`Core`](crate::core::Core), and declares as
//! data which abilities it lacks ([`Capability`]). Only `node/start.rs` knows the carriers apart.

pub(crate) mod broker;
mod capability;
mod guaranteed;
pub(crate) mod mesh;
mod seam;

pub use capability::{Capability, Unsupported};
pub use guaranteed::{DeliveryError, OutboxError, Receipt};
pub(crate) use guaranteed::{NewGuaranteed, Submission};
pub(crate) use seam::{CannotKeep, Carrier, Choice, Condition, NotMet, Wish, WishEnd};
