//! The flags that choose the peers that a node accepts.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use peerbus::{MeshKey, Secret, Trust};

use crate::secrets;

/// Without any of these flags, a node accepts only this user's processes on this host.
#[derive(Args, Clone)]
pub(crate) struct TrustOptions {
    /// Connect to every node that holds this key, on any network; several, separated by commas, to
    /// rotate a mesh's key. `peerbus keygen --mesh` makes one. Other users of this host can read
    /// command lines: prefer a file or the environment
    #[arg(
        long,
        value_name = "KEY",
        env = "PEERBUS_MESH_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    mesh_key: Vec<Secret>,
    /// File with one mesh key per line
    #[arg(long, value_name = "FILE", env = "PEERBUS_MESH_KEY_FILE", conflicts_with = "mesh_key")]
    mesh_key_file: Option<PathBuf>,
    /// Connect to the nodes whose ids are in this file, on any network; each line has a name, an id
    /// and roles. The file is reloaded when it changes
    #[arg(long, value_name = "FILE", env = "PEERBUS_TRUSTED_KEYS")]
    trusted_keys: Option<PathBuf>,
    /// File of rules: which peers may publish, subscribe, send or serve which names here. The file is
    /// reloaded when it changes [default: all may do everything; with --trusted-keys, nothing]
    #[arg(long, value_name = "FILE", env = "PEERBUS_RULES")]
    pub(crate) rules: Option<PathBuf>,
    /// Authentication of peers [default: by the given keys; without keys, this-host]
    #[arg(long, value_name = "MODE", env = "PEERBUS_TRUST")]
    trust: Option<Mode>,
    /// With --trust open: accept connections from beyond this host
    #[arg(long)]
    anywhere: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Processes of the same user on this host
    ThisHost,
    /// Every node that holds the mesh key
    MeshKey,
    /// Every node listed in the file of trusted keys
    TrustedKeys,
    /// Every node, in clear text
    Open,
}

impl TrustOptions {
    pub(crate) fn trust(&self) -> anyhow::Result<Trust> {
        let has_key = !self.mesh_key.is_empty() || self.mesh_key_file.is_some();
        let mode = match (self.trust, has_key, &self.trusted_keys) {
            (Some(mode), ..) => mode,
            (None, true, Some(_)) => bail!(
                "a mesh key and trusted keys are given; choose one by --trust mesh-key or \
                 --trust trusted-keys"
            ),
            (None, true, None) => Mode::MeshKey,
            (None, false, Some(_)) => Mode::TrustedKeys,
            (None, false, None) => Mode::ThisHost,
        };
        ensure!(!self.anywhere || mode == Mode::Open, "--anywhere requires --trust open");
        let keys_are_used = matches!(mode, Mode::MeshKey | Mode::TrustedKeys);
        ensure!(
            keys_are_used || !has_key && self.trusted_keys.is_none(),
            "keys are given (by a flag or the environment), and --trust {} uses none: leave out one \
             of the two",
            if mode == Mode::Open { "open" } else { "this-host" }
        );
        Ok(match mode {
            Mode::ThisHost => Trust::ThisHost,
            Mode::MeshKey => Trust::MeshKey(self.mesh_keys()?),
            Mode::TrustedKeys => Trust::TrustedKeys(
                self.trusted_keys
                    .clone()
                    .context("--trust trusted-keys requires --trusted-keys FILE")?,
            ),
            Mode::Open => Trust::Open { anywhere: self.anywhere },
        })
    }

    /// Warns of keys on the command line.
    pub(crate) fn warn_if_on_command_line(&self) {
        for key in &self.mesh_key {
            secrets::warn_if_on_command_line(key, "--mesh-key-file");
        }
    }

    fn mesh_keys(&self) -> anyhow::Result<Vec<MeshKey>> {
        if let Some(path) = &self.mesh_key_file {
            return Ok(MeshKey::load(path)?);
        }
        ensure!(
            !self.mesh_key.is_empty(),
            "--trust mesh-key requires --mesh-key KEY or --mesh-key-file FILE; `peerbus keygen --mesh` \
             makes a key"
        );
        // A text that is not a key may be a key with a typo, so the error doesn't repeat it.
        let parse = |key: &Secret| key.reveal().trim().parse().context("--mesh-key");
        self.mesh_key.iter().map(parse).collect()
    }
}
