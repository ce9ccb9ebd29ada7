//! Two nodes in one process find each other and say hello: `cargo run --example hello`

use std::time::Duration;

use peerbus::Node;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: peerbus::MeshName = "example-hello".parse()?;
    let alice = Node::builder().name("alice").mesh(mesh.clone()).start().await?;
    let bob = Node::builder().name("bob").mesh(mesh).start().await?;

    let mut greetings = bob.subscribe("greetings")?;
    alice.wait_for_subscribers("greetings", 1, Duration::from_secs(5)).await?;
    alice.publish("greetings", "hello, bob").await?;

    if let Some(message) = greetings.recv().await {
        println!("bob heard: {}", message.text());
    }
    alice.shutdown().await;
    bob.shutdown().await;
    Ok(())
}
