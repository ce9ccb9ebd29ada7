//! Typed events on topics, and the reports on them: `cargo run --example publish_subscribe`

use std::time::Duration;

use peerbus::{Body, MeshName, Node};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    fruit: String,
    count: u32,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: MeshName = "example-pubsub".parse()?;
    let shop = Node::builder().name("shop").mesh(mesh.clone()).start().await?;
    let europe = Node::builder().name("europe").mesh(mesh.clone()).start().await?;
    let audit = Node::builder().name("audit").mesh(mesh).start().await?;

    // `*` matches one token of the topic, `>` the rest.
    let mut european = europe.subscribe("orders.eu.*")?;
    let mut all = audit.subscribe("orders.>")?;
    shop.wait_for_subscribers("orders.eu.placed", 2, Duration::from_secs(5)).await?;

    let order = Order { fruit: "apples".into(), count: 17 };
    let report = shop.publish("orders.eu.placed", Body::encode(&order)?).await?;
    println!("queued for {} nodes, dropped for {}", report.queued, report.dropped.len());
    let report = shop.publish("orders.us.placed", Body::encode(&order)?).await?;
    println!("queued for {} node", report.queued);

    if let Some(message) = european.recv().await {
        println!("europe: {:?}", message.decode::<Order>()?);
    }
    for _ in 0..2 {
        if let Some(message) = all.recv().await {
            let topic = message.topic().map(ToString::to_string).unwrap_or_default();
            println!("audit: {topic} {:?}", message.decode::<Order>()?);
        }
    }
    for node in [shop, europe, audit] {
        node.shutdown().await;
    }
    Ok(())
}
