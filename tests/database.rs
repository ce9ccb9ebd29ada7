//! The transactional outbox and inbox in real databases: SQLite, and the PostgreSQL that
//! `PEERBUS_TEST_POSTGRES` names (`.ci/with-postgres` starts one).
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::sync::Mutex;
use std::time::Duration;

use common::{Host, private_dir, soon};
use peerbus::database::{NewMessage, RelayError, postgres, sqlite};
use peerbus::{Call, HandlerError, MessageId, Node, NodeId};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::{Client, NoTls};

const POLL: Duration = Duration::from_millis(5);

const ALICE: NodeId = NodeId::from_bytes([1; 32]);

/// Two nodes with stores, and the messages that the second one receives.
async fn pair(
    host: &Host,
    stores: &TempDir,
) -> (Node, Node, UnboundedReceiver<(String, MessageId)>) {
    let node = |name: &str| host.config(name).outbox(stores.path().join(name)).start();
    let (alice, bob) = (node("alice").await.unwrap(), node("bob").await.unwrap());
    let (told, came) = unbounded_channel();
    let handler = move |call: Call| {
        told.send((call.message.text().into_owned(), call.message.header.id)).unwrap();
        std::future::ready(Ok::<_, HandlerError>(()))
    };
    // Dropping it would withdraw the service, which must last until the end of the test.
    std::mem::forget(bob.serve("work", handler).concurrency(1).start().unwrap());
    (alice, bob, came)
}

fn message(text: &str) -> NewMessage {
    NewMessage::to_service("work", text).unwrap().key("in order")
}

#[tokio::test]
async fn sqlite_sends_what_is_committed_and_nothing_else() {
    let (host, stores) = (Host::new(), private_dir());
    let (alice, _bob, mut came) = pair(&host, &stores).await;
    let path = stores.path().join("orders.db");
    let mut connection = Connection::open(&path).unwrap();
    sqlite::create_tables(&connection).unwrap();
    sqlite::create_tables(&connection).unwrap();
    let transaction = connection.transaction().unwrap();
    sqlite::insert(&transaction, &message("rolled back")).unwrap();
    drop(transaction);
    let mut ids = Vec::new();
    for n in 0..600 {
        let transaction = connection.transaction().unwrap();
        ids.push(sqlite::insert(&transaction, &message(&n.to_string())).unwrap());
        transaction.commit().unwrap();
    }
    let relay = Connection::open(&path).unwrap();
    let relay = tokio::spawn(sqlite::relay(alice.clone(), relay, POLL));
    for (n, id) in ids.into_iter().enumerate() {
        assert_eq!(soon(came.recv()).await.unwrap(), (n.to_string(), id));
    }
    sqlite::insert(&connection, &message("later")).unwrap();
    assert_eq!(soon(came.recv()).await.unwrap().0, "later");
    let count = |connection: &Connection| -> i64 {
        connection.query_row("SELECT count(*) FROM peerbus_outbox", [], |row| row.get(0)).unwrap()
    };
    soon(async {
        while count(&connection) > 0 {
            tokio::task::yield_now().await
        }
    })
    .await;
    // The relay ends with its node.
    let path = stores.path().join("empty.db");
    let empty = Connection::open(&path).unwrap();
    sqlite::create_tables(&empty).unwrap();
    let idle = host.config("idle").outbox(stores.path().join("idle")).start().await.unwrap();
    let ending = tokio::spawn(sqlite::relay(idle.clone(), empty, POLL));
    idle.shutdown().await;
    soon(ending).await.unwrap().unwrap();
    // A row that is not a message stops the relay, and stays in the table.
    let bad = "INSERT INTO peerbus_outbox (message_id, kind, name, body) VALUES (x'00', 'service', 'a', x'')";
    connection.execute(bad, []).unwrap();
    assert!(matches!(soon(relay).await.unwrap(), Err(RelayError::Row(_))));
    assert_eq!(count(&connection), 1);
}

