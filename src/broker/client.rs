//! What a node has in place of a mesh: a session, and what it takes to have another one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::session::{ConnectError, Failed, Lost, Session};
use super::{BrokerKind, BrokerUrl, Command, Incoming, Me, StoreFailure};
use crate::address::{Pattern, ServiceName, Topic};
use crate::report::DropReason;
use crate::sync::{Mutex, Rank, lock};

/// How long a connection may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between attempts: doubling.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How soon the broker is asked again for what it refused.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// What a command counts for besides its message.
const ORDER_COST: u64 = 128;

/// Whether the broker can be talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Not yet, or not again: why the last attempt failed.
    Down {
        error: String,
    },
    Up {
        title: String,
    },
    /// The node has left.
    Closed,
}

/// What a node wants of the broker for as long as it lives, whatever becomes of a session.
#[derive(Debug, Default)]
pub(crate) struct DesiredState {
    /// How many local subscriptions ask for each pattern.
    patterns: BTreeMap<Pattern, usize>,
    services: BTreeMap<ServiceName, u32>,
    consumers: BTreeMap<ServiceName, (Pattern, u32)>,
    /// Of those, what the broker has confirmed.
    subscribed: BTreeSet<Pattern>,
    served: BTreeSet<ServiceName>,
}

impl DesiredState {
    fn commands(&self) -> Vec<Command> {
        let patterns = self.patterns.keys().cloned().map(Command::Subscribe);
        let services = self.services.iter().map(|(name, n)| Command::Serve(name.clone(), *n));
        let consumers = self.consumers.iter();
        let consumers = consumers
            .map(|(name, (pattern, n))| Command::Consume(name.clone(), pattern.clone(), *n));
        patterns.chain(services).chain(consumers).collect()
    }
}

/// Whether a message waits for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    Now,
    Until(Instant),
}

pub(crate) struct BrokerClient {
    url: BrokerUrl,
    commands: mpsc::UnboundedSender<Queued>,
    queued: Arc<Queue>,
    session: ArcSwapOption<Session>,
    desired: Mutex<DesiredState>,
    state: watch::Sender<State>,
    closing: Notify,
    closed: Notify,
}

/// A command, and its place in the queue.
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
        ORDER_COST
            + match self {
                Self::Publish(_, parcel)
                | Self::Call(_, _, _, parcel)
                | Self::Reply(_, parcel)
                | Self::Tell(parcel) => parcel.len() as u64,
                Self::Store(message) => message.parcel.len() as u64,
                _ => 0,
            }
    }

    /// The same again, if it is wished for until it is taken back.
    fn wish(&self) -> Option<Self> {
        match self {
            Self::Subscribe(pattern) => Some(Self::Subscribe(pattern.clone())),
            Self::Serve(name, n) => Some(Self::Serve(name.clone(), *n)),
            Self::Consume(name, pattern, n) => {
                Some(Self::Consume(name.clone(), pattern.clone(), *n))
            }
            _ => None,
        }
    }

    /// Whether its end with a session is a loss to be counted.
    fn is_message(&self) -> bool {
        matches!(self, Self::Publish(..) | Self::Call(..) | Self::Reply(..))
    }
}

/// What makes a client work; to be run as a task.
pub(crate) struct ConnectionTask {
    client: Arc<BrokerClient>,
    me: Me,
    incoming: Arc<dyn Incoming>,
    commands: mpsc::UnboundedReceiver<Queued>,
    /// What the broker refused, and is asked for again.
    refused: Vec<Command>,
}

impl BrokerClient {
    /// `limit` is how many bytes of messages may wait for the broker.
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

    pub(crate) fn kind(&self) -> BrokerKind {
        self.url.kind()
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(*self.state.borrow(), State::Up { .. })
    }

    /// Waits until the broker can be talked to.
    pub(crate) async fn wait_until_up(&self, deadline: Instant) -> bool {
        let mut states = self.state.subscribe();
        let up = states.wait_for(|state| matches!(state, State::Up { .. }));
        matches!(timeout_at(deadline, up).await, Ok(Ok(_)))
    }

