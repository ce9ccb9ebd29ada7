//! A node that shuts down: it drains, says goodbye and closes its store, in this order.

use std::time::Duration;

use super::{Later, Request, SimNode};
use crate::engine::sim::ledger::Ledger;
use crate::engine::{Flow, Time};

/// How often peers are asked what they have confirmed, in microseconds.
const ASK_EVERY: u64 = 20_000;
/// How long peers have to close after the goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Ending {
    #[default]
    NotBegun,
    /// What runs and is queued is finished until then.
    Draining(Time),
    /// What was sent is confirmed, and what was processed is stored and answered.
    Settling(Time),
    /// Peers close their links.
    SayingGoodbye(Time),
    Over,
}

impl Ending {
    pub(super) fn has_begun(self) -> bool {
        self != Self::NotBegun
    }
}

impl SimNode {
    /// Whether it shuts down.
    pub(in super::super) fn is_ending(&self) -> bool {
        self.ending.has_begun()
    }

    /// Takes no more calls and makes no more links.
    pub(in super::super) fn begin_to_end(&mut self, within: Duration, ledger: &mut Ledger) {
        if self.ending.has_begun() {
            return;
        }
        ledger.seen.add("shutdowns", 1);
        self.ending = Ending::Draining(self.now.time + within);
        self.mesh.stop_linking();
        self.withdraw_services();
        self.later(0, Later::End);
    }

    pub(super) fn go_on_ending(&mut self, ledger: &mut Ledger) {
        let now = self.now.time;
        match self.ending {
            Ending::NotBegun | Ending::Over => return,
            Ending::Draining(until) => {
                let numbers: Vec<_> = self.front.numbers().map(|(number, _)| number).collect();
                let idle = numbers.iter().all(|number| self.front.is_idle(*number));
                if idle || until <= now {
                    self.front.abort_all();
                    self.ending = Ending::Settling(until);
                }
            }
            Ending::Settling(until) => {
                let settled = self.links.values().all(|end| Flow::is_settled(&end.flow))
                    && self.store.as_ref().is_none_or(|store| store.inbox.is_idle());
                if settled || until <= now {
                    let what = match settled {
                        true => "shutdowns with nothing left to wait for",
                        false => "shutdowns that ran out of time",
                    };
                    ledger.seen.add(what, 1);
                    self.mesh.say_goodbye();
                    self.ending = Ending::SayingGoodbye(now + GOODBYE);
                } else {
                    self.mesh.probe_all();
                }
            }
            Ending::SayingGoodbye(until) if self.routing.peers() == 0 || until <= now => {
                return self.end_now(ledger);
            }
            Ending::SayingGoodbye(_) => {}
        }
        self.later(ASK_EVERY, Later::End);
    }

    fn end_now(&mut self, ledger: &mut Ledger) {
        self.mesh.close_all(self.now.time);
        self.perform(ledger);
        if let Some(store) = &mut self.store {
            store.close(self.now, &mut self.random, ledger);
        }
        self.perform(ledger);
        self.front.handle_shut_down();
        self.perform(ledger);
        self.ending = Ending::Over;
        self.requests.push_back(Request::Ended);
    }
}
