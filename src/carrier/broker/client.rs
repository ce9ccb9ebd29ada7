//! The broker client: keeps a session, and reconnects and restores the wishes when it is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::session::{ConnectError, Failed, Lost, Session};
use super::{BrokerUrl, Guaranteed, Incoming, Me, Outgoing, StoreFailure};
use crate::address::{Pattern, ServiceName, Topic};
use crate::carrier::{Wish, WishEnd};
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};
use crate::text::{Line, clean};

/// The time limit of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The backoff between attempts to connect, which doubles.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// The interval at which refused wishes are retried.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// The most characters of a broker's text.
const MAX_TEXT: usize = 1024;
/// The cost of a command besides its message, in bytes.
const COMMAND_COST: u64 = 128;

/// The state of the connection to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Not connected, with the error of the last attempt.
    Down {
        error: String,
    },
    Up {
        title: String,
    },
    /// The node closed the connection.
    Closed,
}

/// The wishes of a node, which outlive any session.
#[derive(Debug, Default)]
pub(crate) struct DesiredState {
    /// Each pattern, with its number of local subscriptions.
    patterns: BTreeMap<Pattern, usize>,
    services: BTreeMap<ServiceName, u32>,
    consumers: BTreeMap<ServiceName, (Pattern, u32)>,
    /// The patterns, and the services below, that the broker has confirmed.
    subscribed: BTreeSet<Pattern>,
    served: BTreeSet<ServiceName>,
}

impl DesiredState {
    fn wishes(&self) -> Vec<Wish> {
        let patterns = self.patterns.keys().cloned().map(Wish::Subscribe);
        let services = self.services.iter().map(|(name, n)| Wish::Serve(name.clone(), *n));
        let consumers = self
            .consumers
            .iter()
            .map(|(name, (pattern, n))| Wish::Consume(name.clone(), pattern.clone(), *n));
        patterns.chain(services).chain(consumers).collect()
    }

    /// Adds a wish. Returns true if the broker must be asked to fulfil it.
    fn add(&mut self, wish: &Wish) -> bool {
        match wish {
            Wish::Subscribe(pattern) => {
                let count = self.patterns.entry(pattern.clone()).or_default();
                *count += 1;
                return *count == 1;
            }
            Wish::Serve(name, n) => _ = self.services.insert(name.clone(), *n),
            Wish::Consume(name, pattern, n) => {
                self.consumers.insert(name.clone(), (pattern.clone(), *n));
            }
        }
        true
    }

    /// Removes a wish. Returns true if the broker must undo it.
    fn remove(&mut self, wish: &Wish, end: WishEnd) -> bool {
        match wish {
            Wish::Subscribe(pattern) => {
                let Some(count) = self.patterns.get_mut(pattern) else { return false };
                *count -= 1;
                if *count > 0 {
                    return false;
                }
                self.patterns.remove(pattern);
                self.subscribed.remove(pattern);
                true
            }
            Wish::Serve(name, _) => {
                self.served.remove(name);
                self.services.remove(name).is_some()
            }
            Wish::Consume(name, ..) => {
                self.consumers.remove(name).is_some() || end == WishEnd::Forget
            }
        }
    }

    fn contains(&self, wish: &Wish) -> bool {
        match wish {
            Wish::Subscribe(pattern) => self.patterns.contains_key(pattern),
            Wish::Serve(name, _) => self.services.contains_key(name),
            Wish::Consume(name, ..) => self.consumers.contains_key(name),
        }
    }

    /// Records that the broker fulfilled a wish.
    fn confirm(&mut self, wish: Wish) {
        if !self.contains(&wish) {
            return;
        }
        match wish {
            Wish::Subscribe(pattern) => _ = self.subscribed.insert(pattern),
            Wish::Serve(name, _) => _ = self.served.insert(name),
            Wish::Consume(..) => {}
        }
    }
}

/// A command for a session.
#[derive(Debug)]
pub(crate) enum Command {
    Send(Outgoing),
    Store(Box<Guaranteed>),
    Begin(Wish),
    End(Wish, WishEnd),
}

pub(crate) struct BrokerClient {
    url: BrokerUrl,
    commands: mpsc::UnboundedSender<Queued>,
    queued: Arc<Queue>,
    session: ArcSwapOption<Box<dyn Session>>,
    desired: Mutex<DesiredState>,
    state: watch::Sender<State>,
    closing: Notify,
    closed: Notify,
}

/// A queued command, and its place in the queue's accounting.
struct Queued {
    command: Command,
    _place: Place,
}

struct Queue {
    bytes: AtomicU64,
    limit: u64,
    freed: Notify,
}

struct Place {
    queue: Arc<Queue>,
    cost: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queue.bytes.fetch_sub(self.cost, Ordering::AcqRel);
        self.queue.freed.notify_waiters();
    }
}