#[tokio::test]
async fn sqlite_knows_what_it_has_seen_once_that_is_committed() {
    let connection = Mutex::new(Connection::open_in_memory().unwrap());
    let mut connection = connection.lock().unwrap();
    sqlite::create_tables(&connection).unwrap();
    let id = MessageId::from_bytes([7; 16]);
    let transaction = connection.transaction().unwrap();
    assert!(!sqlite::inbox_seen(&transaction, "billing", ALICE, id).unwrap());
    assert!(sqlite::inbox_seen(&transaction, "billing", ALICE, id).unwrap());
    drop(transaction);
    let transaction = connection.transaction().unwrap();
    assert!(
        !sqlite::inbox_seen(&transaction, "billing", ALICE, id).unwrap(),
        "the first was rolled back"
    );
    transaction.commit().unwrap();
    assert!(sqlite::inbox_seen(&connection, "billing", ALICE, id).unwrap());
    assert!(
        !sqlite::inbox_seen(&connection, "mail", ALICE, id).unwrap(),
        "that is another consumer"
    );
    let mallory = NodeId::from_bytes([2; 32]);
    let other = MessageId::from_bytes([8; 16]);
    assert!(!sqlite::inbox_seen(&connection, "billing", mallory, other).unwrap());
    assert!(!sqlite::inbox_seen(&connection, "billing", ALICE, other).unwrap(), "another's id");
    assert_eq!(sqlite::forget_seen(&connection, Duration::from_secs(60)).unwrap(), 0);
}

#[test]
fn an_sqlite_inbox_without_senders_is_converted_and_forgets_nothing() {
    let connection = Connection::open_in_memory().unwrap();
    let before = "CREATE TABLE peerbus_inbox (
                      consumer TEXT NOT NULL, message_id BLOB NOT NULL, seen_at INTEGER NOT NULL,
                      PRIMARY KEY (consumer, message_id)
                  ) WITHOUT ROWID;
                  INSERT INTO peerbus_inbox VALUES ('billing', x'07070707070707070707070707070707', 1);";
    connection.execute_batch(before).unwrap();
    for _ in 0..2 {
        sqlite::create_tables(&connection).unwrap();
    }
    let (seen, new) = (MessageId::from_bytes([7; 16]), MessageId::from_bytes([8; 16]));
    assert!(sqlite::inbox_seen(&connection, "billing", ALICE, seen).unwrap());
    assert!(!sqlite::inbox_seen(&connection, "mail", ALICE, seen).unwrap());
    assert!(!sqlite::inbox_seen(&connection, "billing", ALICE, new).unwrap());
    assert!(sqlite::inbox_seen(&connection, "billing", ALICE, new).unwrap());
}

/// A connection to the database of this test, in its own schema.
async fn connect(schema: &str) -> Option<Client> {
    let Ok(address) = std::env::var("PEERBUS_TEST_POSTGRES") else {
        eprintln!("skipped: PEERBUS_TEST_POSTGRES names no server; try .ci/with-postgres");
        return None;
    };
    let (client, connection) = tokio_postgres::connect(&address, NoTls).await.unwrap();
    tokio::spawn(connection);
    let own = format!("CREATE SCHEMA IF NOT EXISTS {schema}; SET search_path TO {schema}");
    client.batch_execute(&own).await.unwrap();
    Some(client)
}

