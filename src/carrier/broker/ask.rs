//! Questions between nodes over a broker, since a broker does not report which nodes are present.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Asks for the subscribers to that topic.
    Subscribers(String),
    /// Asks for the durable subscriptions to that topic.
    Consumers(String),
    /// Asks for the nodes that serve that name.
    Instances(String),
    /// Cancels that message, at the node that handles it.
    Cancel([u8; 16]),
}
