//! The messages that a bridge has seen, by which it recognises what another bridge brings back.
//!
//! Ids can be guessed, and on a broker a sender is as claimed. So nothing here rests on them: a
//! message is the same as another only if sender, id, destination, headers and body are the same,
//! and it is an echo only if a bridge has carried it, as it says itself. Nobody can keep another's
//! message from crossing, other than by delivering the very same message before.

use std::collections::{HashMap, VecDeque};

use ring::digest::{Context, SHA256};

use super::{Bridge, Way};
use crate::identity::NodeId;
use crate::message::{Message, MessageId};
use crate::sync::{Mutex, lock};

/// The number of messages remembered, with the side that they came from.
const REMEMBERED: usize = 65_536;

/// A digest of all that a message keeps when it crosses bridges, and of its first sender and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint([u8; 32]);

impl Fingerprint {
    pub(super) fn of(message: &Message) -> Self {
        let header = &message.header;
        let headers = header.extra.as_deref().map_or(&[][..], |extra| &extra.headers);
        let first = |name: &str| headers.iter().find(|(found, _)| found == name).map(|it| &it.1);
        let from = first(Bridge::FROM).cloned().unwrap_or_else(|| message.from.to_string());
        let id = first(Bridge::ID).cloned().unwrap_or_else(|| header.id.to_string());
        let destination = header.destination.to_string();
        let mut digest = Context::new(&SHA256);
        // The lengths keep one field apart from the next.
        let mut add = |field: &[u8]| {
            digest.update(&(field.len() as u64).to_be_bytes());
            digest.update(field);
        };
        for field in [&from, &id, &destination] {
            add(field.as_bytes());
        }
        for field in [header.ordering_key(), header.content_type()] {
            add(field.unwrap_or_default().as_bytes());
        }
        let of_bridges = [Bridge::VIA, Bridge::FROM, Bridge::ID];
        for (name, value) in headers.iter().filter(|(name, _)| !of_bridges.contains(&name.as_str()))
        {
            add(name.as_bytes());
            add(value.as_bytes());
        }
        add(&message.body);
        let digest = digest.finish();
        Self(*digest.as_ref().first_chunk().expect("SHA-256 has 32 bytes"))
    }

    /// The id of a guaranteed message on the other side: its time, and ten bytes of the digest.
    pub(super) fn id(&self, id: MessageId) -> MessageId {
        let mut bytes = id.to_bytes();
        bytes[6..].copy_from_slice(&self.0[..10]);
        MessageId::from_bytes(bytes)
    }
}

/// The result of looking up a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sight {
    New,
    /// A message that came from this side before.
    Again,
    /// A message that came from the other side before.
    Echo,
}

/// The sides from which the last messages came, and who sent them there.
#[derive(Default)]
pub(super) struct Seen(Mutex<Memory>);

#[derive(Default)]
struct Memory {
    seen: HashMap<Fingerprint, (Way, NodeId)>,
    order: VecDeque<Fingerprint>,
}

impl Seen {
    /// Looks up a message that `from` sent on the side where `way` begins. `is_carried` is true if it
    /// says that a bridge brought it there.
    pub(super) fn look(
        &self,
        fingerprint: Fingerprint,
        way: Way,
        from: NodeId,
        is_carried: bool,
    ) -> Sight {
        let Memory { seen, order } = &mut *lock(&self.0);
        if let Some((known_way, known_from)) = seen.get_mut(&fingerprint) {
            if *known_way != way && is_carried {
                return Sight::Echo;
            }
            if *known_way == way && (is_carried || *known_from == from) {
                return Sight::Again;
            }
            (*known_way, *known_from) = (way, from);
            return Sight::New;
        }
        if order.len() == REMEMBERED
            && let Some(oldest) = order.pop_front()
        {
            seen.remove(&oldest);
        }
        order.push_back(fingerprint);
        seen.insert(fingerprint, (way, from));
        Sight::New
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::address::Destination;
    use crate::message::{Header, IdSource, Kind};

    const ALICE: NodeId = NodeId::from_bytes([1; 32]);
    const MALLORY: NodeId = NodeId::from_bytes([2; 32]);

    fn event(id: MessageId, from: NodeId, body: &'static str) -> Fingerprint {
        let topic = Destination::Topic("a.b".parse().unwrap());
        Fingerprint::of(&Message::new(from, Header::new(id, Kind::Event, topic), Bytes::from(body)))
    }

    #[test]
    fn what_another_bridge_brings_back_is_an_echo_and_what_comes_again_is_not() {
        let (seen, ids) = (Seen::default(), IdSource::new(1));
        let one = event(ids.next(1), ALICE, "one");
        assert_eq!(seen.look(one, Way::Export, ALICE, false), Sight::New);
        assert_eq!(seen.look(one, Way::Export, ALICE, false), Sight::Again);
        assert_eq!(seen.look(one, Way::Import, MALLORY, true), Sight::Echo);
        let other = event(ids.next(1), ALICE, "other");
        assert_eq!(seen.look(other, Way::Import, MALLORY, true), Sight::New);
        assert_eq!(seen.look(other, Way::Export, MALLORY, true), Sight::Echo);
    }

    #[test]
    fn nobody_uses_up_the_next_id_of_another() {
        let (seen, id) = (Seen::default(), IdSource::new(1).next(1));
        for (from, body) in [(MALLORY, "forged"), (ALICE, "forged"), (MALLORY, "true")] {
            let forged = event(id, from, body);
            assert_eq!(seen.look(forged, Way::Import, MALLORY, false), Sight::New);
            assert_eq!(seen.look(forged, Way::Import, MALLORY, true), Sight::Again);
            assert_eq!(seen.look(event(id, ALICE, "true"), Way::Export, ALICE, false), Sight::New);
            *lock(&seen.0) = Memory::default();
        }
        // Even one who knows all of it in advance, since no bridge carried the true message.
        let same = event(id, ALICE, "true");
        assert_eq!(seen.look(same, Way::Import, ALICE, false), Sight::New);
        assert_eq!(seen.look(same, Way::Export, ALICE, false), Sight::New);
        assert_ne!(event(id, ALICE, "true").id(id), event(id, MALLORY, "true").id(id));
        assert_ne!(event(id, ALICE, "true").id(id), event(id, ALICE, "forged").id(id));
        assert_eq!(event(id, ALICE, "true").id(id).sent_at(), id.sent_at());
    }

    #[test]
    fn only_so_many_are_remembered() {
        let (seen, ids) = (Seen::default(), IdSource::new(1));
        let first = event(ids.next(1), ALICE, "");
        seen.look(first, Way::Export, ALICE, false);
        for _ in 0..REMEMBERED {
            seen.look(event(ids.next(1), ALICE, ""), Way::Export, ALICE, false);
        }
        assert_eq!(seen.look(first, Way::Import, ALICE, true), Sight::New);
        assert_eq!(lock(&seen.0).order.len(), REMEMBERED);
        assert_eq!(lock(&seen.0).seen.len(), REMEMBERED);
    }
}
