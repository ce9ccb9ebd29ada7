//! The names that the crate's root exports, beside those that every Rust file has.

use std::fmt::Debug;
use std::time::Duration;

// Any name of the prelude's that this shadowed would no longer be what the file below needs.
use peerbus::*;

fn crosses_threads<T: Send + Sync + Sized + Unpin>() {}

fn is_a_value<T: Clone + Debug + PartialEq + Eq + Into<Body> + Default>() {}

#[test]
fn a_glob_import_leaves_the_prelude_alone() {
    crosses_threads::<Node>();
    crosses_threads::<Events>();
    crosses_threads::<Message>();
    is_a_value::<String>();
    let some: Option<Vec<String>> = Some(Vec::from(["one".to_owned()]));
    let parsed: Result<Box<Topic>, AddressError> = "orders.new".parse().map(Box::new);
    assert!(matches!((some, parsed), (Some(_), Ok(_))));
}

#[test]
fn a_configuration_is_shown_without_its_secrets() {
    let (key, broker) = (MeshKey::generate(), "nats://me:hunter2@example:4222");
    let shown = format!("{:?}", Node::builder().name("shop").mesh_key(key.clone()).broker(broker));
    assert!(shown.contains("shop"), "{shown}");
    assert!(!shown.contains("hunter2") && !shown.contains(&key.reveal()), "{shown}");
}

/// A function of the user's own that sets what all its sends have in common.
fn urgent(send: builder::Send<'_>) -> builder::Send<'_> {
    send.header("priority", "urgent")
}

#[tokio::test]
async fn a_builder_can_be_named() {
    let network = MemoryNetwork::default();
    let node =
        Node::builder().memory(&network).service_grace(Duration::ZERO).start().await.unwrap();
    let sent = urgent(node.send("nobody", "17")).await;
    assert!(matches!(sent, Err(SendError::NoService(_))));
    node.shutdown().await;
}
