//! Questions that nodes ask each other over a broker, since a broker reports nobody's presence.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Asks for the subscribers to that topic.
    Subscribers(String),
    /// Asks for the durable subscriptions to that topic.
    Consumers(String),
    /// Asks for the nodes that serve that name.
    Instances(String),
    /// Tells the node that handles that message that its sender no longer wants it.
    Cancel([u8; 16]),
}
