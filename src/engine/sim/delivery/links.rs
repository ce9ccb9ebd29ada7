//! Links that come up, deliver with delay, and break.

use std::time::Duration;

use super::{Event, Packet, World, id, pair};
use crate::wire::Control;

impl World {
    pub(super) fn link(&mut self, node: usize, with: usize) {
        let both = self.nodes[node].life.is_some() && self.nodes[with].life.is_some();
        if node == with || !both || self.links.contains_key(&pair(node, with)) {
            return;
        }
        self.connections += 1;
        self.links.insert(pair(node, with), self.connections);
        for (a, b) in [(node, with), (with, node)] {
            if let Some(life) = &mut self.nodes[a].life {
                life.outbox.handle_link_up(id(b));
            }
            self.announce_inbox(a, b);
            self.perform(a);
        }
    }

    pub(super) fn cut(&mut self, node: usize, with: usize) {
        if self.links.remove(&pair(node, with)).is_none() {
            return;
        }
        self.seen.add("cuts", 1);
        let now = self.clock();
        for (a, b) in [(node, with), (with, node)] {
            if let Some(life) = &mut self.nodes[a].life {
                life.outbox.handle_link_down(now, id(b));
            }
            self.perform(a);
        }
        let pause = self.random.between(100, 200_000);
        self.after(pause, node, Event::Link { with });
    }

    pub(super) fn transmit(&mut self, from: usize, to: usize, packet: Packet) {
        let Some(connection) = self.links.get(&pair(from, to)).copied() else { return };
        let delay = Duration::from_micros(self.random.between(50, 500));
        let last = self.last_arrival.entry((from, to)).or_default();
        *last = (*last).max(self.now + delay);
        let at = *last;
        self.at(at, to, Event::Arrive { from, connection, packet });
    }

    pub(super) fn handle_packet(&mut self, from: usize, node: usize, packet: Packet) {
        let now = self.clock();
        let Some(life) = &mut self.nodes[node].life else { return };
        match packet {
            Packet::Message { id: message, delivery } => {
                self.handle_message(from, node, message, delivery);
            }
            Packet::Answer(answer) => {
                life.outbox.handle_answer(now, id(from), answer);
            }
            Packet::Control(Control::Inbox(info)) => life.outbox.handle_inbox(id(from), *info),
            Packet::Control(Control::Epochs(epochs)) => {
                life.inbox.handle_epochs(id(from), &epochs);
            }
            Packet::Control(_) => unreachable!("nobody sends it"),
        }
    }
}