#[tokio::test]
async fn postgres_sends_what_is_committed_and_nothing_else() {
    let Some(mut client) = connect("sends").await else { return };
    let (host, stores) = (Host::new(), private_dir());
    let (alice, _bob, mut came) = pair(&host, &stores).await;
    postgres::create_tables(&client).await.unwrap();
    postgres::create_tables(&client).await.unwrap();
    let transaction = client.transaction().await.unwrap();
    postgres::insert(&transaction, &message("rolled back")).await.unwrap();
    drop(transaction);
    let mut ids = Vec::new();
    for n in 0..600 {
        let transaction = client.transaction().await.unwrap();
        ids.push(postgres::insert(&transaction, &message(&n.to_string())).await.unwrap());
        transaction.commit().await.unwrap();
    }
    let relay = connect("sends").await.unwrap();
    let relay = tokio::spawn(postgres::relay(alice.clone(), relay, POLL));
    for (n, id) in ids.into_iter().enumerate() {
        assert_eq!(soon(came.recv()).await.unwrap(), (n.to_string(), id));
    }
    let bad =
        "INSERT INTO peerbus_outbox (message_id, kind, name, body) VALUES ('', 'service', 'a', '')";
    client.execute(bad, &[]).await.unwrap();
    assert!(matches!(soon(relay).await.unwrap(), Err(RelayError::Row(_))));
    let left = client.query_one("SELECT count(*) FROM peerbus_outbox", &[]).await.unwrap();
    assert_eq!(left.get::<_, i64>(0), 1);
}

#[tokio::test]
async fn two_relays_on_one_postgres_table_send_each_message_once() {
    let Some(client) = connect("two").await else { return };
    let (host, stores) = (Host::new(), private_dir());
    let (alice, _bob, mut came) = pair(&host, &stores).await;
    postgres::create_tables(&client).await.unwrap();
    for n in 0..1000 {
        let message = NewMessage::to_service("work", n.to_string()).unwrap();
        postgres::insert(&client, &message).await.unwrap();
    }
    for _ in 0..2 {
        let relay = connect("two").await.unwrap();
        tokio::spawn(postgres::relay(alice.clone(), relay, POLL));
    }
    let mut texts = Vec::new();
    for _ in 0..1000 {
        texts.push(soon(came.recv()).await.unwrap().0.parse::<u32>().unwrap());
    }
    texts.sort_unstable();
    assert!(texts.into_iter().eq(0..1000));
}

#[tokio::test]
async fn a_postgres_inbox_without_senders_is_converted_and_forgets_nothing() {
    let Some(client) = connect("converted").await else { return };
    let before = "CREATE TABLE peerbus_inbox (
                      consumer TEXT NOT NULL, message_id BYTEA NOT NULL,
                      seen_at TIMESTAMPTZ NOT NULL DEFAULT now(), PRIMARY KEY (consumer, message_id)
                  );
                  INSERT INTO peerbus_inbox VALUES ('billing', '\\x07070707070707070707070707070707');";
    client.batch_execute(before).await.unwrap();
    for _ in 0..2 {
        postgres::create_tables(&client).await.unwrap();
    }
    let (seen, new) = (MessageId::from_bytes([7; 16]), MessageId::from_bytes([8; 16]));
    assert!(postgres::inbox_seen(&client, "billing", ALICE, seen).await.unwrap());
    assert!(!postgres::inbox_seen(&client, "billing", ALICE, new).await.unwrap());
    assert!(postgres::inbox_seen(&client, "billing", ALICE, new).await.unwrap());
}

#[tokio::test]
async fn postgres_knows_what_it_has_seen_once_that_is_committed() {
    let Some(mut client) = connect("seen").await else { return };
    postgres::create_tables(&client).await.unwrap();
    let id = MessageId::from_bytes([7; 16]);
    let transaction = client.transaction().await.unwrap();
    assert!(!postgres::inbox_seen(&transaction, "billing", ALICE, id).await.unwrap());
    assert!(postgres::inbox_seen(&transaction, "billing", ALICE, id).await.unwrap());
    drop(transaction);
    let transaction = client.transaction().await.unwrap();
    assert!(
        !postgres::inbox_seen(&transaction, "billing", ALICE, id).await.unwrap(),
        "the first was rolled back"
    );
    transaction.commit().await.unwrap();
    assert!(postgres::inbox_seen(&client, "billing", ALICE, id).await.unwrap());
    assert!(!postgres::inbox_seen(&client, "mail", ALICE, id).await.unwrap(), "another consumer");
    assert_eq!(postgres::forget_seen(&client, Duration::from_secs(60)).await.unwrap(), 0);
    assert_eq!(postgres::forget_seen(&client, Duration::ZERO).await.unwrap(), 2);
}
