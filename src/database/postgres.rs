//! The outbox and inbox tables in PostgreSQL.
//!
//! ```no_run
//! use peerbus::database::{NewMessage, postgres};
//!
//! # async fn example(mut client: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! postgres::create_tables(&client).await?;
//! let transaction = client.transaction().await?;
//! transaction.execute("INSERT INTO orders VALUES (17)", &[]).await?;
//! postgres::insert(&transaction, &NewMessage::to_service("billing", "charge 17")?).await?;
//! transaction.commit().await?;
//! # Ok(()) }
//! ```

use std::time::Duration;

use tokio_postgres::{Client, GenericClient};

use super::{BATCH, NewMessage, RelayError, Row, hand_over};
use crate::carrier::OutboxError;
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::node::Node;

/// Creates the tables `peerbus_outbox` and `peerbus_inbox`, unless they exist. An inbox from before
/// senders were recorded is converted: a message that it knows counts as seen, whoever sends it.
///
/// # Errors
/// The error of PostgreSQL.
pub async fn create_tables(client: &impl GenericClient) -> Result<(), tokio_postgres::Error> {
    client
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS peerbus_outbox (
                 id BIGSERIAL PRIMARY KEY,
                 message_id BYTEA NOT NULL,
                 kind TEXT NOT NULL,
                 name TEXT NOT NULL,
                 ordering_key TEXT,
                 content_type TEXT,
                 body BYTEA NOT NULL
             );
             CREATE TABLE IF NOT EXISTS peerbus_inbox (
                 consumer TEXT NOT NULL,
                 message_id BYTEA NOT NULL,
                 sender BYTEA NOT NULL DEFAULT '',
                 seen_at TIMESTAMPTZ NOT NULL DEFAULT now(),
                 PRIMARY KEY (consumer, message_id, sender)
             );
             DO $$ BEGIN
                 IF NOT EXISTS (
                     SELECT FROM pg_attribute
                     WHERE attrelid = 'peerbus_inbox'::regclass AND attname = 'sender'
                 ) THEN
                     ALTER TABLE peerbus_inbox
                         ADD COLUMN sender BYTEA NOT NULL DEFAULT '',
                         DROP CONSTRAINT peerbus_inbox_pkey,
                         ADD PRIMARY KEY (consumer, message_id, sender);
                 END IF;
             END $$;",
        )
        .await
}

/// Inserts a message in the user's own transaction; returns its id.
///
/// The order of messages from concurrent transactions is undefined.
///
/// # Errors
/// The error of PostgreSQL.
pub async fn insert(
    transaction: &impl GenericClient,
    message: &NewMessage,
) -> Result<MessageId, tokio_postgres::Error> {
    let row = message.row();
    transaction
        .execute(
            "INSERT INTO peerbus_outbox (message_id, kind, name, ordering_key, content_type, body)
             VALUES ($1, $2, $3, $4, $5, $6)",
            &[&row.message_id, &row.kind, &row.name, &row.key, &row.content_type, &row.body],
        )
        .await?;
    Ok(row.id().expect("it was drawn with 16 bytes"))
}

/// Records that a consumer has seen a message, from this transaction's commit on; returns true if
/// it had seen the message before.
///
/// `consumer` names the handler: a service or a durable subscription. An event has the same id for
/// all of them, and each handles it once. `sender` is the message's `from`: an id can be guessed, so
/// it means something only together with who used it. Over a broker, `from` is a claim.
///
/// A handler that makes its changes in the same transaction makes them once, however often the
/// message is delivered. While another open transaction has just recorded the message, this waits
/// for its end.
///
/// # Errors
/// The error of PostgreSQL.
pub async fn inbox_seen(
    transaction: &impl GenericClient,
    consumer: &str,
    sender: NodeId,
    id: MessageId,
) -> Result<bool, tokio_postgres::Error> {
    let new = transaction
        .execute(
            "INSERT INTO peerbus_inbox (consumer, message_id, sender)
             SELECT $1::text, $2::bytea, $3::bytea WHERE NOT EXISTS (
                 SELECT FROM peerbus_inbox WHERE consumer = $1 AND message_id = $2 AND sender = ''
             ) ON CONFLICT DO NOTHING",
            &[&consumer, &&id.to_bytes()[..], &&sender.as_bytes()[..]],
        )
        .await?;
    Ok(new == 0)
}

/// Forgets the messages seen longer ago than that; returns their number. Later duplicates of them
/// are not recognised.
///
/// # Errors
/// The error of PostgreSQL.
pub async fn forget_seen(
    client: &impl GenericClient,
    longer_ago: Duration,
) -> Result<u64, tokio_postgres::Error> {
    let seconds = longer_ago.as_secs_f64();
    client
        .execute(
            "DELETE FROM peerbus_inbox WHERE seen_at < now() - make_interval(secs => $1)",
            &[&seconds],
        )
        .await
}

/// Hands committed messages to the node's outbox, and polls for more every `poll`, until it fails
/// or the node shuts down. Of several relays on one table one is active, which keeps the order of
/// the messages; another takes over when the connection of the active one ends.
///
/// # Errors
/// [`RelayError`]. A full outbox is retried; a lost connection is an error, after which a new relay
/// continues where this one stopped.
///
/// # Cancel safety
/// Dropping the future loses nothing; the current batch may be handed over again.
pub async fn relay(node: Node, mut client: Client, poll: Duration) -> Result<(), RelayError> {
    let mut leads = false;
    while !node.is_stopping() {
        if !leads {
            leads = client.query_one(LEAD, &[]).await?.try_get(0)?;
        }
        if !leads {
            tokio::time::sleep(poll).await;
            continue;
        }
        match relay_batch(&node, &mut client).await {
            Ok(0) => {}
            Ok(_more) => continue,
            Err(error) if error.is_full() => {}
            Err(RelayError::Outbox(OutboxError::ShutDown)) => return Ok(()),
            Err(error) => return Err(error),
        }
        tokio::time::sleep(poll).await;
    }
    Ok(())
}

/// Takes the session's advisory lock for the table's relay. The high half of the lock's number
/// spells `peer`, the low half is the table's oid.
const LEAD: &str = "SELECT pg_try_advisory_lock((x'70656572'::int::bigint << 32) | 'peerbus_outbox'::regclass::oid::bigint)";

/// Hands over one batch; returns the number of messages.
async fn relay_batch(node: &Node, client: &mut Client) -> Result<usize, RelayError> {
    let transaction = client.transaction().await?;
    let found = transaction
        .query(
            "SELECT id, message_id, kind, name, ordering_key, content_type, body
             FROM peerbus_outbox ORDER BY id LIMIT $1",
            &[&BATCH],
        )
        .await?;
    let mut rows = Vec::new();
    for row in &found {
        let message = Row {
            message_id: row.try_get(1)?,
            kind: row.try_get(2)?,
            name: row.try_get(3)?,
            key: row.try_get(4)?,
            content_type: row.try_get(5)?,
            body: row.try_get(6)?,
        };
        rows.push((row.try_get::<_, i64>(0)?, message));
    }
    if !rows.is_empty() {
        let count = hand_over(node, &rows).await?;
        let ids: Vec<i64> = rows[..count].iter().map(|(id, _)| *id).collect();
        transaction.execute("DELETE FROM peerbus_outbox WHERE id = ANY($1)", &[&ids]).await?;
    }
    transaction.commit().await?;
    Ok(rows.len())
}
