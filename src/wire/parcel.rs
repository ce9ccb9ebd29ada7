//! A message as carried by a broker: a peerbus head, and the body apart, as any other program on
//! the broker would write and read it.
//!
//! ```text
//! [1, from, record without its body, expires at, not before]
//! ```
//!
//! The times are in ms since the Unix epoch, by the wall clock. Only guaranteed messages have them.

use bytes::Bytes;

use super::pack::{ArrayWriter, Reader};
use super::record::{Inheritance, ReadContext, read_record, write_message};
use super::{Envelope, Record, WireError};
use crate::identity::NodeId;

/// The format version of the head.
const VERSION: u64 = 1;

/// A message to be sent over a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parcel {
    pub(crate) head: Bytes,
    pub(crate) body: Bytes,
}

/// A message received over a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// The sender, as it names itself: a broker authenticates nobody.
    pub(crate) from: NodeId,
    pub(crate) envelope: Envelope,
    pub(crate) expires_at: Option<u64>,
    pub(crate) not_before: Option<u64>,
}

impl Parcel {
    /// Packs a message sent by `me`.
    pub(crate) fn pack(
        mut envelope: Envelope,
        me: &NodeId,
        expires_at: Option<u64>,
        not_before: Option<u64>,
    ) -> Self {
        let body = envelope.payload.take_body();
        let (mut record, mut head) = (Vec::with_capacity(64), Vec::with_capacity(128));
        write_message(&mut record, &envelope, &mut Inheritance::default(), me);
        let mut fields = ArrayWriter::new(&mut head);
        fields.uint(VERSION);
        fields.bin(me.as_bytes());
        fields.bin(&record);
        fields.opt_uint(expires_at);
        fields.opt_uint(not_before);
        fields.finish();
        Self { head: head.into(), body }
    }

    /// Unpacks a message.
    ///
    /// # Errors
    /// [`WireError`] if the head is invalid, or the body is over the limit.
    pub(crate) fn unpack(self, me: &NodeId, max_body: usize) -> Result<Unpacked, WireError> {
        if self.body.len() > max_body {
            return Err(WireError::BodyTooLarge(self.body.len()));
        }
        let mut reader = Reader::new(&self.head);
        let mut fields = reader.array()?;
        match fields.need(Reader::uint)? {
            VERSION => {}
            other => return Err(WireError::Version(other)),
        }
        let from = fields.need(Reader::node_id)?;
        let record = fields.need(|reader| Ok(self.head.slice_ref(reader.bin()?)))?;
        let (expires_at, not_before) = (fields.opt(Reader::uint)?, fields.opt(Reader::uint)?);
        fields.finish()?;
        let context = ReadContext { me, peer: &from, max_body };
        let inherited = &mut Inheritance::default();
        match read_record(&record, &record, context, inherited, &mut || None)? {
            Record::Message(mut envelope) => {
                if let Some(body) = envelope.payload.body_mut() {
                    *body = self.body;
                }
                Ok(Unpacked { from, envelope, expires_at, not_before })
            }
            _ => Err(WireError::Unexpected("expected a message")),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Destination;
    use crate::message::{Header, Kind, MessageId};
    use crate::wire::{Failure, Payload};
    use proptest::prelude::*;

    const ME: NodeId = NodeId::from_bytes([1; 32]);
    const YOU: NodeId = NodeId::from_bytes([2; 32]);

    fn envelope(payload: Payload) -> Envelope {
        let id = MessageId::from_bytes([7; 16]);
        let destination = match payload {
            Payload::Event(_) => Destination::Topic("orders.new".parse().unwrap()),
            Payload::Call(_) | Payload::Request(_) => {
                Destination::Service("billing".parse().unwrap())
            }
            _ => Destination::Node(YOU),
        };
        let kind = match payload {
            Payload::Event(_) => Kind::Event,
            Payload::Call(_) | Payload::Request(_) => Kind::Command,
            _ => Kind::Document,
        };
        let mut header = Header::new(id, kind, destination);
        header.reply_to = Some(ME);
        Envelope { header, payload }
    }

    #[test]
    fn a_message_survives_the_way_and_its_body_is_left_as_it_is() {
        let failure = Failure { code: "x".into(), text: "y".into() };
        for payload in [
            Payload::Event("large".repeat(2000).into()),
            Payload::Call("body".into()),
            Payload::Request(Bytes::new()),
            Payload::Reply("reply".into()),
            Payload::Failed(failure),
        ] {
            let sent = envelope(payload);
            let parcel = Parcel::pack(sent.clone(), &ME, Some(17), None);
            if let Payload::Event(body) | Payload::Call(body) = &sent.payload {
                assert_eq!(parcel.body, body);
            }
            let came = parcel.unpack(&YOU, 1 << 20).unwrap();
            assert_eq!((came.from, came.expires_at, came.not_before), (ME, Some(17), None));
            assert_eq!(came.envelope, sent);
        }
    }

    #[test]
    fn a_body_over_the_limit_is_refused() {
        let parcel = Parcel::pack(envelope(Payload::Event("12345".into())), &ME, None, None);
        assert_eq!(parcel.unpack(&YOU, 4), Err(WireError::BodyTooLarge(5)));
    }

    proptest! {
        #[test]
        fn any_head_is_read_without_a_panic(head in prop::collection::vec(any::<u8>(), 0..200)) {
            let parcel = Parcel { head: head.into(), body: Bytes::new() };
            let _refused = parcel.unpack(&YOU, 1000);
        }
    }
}