impl Command {
    fn cost(&self) -> u64 {
        COMMAND_COST
            + match self {
                Self::Send(message) => message.len() as u64,
                Self::Store(message) => message.parcel.len() as u64,
                Self::Begin(_) | Self::End(..) => 0,
            }
    }
}

/// The task that keeps a client connected.
pub(crate) struct ConnectionTask {
    client: Arc<BrokerClient>,
    me: Me,
    incoming: Arc<dyn Incoming>,
    commands: mpsc::UnboundedReceiver<Queued>,
    /// Wishes that the broker refused, which are retried.
    refused: Vec<Wish>,
}

impl BrokerClient {
    /// Creates a client, and the task to run for it. `limit` bounds its queued messages, in bytes.
    pub(crate) fn new(
        url: BrokerUrl,
        me: Me,
        limit: u64,
        incoming: Arc<dyn Incoming>,
    ) -> (Arc<Self>, ConnectionTask) {
        let (sender, commands) = mpsc::unbounded_channel();
        let queued = Arc::new(Queue { bytes: AtomicU64::new(0), limit, freed: Notify::new() });
        let client = Arc::new(Self {
            url,
            commands: sender,
            queued,
            session: ArcSwapOption::empty(),
            desired: Mutex::new(Rank::Table, DesiredState::default()),
            state: watch::Sender::new(State::Down { error: "not connected yet".into() }),
            closing: Notify::new(),
            closed: Notify::new(),
        });
        let task =
            ConnectionTask { client: client.clone(), me, incoming, commands, refused: Vec::new() };
        (client, task)
    }

    pub(crate) fn url(&self) -> &BrokerUrl {
        &self.url
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(*self.state.borrow(), State::Up { .. })
    }

    /// Waits until the broker is connected. Returns false if the deadline passes first.
    pub(crate) async fn wait_until_up(&self, deadline: Instant) -> bool {
        let mut states = self.state.subscribe();
        let up = states.wait_for(|state| matches!(state, State::Up { .. }));
        matches!(timeout_at(deadline, up).await, Ok(Ok(_)))
    }

    /// Returns the number of bytes queued for the broker.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.queued.bytes.load(Ordering::Acquire)
    }

    /// Passes a message to the session, or queues it.
    pub(crate) fn send(&self, message: Outgoing) -> Result<(), DropReason> {
        let session = self.session.load();
        let Some(session) = &*session else { return Err(DropReason::LinkLost) };
        // Queued messages go first.
        let message = match self.queued_bytes() {
            0 => match session.try_send(message) {
                None => return Ok(()),
                Some(message) => message,
            },
            _ => message,
        };
        self.queue_within_limit(Command::Send(message))
    }

    /// Queues a message to be stored.
    pub(crate) fn store(&self, message: Guaranteed) -> Result<(), DropReason> {
        if self.session.load().is_none() {
            return Err(DropReason::LinkLost);
        }
        self.queue_within_limit(Command::Store(Box::new(message)))
    }

    fn queue_within_limit(&self, command: Command) -> Result<(), DropReason> {
        let (waiting, cost) = (self.queued_bytes(), command.cost());
        if waiting > 0 && waiting + cost > self.queued.limit {
            return Err(DropReason::SlowPeer);
        }
        self.enqueue(command, cost);
        Ok(())
    }

    /// Waits until there is room for that many bytes. Returns false if the deadline passes first.
    pub(crate) async fn wait_for_room(&self, bytes: usize, deadline: Instant) -> bool {
        let cost = COMMAND_COST + bytes as u64;
        loop {
            let mut freed = std::pin::pin!(self.queued.freed.notified());
            freed.as_mut().enable();
            let waiting = self.queued_bytes();
            if waiting == 0 || waiting + cost <= self.queued.limit {
                return true;
            }
            if timeout_at(deadline, freed).await.is_err() {
                return false;
            }
        }
    }

    fn enqueue(&self, command: Command, cost: u64) {
        self.queued.bytes.fetch_add(cost, Ordering::AcqRel);
        let place = Place { queue: self.queued.clone(), cost };
        let _task_has_ended = self.commands.send(Queued { command, _place: place });
    }

    /// Queues a change of the wishes, if there is a session; a new session restores all wishes.
    fn change(&self, command: Command) {
        if self.session.load().is_some() {
            let cost = command.cost();
            self.enqueue(command, cost);
        }
    }

    pub(crate) fn wish(&self, wish: Wish) {
        let mut desired = lock(&self.desired);
        if desired.add(&wish) {
            self.change(Command::Begin(wish));
        }
    }

    pub(crate) fn end_wish(&self, wish: Wish, end: WishEnd) {
        let mut desired = lock(&self.desired);
        if desired.remove(&wish, end) {
            self.change(Command::End(wish, end));
        }
    }

    /// Returns true if the broker has confirmed a subscription of this node to a topic.
    pub(crate) fn has_subscribed(&self, topic: &Topic) -> bool {
        lock(&self.desired).subscribed.iter().any(|pattern| pattern.matches(topic))
    }

    /// Returns true if the broker has confirmed that this node serves a name.
    pub(crate) fn has_served(&self, name: &ServiceName) -> bool {
        lock(&self.desired).served.contains(name)
    }

    /// Returns true if this node has a durable subscription to a topic, and is connected.
    pub(crate) fn has_consumed(&self, topic: &Topic) -> bool {
        let desired = lock(&self.desired);
        self.is_up() && desired.consumers.values().any(|(pattern, _)| pattern.matches(topic))
    }

    /// Sends queued messages, says goodbye and closes, until the deadline.
    pub(crate) async fn close(&self, deadline: Instant) {
        if *self.state.borrow() == State::Closed {
            return;
        }
        let mut closed = std::pin::pin!(self.closed.notified());
        closed.as_mut().enable();
        self.closing.notify_one();
        let _too_slow = timeout_at(deadline, closed).await;
    }

    /// Releases the session without a goodbye.
    pub(crate) fn abandon(&self) {
        self.session.store(None);
        let before = self.state.send_replace(State::Closed);
        let bytes = self.queued_bytes();
        if bytes > 0 && before != State::Closed {
            tracing::warn!(
                broker = %self.url,
                bytes,
                "the node ended without a shutdown: what was queued for the broker is lost"
            );
        }
    }

    fn set_state(&self, incoming: &dyn Incoming, state: State) {
        if self.state.send_replace(state.clone()) != state {
            incoming.handle_state(&state);
        }
    }
}

