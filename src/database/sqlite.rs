//! The outbox and inbox tables in SQLite.
//!
//! ```no_run
//! use peerbus::database::{NewMessage, sqlite};
//!
//! # fn example(mut connection: rusqlite::Connection) -> Result<(), Box<dyn std::error::Error>> {
//! sqlite::create_tables(&connection)?;
//! let transaction = connection.transaction()?;
//! transaction.execute("INSERT INTO orders VALUES (17)", [])?;
//! sqlite::insert(&transaction, &NewMessage::to_service("billing", "charge 17")?)?;
//! transaction.commit()?;
//! # Ok(()) }
//! ```

use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, params};
use tokio::task::JoinError;

use super::{BATCH, NewMessage, RelayError, Row, hand_over};
use crate::identity::NodeId;
use crate::message::MessageId;
use crate::node::Node;

/// Creates the tables `peerbus_outbox` and `peerbus_inbox`, unless they exist. An inbox from before
/// senders were recorded is converted: a message that it knows counts as seen, whoever sends it.
///
/// # Errors
/// The error of SQLite.
pub fn create_tables(connection: &Connection) -> rusqlite::Result<()> {
    let is_old = "SELECT count(*) > 0 AND sum(name = 'sender') = 0
                  FROM pragma_table_info('peerbus_inbox')";
    if connection.query_row(is_old, [], |row| row.get(0))? {
        connection.execute_batch(CONVERT_INBOX)?;
    }
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS peerbus_outbox (
             id INTEGER PRIMARY KEY AUTOINCREMENT,
             message_id BLOB NOT NULL,
             kind TEXT NOT NULL,
             name TEXT NOT NULL,
             ordering_key TEXT,
             content_type TEXT,
             body BLOB NOT NULL
         );
         CREATE TABLE IF NOT EXISTS peerbus_inbox (
             consumer TEXT NOT NULL,
             message_id BLOB NOT NULL,
             sender BLOB NOT NULL,
             seen_at INTEGER NOT NULL,
             PRIMARY KEY (consumer, message_id, sender)
         ) WITHOUT ROWID;",
    )
}

/// Gives each row an empty sender. SQLite can't change a primary key.
const CONVERT_INBOX: &str = "
    SAVEPOINT peerbus_inbox;
    ALTER TABLE peerbus_inbox RENAME TO peerbus_inbox_before;
    CREATE TABLE peerbus_inbox (
        consumer TEXT NOT NULL,
        message_id BLOB NOT NULL,
        sender BLOB NOT NULL,
        seen_at INTEGER NOT NULL,
        PRIMARY KEY (consumer, message_id, sender)
    ) WITHOUT ROWID;
    INSERT INTO peerbus_inbox SELECT consumer, message_id, x'', seen_at FROM peerbus_inbox_before;
    DROP TABLE peerbus_inbox_before;
    RELEASE peerbus_inbox;";

/// Inserts a message in the user's own transaction; returns its id.
///
/// # Errors
/// The error of SQLite.
pub fn insert(transaction: &Connection, message: &NewMessage) -> rusqlite::Result<MessageId> {
    let row = message.row();
    let mut insert = transaction.prepare_cached(
        "INSERT INTO peerbus_outbox (message_id, kind, name, ordering_key, content_type, body)
         VALUES (?, ?, ?, ?, ?, ?)",
    )?;
    insert.execute(params![
        row.message_id,
        row.kind,
        row.name,
        row.key,
        row.content_type,
        row.body
    ])?;
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
/// message is delivered.
///
/// # Errors
/// The error of SQLite.
pub fn inbox_seen(
    transaction: &Connection,
    consumer: &str,
    sender: NodeId,
    id: MessageId,
) -> rusqlite::Result<bool> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut insert = transaction.prepare_cached(
        "INSERT INTO peerbus_inbox (consumer, message_id, sender, seen_at)
         SELECT ?1, ?2, ?3, ?4 WHERE NOT EXISTS (
             SELECT 1 FROM peerbus_inbox WHERE consumer = ?1 AND message_id = ?2 AND sender = x''
         ) ON CONFLICT DO NOTHING",
    )?;
    let (id, sender) = (id.to_bytes(), sender.as_bytes());
    Ok(insert.execute(params![consumer, &id[..], &sender[..], now as i64])? == 0)
}

