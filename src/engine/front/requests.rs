//! The open requests of a node, and their deadlines.

use std::collections::BTreeSet;

use super::Host;
use crate::engine::{HashMap, Path, Time};
use crate::message::MessageId;

/// Open requests, by correlation id.
pub(super) struct Requests<H: Host> {
    open: HashMap<MessageId, Open<H>>,
    deadlines: BTreeSet<(Time, MessageId)>,
}

pub(super) struct Open<H: Host> {
    deadline: Time,
    pub(super) path: Path,
    pub(super) way: H::Way,
    pub(super) waiter: H::Waiter,
}

impl<H: Host> Default for Requests<H> {
    fn default() -> Self {
        Self { open: HashMap::default(), deadlines: BTreeSet::new() }
    }
}

impl<H: Host> Requests<H> {
    pub(super) fn insert(
        &mut self,
        id: MessageId,
        deadline: Time,
        path: Path,
        way: H::Way,
        waiter: H::Waiter,
    ) {
        self.deadlines.insert((deadline, id));
        self.open.insert(id, Open { deadline, path, way, waiter });
    }

    /// Ends a request.
    pub(super) fn remove(&mut self, id: MessageId) -> Option<Open<H>> {
        let open = self.open.remove(&id)?;
        self.deadlines.remove(&(open.deadline, id));
        Some(open)
    }

    /// Ends a request, if it took that path.
    pub(super) fn remove_over(&mut self, id: MessageId, path: Path) -> Option<H::Waiter> {
        if self.open.get(&id)?.path != path {
            return None;
        }
        self.remove(id).map(|open| open.waiter)
    }

    /// Ends all requests that took a path, in the order of their ids.
    pub(super) fn remove_all(&mut self, path: Path) -> Vec<(MessageId, H::Waiter)> {
        let over = self.open.iter().filter(|(_, open)| open.path == path);
        let mut ids: Vec<MessageId> = over.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| Some((id, self.remove(id)?.waiter))).collect()
    }

    /// Ends a request whose deadline has passed.
    pub(super) fn pop_late(&mut self, now: Time) -> Option<(MessageId, Open<H>)> {
        let (_, id) = *self.deadlines.first().filter(|(deadline, _)| *deadline <= now)?;
        Some((id, self.remove(id)?))
    }

    /// Ends all requests, in the order of their deadlines.
    pub(super) fn drain(&mut self) -> Vec<H::Waiter> {
        let ids = std::mem::take(&mut self.deadlines).into_iter().map(|(_, id)| id);
        ids.filter_map(|id| Some(self.open.remove(&id)?.waiter)).collect()
    }

    pub(super) fn poll_timeout(&self) -> Option<Time> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }
}