/// The end of a session.
enum End {
    Lost(Lost),
    Asked,
}

impl ConnectionTask {
    /// Connects for the first time.
    ///
    /// # Errors
    /// Only errors that a retry can't mend.
    pub(crate) async fn connect_first(&self) -> Result<Option<Box<dyn Session>>, ConnectError> {
        match self.connect().await {
            Ok(session) => Ok(Some(session)),
            Err(error) if error.for_good => Err(error),
            Err(error) => {
                self.tell_unreachable(error.text);
                Ok(None)
            }
        }
    }

    async fn connect(&self) -> Result<Box<dyn Session>, ConnectError> {
        let url = &self.client.url;
        let Some(connect) = url.adapter().connect else {
            return Err(ConnectError::for_good(format!(
                "this build does not support {}",
                url.kind()
            )));
        };
        let connecting = connect(url, &self.me, &self.incoming);
        let late = |_| Err(ConnectError::passing("timed out after 10 s: no answer"));
        timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(late)
    }

    /// Logs and reports a failed attempt. Repeated failures are logged at debug level only.
    fn tell_unreachable(&self, error: String) {
        let (client, error) = (&self.client, clean(&error, MAX_TEXT));
        match client.state() {
            State::Down { error: before } if before == error => {
                tracing::debug!(broker = %client.url, error, "the broker can't be reached");
            }
            _ => tracing::warn!(broker = %client.url, error, "the broker can't be reached"),
        }
        client.set_state(&*self.incoming, State::Down { error });
    }

    /// Keeps the client connected until it is closed.
    pub(crate) async fn run(mut self, mut first: Option<Box<dyn Session>>) {
        let mut retry = FIRST_RETRY;
        let client = self.client.clone();
        loop {
            let connected = match first.take() {
                Some(session) => Ok(session),
                None => self.connect().await,
            };
            match connected {
                Ok(session) => {
                    retry = FIRST_RETRY;
                    match self.keep(session).await {
                        End::Asked => break,
                        End::Lost(Lost(error)) => {
                            let error = clean(&error, MAX_TEXT);
                            tracing::warn!(broker = %client.url, error, "broker connection lost");
                            client.set_state(&*self.incoming, State::Down { error });
                        }
                    }
                }
                Err(error) => {
                    self.tell_unreachable(error.text);
                }
            }
            tokio::select! {
                () = sleep(retry) => {}
                () = client.closing.notified() => break,
            }
            retry = (retry * 2).min(LONGEST_RETRY);
        }
        client.session.store(None);
        self.drop_waiting();
        client.set_state(&*self.incoming, State::Closed);
        client.closed.notify_waiters();
    }