    /// What waits for the broker, in bytes.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.queued.bytes.load(Ordering::Acquire)
    }

    /// Hands a message to the session, or lets it wait for it.
    pub(crate) fn send(&self, command: Command) -> Result<(), DropReason> {
        let session = self.session.load();
        let Some(session) = &*session else { return Err(DropReason::LinkLost) };
        let waiting = self.queued_bytes();
        // What waits goes first.
        let command = match waiting {
            0 => match session.perform_now(command) {
                None => return Ok(()),
                Some(command) => command,
            },
            _ => command,
        };
        let cost = command.cost();
        if waiting > 0 && waiting + cost > self.queued.limit {
            return Err(DropReason::SlowPeer);
        }
        self.enqueue(command, cost);
        Ok(())
    }

    /// Waits for room as long as `pace` says, and then does as [`BrokerClient::send`] does.
    pub(crate) async fn send_at(&self, command: Command, pace: Pace) -> Result<(), DropReason> {
        let Pace::Until(deadline) = pace else { return self.send(command) };
        let cost = command.cost();
        loop {
            let mut freed = std::pin::pin!(self.queued.freed.notified());
            freed.as_mut().enable();
            let waiting = self.queued_bytes();
            if waiting == 0 || waiting + cost <= self.queued.limit {
                return self.send(command);
            }
            if timeout_at(deadline, freed).await.is_err() {
                return Err(DropReason::SlowPeer);
            }
        }
    }

    fn enqueue(&self, command: Command, cost: u64) {
        self.queued.bytes.fetch_add(cost, Ordering::AcqRel);
        let place = Place { queue: self.queued.clone(), cost };
        let _task_has_ended = self.commands.send(Queued { command, _place: place });
    }

    /// Asks for what is not a message; it is restored when the session is another one.
    fn ask(&self, command: Command) {
        if self.session.load().is_some() {
            let cost = command.cost();
            self.enqueue(command, cost);
        }
    }

    pub(crate) fn subscribe(&self, pattern: &Pattern) {
        let mut desired = lock(&self.desired);
        let count = desired.patterns.entry(pattern.clone()).or_default();
        *count += 1;
        if *count == 1 {
            self.ask(Command::Subscribe(pattern.clone()));
        }
    }

    pub(crate) fn unsubscribe(&self, pattern: &Pattern) {
        let mut desired = lock(&self.desired);
        let Some(count) = desired.patterns.get_mut(pattern) else { return };
        *count -= 1;
        if *count == 0 {
            desired.patterns.remove(pattern);
            desired.subscribed.remove(pattern);
            self.ask(Command::Unsubscribe(pattern.clone()));
        }
    }

    pub(crate) fn serve(&self, name: &ServiceName, concurrency: u32) {
        lock(&self.desired).services.insert(name.clone(), concurrency);
        self.ask(Command::Serve(name.clone(), concurrency));
    }

    pub(crate) fn withdraw(&self, name: &ServiceName) {
        let mut desired = lock(&self.desired);
        desired.served.remove(name);
        if desired.services.remove(name).is_some() {
            self.ask(Command::Withdraw(name.clone()));
        }
    }

    pub(crate) fn consume(&self, name: &ServiceName, pattern: &Pattern, concurrency: u32) {
        lock(&self.desired).consumers.insert(name.clone(), (pattern.clone(), concurrency));
        self.ask(Command::Consume(name.clone(), pattern.clone(), concurrency));
    }

    pub(crate) fn pause(&self, name: &ServiceName) {
        if lock(&self.desired).consumers.remove(name).is_some() {
            self.ask(Command::Pause(name.clone()));
        }
    }

    pub(crate) fn forget(&self, name: &ServiceName) {
        lock(&self.desired).consumers.remove(name);
        self.ask(Command::Forget(name.clone()));
    }

    /// Whether the broker knows that this node subscribes to a topic.
    pub(crate) fn has_subscribed(&self, topic: &Topic) -> bool {
        lock(&self.desired).subscribed.iter().any(|pattern| pattern.matches(topic))
    }

    /// Whether the broker knows that this node serves a name.
    pub(crate) fn has_served(&self, name: &ServiceName) -> bool {
        lock(&self.desired).served.contains(name)
    }

    /// Whether the broker knows of a durable subscription of this node to a topic.
    pub(crate) fn has_consumed(&self, topic: &Topic) -> bool {
        let desired = lock(&self.desired);
        self.is_up() && desired.consumers.values().any(|(pattern, _)| pattern.matches(topic))
    }

    /// Sends what waits, says goodbye, closes; within that time.
    pub(crate) async fn close(&self, deadline: Instant) {
        if *self.state.borrow() == State::Closed {
            return;
        }
        let mut closed = std::pin::pin!(self.closed.notified());
        closed.as_mut().enable();
        self.closing.notify_one();
        let _too_slow = timeout_at(deadline, closed).await;
    }

    /// Lets go of the session without a goodbye.
    pub(crate) fn abandon(&self) {
        self.session.store(None);
    }

    fn set_state(&self, incoming: &dyn Incoming, state: State) {
        if self.state.send_replace(state.clone()) != state {
            incoming.handle_state(&state);
        }
    }

    /// The broker has done what was wished for, if it still is.
    fn handle_done(&self, wish: Command) {
        let mut desired = lock(&self.desired);
        match wish {
            Command::Subscribe(pattern) if desired.patterns.contains_key(&pattern) => {
                desired.subscribed.insert(pattern);
            }
            Command::Serve(name, _) if desired.services.contains_key(&name) => {
                desired.served.insert(name);
            }
            _ => {}
        }
    }

    /// Whether what was wished for still is.
    fn is_wished(&self, wish: &Command) -> bool {
        let desired = lock(&self.desired);
        match wish {
            Command::Subscribe(pattern) => desired.patterns.contains_key(pattern),
            Command::Serve(name, _) => desired.services.contains_key(name),
            Command::Consume(name, ..) => desired.consumers.contains_key(name),
            _ => false,
        }
    }
}

