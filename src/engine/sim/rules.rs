//! The rules of a simulated node about one peer, and an oracle that judges by them.

use super::Random;
use crate::address::Destination;
use crate::identity::NodeId;
use crate::trust::{Grants, Rules};

/// What a peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Rule {
    #[default]
    All,
    Nothing,
    /// Events of topics that begin with `a`, guaranteed ones too, and no calls.
    PublishA,
    /// Calls to `work`, guaranteed ones too, and no events.
    SendWork,
    /// All, but that it hears of nothing but old orders.
    HearOld,
}

impl Rule {
    pub(super) fn any(random: &mut Random) -> Self {
        match random.below(7) {
            0 => Self::Nothing,
            1 => Self::PublishA,
            2 => Self::SendWork,
            3 => Self::HearOld,
            _ => Self::All,
        }
    }

    pub(super) fn grants(self) -> Grants {
        let text = match self {
            Self::All => return Grants::Everything,
            Self::Nothing => "",
            Self::PublishA => "* publish a.>\n* subscribe >\n* serve *",
            Self::SendWork => "* send work\n* subscribe >\n* serve *",
            Self::HearOld => {
                "* publish >\n* send >\n* serve *\n* subscribe a.orders.old\n* subscribe b.>"
            }
        };
        let rules: Rules = text.parse().unwrap();
        rules.grants(&NodeId::from_bytes([0; 32]), None)
    }

    /// Judges a message without the engine's code.
    pub(super) fn lets_send(self, to: &Destination) -> bool {
        match (self, to) {
            (Self::All | Self::HearOld, _) => true,
            (Self::Nothing, _) => false,
            (Self::PublishA, Destination::Topic(topic)) => topic.as_str().starts_with("a."),
            (Self::SendWork, Destination::Service(name)) => name.as_str() == "work",
            (Self::PublishA | Self::SendWork, _) => false,
        }
    }

    /// Judges a durable subscription in the same way.
    pub(super) fn lets_subscribe(self, pattern: &str) -> bool {
        match self {
            Self::Nothing => false,
            Self::HearOld => pattern == "a.orders.old",
            Self::All | Self::PublishA | Self::SendWork => true,
        }
    }

    /// Judges a message to the peer: an event that it is to have, or a call that it is to handle.
    pub(super) fn lets_have(self, to: &Destination) -> bool {
        match (self, to) {
            (Self::Nothing, Destination::Node(_)) => true,
            (Self::Nothing, _) => false,
            (Self::HearOld, Destination::Topic(topic)) => topic.as_str() == "a.orders.old",
            _ => true,
        }
    }
}