    /// Uses a session until it is lost, or until the client is closed.
    async fn keep(&mut self, session: Box<dyn Session>) -> End {
        let (client, session) = (self.client.clone(), Arc::new(session));
        self.refused.clear();
        let restore = {
            let mut desired = lock(&client.desired);
            (desired.subscribed, desired.served) = Default::default();
            // From here on changes are queued as commands.
            client.session.store(Some(session.clone()));
            desired.wishes()
        };
        for wish in restore {
            if let Err(lost) = self.fulfil(&**session, wish).await {
                return self.end(lost);
            }
        }
        let title = clean(&session.title(), MAX_TEXT);
        client.set_state(&*self.incoming, State::Up { title });
        let mut batch = Vec::new();
        let mut lost = std::pin::pin!(session.lost());
        loop {
            tokio::select! {
                biased;
                lost = &mut lost => return self.end(lost),
                () = client.closing.notified() => break,
                _ = self.commands.recv_many(&mut batch, 64) => {}
                () = sleep(ASK_AGAIN), if !self.refused.is_empty() => {
                    if let Err(lost) = self.ask_again(&**session).await {
                        return self.end(lost);
                    }
                }
            }
            let mut waiting = batch.drain(..);
            while let Some(Queued { command, _place }) = waiting.next() {
                if let Err(lost) = self.perform(&**session, command).await {
                    self.drop_orders(waiting);
                    return self.end(lost);
                }
            }
        }
        while let Ok(Queued { command, _place }) = self.commands.try_recv() {
            if let Err(lost) = self.perform(&**session, command).await {
                return self.end(lost);
            }
        }
        session.close().await;
        End::Asked
    }

    async fn perform(&mut self, session: &dyn Session, command: Command) -> Result<(), Lost> {
        let performed = match command {
            Command::Begin(wish) => return self.fulfil(session, wish).await,
            Command::Send(message) => session.send(message).await,
            Command::Store(message) => match session.durable() {
                Some(durable) => durable.store(*message).await,
                None => {
                    let text = "the broker keeps no messages".to_owned();
                    let _gave_up = message.stored.send(Err(StoreFailure::Refused(text)));
                    Ok(())
                }
            },
            Command::End(Wish::Subscribe(pattern), _) => session.unsubscribe(pattern).await,
            Command::End(Wish::Serve(name, _), _) => session.withdraw(name).await,
            Command::End(Wish::Consume(name, ..), end) => match (session.durable(), end) {
                (Some(durable), WishEnd::Pause) => durable.pause(name).await,
                (Some(durable), WishEnd::Forget) => durable.forget(name).await,
                (None, _) => Ok(()),
            },
        };
        match performed {
            Ok(()) => Ok(()),
            Err(Failed::Lost(lost)) => Err(lost),
            Err(Failed::Refused(error)) => {
                let error = Line(&error);
                tracing::error!(broker = %self.client.url, %error, "the broker refused a command");
                Ok(())
            }
        }
    }

    async fn fulfil(&mut self, session: &dyn Session, wish: Wish) -> Result<(), Lost> {
        let fulfilled = match wish.clone() {
            Wish::Subscribe(pattern) => session.subscribe(pattern).await,
            Wish::Serve(name, n) => session.serve(name, n).await,
            Wish::Consume(name, pattern, n) => match session.durable() {
                Some(durable) => durable.consume(name, pattern, n).await,
                None => Err(Failed::Refused("the broker has no durable subscriptions".into())),
            },
        };
        match fulfilled {
            Ok(()) => lock(&self.client.desired).confirm(wish),
            Err(Failed::Lost(lost)) => return Err(lost),
            Err(Failed::Refused(error)) => {
                let error = Line(&error);
                tracing::error!(broker = %self.client.url, %error, "the broker refused a wish");
                self.refused.push(wish);
            }
        }
        Ok(())
    }

    /// Retries refused wishes, for example for a queue of a broker that has just started.
    async fn ask_again(&mut self, session: &dyn Session) -> Result<(), Lost> {
        for wish in std::mem::take(&mut self.refused) {
            if lock(&self.client.desired).contains(&wish) {
                self.fulfil(session, wish).await?;
            }
        }
        Ok(())
    }

    fn end(&mut self, lost: Lost) -> End {
        self.client.session.store(None);
        self.drop_waiting();
        End::Lost(lost)
    }

    /// Drops all queued commands: for the next session they would be too late.
    fn drop_waiting(&mut self) {
        let waiting: Vec<Queued> = std::iter::from_fn(|| self.commands.try_recv().ok()).collect();
        self.drop_orders(waiting);
    }

    fn drop_orders(&self, waiting: impl IntoIterator<Item = Queued>) {
        let mut dropped = 0;
        for Queued { command, .. } in waiting {
            match command {
                Command::Store(message) => _ = message.stored.send(Err(StoreFailure::Lost)),
                Command::Send(message) => dropped += u64::from(message.counts()),
                Command::Begin(_) | Command::End(..) => {}
            }
        }
        if dropped > 0 {
            self.incoming.handle_dropped(DropReason::LinkLost, dropped);
        }
    }
}
