//! Exactly-once effects: a transactional outbox and an idempotent consumer over SQLite:
//! `cargo run --features sqlite --example idempotent_consumer`

use std::sync::{Arc, Mutex};

use peerbus::database::{DEFAULT_POLL, NewMessage, sqlite};
use peerbus::{Call, HandlerError, MeshName, Node};
use rusqlite::Connection;

/// Any error that another thread may have.
type Failed = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: MeshName = "example-sqlite".parse()?;
    let dir = std::env::temp_dir().join(format!("peerbus-sqlite-{}", std::process::id()));

    // The shop records an order and the charge for it in one transaction.
    let shop = Node::builder().name("shop").mesh(mesh.clone()).outbox(dir.join("shop")).start();
    let shop = shop.await?;
    let mut orders = Connection::open(dir.join("orders.db"))?;
    sqlite::create_tables(&orders)?;
    orders.execute("CREATE TABLE orders (amount INTEGER)", [])?;
    let transaction = orders.transaction()?;
    transaction.execute("INSERT INTO orders VALUES (17)", [])?;
    sqlite::insert(&transaction, &NewMessage::to_service("billing", "17")?)?;
    transaction.commit()?;
    let relay = Connection::open(dir.join("orders.db"))?;
    let relay = tokio::spawn(sqlite::relay(shop.clone(), relay, DEFAULT_POLL));

    // Billing charges and records the message as seen in one transaction.
    let billing = Node::builder().name("billing").mesh(mesh).outbox(dir.join("billing"));
    let billing = billing.start().await?;
    let accounts = Connection::open(dir.join("accounts.db"))?;
    sqlite::create_tables(&accounts)?;
    accounts.execute("CREATE TABLE charges (amount INTEGER)", [])?;
    let accounts = Arc::new(Mutex::new(accounts));
    let (told, mut charged) = tokio::sync::mpsc::unbounded_channel();
    let charge = move |call: Call| {
        let (accounts, told) = (accounts.clone(), told.clone());
        async move {
            let total = charge(&accounts, &call);
            let total = total.map_err(|error| HandlerError::from_error(&*error))?;
            // The message is processed in the database, but the handler fails, as if it had been
            // killed at that point: so the message is redelivered.
            if call.message.attempt() == 1 {
                return Err(HandlerError::new("unlucky", "it was done before it failed"));
            }
            let _main_has_ended = told.send((call.message.attempt(), total));
            Ok(())
        }
    };
    let _service = billing.serve("billing", charge).start()?;
    if let Some((attempt, total)) = charged.recv().await {
        println!("at attempt {attempt}, {total} were charged in all");
    }
    shop.shutdown().await;
    billing.shutdown().await;
    relay.await??;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

/// Makes the charge, unless it was made before; returns the total charged.
fn charge(accounts: &Mutex<Connection>, call: &Call) -> Result<i64, Failed> {
    let mut accounts = accounts.lock().expect("no handler panics while it holds it");
    let transaction = accounts.transaction()?;
    let message = &call.message;
    if !sqlite::inbox_seen(&transaction, "billing", message.from, message.header.id)? {
        let amount: i64 = message.text().parse()?;
        transaction.execute("INSERT INTO charges VALUES (?)", [amount])?;
    }
    let total = transaction.query_row("SELECT sum(amount) FROM charges", [], |row| row.get(0))?;
    transaction.commit()?;
    Ok(total)
}
