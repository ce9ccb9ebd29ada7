//! The transactional outbox and inbox in a database of the user's own.
//!
//! A service that changes its database and sends a message wants both or none. It
//! inserts the message into a table in the transaction of its change; a relay takes what is
//! committed and hands it to the node's outbox, which sends it until it is processed
//! (the *transactional outbox* of Richardson's *Microservices Patterns*). On the other
//! side a handler notes in the transaction of its own change that it has seen a message, so that
//! one that comes again changes nothing (Hohpe and Woolf's *idempotent receiver*). With both, effects
//! happen exactly once.
//!
//! ```text
//!  user's transaction            relay                       handler's transaction
//!  ┌────────────────────┐        stores in the node's       ┌─────────────────────┐
//!  │ change             │        outbox, then deletes       │ seen(message id)?   │
//!  │ insert ▶ table ────┼──────▶ ──────────── sent ────────▶│ change              │
//!  └────────────────────┘                                   └─────────────────────┘
//! ```
//!
//! A relay that crashes between the two hands a message to the outbox again, with the same id, and
//! that stores it once ([`Guaranteed::once`]). The far side needs the inbox still: for a handler
//! that was killed before its Ok was stored, and whose message comes again.

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

/// How many messages a relay takes at once.
const BATCH: i64 = 256;

/// How often a relay looks for messages when nobody tells it to.
pub const DEFAULT_POLL: Duration = Duration::from_millis(100);

/// A message to be inserted.
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

    /// An event for the durable subscriptions that the relay's node knows when it takes it.
    ///
    /// # Errors
    /// [`AddressError`] if the topic can't be parsed.
    pub fn to_topic(topic: &str, body: impl Into<Body>) -> Result<Self, AddressError> {
        let destination = Destination::Topic(topic.parse()?);
        Ok(Self { destination, body: body.into(), key: None })
    }

    /// Messages with the same key belong in one order.
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

/// A message in the table.
struct Row {
    message_id: Vec<u8>,
    /// `topic`, `service` or `node`.
    kind: String,
    name: String,
    key: Option<String>,
    content_type: Option<String>,
    body: Vec<u8>,
}

/// A row that no message can be made of, or one that no outbox of this size can hold. The relay
/// stops there, so that nothing is lost; somebody has to mend the row or delete it. What was
/// inserted before it has been handed over.
#[derive(Debug, thiserror::Error)]
#[error("row {id} of the outbox table is no message: {problem}")]
#[non_exhaustive]
pub struct BadRow {
    /// The row's id.
    pub id: i64,
    /// What is wrong with it.
    pub problem: String,
}

impl Row {
    fn id(&self) -> Option<MessageId> {
        Some(MessageId::from_bytes(self.message_id[..].try_into().ok()?))
    }

    fn message<'a>(&self, node: &'a Node, row: i64) -> Result<Guaranteed<'a>, BadRow> {
        let bad = |problem: String| BadRow { id: row, problem };
        let id = self.id().ok_or_else(|| bad("the message id has not 16 bytes".into()))?;
        let destination = match self.kind.as_str() {
            "topic" => self.name.parse::<Topic>().map(Destination::Topic),
            "service" => self.name.parse::<ServiceName>().map(Destination::Service),
            "node" => match self.name.parse::<NodeId>() {
                Ok(node) => Ok(Destination::Node(node)),
                Err(error) => return Err(bad(error.to_string())),
            },
            other => return Err(bad(format!("its kind is {other:?}"))),
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

/// Stores messages in a node's outbox, in one transaction: as many of the first as it takes at
/// once, and how many those are.
async fn hand_over(node: &Node, rows: &[(i64, Row)]) -> Result<usize, RelayError> {
    let mut messages = rows.iter().map(|(id, row)| row.message(node, *id));
    // What comes before a bad row goes ahead.
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

/// A relay that can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// A row is no message.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// The node's outbox refuses.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// SQLite refuses.
    #[cfg(feature = "sqlite")]
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL refuses.
    #[cfg(feature = "postgres")]
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
}

impl RelayError {
    /// Whether it is the outbox that is full, which passes.
    fn is_full(&self) -> bool {
        matches!(self, Self::Outbox(OutboxError::OutboxFull { .. }))
    }
}
