//! A service, its replies and its errors: `cargo run --example request_reply`

use std::time::Duration;

use peerbus::{Call, HandlerError, MeshName, Node, RequestError};

async fn square_root(call: Call) -> Result<String, HandlerError> {
    // Any error becomes one that the caller receives, so `?` works.
    let number: f64 = call.message.text().parse()?;
    if number < 0.0 {
        return Err(HandlerError::new("negative", format!("{number} has no real square root")));
    }
    Ok(number.sqrt().to_string())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: MeshName = "example-request".parse()?;
    let server = Node::builder().name("server").mesh(mesh.clone()).start().await?;
    let client = Node::builder().name("client").mesh(mesh).start().await?;

    let service = server.serve("math.sqrt", square_root).concurrency(8).start()?;
    client.wait_for_service("math.sqrt", Duration::from_secs(5)).await?;

    for question in ["2", "-2", "two"] {
        match client.request("math.sqrt", question).deadline(Duration::from_secs(1)).await {
            Ok(reply) => println!("{question}: {}", reply.text()),
            Err(RequestError::Handler(error)) => println!("{question}: declined, {error}"),
            Err(error) => println!("{question}: no reply, {error}"),
        }
    }

    // A rolling deploy: accept no more calls, finish the running ones.
    service.drain().await;
    client.shutdown().await;
    server.shutdown().await;
    Ok(())
}
