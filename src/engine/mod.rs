//! The engine: every decision of a node, with no I/O and no clock.
//!
//! The engine receives inputs and the time (`handle_*`), and returns what to do (`poll_*`). The
//! shell (`core/` and `carrier/mesh/`) carries that out over real links, the simulator in `sim/`
//! over simulated ones.
//!
//! ```text
//!             used rarely                       used for every message
//!  ┌──────────────────────────────┐   ┌──────────────────────────────────────────┐
//!  │ Mesh: peers, their patterns  │──▶│ Routing: an immutable snapshot           │
//!  │ and services, dials          │   │ Flow: one a link: queues, credit         │
//!  ├──────────────────────────────┤   │ SubscriptionQueue: one a subscription    │
//!  │ Outbox, Inbox: guaranteed    │   │ Front: calls, requests, permission       │
//!  │ messages                     │   │ choose(): one among several instances    │
//!  └──────────────────────────────┘   └──────────────────────────────────────────┘
//! ```

mod bucket;
mod budget;
mod choice;
pub(crate) mod delivery;
mod dialer;
mod flow;
mod front;
mod mesh;
mod queue;
mod random;
mod routing;
#[cfg(test)]
mod sim;
mod subscription;
mod turns;

pub(crate) use bucket::{Bucket, Rate};
pub(crate) use budget::{Budget, Share};
pub(crate) use choice::{Affinity, Candidate, choose};
pub(crate) use dialer::{MAX_ADDRESSES, Sighting, TargetKey};
pub(crate) use flow::{Backlog, Flow, LinkLoss, Liveness, Timing, Violation};
pub(crate) use front::{
    Effect, Ended, Front, FrontLimits, Host, Incoming, OutOfTurn, ReceivedControl, ReceivedMessage,
    Reply, RequestOutcome, Run, ServiceNumber, Settlement, incoming, may_publish,
};
pub(crate) use mesh::{
    Action, Connection, DownReason, MAX_ANNOUNCED, Mesh, MeshConfig, MeshEvent, Origin, TooMany,
};
pub(crate) use queue::Queue;
pub(crate) use routing::{Instance, PatternTrie, RouteChange, Routing};
pub use subscription::Overflow;
pub(crate) use subscription::{
    Delivered, EventBatch, EventBatchBuilder, EventSink, Lost, SubscriptionQueue, deliver,
};

use std::ops::Add;
use std::time::Duration;

use foldhash::fast::RandomState;

/// A map with a fast hash, for keys that this node draws, or of which credit allows few. Its seed
/// is random, but an observer of this process could in time find keys that collide.
pub(crate) type HashMap<K, V> = std::collections::HashMap<K, V, RandomState>;

/// The number of entries of an ended link that are forgotten at once. A peer may have left tens of
/// thousands, and all others wait meanwhile.
const FORGOTTEN_AT_ONCE: usize = 64;

/// A point in time, measured from the engine's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Time(Duration);

impl Time {
    pub(crate) const fn after_start(elapsed: Duration) -> Self {
        Self(elapsed)
    }

    pub(crate) fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn since_start(self) -> Duration {
        self.0
    }
}

impl Add<Duration> for Time {
    type Output = Self;
    fn add(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }
}

/// The number of a connection, from its first byte to its end; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// The path between this node and the other end of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Path {
    /// Within this node.
    Local,
    Link(LinkId),
    /// Through the broker.
    Broker,
}
