//! A publisher: a topic, and who hears it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Publish;
use super::draft::Draft;
use super::peer_link::PeerLink;
use super::publish::To;
use super::shared::Shared;
use crate::address::Topic;
use crate::message::Body;
use crate::opaque::opaque;

/// Publishes on one topic. It knows who subscribes, and looks again only when that changes, so a
/// message costs less than with [`Node::publish`](crate::Node::publish), which looks each time.
///
/// Cloning is cheap; each task has its own.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
    route: Route,
}

opaque!(Publisher, |it| topic: it.topic());

/// Who hears a topic, as of a version of the routes.
#[derive(Clone)]
pub(crate) struct Route {
    pub(crate) topic: Topic,
    pub(crate) links: Vec<Arc<PeerLink>>,
    /// Whether this node's own subscriptions do.
    pub(crate) here: bool,
    version: u64,
}

impl Publisher {
    pub(crate) fn new(shared: &Arc<Shared>, topic: Topic) -> Self {
        let route = Route::find(shared, topic);
        Self { shared: shared.clone(), route }
    }

    /// The topic.
    pub fn topic(&self) -> &Topic {
        &self.route.topic
    }

    /// Publishes an event on the topic, as [`Node::publish`](crate::Node::publish) does.
    pub fn publish(&mut self, body: impl Into<Body>) -> Publish<'_> {
        if self.route.version != self.shared.routes_version.load(Ordering::Acquire) {
            self.route = Route::find(&self.shared, self.route.topic.clone());
        }
        let (shared, draft) = (&self.shared, Draft::new(body.into()));
        Publish { shared, to: Ok(To::Known(&self.route)), draft }
    }
}

impl Route {
    fn find(shared: &Shared, topic: Topic) -> Self {
        // What changes while this looks is seen the next time.
        let version = shared.routes_version.load(Ordering::Acquire);
        let routing = shared.routing.load();
        let links = routing.subscribers(&topic).iter().map(|(_, cell)| (*cell).clone()).collect();
        let here = shared.inboxes.load().has_match(&topic);
        Self { topic, links, here, version }
    }
}
