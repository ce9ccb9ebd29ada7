//! Permission: sorts received records by their handler and by the rights of the peer.

use crate::address::Destination;
use crate::engine::RequestOutcome;
use crate::identity::NodeId;
use crate::message::{Message, MessageId};
use crate::trust::{Action, Grants};
use crate::wire::{
    Answer, Control, DeliveryOutcome, Envelope, InboxInfo, Lane, Moment, Payload, Record,
};

pub(super) const NOT_ALLOWED: &str = "the node's rules don't allow it";

/// A record from a peer, sorted by its handler.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// An event. Its topic is not checked yet: see [`may_publish`], once for each batch.
    Event(Message),
    /// Any other message, and the credit that it holds.
    Message {
        received: ReceivedMessage,
        lane: Lane,
        cost: u64,
    },
    Control(ReceivedControl),
    /// A record of a later version.
    Unknown,
}

/// A message other than an event. It is large and moves between queues, so it is boxed.
#[derive(Debug)]
pub(crate) enum ReceivedMessage {
    /// A call or a request, for the front.
    Call(Box<Message>),
    /// A call that the peer may not send.
    RefusedCall(Box<Message>),
    /// A guaranteed message, for the inbox.
    Delivery(Box<Message>),
    /// The answer to a guaranteed message that the peer may not send.
    RefusedDelivery(Answer),
    /// The outcome of a request of this node.
    Outcome(Option<MessageId>, RequestOutcome),
}

#[derive(Debug)]
pub(crate) enum ReceivedControl {
    /// The number of this node's messages that the peer dropped since the link began, by reason.
    DropReport(Vec<(String, u64)>),
    /// The peer cancelled a call.
    Cancel(MessageId),
    /// Answers to guaranteed messages, for the outbox.
    Answers(Vec<Answer>),
    /// The epochs of the peer's outbox and its present moment, for the inbox.
    Epochs(Vec<u64>, Option<Moment>),
    /// The peer's durable subscriptions, for the outbox, and the denial of the forbidden ones.
    Inbox(Box<InboxInfo>, Option<Control>),
    /// A record about the link or its peer, for the mesh.
    Mesh(Control),
}

/// A record that must not arrive before its link is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfTurn;

/// Sorts a record from `peer`, which has the rights `grants`. `is_open` is true once the link is
/// accepted.
///
/// # Errors
/// [`OutOfTurn`] if the link must end.
pub(crate) fn incoming(
    record: Record,
    peer: NodeId,
    is_open: bool,
    grants: &Grants,
) -> Result<Incoming, OutOfTurn> {
    match record {
        Record::Control(control) => {
            incoming_control(control, is_open, grants).map(Incoming::Control)
        }
        Record::Message(envelope) if is_open => Ok(incoming_message(envelope, peer, grants)),
        Record::Message(_) => Err(OutOfTurn),
        Record::Unknown(_) => Ok(Incoming::Unknown),
    }
}

fn incoming_control(
    control: Control,
    is_open: bool,
    grants: &Grants,
) -> Result<ReceivedControl, OutOfTurn> {
    Ok(match control {
        Control::Dropped(_) | Control::Answers(_) | Control::Epochs(..) | Control::Inbox(_)
            if !is_open =>
        {
            return Err(OutOfTurn);
        }
        Control::Dropped(counts) => ReceivedControl::DropReport(counts),
        Control::Answers(answers) => ReceivedControl::Answers(answers),
        Control::Epochs(epochs, moment) => ReceivedControl::Epochs(epochs, moment),
        Control::Inbox(mut info) => {
            let denial = take_denied(&mut info, grants);
            ReceivedControl::Inbox(info, denial)
        }
        Control::Cancel(id) => ReceivedControl::Cancel(id),
        control => ReceivedControl::Mesh(control),
    })
}

/// Removes the durable subscriptions that the peer's rights deny; returns their denial.
fn take_denied(info: &mut InboxInfo, grants: &Grants) -> Option<Control> {
    let (permitted, denied): (Vec<_>, Vec<_>) = std::mem::take(&mut info.subscriptions)
        .into_iter()
        .partition(|(_, pattern)| grants.permit_all(Action::Subscribe, pattern));
    info.subscriptions = permitted;
    Control::denied(denied.into_iter().map(|(_, pattern)| (Action::Subscribe, pattern.to_string())))
}

fn incoming_message(envelope: Envelope, peer: NodeId, grants: &Grants) -> Incoming {
    let (lane, cost) = (envelope.lane(), envelope.cost());
    let Envelope { header, payload } = envelope;
    let may_send = permits(grants, &header.destination);
    let call = |message| match may_send {
        true => ReceivedMessage::Call(message),
        false => ReceivedMessage::RefusedCall(message),
    };
    let received = match payload {
        Payload::Event(body) => return Incoming::Event(Message::new(peer, header, body)),
        Payload::Call(body) => call(Box::new(Message::new(peer, header, body))),
        Payload::Request(body) => call(Box::new(Message::request(peer, header, body))),
        Payload::Guaranteed(body, delivery) if may_send => {
            let mut message = Box::new(Message::new(peer, header, body));
            message.delivery = Some(delivery);
            ReceivedMessage::Delivery(message)
        }
        Payload::Guaranteed(_, delivery) => ReceivedMessage::RefusedDelivery(Answer {
            id: delivery.id.clone(),
            attempt: delivery.attempt,
            outcome: DeliveryOutcome::Rejected(NOT_ALLOWED.into()),
        }),
        Payload::Reply(body) => {
            let id = header.correlation_id;
            let message = Box::new(Message::new(peer, header, body));
            ReceivedMessage::Outcome(id, RequestOutcome::Reply(message))
        }
        Payload::Failed(failure) => {
            ReceivedMessage::Outcome(header.correlation_id, RequestOutcome::Failed(failure))
        }
    };
    Incoming::Message { received, lane, cost }
}

/// Returns true if a peer may publish on a topic.
pub(crate) fn may_publish(grants: &Grants, topic: &str) -> bool {
    grants.permit(Action::Publish, topic)
}

/// Returns true if a peer may send to a destination.
fn permits(grants: &Grants, destination: &Destination) -> bool {
    match destination {
        Destination::Topic(topic) => may_publish(grants, topic.as_str()),
        Destination::Service(name) if !name.is_reserved() => {
            grants.permit(Action::Send, name.as_str())
        }
        Destination::Service(_) | Destination::Node(_) => grants.permit_node(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::ServiceName;
    use crate::trust::Rules;

    #[test]
    fn a_node_is_not_reached_by_the_name_of_its_inbox() {
        let id = NodeId::from_bytes([1; 32]);
        let inbox = Destination::Service(ServiceName::node_inbox());
        let may = |rules: &str, destination: &Destination| {
            permits(&rules.parse::<Rules>().unwrap().grants(&id, None), destination)
        };
        for destination in [inbox, Destination::Node(id)] {
            assert!(!may("* send *", &destination));
            assert!(may("* send >", &destination));
        }
    }
}