/// How a session's life ended.
enum End {
    Lost(Lost),
    Asked,
}

impl ConnectionTask {
    /// Connects for the first time.
    ///
    /// # Errors
    /// Only what trying again won't mend.
    pub(crate) async fn connect_first(&self) -> Result<Option<Session>, ConnectError> {
        match self.connect().await {
            Ok(session) => Ok(Some(session)),
            Err(error) if error.for_good => Err(error),
            Err(error) => {
                self.tell_unreachable(error.text);
                Ok(None)
            }
        }
    }

    async fn connect(&self) -> Result<Session, ConnectError> {
        let connecting = Session::connect(&self.client.url, &self.me, &self.incoming);
        let late = |_| Err(ConnectError::passing("no answer within 10 s"));
        timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(late)
    }

    /// It is tried again and again; who reads the log needn't hear of each time.
    fn tell_unreachable(&self, error: String) {
        let client = &self.client;
        match client.state() {
            State::Down { error: before } if before == error => {
                tracing::debug!(broker = %client.url, error, "the broker can't be reached");
            }
            _ => tracing::warn!(broker = %client.url, error, "the broker can't be reached"),
        }
        client.set_state(&*self.incoming, State::Down { error });
    }

    /// Keeps a session until the client is closed.
    pub(crate) async fn run(mut self, mut first: Option<Session>) {
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
                            tracing::warn!(broker = %client.url, error, "the broker is lost");
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

    /// Works with a session until it is lost, or the client is to be closed.
    async fn keep(&mut self, session: Session) -> End {
        let (client, session) = (self.client.clone(), Arc::new(session));
        self.refused.clear();
        let restore = {
            let mut desired = lock(&client.desired);
            (desired.subscribed, desired.served) = Default::default();
            // From here on changes are asked for.
            client.session.store(Some(session.clone()));
            desired.commands()
        };
        for command in restore {
            if let Err(lost) = self.perform(&session, command).await {
                return self.end(lost);
            }
        }
        client.set_state(&*self.incoming, State::Up { title: session.title() });
        let mut batch = Vec::new();
        let mut lost = std::pin::pin!(session.lost());
        loop {
            tokio::select! {
                biased;
                lost = &mut lost => return self.end(lost),
                () = client.closing.notified() => break,
                _ = self.commands.recv_many(&mut batch, 64) => {}
                () = sleep(ASK_AGAIN), if !self.refused.is_empty() => {
                    if let Err(lost) = self.ask_again(&session).await {
                        return self.end(lost);
                    }
                }
            }
            let mut waiting = batch.drain(..);
            while let Some(Queued { command, _place }) = waiting.next() {
                if let Err(lost) = self.perform(&session, command).await {
                    self.drop_orders(waiting);
                    return self.end(lost);
                }
            }
        }
        while let Ok(Queued { command, _place }) = self.commands.try_recv() {
            if let Err(lost) = self.perform(&session, command).await {
                return self.end(lost);
            }
        }
        session.close().await;
        End::Asked
    }

    async fn perform(&mut self, session: &Session, command: Command) -> Result<(), Lost> {
        let wish = command.wish();
        match (session.perform(command).await, wish) {
            (Ok(()), wish) => wish.into_iter().for_each(|wish| self.client.handle_done(wish)),
            (Err(Failed::Lost(lost)), _) => return Err(lost),
            (Err(Failed::Refused(error)), wish) => {
                tracing::error!(broker = %self.client.url, error, "the broker refused");
                self.refused.extend(wish);
            }
        }
        Ok(())
    }

    /// Asks again for what was refused: a queue of a broker that has just started, say.
    async fn ask_again(&mut self, session: &Session) -> Result<(), Lost> {
        for wish in std::mem::take(&mut self.refused) {
            if self.client.is_wished(&wish) {
                self.perform(session, wish).await?;
            }
        }
        Ok(())
    }

    fn end(&mut self, lost: Lost) -> End {
        self.client.session.store(None);
        self.drop_waiting();
        End::Lost(lost)
    }

    /// What waits for a session that is gone would come too late.
    fn drop_waiting(&mut self) {
        let waiting: Vec<Queued> = std::iter::from_fn(|| self.commands.try_recv().ok()).collect();
        self.drop_orders(waiting);
    }

    fn drop_orders(&self, waiting: impl IntoIterator<Item = Queued>) {
        let mut dropped = 0;
        for Queued { command, .. } in waiting {
            match command {
                Command::Store(message) => _ = message.stored.send(Err(StoreFailure::Lost)),
                command => dropped += u64::from(command.is_message()),
            }
        }
        if dropped > 0 {
            self.incoming.handle_dropped(DropReason::LinkLost, dropped);
        }
    }
}
