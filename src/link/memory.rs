//! Links within one process, for tests of whole nodes without sockets; they can be cut.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{Acceptor, DialError, Link, Receiver};
use crate::engine::{Connection, Origin, TargetKey};
use crate::identity::NodeId;
use crate::opaque::opaque;
use crate::peer::Address;
use crate::sync::{Guard, Mutex, lock};

/// A network of nodes within this process, instead of sockets and discovery: for tests of a
/// service's behaviour. [`MemoryNetwork::cut`] simulates link loss.
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// use peerbus::{MemoryNetwork, Node};
/// let network = MemoryNetwork::default();
/// let alice = Node::builder().memory(&network).start().await?;
/// let bob = Node::builder().memory(&network).start().await?;
/// alice.wait_for_peers(1, std::time::Duration::from_secs(5)).await?;
/// network.cut(&bob.id());
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
#[derive(Clone, Default)]
pub struct MemoryNetwork {
    shared: Arc<Mutex<Shared>>,
}

opaque!(MemoryNetwork, |_it|);

#[derive(Default)]
struct Shared {
    nodes: HashMap<u64, Listener>,
    next: u64,
    /// The live ends, for [`MemoryNetwork::cut`].
    ends: Vec<(NodeId, Weak<End>)>,
}

struct Listener {
    id: NodeId,
    acceptor: Weak<dyn Acceptor>,
}

/// A node's port in the network.
pub(crate) struct MemoryPort {
    network: MemoryNetwork,
    pub(crate) number: u64,
    id: NodeId,
    acceptor: Arc<dyn Acceptor>,
}

enum Parcel {
    Batch(Vec<Bytes>),
    End,
}

/// One end of a link: what it sends arrives at the other end.
struct End {
    outbox: mpsc::UnboundedSender<Parcel>,
    back: mpsc::UnboundedSender<Parcel>,
}

impl Link for End {
    fn send(&self, frames: Vec<Bytes>) {
        // The copy stands in for the transport: the sender's buffers are released at once.
        let frames = frames.iter().map(|frame| Bytes::copy_from_slice(frame)).collect();
        let _ended = self.outbox.send(Parcel::Batch(frames));
    }

    fn close(&self) {
        let _ended = self.outbox.send(Parcel::End);
        let _ended = self.back.send(Parcel::End);
    }
}

impl MemoryNetwork {
    fn lock(&self) -> Guard<'_, Shared> {
        lock(&self.shared)
    }

    /// Joins the network; connections are passed to `acceptor`.
    pub(crate) fn join(&self, id: NodeId, acceptor: &Arc<dyn Acceptor>) -> MemoryPort {
        let mut shared = self.lock();
        let number = shared.next;
        shared.next += 1;
        shared.nodes.insert(number, Listener { id, acceptor: Arc::downgrade(acceptor) });
        MemoryPort { network: self.clone(), number, id, acceptor: acceptor.clone() }
    }

    /// The addresses of all other nodes.
    pub(crate) fn others(&self, number: u64) -> Vec<Address> {
        let shared = self.lock();
        let others = shared.nodes.keys().filter(|other| **other != number);
        others.map(|other| Address::Memory(*other)).collect()
    }

    /// Cuts every connection of a node, as if its cable were unplugged for a moment: messages in
    /// flight arrive, both sides are notified, and they redial.
    pub fn cut(&self, node: &NodeId) {
        let ends: Vec<_> = self.lock().ends.clone();
        for (_, end) in ends.iter().filter(|(owner, _)| owner == node) {
            if let Some(end) = end.upgrade() {
                end.close();
            }
        }
    }
}

impl MemoryPort {
    /// Accepts no more connections.
    pub(crate) fn leave(&self) {
        self.network.lock().nodes.remove(&self.number);
    }

    pub(crate) fn dial(&self, target: &TargetKey, number: u64) -> Result<(), DialError> {
        let listener = {
            let shared = self.network.lock();
            let found = shared.nodes.get(&number);
            found.and_then(|node| Some((node.id, node.acceptor.upgrade()?)))
        };
        let Some((peer, acceptor)) = listener else {
            return Err(DialError::Failed(format!("no node {number} in memory")));
        };
        let (to_peer, from_us) = mpsc::unbounded_channel();
        let (to_us, from_peer) = mpsc::unbounded_channel();
        let near = Arc::new(End { outbox: to_peer.clone(), back: to_us.clone() });
        let far = Arc::new(End { outbox: to_us, back: to_peer });
        let mut shared = self.network.lock();
        shared.ends.retain(|(_, end)| end.strong_count() > 0);
        shared.ends.push((self.id, Arc::downgrade(&near)));
        shared.ends.push((peer, Arc::downgrade(&far)));
        drop(shared);
        let connection = |claimed, address, target| Connection {
            origin: Origin::SameProcess,
            claimed: Some(claimed),
            target,
            address: Some(Address::Memory(address)),
            ..Connection::default()
        };
        let there = acceptor.handle_connected(far, connection(self.id, self.number, None));
        tokio::spawn(deliver(from_us, there));
        let here = connection(peer, number, Some(target.clone()));
        let here = self.acceptor.handle_connected(near, here);
        tokio::spawn(deliver(from_peer, here));
        Ok(())
    }
}

async fn deliver(mut parcels: mpsc::UnboundedReceiver<Parcel>, receiver: Arc<dyn Receiver>) {
    while let Some(Parcel::Batch(frames)) = parcels.recv().await {
        if let Some(rest) = receiver.handle_batch(frames) {
            rest.await;
        }
    }
    receiver.handle_closed();
}
