//! Publishers: a topic, with its cached subscribers.

use std::sync::Arc;

use super::draft::Draft;
use super::publish::To;
use super::{Inner, Publish};
use crate::address::Topic;
use crate::core::Way;
use crate::message::Body;
use crate::opaque::opaque;

/// Publishes on one topic. A publisher caches the subscribers, and searches again only when they
/// change, so a message costs less than with [`Node::publish`](crate::Node::publish), which
/// searches each time.
///
/// Cloning is cheap: use a clone for each task.
#[derive(Clone)]
pub struct Publisher {
    node: Arc<Inner>,
    route: Route,
}

opaque!(Publisher, |it| topic: it.topic());

/// The ways to the subscribers of a topic, as of a version of the routes.
#[derive(Clone)]
pub(crate) struct Route {
    pub(crate) topic: Topic,
    pub(crate) ways: Vec<Arc<dyn Way>>,
    /// This node's own subscriptions match, and none of the ways reaches them.
    pub(crate) here: bool,
    version: u64,
}

impl Publisher {
    pub(crate) fn new(node: &Arc<Inner>, topic: Topic) -> Self {
        let route = Route::find(node, topic);
        Self { node: node.clone(), route }
    }

    /// The topic.
    pub fn topic(&self) -> &Topic {
        &self.route.topic
    }

    /// Publishes an event on the topic, as [`Node::publish`](crate::Node::publish) does.
    pub fn publish(&mut self, body: impl Into<Body>) -> Publish<'_> {
        if self.route.version != self.node.core.routes.version() {
            self.route = Route::find(&self.node, self.route.topic.clone());
        }
        Publish::new(&self.node, Ok(To::Known(&self.route)), Draft::new(body.into()))
    }
}

impl Route {
    fn find(node: &Inner, topic: Topic) -> Self {
        // A change during the search is detected the next time.
        let version = node.core.routes.version();
        let mut ways = Vec::new();
        let mut here = node.carrier.subscribers(&topic, &mut |way| ways.push(way.clone()));
        here = here && node.core.subscriptions.load().has_match(&topic);
        Self { topic, ways, here, version }
    }
}
