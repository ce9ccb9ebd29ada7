//! A link of this node: its flow, and the transport beneath it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::core::{Publication, Reporter, Way};
use crate::engine::{Backlog, Flow, LinkId, Path, Time};
use crate::identity::NodeId;
use crate::link::Link;
use crate::message::MessageId;
use crate::report::DropReason;
use crate::sync::{Guard, Mutex, Rank, lock};
use crate::trust::Grants;
use crate::wire::{Control, Envelope, Lane, Totals};

/// One link of a node.
///
/// A call that changes the flow also passes the resulting batches to the transport, under the
/// flow's lock, which keeps the order. The lock is never held across an await.
pub(crate) struct PeerLink {
    pub(crate) id: LinkId,
    pub(crate) peer: NodeId,
    /// The rights of the peer.
    pub(crate) grants: Grants,
    me: Weak<Self>,
    flow: Mutex<Flow>,
    link: Arc<dyn Link>,
    reporter: Arc<Reporter>,
    started: Instant,
    /// The decider accepted the link: messages may flow.
    open: AtomicBool,
    /// The link has ended on this side; batches that still arrive are ignored.
    ended: AtomicBool,
    /// The peer has announced its epochs.
    epochs_told: AtomicBool,
    /// The number of batches that the transport encoded since the flow was last notified.
    released: AtomicU32,
    /// The flow has more batches than the transport may hold.
    starved: AtomicBool,
    /// Wakes the sending task when the transport has room again.
    room: Notify,
    /// The buffer of a batch that the transport has finished with.
    spare: Mutex<Option<Vec<u8>>>,
    /// Wakes publishers that wait for room in the queue, and their number.
    queue_room: Notify,
    waiting: AtomicU32,
}

