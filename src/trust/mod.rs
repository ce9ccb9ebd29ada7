//! Trust: the peers that a node accepts, and what they may do.

mod mesh_key;
mod rules;
mod trusted_keys;
mod watched;

use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use mesh_key::{HostKeys, PROOF_LEN, Proof, Role};
pub use mesh_key::{MeshKey, MeshKeyError, MeshKeyFileError};
pub use rules::{Action, ParseRulesError, Rules, RulesError, SubjectError};
pub(crate) use rules::{Grants, RulesSource};
pub(crate) use trusted_keys::TrustedKeys;
pub use trusted_keys::{TrustedKeysError, TrustedLine};
pub(crate) use watched::Watched;

use crate::identity::NodeId;

/// The trust mode: the peers that a node accepts, and how it authenticates them.
///
/// Except in [`Trust::Open`], all network traffic is encrypted and authenticated: TLS 1.3
/// (RFC 8446) between the raw public keys (RFC 7250) that are the nodes' ids. The modes differ
/// in the keys that are accepted. A mode applies equally to dialled and accepted connections.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Trust {
    /// Processes of the same user on this host only. The node neither listens nor dials beyond
    /// loopback. On loopback TCP, a secret in the user's private folder takes the place of a mesh
    /// key.
    #[default]
    ThisHost,
    /// All nodes that hold one of these keys: one to eight, several to rotate a mesh's key.
    MeshKey(Vec<MeshKey>),
    /// All nodes whose public keys are in this file, which is reloaded when it changes. Each line
    /// has a name, a node id, and optionally roles separated by commas:
    ///
    /// ```text
    /// # name   node id                                               roles
    /// till-1   mfrgg2dfmztwq2lknnwg23tpobyxe43uov3ho6dzpiydcmrtgq2q  tills
    /// billing  nbswy3dpeb3w64tmmqqho2lunaqhg33nmuqgk5dforxgc3baorsq
    /// ```
    TrustedKeys(PathBuf),
    /// All nodes: nothing is encrypted or authenticated, so any ZeroMQ client can join. Limited to
    /// loopback unless `anywhere`.
    Open {
        /// Allows addresses beyond this host.
        anywhere: bool,
    },
}

impl Trust {
    /// The name of the mode in flags and announcements.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::ThisHost => "this-host",
            Self::MeshKey(_) => "mesh-key",
            Self::TrustedKeys(_) => "trusted-keys",
            Self::Open { .. } => "open",
        }
    }

    /// Returns true if the mode reaches beyond this host.
    pub(crate) fn reaches_networks(&self) -> bool {
        !matches!(self, Self::ThisHost | Self::Open { anywhere: false })
    }
}

/// For the fuzzer: the text of a file of mesh keys, trusted keys or rules.
#[cfg(fuzzing)]
pub(crate) fn check_text(text: &str) {
    if let Ok(keys) = MeshKey::parse_all(text) {
        assert!(keys.iter().all(|key| key.reveal().parse().as_ref() == Ok(key)));
    }
    let trusted = TrustedKeys::parse(text).unwrap_or_default();
    assert!(trusted.get(&NodeId::BROKER).is_none());
    if let Ok(rules) = text.parse::<Rules>() {
        let id = NodeId::from_bytes([1; 32]);
        let _may = rules.grants(&id, trusted.get(&id)).permit(Action::Send, "stock");
    }
}

/// The peers that are let in over a network, by their authenticated identity.
#[derive(Debug, Clone)]
pub(crate) enum LetIn {
    Anybody,
    /// The nodes that prove the key of this user on this host.
    ThisHost(Arc<HostKeys>),
    /// The nodes that prove one of these keys.
    MeshKey(Arc<Vec<MeshKey>>),
    /// The nodes whose keys are in the file.
    TrustedKeys(Arc<Watched<TrustedKeys>>),
}

