//! The start of a node: composes core and carrier by the configuration.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::ending::{Life, RuntimeGuard};
use super::{Inner, Node};
use crate::carrier::Carrier;
use crate::carrier::broker::{
    BrokerCarrier, BrokerHandle, BrokerUrl, BrokerUrlError, RefusedByBroker,
};
use crate::carrier::mesh::durable::Durable;
use crate::carrier::mesh::store::{self, Store, StoreError};
use crate::carrier::mesh::{MeshCarrier, MeshHandle, MeshParts, SocketError};
use crate::clock::unix_ms;
use crate::config::Config;
use crate::core::Core;
use crate::engine::delivery::{Now, OutboxConfig};
use crate::engine::{Budget, Mesh, MeshConfig, Time};
use crate::identity::{Identity, IdentityError, Incarnation, NodeId, random_u64};
use crate::journal::Options;
use crate::trust::{MeshKeyFileError, RulesError, TrustError, TrustedKeysError};
use crate::wire::{LANES, Limits};

/// The error of starting a node. It names the setting to change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Contradictory or invalid settings.
    #[error("{0}")]
    Config(String),
    /// There is no tokio runtime here.
    #[error("a node runs in a tokio runtime, and there is none here; start it in one")]
    NoRuntime,
    /// The identity file can't be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The key that this user's nodes share on this host can't be read or created.
    #[error(transparent)]
    HostKey(MeshKeyFileError),
    /// The file of trusted keys can't be used.
    #[error(transparent)]
    TrustedKeys(TrustedKeysError),
    /// The file of rules can't be used.
    #[error(transparent)]
    Rules(RulesError),
    /// The store can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The address can't be listened on.
    #[error("can't listen on {addr}: {source}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The broker's address can't be used.
    #[error(transparent)]
    BrokerUrl(#[from] BrokerUrlError),
    /// The broker refuses this node permanently, for example because of wrong credentials, or of a
    /// queue that exists with other settings.
    #[error("the broker {url} refused: {reason}")]
    Broker {
        /// The broker's address.
        url: BrokerUrl,
        /// The broker's reason.
        reason: String,
    },
    /// The folder of this host's sockets and key can't be used.
    #[error(
        "can't use the folder of this host's sockets, {dir}: {source}; --runtime-dir names another \
         one, and --no-local with a mesh key or trusted keys needs none",
        dir = dir.display()
    )]
    SocketDir {
        /// The folder.
        dir: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Multicast DNS can't be used.
    #[error("mDNS can't be used: {0}; turn it off with --no-mdns")]
    Mdns(String),
}

impl From<TrustError> for StartError {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::MeshKey(error) => Self::HostKey(error),
            TrustError::TrustedKeys(error) => Self::TrustedKeys(error),
            TrustError::Rules(error) => Self::Rules(error),
        }
    }
}

impl From<RefusedByBroker> for StartError {
    fn from(RefusedByBroker { url, reason }: RefusedByBroker) -> Self {
        Self::Broker { url, reason }
    }
}

impl From<SocketError> for StartError {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::SocketDir { dir, source } => Self::SocketDir { dir, source },
            SocketError::Trust(error) => error.into(),
            SocketError::Listen { addr, source } => Self::Listen { addr, source },
            SocketError::Mdns(reason) => Self::Mdns(reason),
        }
    }
}

impl Config {
    /// Starts the node.
    ///
    /// # Errors
    /// [`StartError`] names the setting that must change.
    pub async fn start(self) -> Result<Node, StartError> {
        Node::start(self).await
    }
}