impl PeerLink {
    pub(crate) fn new(
        id: LinkId,
        peer: NodeId,
        grants: Grants,
        flow: Flow,
        link: Arc<dyn Link>,
        reporter: Arc<Reporter>,
        started: Instant,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            id,
            peer,
            grants,
            me: me.clone(),
            flow: Mutex::new(Rank::Flow, flow),
            link,
            reporter,
            started,
            open: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            epochs_told: AtomicBool::new(false),
            released: AtomicU32::new(0),
            starved: AtomicBool::new(false),
            room: Notify::new(),
            spare: Mutex::new(Rank::Leaf, None),
            queue_room: Notify::new(),
            waiting: AtomicU32::new(0),
        })
    }

    pub(crate) fn now(&self) -> Time {
        Time::after_start(self.started.elapsed())
    }

    /// Records that the peer announced its epochs. Returns true the first time.
    pub(crate) fn is_first_epochs(&self) -> bool {
        !self.epochs_told.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    pub(crate) fn set_open(&self) {
        self.open.store(true, Ordering::Release);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn lock(&self) -> Guard<'_, Flow> {
        lock(&self.flow)
    }

    /// Reads the flow, without sending anything.
    pub(crate) fn peek<R>(&self, look: impl FnOnce(&Flow) -> R) -> R {
        look(&self.lock())
    }

    /// Changes the flow, then sends the batches that can be sent.
    pub(crate) fn with_flow<R>(&self, change: impl FnOnce(&mut Flow) -> R) -> R {
        let mut flow = self.lock();
        let result = change(&mut flow);
        self.transmit(&mut flow);
        if self.waiting.load(Ordering::Relaxed) > 0 && flow.has_room_for_events() {
            self.queue_room.notify_waiters();
        }
        result
    }

    fn transmit(&self, flow: &mut Flow) {
        loop {
            // Mostly nothing has changed, and a load is cheaper than a swap.
            if self.released.load(Ordering::SeqCst) > 0 {
                let released = self.released.swap(0, Ordering::SeqCst);
                flow.handle_released(released);
                lock(&self.spare).take().into_iter().for_each(|buffer| flow.recycle(buffer));
            }
            while flow.can_transmit()
                && let Some(batch) = flow.poll_transmit(self.now())
            {
                let own = |bytes| match self.me.upgrade() {
                    Some(link) => Bytes::from_owner(Tracked { bytes, link }),
                    None => Bytes::from(bytes),
                };
                self.link.send(batch.into_frames(own));
            }
            if !flow.has_pending() {
                return;
            }
            // Either the transport sees this flag when it releases a batch, or the check below sees
            // the release.
            if !self.starved.load(Ordering::SeqCst) {
                self.starved.store(true, Ordering::SeqCst);
            }
            if self.released.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }

    /// Continues to send whenever the transport has room again, until the link ends.
    pub(crate) async fn keep_sending(self: Arc<Self>) {
        while !self.has_ended() {
            self.room.notified().await;
            self.with_flow(|_| ());
        }
    }

    pub(crate) fn send_control(&self, control: Control) {
        let overflowed = self.with_flow(|flow| {
            flow.enqueue_control(&control);
            flow.has_overflowed()
        });
        if overflowed {
            self.link.close();
        }
    }

    pub(crate) fn admit(&self) {
        self.link.admit();
    }

    pub(crate) fn prove(&self) {
        self.link.prove();
    }

    pub(crate) fn send_message(&self, envelope: Envelope) -> Result<(), DropReason> {
        self.with_flow(|flow| flow.enqueue(envelope))
    }

    pub(crate) fn unfinished_calls(&self) -> u64 {
        self.peek(Flow::unfinished_calls)
    }

    /// The time at which bytes last arrived, if the transport sees more than whole batches.
    pub(crate) fn last_heard(&self) -> Option<Time> {
        let heard = Instant::from_std(self.link.last_heard()?);
        Some(Time::after_start(heard.saturating_duration_since(self.started)))
    }

    pub(crate) fn close(&self) {
        self.ended.store(true, Ordering::Release);
        self.room.notify_one();
        self.queue_room.notify_waiters();
        self.link.close();
    }
}

impl Way for PeerLink {
    fn path(&self) -> Path {
        Path::Link(self.id)
    }

    fn node(&self) -> NodeId {
        self.peer
    }

    fn send(&self, call: Envelope) -> Result<(), DropReason> {
        self.send_message(call)
    }

    fn send_event(&self, event: &Publication<'_>) -> Result<Backlog, DropReason> {
        self.with_flow(|flow| flow.enqueue_event(&event.encoded))
    }

    fn send_event_within<'a>(
        &'a self,
        event: &'a Publication<'_>,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Backlog, DropReason>> {
        let sending = async move {
            let _counted = Waiting::new(&self.waiting);
            loop {
                let mut freed = std::pin::pin!(self.queue_room.notified());
                freed.as_mut().enable();
                match self.send_event(event) {
                    Err(DropReason::SlowPeer) => freed.await,
                    done => return done,
                }
            }
        };
        timeout_at(deadline, sending).map(|sent| sent.unwrap_or(Err(DropReason::SlowPeer))).boxed()
    }

    fn take_back(&self, id: MessageId) {
        let taken_back = self.with_flow(|flow| {
            let taken_back = flow.take_back(id);
            if !taken_back {
                flow.enqueue_control(&Control::Cancel(id));
            }
            taken_back
        });
        if taken_back {
            self.reporter.count_drop(self.peer, DropReason::Cancelled, 1);
        }
    }

    fn give_back(&self, lane: Lane, held: Totals) {
        self.with_flow(|flow| flow.handle_consumed(lane, held));
    }

    fn answer(&self, lane: Lane, held: Totals, reply: Envelope) -> Result<(), DropReason> {
        self.with_flow(|flow| {
            flow.handle_consumed(lane, held);
            flow.enqueue(reply)
        })
    }

    fn report_drop(&self, reason: DropReason, count: u64) {
        self.with_flow(|flow| flow.handle_dropped(reason, count));
    }
}

/// The head of a batch. Its drop reports that the transport has finished with the batch.
struct Tracked {
    bytes: Vec<u8>,
    link: Arc<PeerLink>,
}

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        // The flow must not be locked here: this may run within the transport's send, under its
        // lock.
        *lock(&self.link.spare) = Some(std::mem::take(&mut self.bytes));
        self.link.released.fetch_add(1, Ordering::SeqCst);
        if self.link.starved.swap(false, Ordering::SeqCst) {
            self.link.room.notify_one();
        }
    }
}

/// Counts a publisher that waits for room, until it is dropped.
struct Waiting<'a>(&'a AtomicU32);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