impl LetIn {
    /// Loads the mode's keys. `folder` prepares the private folder of the user's nodes on this host,
    /// if the mode needs it.
    ///
    /// # Errors
    /// [`TrustError`] if the mode's keys can't be read, or the error of `folder`.
    pub(crate) fn new<E: From<TrustError>>(
        trust: &Trust,
        folder: impl FnOnce() -> Result<PathBuf, E>,
    ) -> Result<Self, E> {
        Ok(match trust {
            Trust::ThisHost => {
                let keys = HostKeys::open(&folder()?).map_err(TrustError::from)?;
                Self::ThisHost(Arc::new(keys))
            }
            Trust::MeshKey(keys) => Self::MeshKey(Arc::new(keys.clone())),
            Trust::TrustedKeys(path) => {
                let keys = Watched::open(path, TrustedKeys::load).map_err(TrustError::from)?;
                Self::TrustedKeys(Arc::new(keys))
            }
            Trust::Open { .. } => Self::Anybody,
        })
    }

    /// The mesh keys that this node proves, and of which a peer must prove one.
    pub(crate) fn mesh_keys(&self) -> Arc<Vec<MeshKey>> {
        match self {
            Self::ThisHost(keys) => keys.keys(),
            Self::MeshKey(keys) => keys.clone(),
            Self::Anybody | Self::TrustedKeys(_) => Arc::default(),
        }
    }

    /// Checks the file of this host's key, and writes it again if it was removed.
    ///
    /// # Errors
    /// [`MeshKeyFileError`] if it can be neither read nor created.
    pub(crate) fn renew(&self) -> Result<(), MeshKeyFileError> {
        match self {
            Self::ThisHost(keys) => keys.renew(),
            Self::Anybody | Self::MeshKey(_) | Self::TrustedKeys(_) => Ok(()),
        }
    }

    /// Returns true if the public key alone doesn't exclude its holder.
    pub(crate) fn trusts(&self, id: &NodeId) -> bool {
        match self {
            Self::Anybody | Self::ThisHost(_) | Self::MeshKey(_) => true,
            Self::TrustedKeys(watched) => watched.current().get(id).is_some(),
        }
    }
}

/// The permissions of the peers that are let in.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    rules: Option<Arc<Watched<Rules>>>,
    let_in: LetIn,
}

impl Access {
    /// Loads the rules, which must make sense in that trust mode, with or without sockets for this
    /// host.
    ///
    /// # Errors
    /// [`TrustError`] if the file of rules can't be used.
    pub(crate) fn new(
        rules: Option<&RulesSource>,
        trust: &Trust,
        local: bool,
        let_in: LetIn,
    ) -> Result<Self, TrustError> {
        let rules = rules.map(|rules| rules.open(trust, local)).transpose()?;
        Ok(Self { rules: rules.map(Arc::new), let_in })
    }

    pub(crate) fn let_in(&self) -> &LetIn {
        &self.let_in
    }

    pub(crate) fn rules(&self) -> Option<&Arc<Watched<Rules>>> {
        self.rules.as_ref()
    }

    /// Warns of rules for names that no trusted key has.
    pub(crate) fn warn_of_unknown_subjects(&self) {
        if let (Some(rules), LetIn::TrustedKeys(keys)) = (&self.rules, &self.let_in) {
            for subject in rules.current().unknown_to(&keys.current()) {
                tracing::warn!(
                    subject,
                    "a rule means nobody: no trusted key has this name or role"
                );
            }
        }
    }

    /// Returns false if no node with that id can be linked over a network.
    pub(crate) fn may_link(&self, id: &NodeId) -> bool {
        match &self.let_in {
            LetIn::TrustedKeys(watched) => watched.current().get(id).is_some(),
            _ => true,
        }
    }

    /// The permissions of a peer over a network. Without rules a peer may do everything, except
    /// that a trusted key may do only what a rule allows.
    pub(crate) fn grants(&self, id: &NodeId) -> Grants {
        self.grants_by(self.rules.as_ref().map(|rules| rules.current()).as_deref(), id)
    }

    /// The permissions of a peer by those rules.
    pub(crate) fn grants_by(&self, rules: Option<&Rules>, id: &NodeId) -> Grants {
        match (rules, &self.let_in) {
            (Some(rules), LetIn::TrustedKeys(keys)) => rules.grants(id, keys.current().get(id)),
            (None, LetIn::TrustedKeys(_)) => Grants::nothing(),
            (Some(rules), _) => rules.grants(id, None),
            (None, _) => Grants::Everything,
        }
    }
}

/// The keys of a trust mode, or the rules, can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error(transparent)]
    MeshKey(#[from] MeshKeyFileError),
    #[error(transparent)]
    TrustedKeys(#[from] TrustedKeysError),
    #[error(transparent)]
    Rules(#[from] RulesError),
}
