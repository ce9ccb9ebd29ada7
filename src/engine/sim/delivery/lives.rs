//! Nodes that start, crash and lose what they had, and disks that fail.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::{Event, Life, NODES, Node, Packet, Which, World, id};
use crate::engine::Time;
use crate::engine::delivery::{Contents, Inbox, Outbox, OutboxConfig, RetryPolicy};
use crate::engine::sim::disk::{Crash, Disk, SEGMENT};
use crate::journal::{Entry, Level};
use crate::message::MessageId;
use crate::wire::{Control, InboxInfo};

impl World {
    pub(super) fn restart(&mut self, node: usize) {
        if self.nodes[node].life.is_some() {
            return;
        }
        let (now, epoch, inbox_epoch) = (self.clock(), self.random.next(), self.random.next());
        let config = OutboxConfig {
            me: id(node),
            epoch,
            seed: self.random.next(),
            max_bytes: 1 << 30,
            max_messages: 1000,
            window_bytes: 600,
            retry: RetryPolicy::default(),
            hold_keys: self.hold_keys,
            segment_size: SEGMENT,
            reassign_after: self.reassign_after,
            gone_after: Duration::from_secs(3600),
        };
        self.decide(node, &config);
        let entry = &mut self.nodes[node];
        let (mut outbox, mut inbox) =
            (Outbox::new(config), Inbox::new(inbox_epoch).with_snapshots_after(SEGMENT));
        let mut numbers = HashMap::new();
        let take = |it: Entry<'_>| outbox.recover(it.position, it.payload).unwrap();
        let outbox_read = entry.outbox_disk.open(take);
        for Contents { number, position, .. } in outbox.contents() {
            numbers.insert(number, entry.stored_id(number, position.expect("it is stored")));
        }
        outbox.handle_segments(&entry.outbox_disk.segments());
        outbox.handle_room(now, entry.outbox_disk.look_for_room());
        let inbox_read = entry.inbox_disk.open(|it| inbox.recover(it.payload).unwrap());
        for read in [outbox_read, inbox_read] {
            self.seen.when("journals with a torn tail", read.torn > 0);
            self.seen.when("journals with holes", !read.damaged.is_empty());
        }
        outbox.handle_recovered(now);
        let contents: Vec<_> = outbox.contents().collect();
        for letter in &contents {
            let of_this = |other: &&Contents| other.number == letter.number;
            let ended = contents.iter().filter(of_this).all(|other| other.dead.is_some());
            let sent = self.sent.get_mut(&numbers[&letter.number]).expect("it was sent");
            if ended && sent.done.as_ref().is_none_or(Result::is_ok) {
                // It crashed before it could tell.
                sent.done = letter.dead.clone().map(Err);
                sent.may_end_again = true;
            }
        }
        let recovered: HashSet<MessageId> = numbers.values().copied().collect();
        self.check_transactions(node, &recovered);
        self.check_ends(node, &recovered);
        let entry = &mut self.nodes[node];
        inbox.handle_recovered();
        let (waiting, running) = (HashMap::new(), HashSet::new());
        entry.life = Some(Life {
            outbox,
            inbox,
            numbers,
            waiting,
            running,
            snapshots: 0,
            wakes: None,
            retry_at: Time::default(),
            looks: false,
        });
        self.submit_again(node);
        self.announce_consumers(node);
        for other in 0..NODES {
            self.after(100, node, Event::Link { with: other });
        }
    }

    pub(super) fn crash(&mut self, node: usize, crash: Crash) {
        if self.nodes[node].life.take().is_none() {
            return;
        }
        let entry = &mut self.nodes[node];
        entry.lives += 1;
        self.seen.add("crashes", 1);
        for disk in [&mut entry.outbox_disk, &mut entry.inbox_disk] {
            let lost = disk.crash(crash, &mut self.random);
            self.seen.add("files cut short with the power", lost.cut);
            self.seen.add("sectors lost with the power", lost.sectors);
            self.seen.add("sectors torn with the power", lost.torn);
        }
        if crash == Crash::Machine {
            self.seen.add("power cuts", 1);
        }
        match self.random.below(60) {
            0 => self.lose_inbox(node),
            1 => self.restore_outbox(node),
            2..=9 => self.nodes[node].backup = Some(self.nodes[node].outbox_disk.copy()),
            _ => {}
        }
        let ended = self.sent.values_mut().filter(|it| it.sender == node && it.done.is_some());
        ended.for_each(|sent| sent.may_end_again = true);
        for other in 0..NODES {
            self.cut(node, other);
        }
        let pause = self.random.between(1_000, 300_000);
        self.after(pause, node, Event::Restart);
    }