/// Forgets the messages seen longer ago than that; returns their number. Later duplicates of them
/// are not recognised.
///
/// # Errors
/// The error of SQLite.
pub fn forget_seen(connection: &Connection, longer_ago: Duration) -> rusqlite::Result<usize> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let before = now.saturating_sub(longer_ago).as_secs();
    connection.execute("DELETE FROM peerbus_inbox WHERE seen_at < ?", [before as i64])
}

/// Hands committed messages to the node's outbox, and polls for more every `poll`, until it fails
/// or the node shuts down. It owns the connection, and occupies a thread of the blocking pool.
///
/// # Errors
/// [`RelayError`]. A full outbox is retried.
///
/// # Panics
/// If the relay's own thread panicked, for example in a function that the user registered with
/// SQLite.
///
/// # Cancel safety
/// Dropping the future ends the relay after its current batch; nothing is lost.
pub async fn relay(node: Node, connection: Connection, poll: Duration) -> Result<(), RelayError> {
    let (stop, stopped) = mpsc::channel::<()>();
    let runtime = tokio::runtime::Handle::current();
    let working = tokio::task::spawn_blocking(move || {
        // Dropping the future drops the sender, which ends the relay.
        while !node.is_stopping() && stopped.try_recv() != Err(TryRecvError::Disconnected) {
            let rows = match pending(&connection) {
                Ok(rows) => rows,
                Err(error) if is_busy(&error) => Vec::new(),
                Err(error) => return Err(error.into()),
            };
            if !rows.is_empty() {
                match runtime.block_on(hand_over(&node, &rows)) {
                    Ok(count) => {
                        delete(&connection, &rows[..count])?;
                        continue;
                    }
                    Err(error) if error.is_full() => {}
                    Err(RelayError::Outbox(crate::carrier::OutboxError::ShutDown)) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            let _told_to_end = stopped.recv_timeout(poll);
        }
        Ok(())
    });
    let ended = working.await;
    drop(stop);
    outcome(ended)
}

/// The outcome of a relay by the end of its thread.
fn outcome(ended: Result<Result<(), RelayError>, JoinError>) -> Result<(), RelayError> {
    match ended.map_err(JoinError::try_into_panic) {
        Ok(result) => result,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime shuts down, and the node with it.
        Err(Err(_cancelled)) => Ok(()),
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
}

fn pending(connection: &Connection) -> rusqlite::Result<Vec<(i64, Row)>> {
    let mut select = connection.prepare_cached(
        "SELECT id, message_id, kind, name, ordering_key, content_type, body
         FROM peerbus_outbox ORDER BY id LIMIT ?",
    )?;
    let rows = select.query_map([BATCH], |row| {
        let message = Row {
            message_id: row.get(1)?,
            kind: row.get(2)?,
            name: row.get(3)?,
            key: row.get(4)?,
            content_type: row.get(5)?,
            body: row.get(6)?,
        };
        Ok((row.get(0)?, message))
    })?;
    rows.collect()
}

/// Deletes rows that are in the node's outbox; until it succeeds, they must not be handed over
/// again.
fn delete(connection: &Connection, rows: &[(i64, Row)]) -> rusqlite::Result<()> {
    loop {
        let deleted = connection.unchecked_transaction().and_then(|transaction| {
            for (id, _) in rows {
                transaction
                    .prepare_cached("DELETE FROM peerbus_outbox WHERE id = ?")?
                    .execute([id])?;
            }
            transaction.commit()
        });
        match deleted {
            Err(error) if is_busy(&error) => std::thread::sleep(Duration::from_millis(5)),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "in the relay")]
    async fn a_panic_of_the_relay_reaches_its_caller() {
        let _unreached = outcome(tokio::task::spawn_blocking(|| panic!("in the relay")).await);
    }
}
