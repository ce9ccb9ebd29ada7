//! Replies, on their way to the node that called.

use std::sync::Arc;

use super::counters::add;
use super::draft::check_size;
use super::handler::Reply;
use super::peer_link::Credit;
use super::shared::{RequestOutcome, Shared};
use crate::address::Destination;
use crate::message::{Extra, Header, Kind, Message};
use crate::report::DropReason;
use crate::wire::{Envelope, Failure, Payload};

impl Shared {
    pub(super) fn reply_with(
        self: &Arc<Self>,
        call: &Message,
        credit: Option<Credit>,
        reply: Reply,
    ) {
        if !call.wants_reply {
            return;
        }
        let (body, extra) = reply.into_parts();
        if let Err(error) = check_size(body.len(), extra.as_deref(), self.config.max_body) {
            let failure = Failure { code: "too_large".into(), text: error.to_string() };
            return self.reply(call, credit, Payload::Failed(failure));
        }
        self.send_reply(call, credit, Payload::Reply(body), extra);
    }

    pub(crate) fn reply(
        self: &Arc<Self>,
        call: &Message,
        credit: Option<Credit>,
        payload: Payload,
    ) {
        self.send_reply(call, credit, payload, None);
    }

    /// Sends a reply to the node that called.
    fn send_reply(
        self: &Arc<Self>,
        call: &Message,
        credit: Option<Credit>,
        payload: Payload,
        extra: Option<Box<Extra>>,
    ) {
        // Where it came from, whatever it says: a reply elsewhere could pass for an answer to
        // somebody else's request.
        let id = self.ids.next_now();
        let mut header = Header::new(id, Kind::Document, Destination::Node(call.from));
        header.correlation_id = Some(call.header.id);
        header.extra = extra;
        let envelope = Envelope { header, payload };
        let Some(credit) = credit else {
            return match self.broker() {
                Some(broker) => self.reply_by_broker(broker, call.from, envelope),
                None => self.reply_to_self(envelope),
            };
        };
        match credit.answer(envelope) {
            Ok(()) => add(&self.counters.queued, 1),
            Err(reason) => self.count_drop(call.from, reason, 1),
        }
    }

    fn reply_to_self(&self, Envelope { header, payload }: Envelope) {
        let Some(id) = header.correlation_id else {
            return;
        };
        let outcome = match payload {
            Payload::Failed(failure) => RequestOutcome::Failed(failure),
            Payload::Event(body)
            | Payload::Call(body)
            | Payload::Request(body)
            | Payload::Reply(body)
            | Payload::Guaranteed(body, _) => {
                RequestOutcome::Reply(Message::new(self.id, header, body))
            }
        };
        match self.end_request(id) {
            Some((waiter, _)) => {
                let _caller_left = waiter.send(outcome);
            }
            None => self.count_drop(self.id, DropReason::Late, 1),
        }
    }
}
