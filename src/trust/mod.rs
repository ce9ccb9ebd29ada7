//! Whom a node talks to.

mod mesh_key;
mod rules;
mod trusted_keys;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use mesh_key::{MeshKey, MeshKeyError, MeshKeyFileError};
pub(crate) use mesh_key::{PROOF_LEN, Proof, Role};
pub(crate) use rules::Grants;
pub use rules::{Action, ParseRulesError, Rules, RulesError};
pub(crate) use trusted_keys::{TrustedKeys, Watched};
pub use trusted_keys::{TrustedKeysError, TrustedLine};

use crate::identity::NodeId;

/// Whom a node talks to, and how it knows them.
///
/// But for [`Trust::Open`], whatever passes a network is encrypted and authenticated: TLS 1.3
/// (RFC 8446) between the raw public keys (RFC 7250) that are the nodes' ids. The modes differ
/// in whose keys are let in. A mode holds for what a node dials as for what dials it.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Trust {
    /// Processes of the same user on this host, and nobody else. Nothing beyond loopback is
    /// listened on or dialled. On loopback TCP, a secret in the user's private folder takes the
    /// place of a mesh key.
    #[default]
    ThisHost,
    /// Whoever holds one of these keys: one to eight, several while a mesh goes from one to the
    /// next.
    MeshKey(Vec<MeshKey>),
    /// Whoever's public key is in this file, which is read again when it changes. Each line has
    /// a name, a node id, and roles separated by commas, if any:
    ///
    /// ```text
    /// # name   node id                                               roles
    /// till-1   mfrgg2dfmztwq2lknnwg23tpobyxe43uov3ho6dzpiydcmrtgq2q  tills
    /// billing  nbswy3dpeb3w64tmmqqho2lunaqhg33nmuqgk5dforxgc3baorsq
    /// ```
    TrustedKeys(PathBuf),
    /// Anybody: nothing is encrypted or authenticated, so that any ZeroMQ client can join. Only
    /// on loopback, unless `anywhere`.
    Open {
        /// Beyond this host too.
        anywhere: bool,
    },
}

impl Trust {
    /// The name that flags and announcements have for it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::ThisHost => "this-host",
            Self::MeshKey(_) => "mesh-key",
            Self::TrustedKeys(_) => "trusted-keys",
            Self::Open { .. } => "open",
        }
    }

    /// Whether it reaches beyond this host.
    pub(crate) fn reaches_networks(&self) -> bool {
        !matches!(self, Self::ThisHost | Self::Open { anywhere: false })
    }
}

/// Who is let in over a network, once it is known who that is.
#[derive(Debug, Clone)]
pub(crate) enum LetIn {
    Anybody,
    /// Whoever proves one of these keys.
    MeshKey(Vec<MeshKey>),
    /// Whoever's key is in the file.
    TrustedKeys(Arc<Watched>),
}

impl LetIn {
    /// `folder` is where the user's nodes meet on this host; it is the user's alone.
    ///
    /// # Errors
    /// What keeps the mode's keys from being read.
    pub(crate) fn new(trust: &Trust, folder: &Path) -> Result<Self, TrustError> {
        Ok(match trust {
            Trust::ThisHost => Self::MeshKey(vec![mesh_key::of_this_host(folder)?]),
            Trust::MeshKey(keys) => Self::MeshKey(keys.clone()),
            Trust::TrustedKeys(path) => Self::TrustedKeys(Arc::new(Watched::open(path)?)),
            Trust::Open { .. } => Self::Anybody,
        })
    }

    /// The mesh keys that are proved, and that a peer may prove.
    pub(crate) fn mesh_keys(&self) -> &[MeshKey] {
        match self {
            Self::MeshKey(keys) => keys,
            Self::Anybody | Self::TrustedKeys(_) => &[],
        }
    }

    /// Whether the holder of this public key is let in as far as that alone decides it.
    pub(crate) fn trusts(&self, id: &NodeId) -> bool {
        match self {
            Self::Anybody | Self::MeshKey(_) => true,
            Self::TrustedKeys(watched) => watched.keys().get(id).is_some(),
        }
    }
}

/// What those may do who are let in.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    rules: Option<Rules>,
    let_in: LetIn,
}

impl Access {
    pub(crate) fn new(rules: Option<Rules>, let_in: LetIn) -> Self {
        Self { rules, let_in }
    }

    /// What a peer may do that came over a network. Without rules, everything; but trusted keys
    /// may do nothing that no rule allows.
    pub(crate) fn grants(&self, id: &NodeId) -> Grants {
        match (&self.rules, &self.let_in) {
            (Some(rules), LetIn::TrustedKeys(watched)) => rules.grants(id, watched.keys().get(id)),
            (None, LetIn::TrustedKeys(_)) => Grants::nothing(),
            (Some(rules), _) => rules.grants(id, None),
            (None, _) => Grants::Everything,
        }
    }
}

/// The keys of a trust mode can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error(transparent)]
    MeshKey(#[from] MeshKeyFileError),
    #[error(transparent)]
    TrustedKeys(#[from] TrustedKeysError),
}