    /// It may process again what it has processed.
    fn lose_inbox(&mut self, node: usize) {
        self.seen.add("inboxes lost", 1);
        self.nodes[node].inbox_disk = Disk::default();
        self.durable.retain(|(other, ..)| *other != node);
    }

    /// Puts an outbox back to what it was, if there is a copy, or wipes it: what was in it has no
    /// promise left. What is stored from then on has all of them.
    fn restore_outbox(&mut self, node: usize) {
        self.seen.add("outboxes put back", 1);
        let disk = self.nodes[node].backup.take().unwrap_or_else(Disk::cleaned);
        disk.limit(self.capacity.unwrap_or_default());
        self.nodes[node].outbox_disk = disk;
        let sent = &self.sent;
        self.gone.retain(|message| sent[message].sender != node);
        self.sent.values_mut().filter(|sent| sent.sender == node).for_each(|sent| {
            (sent.stored, sent.forgotten) = (false, true);
        });
    }

    fn consumed(&self, node: usize) -> Vec<(crate::address::ServiceName, crate::address::Pattern)> {
        match node > 0 && self.nodes[node].serves {
            true => vec![("billing".parse().unwrap(), "orders.>".parse().unwrap())],
            false => Vec::new(),
        }
    }

    fn announce_consumers(&mut self, node: usize) {
        let subscriptions = self.consumed(node);
        let Some(life) = &mut self.nodes[node].life else { return };
        let own = InboxInfo { epoch: 0, subscriptions, ended: Vec::new() };
        life.outbox.handle_inbox(id(node), own);
        for other in (0..NODES).filter(|other| *other != node) {
            self.announce_inbox(node, other);
        }
    }

    pub(super) fn announce_inbox(&mut self, node: usize, to: usize) {
        let subscriptions = self.consumed(node);
        let Some(life) = &self.nodes[node].life else { return };
        let info = InboxInfo { epoch: life.inbox.epoch(), subscriptions, ended: Vec::new() };
        self.transmit(node, to, Packet::Control(Control::Inbox(Box::new(info))));
    }

    pub(super) fn handle_written(&mut self, node: usize, which: Which) {
        let now = self.clock();
        let Node { life: Some(life), outbox_disk, inbox_disk, .. } = &mut self.nodes[node] else {
            return;
        };
        let disk = match which {
            Which::Outbox => outbox_disk,
            Which::Inbox => inbox_disk,
        };
        let fails = disk.failing && !self.random.once_in(3);
        let written = disk.finish(fails, &mut self.random);
        let failed = written.iter().any(|(_, result)| result.is_err());
        self.seen.when("failed writes", failed);
        let room = (which == Which::Outbox).then(|| disk.changed_room()).flatten();
        if let Some(room) = room {
            self.seen.when("disks that were full", room.level == Level::Full);
            life.outbox.handle_room(now, room);
        }
        for (token, result) in written {
            match which {
                Which::Outbox => life.outbox.handle_appended(now, token, result),
                Which::Inbox => life.inbox.handle_appended(token, result),
            }
        }
    }

    pub(super) fn fault(&mut self, node: usize) {
        match self.random.below(8) {
            0 => self.crash(node, Crash::Process),
            1 => self.crash(node, Crash::Machine),
            2 | 3 => {
                let with = self.random.below(3) as usize;
                self.cut(node, with);
            }
            4 => {
                let disk = match self.random.once_in(2) {
                    true => &mut self.nodes[node].outbox_disk,
                    false => &mut self.nodes[node].inbox_disk,
                };
                disk.failing = !disk.failing;
            }
            5 => {
                self.seen.add("clock jumps", 1);
                self.wall_offset += self.random.below(2_000) as i64 - 1_000;
            }
            _ => self.serve(node, !self.nodes[node].serves),
        }
    }

    pub(super) fn serve(&mut self, node: usize, serves: bool) {
        self.nodes[node].serves = serves;
        self.announce_consumers(node);
        for other in 0..NODES {
            if let Some(life) = &mut self.nodes[other].life {
                life.outbox.handle_routes_changed();
            }
            self.perform(other);
        }
    }
}
