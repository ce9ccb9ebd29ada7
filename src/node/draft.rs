//! Drafts: the body and optional header fields of a message to be sent.

use std::time::Duration;

use crate::address::Destination;
use crate::config::Config;
use crate::identity::NodeId;
use crate::message::{
    Body, BodyError, Extra, Header, IdSource, Kind, Message, MessageId, check_size,
};

/// A message to be sent, before it has an id. Most messages have only a body, and a publish moves
/// the draft several times, so it is small.
#[derive(Debug, Default, Clone)]
pub(crate) struct Draft {
    pub(super) kind: Option<Kind>,
    pub(super) body: Body,
    rare: Option<Box<Rare>>,
}

#[derive(Debug, Default, Clone)]
pub(super) struct Rare {
    /// The message's id, if it has one already.
    pub(super) id: Option<MessageId>,
    pub(super) ttl: Option<Duration>,
    pub(super) reply_to: Option<NodeId>,
    pub(super) correlation_id: Option<MessageId>,
    extra: Option<Box<Extra>>,
}

impl Draft {
    #[inline]
    pub(crate) fn new(body: Body) -> Self {
        let mut draft = Self { body, ..Self::default() };
        if let Some(content_type) = draft.body.content_type {
            draft.extra().content_type = Some(content_type.to_owned());
        }
        draft
    }

    /// Copies a received message, to send it again with the same id. The return address is left
    /// out.
    pub(crate) fn copy_of(message: &Message) -> Self {
        let header = &message.header;
        let rare = Rare {
            id: Some(header.id),
            ttl: header.time_to_live,
            reply_to: None,
            correlation_id: header.correlation_id,
            extra: header.extra.clone(),
        };
        let body = message.body.clone().into();
        Self { kind: Some(header.kind), body, rare: Some(Box::new(rare)) }
    }

    /// Sets a user header, in place of an earlier value.
    pub(crate) fn set_header(&mut self, name: &str, value: String) {
        let headers = &mut self.extra().headers;
        headers.retain(|(other, _)| other != name);
        headers.push((name.to_owned(), value));
    }

    /// Sets the message's id.
    pub(crate) fn set_id(&mut self, id: MessageId) {
        self.rare().id = Some(id);
    }

    /// Returns the message's id, or draws the next one.
    pub(super) fn id(&self, ids: &IdSource) -> MessageId {
        self.rare.as_ref().and_then(|rare| rare.id).unwrap_or_else(|| ids.next_now())
    }

    pub(super) fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    pub(super) fn extra(&mut self) -> &mut Extra {
        self.rare().extra.get_or_insert_default()
    }

    pub(super) fn ordering_key(&self) -> Option<&str> {
        self.rare.as_ref()?.extra.as_ref()?.ordering_key.as_deref()
    }

    /// Returns true if the draft has only a body.
    pub(super) fn is_plain(&self) -> bool {
        self.kind.is_none() && self.rare.is_none()
    }

    pub(super) fn check(&self, config: &Config) -> Result<(), BodyError> {
        let extra = self.rare.as_ref().and_then(|rare| rare.extra.as_deref());
        check_size(self.body.len(), extra, config.max_body)
    }

    pub(super) fn header(
        &mut self,
        id: MessageId,
        usual: Kind,
        destination: Destination,
    ) -> Header {
        let mut header = Header::new(id, self.kind.unwrap_or(usual), destination);
        if let Some(rare) = self.rare.take() {
            header.time_to_live = rare.ttl;
            header.reply_to = rare.reply_to;
            header.correlation_id = rare.correlation_id;
            header.extra = rare.extra;
        }
        header
    }
}

/// Gives a builder the setters that every message has.
macro_rules! message_setters {
    () => {
        /// Sets the message's kind: event, command or document.
        pub fn kind(mut self, kind: Kind) -> Self {
            self.draft.kind = Some(kind);
            self
        }

        /// Sets the ordering key. Messages with the same key are handled in order: those to a
        /// service all go to the same instance while it is present, and its handler receives
        /// them one at a time. When an instance comes or goes, some keys move to another
        /// ([`Event::KeysMoved`](crate::Event::KeysMoved)).
        pub fn key(mut self, key: impl Into<String>) -> Self {
            self.draft.extra().ordering_key = Some(key.into());
            self
        }

        /// Sets the body's media type.
        pub fn content_type(mut self, media_type: impl Into<String>) -> Self {
            self.draft.extra().content_type = Some(media_type.into());
            self
        }

        /// Sets the trace of the message: a W3C `traceparent`.
        pub fn traceparent(mut self, traceparent: impl Into<String>) -> Self {
            self.draft.extra().traceparent = Some(traceparent.into());
            self
        }

        /// Adds a user header.
        pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
            self.draft.extra().headers.push((name.into(), value.into()));
            self
        }
    };
}

pub(super) use message_setters;
