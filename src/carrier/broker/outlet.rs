//! The sending side of a connection between a node and the embedded broker: a link, with a bound on
//! the bytes that it has not written yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::link::Link;

/// The cost of a message besides its bytes.
pub(super) const MESSAGE_COST: u64 = 128;
/// The most bytes of control messages that wait for a peer. One that lets more wait does not read.
const MAX_CONTROL: u64 = 256 * 1024;

/// Returns the cost of a message: all frames but the first.
pub(super) fn cost(frames: &[Bytes]) -> u64 {
    MESSAGE_COST + frames[1..].iter().map(|frame| frame.len() as u64).sum::<u64>()
}

/// Sends the frames of messages, and counts them until the link has written them.
pub(super) struct Outlet {
    link: Arc<dyn Link>,
    messages: Arc<Queued>,
    control: Arc<Queued>,
}

/// The bytes of one kind that a link has not written yet.
#[derive(Default)]
struct Queued {
    bytes: AtomicU64,
    freed: Notify,
}

impl Queued {
    /// Adds a message, unless it would exceed `most`. An empty queue takes any one message.
    fn add(self: &Arc<Self>, frames: &mut [Bytes], most: u64) -> bool {
        let (cost, queued) = (cost(frames), self.bytes.load(Ordering::Acquire));
        if queued > 0 && queued + cost > most {
            return false;
        }
        self.bytes.fetch_add(cost, Ordering::AcqRel);
        let first = std::mem::take(&mut frames[0]);
        frames[0] = Bytes::from_owner(Counted { first, cost, queued: self.clone() });
        true
    }
}

/// The first frame of a message, which is counted until the link drops it.
struct Counted {
    first: Bytes,
    cost: u64,
    queued: Arc<Queued>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.first
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.queued.bytes.fetch_sub(self.cost, Ordering::AcqRel);
        self.queued.freed.notify_waiters();
    }
}

impl Outlet {
    pub(super) fn new(link: Arc<dyn Link>) -> Self {
        Self { link, messages: Arc::default(), control: Arc::default() }
    }

    pub(super) fn link(&self) -> &Arc<dyn Link> {
        &self.link
    }

    /// Sends a message; returns false if `most` bytes wait already.
    pub(super) fn send(&self, mut frames: Vec<Bytes>, most: u64) -> bool {
        let taken = self.messages.add(&mut frames, most);
        if taken {
            self.link.send(frames);
        }
        taken
    }

    /// Sends a message once at most `most` bytes wait. Cancel safe.
    pub(super) async fn send_in_turn(&self, frames: Vec<Bytes>, most: u64) {
        loop {
            let mut freed = std::pin::pin!(self.messages.freed.notified());
            freed.as_mut().enable();
            if self.send(frames.clone(), most) {
                return;
            }
            freed.await;
        }
    }

    /// Sends a control message. Closes the connection, and returns false, if the peer does not read.
    pub(super) fn control(&self, mut frames: Vec<Bytes>) -> bool {
        let taken = self.control.add(&mut frames, MAX_CONTROL);
        match taken {
            true => self.link.send(frames),
            false => self.link.close(),
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{Mutex, lock};

    /// A link that writes nothing until it is told to.
    #[derive(Default)]
    struct Stuck {
        sent: Mutex<Vec<Vec<Bytes>>>,
        closed: Mutex<bool>,
    }

    impl Link for Stuck {
        fn send(&self, frames: Vec<Bytes>) {
            lock(&self.sent).push(frames);
        }
        fn close(&self) {
            *lock(&self.closed) = true;
        }
    }

    fn message(len: usize) -> Vec<Bytes> {
        vec![Bytes::from_static(b"P"), Bytes::from(vec![0; len])]
    }

    #[test]
    fn a_full_queue_refuses_messages_until_the_link_has_written_them() {
        let link = Arc::new(Stuck::default());
        let outlet = Outlet::new(link.clone());
        assert!(outlet.send(message(5000), 1000), "an empty queue takes any one message");
        assert!(!outlet.send(message(1), 1000));
        lock(&link.sent).clear();
        assert!(outlet.send(message(100), 1000));
        assert!(outlet.send(message(100), 1000));
        assert_eq!(lock(&link.sent).len(), 2);
        assert!(!*lock(&link.closed));
    }

    #[test]
    fn a_peer_that_reads_no_answers_loses_its_connection() {
        let link = Arc::new(Stuck::default());
        let outlet = Outlet::new(link.clone());
        let answered = (0..10_000).take_while(|_| outlet.control(message(0))).count();
        assert_eq!(answered as u64, MAX_CONTROL / MESSAGE_COST);
        assert!(*lock(&link.closed));
    }

    #[tokio::test]
    async fn a_sender_waits_for_its_turn() {
        let link = Arc::new(Stuck::default());
        let outlet = Arc::new(Outlet::new(link.clone()));
        assert!(outlet.send(message(100), 200));
        let waiting = outlet.send_in_turn(message(100), 200);
        let mut waiting = std::pin::pin!(waiting);
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        let written = std::mem::take(&mut *lock(&link.sent));
        drop(written);
        waiting.await;
        assert_eq!(lock(&link.sent).len(), 1);
    }
}
