//! The machine of a node: what outlives the node's process, and all that fails or changes while it
//! runs.

use std::time::Duration;

use super::disk::{Crash, Disk};
use super::node::{Disks, Store, node_id};
use super::rules::Rule;
use super::settings::{STORES, Settings};
use super::world::{Event, World};

pub(super) struct Machine {
    /// Those of its store, while nobody has it open.
    pub(super) disks: Option<Disks>,
    /// A copy of the outbox's, and of the inbox's.
    backup: Option<Disk>,
    inbox_backup: Option<Disk>,
    /// The node on it offers services and a durable subscription.
    pub(super) serves: bool,
}

impl Machine {
    pub(super) fn new(node: usize, settings: Settings) -> Self {
        let disks = Disks { outbox: Disk::cleaned(), inbox: Disk::default() };
        disks.outbox.limit(settings.capacity.unwrap_or_default());
        let disks = (node < STORES).then_some(disks);
        Self { disks, backup: None, inbox_backup: None, serves: true }
    }
}

impl World {
    pub(super) fn fault(&mut self) {
        if self.calm {
            return;
        }
        let pause = self.random.between(20_000, 130_000);
        self.after(pause, Event::Fault);
        let node = self.random.below(self.nodes.len() as u64) as usize;
        match self.random.below(17) {
            0 | 1 => self.crash(node, Crash::Process),
            2 | 3 => self.crash(node, Crash::Machine),
            4 => self.shut_down(node),
            5..=7 => {
                if let Some(number) = self.any_connection() {
                    self.ledger.seen.add("cuts", 1);
                    self.cut(number);
                }
            }
            8 => {
                if let Some(number) = self.any_connection() {
                    self.ledger.seen.add("silent cuts", 1);
                    self.connections.get_mut(&number).expect("it is open").silent = true;
                }
            }
            9 => self.change_rule(node),
            10 | 11 => self.toggle_disk(node),
            12 => self.jump(),
            13 => self.back_up_running(node),
            _ => self.serve(node, !self.machines[node].serves),
        }
    }

