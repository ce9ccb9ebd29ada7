//! A guaranteed message outlives its sender's process and is queued for its receiver:
//! `cargo run --example durable_send`

use peerbus::{Call, MeshName, Node};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: MeshName = "example-durable".parse()?;
    let dir = std::env::temp_dir().join(format!("peerbus-durable-{}", std::process::id()));
    let shop = || Node::builder().name("shop").mesh(mesh.clone()).outbox(dir.join("shop"));

    let node = shop().start().await?;
    let receipt = node.send("billing", "charge 17").guaranteed().await?;
    println!("{} is on the disk; no receiver is running", receipt.id());
    let report = node.shutdown().await;
    println!("the shop closes, with {} message in its outbox", report.pending);

    let node = shop().start().await?;
    let receipt = node.send("billing", "charge 4").guaranteed().await?;
    println!("the shop opens again, and sends another");

    let billing = Node::builder().name("billing").mesh(mesh.clone()).outbox(dir.join("billing"));
    let billing = billing.start().await?;
    let charge = |call: Call| async move {
        println!("billing: {}", call.message.text());
        Ok(())
    };
    let _service = billing.serve("billing", charge).concurrency(1).start()?;
    receipt.processed().await?;
    println!("both are processed; {} messages are left", node.outbox_size().pending);
    node.shutdown().await;
    billing.shutdown().await;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}
