//! The transactional outbox and inbox in the user's own database.
//!
//! A service that changes its database and sends a message needs both or neither. It inserts the
//! message into a table in the transaction of its change. A relay hands committed messages to the
//! node's outbox, which sends them until they are processed (the *transactional outbox* of
//! Richardson's *Microservices Patterns*). On the receiving side, a handler records the message's
//! sender and id in the transaction of its own change, so that a duplicate changes nothing (Hohpe and Woolf's
//! *idempotent receiver*). With both, effects happen exactly once.
//!
//! ```text
//!  user's transaction            relay                       handler's transaction
//!  ┌────────────────────┐        stores in the node's       ┌─────────────────────┐
//!  │ change             │        outbox, then deletes       │ seen(sender, id)?   │
//!  │ insert ▶ table ────┼──────▶ ──────────── sent ────────▶│ change              │
//!  └────────────────────┘                                   └─────────────────────┘
//! ```
//!
//! A relay that crashes in between hands the message to the outbox again, with the same id, and the
//! outbox stores it once ([`Guaranteed::once`]). The receiver still needs its inbox table, for a
//! handler that was killed before its Ok was stored: its message is redelivered.

#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "sqlite")]
pub mod sqlite;

use std::time::Duration;

use crate::address::{AddressError, Destination, ServiceName, Topic};
use crate::carrier::OutboxError;
use crate::identity::{NodeId, random_u64};
use crate::message::{Body, IdSource, MessageId};
use crate::node::{Guaranteed, Node};

/// The maximum number of messages that a relay takes at once.
const BATCH: i64 = 256;

/// A default for the polling interval of a relay.
pub const DEFAULT_POLL: Duration = Duration::from_millis(100);

/// A message to insert.
///
/// ```
/// use peerbus::database::NewMessage;
/// let charge = NewMessage::to_service("billing", "charge 17")?.key("customer-7");
/// let placed = NewMessage::to_topic("orders.placed", "17 apples")?;
/// # Ok::<(), peerbus::AddressError>(())
/// ```
#[derive(Debug, Clone)]
pub struct NewMessage {
    destination: Destination,
    body: Body,
    key: Option<String>,
}

impl NewMessage {
    /// A message to a service.
    ///
    /// # Errors
    /// [`AddressError`] if the name can't be parsed.
    pub fn to_service(name: &str, body: impl Into<Body>) -> Result<Self, AddressError> {
        let destination = Destination::Service(name.parse()?);
        Ok(Self { destination, body: body.into(), key: None })
    }

    /// A message to a node.
    pub fn to_node(node: NodeId, body: impl Into<Body>) -> Self {
        Self { destination: Destination::Node(node), body: body.into(), key: None }
    }

    /// An event for the durable subscriptions that the relay's node knows at the hand-over.
    ///
    /// # Errors
    /// [`AddressError`] if the topic can't be parsed.
    pub fn to_topic(topic: &str, body: impl Into<Body>) -> Result<Self, AddressError> {
        let destination = Destination::Topic(topic.parse()?);
        Ok(Self { destination, body: body.into(), key: None })
    }

    /// Sets the ordering key: messages with the same key are handled in order.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    fn row(&self) -> Row {
        let (kind, name) = match &self.destination {
            Destination::Topic(topic) => ("topic", topic.to_string()),
            Destination::Service(name) => ("service", name.to_string()),
            Destination::Node(node) => ("node", node.to_string()),
        };
        Row {
            message_id: IdSource::new(random_u64() >> 22).next_now().to_bytes().to_vec(),
            kind: kind.to_owned(),
            name,
            key: self.key.clone(),
            content_type: self.body.content_type.map(str::to_owned),
            body: self.body.bytes.to_vec(),
        }
    }
}

/// A row of the outbox table.
struct Row {
    message_id: Vec<u8>,
    /// `topic`, `service` or `node`.
    kind: String,
    name: String,
    key: Option<String>,
    content_type: Option<String>,
    body: Vec<u8>,
}

/// A row that is not a valid message, or that is too large for this outbox. The relay stops there,
/// so that nothing is lost; the row must be corrected or deleted by hand. The rows before it have
/// been handed over.
#[derive(Debug, thiserror::Error)]
#[error("row {id} of the outbox table is not a message: {problem}; correct or delete the row")]
#[non_exhaustive]
pub struct BadRow {
    /// The row's id.
    pub id: i64,
    /// The fault of the row.
    pub problem: String,
}

impl Row {
    fn id(&self) -> Option<MessageId> {
        Some(MessageId::from_bytes(self.message_id[..].try_into().ok()?))
    }

    fn message<'a>(&self, node: &'a Node, row: i64) -> Result<Guaranteed<'a>, BadRow> {
        let bad = |problem: String| BadRow { id: row, problem };
        let id = self.id().ok_or_else(|| bad("the message id does not have 16 bytes".into()))?;
        let destination = match self.kind.as_str() {
            "topic" => self.name.parse::<Topic>().map(Destination::Topic),
            "service" => self.name.parse::<ServiceName>().map(Destination::Service),
            "node" => match self.name.parse::<NodeId>() {
                Ok(node) => Ok(Destination::Node(node)),
                Err(error) => return Err(bad(error.to_string())),
            },
            other => {
                return Err(bad(format!("the kind {other:?} is none of topic, service and node")));
            }
        };
        let destination = destination.map_err(|error| bad(error.to_string()))?;
        let key = self.key.clone();
        Ok(Guaranteed::stored_elsewhere(
            node,
            id,
            destination,
            self.body.clone(),
            key,
            &self.content_type,
        ))
    }
}

/// Stores as many of the first rows as the node's outbox accepts at once, in one transaction, and
/// returns their number.
async fn hand_over(node: &Node, rows: &[(i64, Row)]) -> Result<usize, RelayError> {
    let mut messages = rows.iter().map(|(id, row)| row.message(node, *id));
    // The rows before a bad row are stored first.
    let mut count = messages.by_ref().take_while(Result::is_ok).count();
    loop {
        let mut transaction = node.transaction();
        for (id, row) in &rows[..count.max(1)] {
            transaction.add(row.message(node, *id)?);
        }
        let error = match transaction.commit().await {
            Ok(_receipts) => return Ok(count),
            Err(error) => error,
        };
        let passes = match &error {
            OutboxError::ShutDown
            | OutboxError::RuntimeEnded
            | OutboxError::NoOutbox
            | OutboxError::Unsupported(_)
            | OutboxError::NotStored(_) => {
                return Err(error.into());
            }
            OutboxError::OutboxFull { messages, .. } => *messages > 0,
            OutboxError::Address(_) | OutboxError::TooLarge(_) => false,
        };
        match count {
            2.. => count /= 2,
            _ if passes => return Err(error.into()),
            _ => return Err(BadRow { id: rows[0].0, problem: error.to_string() }.into()),
        }
    }
}

/// The error with which a relay ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// A row is not a message.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// The node's outbox failed or refused a message.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// SQLite failed.
    #[cfg(feature = "sqlite")]
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL failed.
    #[cfg(feature = "postgres")]
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
}

impl RelayError {
    /// Returns true if the outbox is full, which is temporary.
    fn is_full(&self) -> bool {
        matches!(self, Self::Outbox(OutboxError::OutboxFull { .. }))
    }
}
