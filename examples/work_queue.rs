//! Competing consumers: each job goes to exactly one worker: `cargo run --example work_queue`

use std::time::Duration;

use peerbus::{Call, MeshName, Node};
use tokio::sync::mpsc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: MeshName = "example-work".parse()?;
    let (done, mut finished) = mpsc::unbounded_channel();
    let mut workers = Vec::new();
    for name in ["ada", "ben", "cleo"] {
        let node = Node::builder().name(name).mesh(mesh.clone()).start().await?;
        let done = done.clone();
        let work = move |call: Call| {
            let done = done.clone();
            async move {
                let _main_has_ended = done.send((name, call.message.text().into_owned()));
                Ok(())
            }
        };
        // One job at a time; the boss sends the next job to the least loaded worker.
        let service = node.serve("resize", work).concurrency(1).start()?;
        workers.push((node, service));
    }
    let boss = Node::builder().name("boss").mesh(mesh).start().await?;
    boss.wait_for_peers(workers.len(), Duration::from_secs(5)).await?;
    boss.wait_for_service("resize", Duration::from_secs(5)).await?;

    for number in 1..=9 {
        boss.send("resize", format!("picture {number}")).await?;
    }
    for _ in 1..=9 {
        if let Some((worker, job)) = finished.recv().await {
            println!("{worker} did {job}");
        }
    }
    boss.shutdown().await;
    for (node, service) in workers {
        service.drain().await;
        node.shutdown().await;
    }
    Ok(())
}
