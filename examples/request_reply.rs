//! A service, its replies and its errors: `cargo run --example request_reply`

use std::time::Duration;

use peerbus::{Call, HandlerError, MeshName, Node, RequestError};

/// An error of our own, with a code that callers can match.
struct Negative(f64);

impl From<Negative> for HandlerError {
    fn from(Negative(number): Negative) -> Self {
        Self::new("negative", format!("{number} has no real square root"))
    }
}

async fn square_root(call: Call) -> Result<String, HandlerError> {
    // Any other error reaches the caller with the code `error`.
    let number = call.message.text().parse().map_err(HandlerError::from_error)?;
    Ok(root_of(number)?.to_string())
}

fn root_of(number: f64) -> Result<f64, Negative> {
    if number < 0.0 { Err(Negative(number)) } else { Ok(number.sqrt()) }
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
