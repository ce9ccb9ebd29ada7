//! The flags that say whom a node talks to.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use peerbus::{MeshKey, Rules, Trust};

/// Without any of them a node talks to this user's processes on this host.
#[derive(Args, Clone)]
pub(crate) struct TrustOptions {
    /// Talk to whoever holds this key, on any network; several, separated by commas, while a mesh
    /// goes from one to the next. `peerbus keygen --mesh` makes one. Other users of this host can
    /// read a command line: a file or the environment is better
    #[arg(
        long,
        value_name = "KEY",
        env = "PEERBUS_MESH_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    mesh_key: Vec<String>,
    /// File with one mesh key a line
    #[arg(long, value_name = "FILE", env = "PEERBUS_MESH_KEY_FILE", conflicts_with = "mesh_key")]
    mesh_key_file: Option<PathBuf>,
    /// Talk to the nodes whose ids are in this file, on any network; each line has a name, an id,
    /// and roles. Read again when it changes
    #[arg(long, value_name = "FILE", env = "PEERBUS_TRUSTED_KEYS")]
    trusted_keys: Option<PathBuf>,
    /// File of rules: who may publish, subscribe, send or serve what here [default: everything,
    /// but nothing with --trusted-keys]
    #[arg(long, value_name = "FILE", env = "PEERBUS_RULES")]
    rules: Option<PathBuf>,
    /// How peers are known [default: by what is given; this-host if nothing is]
    #[arg(long, value_name = "MODE", env = "PEERBUS_TRUST")]
    trust: Option<Mode>,
    /// With --trust open: beyond this host too
    #[arg(long)]
    anywhere: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Processes of the same user on this host
    ThisHost,
    /// Whoever holds the mesh key
    MeshKey,
    /// Whoever is in the file of trusted keys
    TrustedKeys,
    /// Anybody, in clear text
    Open,
}

impl TrustOptions {
    pub(crate) fn trust(&self) -> anyhow::Result<Trust> {
        let has_key = !self.mesh_key.is_empty() || self.mesh_key_file.is_some();
        let mode = match (self.trust, has_key, &self.trusted_keys) {
            (Some(mode), ..) => mode,
            (None, true, Some(_)) => bail!(
                "a mesh key and trusted keys are given; --trust mesh-key or --trust trusted-keys \
                 says which of them counts"
            ),
            (None, true, None) => Mode::MeshKey,
            (None, false, Some(_)) => Mode::TrustedKeys,
            (None, false, None) => Mode::ThisHost,
        };
        ensure!(!self.anywhere || mode == Mode::Open, "--anywhere goes with --trust open");
        Ok(match mode {
            Mode::ThisHost => Trust::ThisHost,
            Mode::MeshKey => Trust::MeshKey(self.mesh_keys()?),
            Mode::TrustedKeys => Trust::TrustedKeys(
                self.trusted_keys
                    .clone()
                    .context("--trust trusted-keys takes --trusted-keys FILE")?,
            ),
            Mode::Open => Trust::Open { anywhere: self.anywhere },
        })
    }

    pub(crate) fn rules(&self) -> anyhow::Result<Option<Rules>> {
        Ok(self.rules.as_deref().map(Rules::load).transpose()?)
    }

    fn mesh_keys(&self) -> anyhow::Result<Vec<MeshKey>> {
        if let Some(path) = &self.mesh_key_file {
            return Ok(MeshKey::load(path)?);
        }
        ensure!(
            !self.mesh_key.is_empty(),
            "--trust mesh-key takes --mesh-key KEY or --mesh-key-file FILE; `peerbus keygen --mesh` \
             makes a key"
        );
        // What is no key may be one with a typo, so it is not repeated.
        self.mesh_key.iter().map(|key| key.trim().parse().context("--mesh-key")).collect()
    }
}
