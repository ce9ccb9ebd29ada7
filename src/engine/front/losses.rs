//! Lost links: what their queued calls and open requests come to.

use super::{Call, Effect, Front, Heading, Host, RequestOutcome};
use crate::engine::{FORGOTTEN_AT_ONCE, LinkId, LinkLoss, Path};
use crate::identity::NodeId;
use crate::report::DropReason;

impl<H: Host> Front<H> {
    /// Handles the loss of the link to `peer`, with the messages lost in its flow. Returns true if
    /// [`Front::forget_lost`] is due.
    pub(crate) fn handle_link_lost(&mut self, link: LinkId, peer: NodeId, lost: &LinkLoss) -> bool {
        let path = Path::Link(link);
        if lost.unsent > 0 {
            let reason = DropReason::LinkLost;
            self.effects.push_back(Effect::OwnDropped { to: peer, reason, count: lost.unsent });
        }
        if lost.in_doubt > 0 {
            self.effects.push_back(Effect::OwnInDoubt(lost.in_doubt));
        }
        for (id, waiter) in self.requests.remove_all(path) {
            let maybe_executed = !lost.unsent_calls.contains(&id);
            self.effects
                .push_back(Effect::Complete(waiter, RequestOutcome::PeerLost { maybe_executed }));
        }
        for (number, served) in &mut self.served {
            if served.calls.handle_path_lost(path) {
                self.losing.push_back(*number);
            }
            for (key, running) in served.calls.all_kept() {
                // The sender's outbox still waits for a guaranteed message.
                if key.path == path && running.heading.delivery.is_none() {
                    self.effects.push_back(Effect::Interrupt(running.handle.clone()));
                }
            }
        }
        self.forget_lost()
    }

    /// Forgets queued calls of lost links: some of them, since all others wait meanwhile. Returns
    /// true while there are more.
    pub(crate) fn forget_lost(&mut self) -> bool {
        for _ in 0..FORGOTTEN_AT_ONCE {
            let Some(number) = self.losing.front().copied() else { return false };
            let served = self.served.get_mut(&number);
            match served.and_then(|served| served.calls.take_lost()) {
                Some((key, call)) => self.forget_call(key.path, call),
                None => {
                    self.losing.pop_front();
                    if let Some(served) = self.served.get(&number) {
                        self.effects.push_back(Effect::CallEnded(served.service.clone()));
                    }
                    self.forget_if_over(number);
                }
            }
        }
        !self.losing.is_empty()
    }

    /// Forgets a call that arrived over a lost path.
    fn forget_call(&mut self, path: Path, call: Call<H>) {
        let Call { message, hold, .. } = call;
        let heading = Heading::of(path, &message);
        self.effects.push_back(Effect::Discard(message));
        match &heading.delivery {
            Some(delivery) => {
                let settlement = heading.settlement(delivery.clone(), None);
                self.effects.push_back(Effect::Settle(hold, settlement, None));
            }
            None => {
                self.effects.push_back(Effect::Release(hold));
                self.effects.push_back(Effect::Forget(DropReason::LinkLost));
            }
        }
    }
}