impl Node {
    /// Boxed, so that a node's code is compiled once, here, and not in each crate that starts one.
    #[inline(never)]
    pub(crate) fn start(config: Config) -> BoxFuture<'static, Result<Self, StartError>> {
        Box::pin(Self::start_here(config))
    }

    async fn start_here(config: Config) -> Result<Self, StartError> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(StartError::NoRuntime);
        }
        config.check().map_err(StartError::Config)?;
        if let Some(dir) = &config.outbox {
            store::prepare(dir)?;
        }
        let kept = config.outbox.as_ref().map(|dir| dir.join(store::IDENTITY));
        let identity = match config.identity.as_ref().or(kept.as_ref()) {
            Some(path) => Identity::load_or_create(path)?,
            None => Identity::ephemeral(),
        };
        let (id, started) = (identity.node_id(), Instant::now());
        let store = match &config.outbox {
            Some(dir) => Some(open_store(dir.clone(), id, &config, started).await?),
            None => None,
        };
        let name = config.name.clone().unwrap_or_else(host_name);
        keep_freed_memory(config.window);
        let core = Core::new(id, name, config, started);
        // From here on the node's tasks end with this guard, if the start fails.
        let begun = EndOnError(Some(core.clone()));
        let (carrier, durable, listening) = carrier(&core, &identity, store).await?;
        core.spawn_own();
        begun.disarm();
        let lost = OnceLock::new();
        let inner = Arc::new(Inner { core, carrier, durable, listening, lost });
        RuntimeGuard::watch(&inner);
        Ok(Self { life: Arc::new(Life(inner)) })
    }
}

/// Ends the tasks of a node whose start fails.
struct EndOnError(Option<Arc<Core>>);

impl EndOnError {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for EndOnError {
    fn drop(&mut self) {
        self.0.iter().for_each(|core| core.abort_tasks());
    }
}

type Carried = (Box<dyn Carrier>, Option<Arc<Durable>>, Vec<SocketAddr>);

/// Creates the carrier by the configuration. No other code reads which one that is.
async fn carrier(
    core: &Arc<Core>,
    identity: &Identity,
    store: Option<Store>,
) -> Result<Carried, StartError> {
    let config = &core.config;
    if let Some(url) = &config.broker {
        let url: BrokerUrl = url.reveal().parse()?;
        let url = match &config.broker_credentials {
            Some(credentials) => url.with_credentials(credentials.clone())?,
            None => url,
        };
        let carrier = BrokerCarrier::connect(core, url).await?;
        return Ok((Box::new(BrokerHandle(carrier)), None, Vec::new()));
    }
    let limits = Limits { max_body: config.max_body as u64, windows: [config.window; LANES] };
    let mesh_config = MeshConfig {
        id: core.id,
        incarnation: Incarnation(random_u64()),
        mesh: config.mesh.clone(),
        name: core.name.clone(),
        limits,
        gossip: config.gossip,
        loopback_only: !config.trust.reaches_networks(),
        dials_per_second: config.dials_per_second,
        budget: Budget::new(config.peer_memory),
    };
    let parts = MeshParts { mesh: Mesh::new(mesh_config, random_u64()), limits, store };
    let (mesh, listening) = match &config.memory {
        Some(network) => (MeshCarrier::over_memory(core, parts, network), Vec::new()),
        None => MeshCarrier::over_sockets(core, parts, identity).await?,
    };
    let handle = MeshHandle(mesh);
    let durable = handle.durable().cloned();
    Ok((Box::new(handle), durable, listening))
}

/// Reads the store on a blocking thread, since that may take long.
async fn open_store(
    dir: PathBuf,
    me: NodeId,
    config: &Config,
    started: Instant,
) -> Result<Store, StartError> {
    let outbox = OutboxConfig {
        me,
        epoch: random_u64(),
        seed: random_u64(),
        max_bytes: config.outbox_bytes,
        max_messages: config.outbox_messages,
        window_bytes: config.window.min(config.send_queue) / 2,
        retry: config.retry,
        hold_keys: config.hold_keys,
        segment_size: Options::default().segment_size,
        reassign_after: config.reassign_after,
        gone_after: config.gone_after,
        lapse_after: config.forget_subscribers_after,
    };
    let options = Options { durability: config.durability, ..Options::default() };
    let open = move || {
        let now = Now { time: Time::after_start(started.elapsed()), unix_ms: unix_ms() };
        Store::open(&dir, &options, outbox, now)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    Ok(opened.map_err(|error| StartError::Config(error.to_string()))??)
}

/// Keeps glibc from returning memory to the system and requesting it again for each message: in two
/// runs of three, a receiver of 64 KiB bodies did so, at a third of its rate. glibc returns free
/// memory at the end of its heap beyond twice the largest mapped block that was ever freed
/// (`mallopt(3)`, `M_MMAP_THRESHOLD`). So a block of a window's size is mapped and freed,
/// untouched. Other allocators are not affected.
fn keep_freed_memory(window: u64) {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(window as usize)));
}

#[cfg(unix)]
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host_name() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_else(|_| "node".into())
}
