//! A work queue that survives the crash of a worker: `cargo run --example durable_work_queue`

use std::collections::BTreeMap;
use std::time::Duration;

use peerbus::{Call, MeshName, Node, Service};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

type Done = UnboundedSender<(&'static str, String, bool)>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mesh: MeshName = "example-crash".parse()?;
    let dir = std::env::temp_dir().join(format!("peerbus-crash-{}", std::process::id()));
    let worker = |name| Node::builder().name(name).mesh(mesh.clone()).outbox(dir.join(name));
    let boss = Node::builder().name("boss").mesh(mesh.clone()).outbox(dir.join("boss"));
    let boss = boss.start().await?;

    let (done, mut finished) = unbounded_channel();
    let (ada, ben) = (worker("ada").start().await?, worker("ben").start().await?);
    let _of_ada = work(&ada, "ada", &done)?;
    let of_ben = work(&ben, "ben", &done)?;
    boss.wait_for_instances("resize", 2, Duration::from_secs(5)).await?;

    let mut receipts = Vec::new();
    for number in 1..=20 {
        receipts.push(boss.send("resize", format!("picture {number}")).guaranteed().await?);
    }
    let mut jobs = BTreeMap::<String, u32>::new();
    for _ in 0..5 {
        if let Some((worker, job, _)) = finished.recv().await {
            println!("{worker} did {job}");
            *jobs.entry(job).or_default() += 1;
        }
    }
    println!("ben crashes in the midst of his work");
    drop((of_ben, ben));
    // Messages that ben may have received are queued for him: he restarts with his store.
    let ben = loop {
        match worker("ben").start().await {
            Ok(ben) => break ben,
            // The previous run still holds the store.
            Err(peerbus::StartError::Store(_)) => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    let _of_ben = work(&ben, "ben", &done)?;
    for receipt in receipts {
        receipt.processed().await?;
    }
    while let Ok((worker, job, again)) = finished.try_recv() {
        println!("{worker} did {job}{}", if again { ", perhaps again" } else { "" });
        *jobs.entry(job).or_default() += 1;
    }
    println!("{} of 20 jobs are done", jobs.len());
    for node in [boss, ada, ben] {
        node.shutdown().await;
    }
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

/// Serves jobs on a node, two at a time.
fn work(node: &Node, name: &'static str, done: &Done) -> Result<Service, peerbus::ServeError> {
    let done = done.clone();
    let resize = move |call: Call| {
        let done = done.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let (job, again) = (call.message.text().into_owned(), call.message.is_redelivered());
            let _main_has_ended = done.send((name, job, again));
            Ok(())
        }
    };
    node.serve("resize", resize).concurrency(2).start()
}
