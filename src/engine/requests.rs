//! Who waits for a reply, and until when.

use std::collections::BTreeSet;

use crate::engine::{HashMap, LinkId, Time};
use crate::message::MessageId;

/// The open requests of a node, by correlation id. `T` is whoever is told the outcome.
#[derive(Debug)]
pub(crate) struct Requests<T> {
    open: HashMap<MessageId, Open<T>>,
    deadlines: BTreeSet<(Time, MessageId)>,
}

#[derive(Debug)]
struct Open<T> {
    deadline: Time,
    /// The link that the call went over; `None` if this node serves itself.
    link: Option<LinkId>,
    waiter: T,
}

impl<T> Default for Requests<T> {
    fn default() -> Self {
        Self { open: HashMap::default(), deadlines: BTreeSet::new() }
    }
}

impl<T> Requests<T> {
    pub(crate) fn insert(
        &mut self,
        id: MessageId,
        deadline: Time,
        link: Option<LinkId>,
        waiter: T,
    ) {
        self.deadlines.insert((deadline, id));
        self.open.insert(id, Open { deadline, link, waiter });
    }

    /// The link that an open request went over.
    pub(crate) fn link(&self, id: MessageId) -> Option<Option<LinkId>> {
        self.open.get(&id).map(|open| open.link)
    }

    /// Ends a request: its reply came, or its caller gave up.
    pub(crate) fn remove(&mut self, id: MessageId) -> Option<(T, Option<LinkId>)> {
        let open = self.open.remove(&id)?;
        self.deadlines.remove(&(open.deadline, id));
        Some((open.waiter, open.link))
    }

    /// The requests whose deadline has passed; each is ended.
    pub(crate) fn handle_timeout(&mut self, now: Time) -> Vec<(MessageId, T, Option<LinkId>)> {
        let mut late = Vec::new();
        while let Some((deadline, id)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, id));
            if let Some(open) = self.open.remove(&id) {
                late.push((id, open.waiter, open.link));
            }
        }
        late
    }

    /// The requests that went over a link that is lost; each is ended.
    pub(crate) fn handle_link_lost(&mut self, link: LinkId) -> Vec<(MessageId, T)> {
        let lost = self.open.iter().filter(|(_, open)| open.link == Some(link));
        let lost: Vec<MessageId> = lost.map(|(id, _)| *id).collect();
        lost.into_iter().filter_map(|id| Some((id, self.remove(id)?.0))).collect()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Time> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::IdSource;
    use std::time::Duration;

    fn at(ms: u64) -> Time {
        Time::after_start(Duration::from_millis(ms))
    }

    #[test]
    fn each_request_ends_once_by_reply_deadline_or_loss() {
        let ids = IdSource::new(1);
        let mut requests = Requests::default();
        let id: Vec<_> = (0..4).map(|_| ids.next(0)).collect();
        requests.insert(id[0], at(10), Some(LinkId(1)), 'a');
        requests.insert(id[1], at(5), Some(LinkId(1)), 'b');
        requests.insert(id[2], at(30), Some(LinkId(2)), 'c');
        requests.insert(id[3], at(30), None, 'd');
        assert_eq!(requests.poll_timeout(), Some(at(5)));
        assert_eq!(requests.handle_timeout(at(5)), [(id[1], 'b', Some(LinkId(1)))]);
        assert_eq!(requests.handle_link_lost(LinkId(1)), [(id[0], 'a')]);
        assert_eq!(requests.remove(id[2]), Some(('c', Some(LinkId(2)))));
        assert_eq!(requests.remove(id[2]), None);
        assert_eq!(requests.len(), 1);
    }
}