    /// The storm is over: nothing fails, all is allowed and served.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        for machine in &mut self.machines {
            machine.serves = true;
            if let Some(Disks { outbox, inbox }) = &mut machine.disks {
                (outbox.failing, inbox.failing) = (false, false);
            }
        }
        for life in self.nodes.iter().flatten().map(|node| node.life).collect::<Vec<_>>() {
            self.act(life, |node, ledger| node.calm_down(ledger));
        }
    }

    fn any_connection(&mut self) -> Option<u64> {
        let index = self.random.below(self.connections.len() as u64) as usize;
        self.connections.keys().nth(index).copied()
    }

    /// A node changes what another may do there.
    fn change_rule(&mut self, node: usize) {
        let peer = self.random.below(self.nodes.len() as u64) as usize;
        let rule = Rule::any(&mut self.random);
        if let Some(life) = self.user_of(node) {
            self.act(life, |node, ledger| node.change_rule(node_id(peer), rule, ledger));
        }
    }

    fn toggle_disk(&mut self, node: usize) {
        let inbox = self.random.once_in(2);
        let disks = match &mut self.nodes[node] {
            Some(node) => node.store.as_mut().map(|store| &mut store.disks),
            None => self.machines[node].disks.as_mut(),
        };
        if let Some(disks) = disks {
            let disk = if inbox { &mut disks.inbox } else { &mut disks.outbox };
            disk.failing = !disk.failing;
        }
    }

    fn serve(&mut self, node: usize, serves: bool) {
        self.machines[node].serves = serves;
        if let Some(life) = self.user_of(node) {
            self.act(life, |node, ledger| node.serve(serves, ledger));
        }
    }

    pub(super) fn shut_down(&mut self, node: usize) {
        let within = Duration::from_millis(self.random.between(20, 800));
        if let Some(life) = self.user_of(node) {
            self.act(life, |node, ledger| node.begin_to_end(within, ledger));
        }
    }

    /// A node has shut down.
    pub(super) fn ended(&mut self, node: usize) {
        let Some(gone) = self.nodes[node].take() else { return };
        self.ledger.shut_down(gone.life);
        if let Some(store) = gone.store {
            if store.is_behind(self.now) {
                self.ledger.promises.handle_sender_lost(node);
            }
            let Disks { mut outbox, mut inbox } = store.disks;
            outbox.close();
            inbox.close();
            self.machines[node].disks = Some(Disks { outbox, inbox });
        }
        self.restart(node);
    }

    pub(super) fn crash(&mut self, node: usize, crash: Crash) {
        let Some(gone) = self.nodes[node].take() else { return };
        let life = gone.life;
        self.ledger.seen.add("crashes", 1);
        self.ledger.seen.when("power cuts", crash == Crash::Machine);
        self.ledger.crashed(life);
        *self.ledger.promises.deaths.entry(node).or_default() += 1;
        if let Some(Store { mut disks, .. }) = gone.store {
            for disk in [&mut disks.outbox, &mut disks.inbox] {
                let lost = disk.crash(crash, &mut self.random);
                let seen = &mut self.ledger.seen;
                seen.add("files cut short with the power", lost.cut);
                seen.add("sectors lost with the power", lost.sectors);
                seen.add("sectors torn with the power", lost.torn);
            }
            self.machines[node].disks = Some(disks);
            match self.random.below(60) {
                0 => self.lose_inbox(node),
                1 | 2 => self.restore_outbox(node),
                3 => self.restore_inbox(node),
                4..=10 => self.back_up(node),
                _ => {}
            }
            self.ledger.promises.handle_sender_lost(node);
        }
        let held =
            self.connections.iter().filter(|(_, it)| it.ends.iter().any(|it| it.life == life));
        for number in held.map(|(number, _)| *number).collect::<Vec<_>>() {
            if self.random.once_in(3) && !self.calm {
                // The host died with it: nobody says that the connection is gone.
                let connection = self.connections.get_mut(&number).expect("it is held");
                connection.silent = true;
                let own = connection.ends.iter_mut().filter(|end| end.life == life);
                own.for_each(|end| end.closed = true);
            } else {
                self.cut(number);
            }
        }
        self.restart(node);
    }

    fn restart(&mut self, node: usize) {
        let pause = match self.random.once_in(8) {
            true => self.random.between(300_000, 2_000_000),
            false => self.random.between(1_000, 300_000),
        };
        self.after(pause, Event::Restart { node });
    }

    fn disks(&mut self, node: usize) -> &mut Disks {
        self.machines[node].disks.as_mut().expect("it has a store")
    }

    fn back_up(&mut self, node: usize) {
        let Disks { outbox, inbox } = self.disks(node);
        let (outbox, inbox) = (outbox.copy(), inbox.copy());
        let machine = &mut self.machines[node];
        (machine.backup, machine.inbox_backup) = (Some(outbox), Some(inbox));
    }

    /// Copies the disks of a node that runs.
    fn back_up_running(&mut self, node: usize) {
        let Some(store) = self.nodes[node].as_ref().and_then(|node| node.store.as_ref()) else {
            return;
        };
        let (outbox, inbox) = (store.disks.outbox.copy(), store.disks.inbox.copy());
        let machine = &mut self.machines[node];
        (machine.backup, machine.inbox_backup) = (Some(outbox), Some(inbox));
    }

    /// It may process again what it has processed.
    fn lose_inbox(&mut self, node: usize) {
        self.ledger.seen.add("inboxes lost", 1);
        self.disks(node).inbox = Disk::default();
        self.ledger.promises.handle_inbox_lost(node);
    }

    /// Puts an inbox back to what it was, if there is a copy.
    fn restore_inbox(&mut self, node: usize) {
        let Some(disk) = self.machines[node].inbox_backup.take() else { return };
        self.ledger.seen.add("inboxes put back", 1);
        self.disks(node).inbox = disk;
        self.ledger.promises.handle_inbox_lost(node);
    }

    /// Puts an outbox back to what it was, if there is a copy, or wipes it.
    fn restore_outbox(&mut self, node: usize) {
        self.ledger.seen.add("outboxes put back", 1);
        let disk = self.machines[node].backup.take().unwrap_or_else(Disk::cleaned);
        disk.limit(self.settings.capacity.unwrap_or_default());
        self.disks(node).outbox = disk;
        self.ledger.promises.handle_put_back(node);
    }
}
