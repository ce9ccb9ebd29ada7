//! The way from a node to itself.

use std::sync::Weak;

use futures_util::FutureExt;
use futures_util::future::{self, BoxFuture};
use tokio::time::Instant;

use super::{Core, Hold, Publication, Way};
use crate::engine::{Backlog, Path, RequestOutcome};
use crate::identity::NodeId;
use crate::message::{Message, MessageId};
use crate::report::DropReason;
use crate::wire::{Envelope, Lane, Payload, Totals};

pub(super) struct LocalWay {
    me: NodeId,
    core: Weak<Core>,
}

impl LocalWay {
    pub(super) fn new(me: NodeId, core: Weak<Core>) -> Self {
        Self { me, core }
    }
}

impl Way for LocalWay {
    fn path(&self) -> Path {
        Path::Local
    }

    fn node(&self) -> NodeId {
        self.me
    }

    fn send(&self, Envelope { header, mut payload }: Envelope) -> Result<(), DropReason> {
        let core = self.core.upgrade().ok_or(DropReason::LinkLost)?;
        let mut message = Box::new(Message::new(self.me, header, payload.take_body()));
        message.wants_reply = matches!(payload, Payload::Request(_));
        let hold = Hold::unbounded(core.local().clone());
        core.with_front(|front, now| front.handle_own_call(now, message, hold))
    }

    /// Delivers to this node's subscriptions, without a queue in between: [`Core::deliver`].
    fn send_event(&self, event: &Publication<'_>) -> Result<Backlog, DropReason> {
        let core = self.core.upgrade().ok_or(DropReason::LinkLost)?;
        match core.publish_here(event) {
            true => Ok(Backlog::Same),
            false => Err(DropReason::SlowSubscriber),
        }
    }

    fn send_event_within<'a>(
        &'a self,
        event: &'a Publication<'_>,
        _deadline: Instant,
    ) -> BoxFuture<'a, Result<Backlog, DropReason>> {
        future::ready(self.send_event(event)).boxed()
    }

    fn take_back(&self, id: MessageId) {
        if let Some(core) = self.core.upgrade() {
            core.with_front(|front, _| front.handle_cancel(Path::Local, id));
        }
    }

    fn give_back(&self, _: Lane, _: Totals) {}

    fn answer(&self, _: Lane, _: Totals, reply: Envelope) -> Result<(), DropReason> {
        let core = self.core.upgrade().ok_or(DropReason::LinkLost)?;
        let Envelope { header, mut payload } = reply;
        let id = header.correlation_id;
        let outcome = match payload {
            Payload::Failed(failure) => RequestOutcome::Failed(failure),
            _ => {
                let message = Message::new(self.me, header, payload.take_body());
                RequestOutcome::Reply(Box::new(message))
            }
        };
        let hold = Hold::unbounded(core.local().clone());
        core.with_front(|front, _| front.handle_outcome(Path::Local, id, outcome, hold));
        Ok(())
    }

    fn report_drop(&self, _: DropReason, _: u64) {}
}
