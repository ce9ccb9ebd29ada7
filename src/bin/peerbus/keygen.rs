//! `peerbus keygen`

use std::path::PathBuf;

use clap::Args;
use peerbus::Identity;
use serde_json::json;

#[derive(Args)]
pub(crate) struct Keygen {
    /// File for the new identity; must not exist
    file: PathBuf,
    /// Print the node id of an identity file that is there, and create none
    #[arg(long)]
    show: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Keygen {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let identity = match self.show {
            true => Identity::load(&self.file)?,
            false => Identity::create(&self.file)?,
        };
        let id = identity.node_id();
        let value = json!({ "node_id": id, "file": self.file });
        crate::output::line(self.json, &value, || id.to_string())?;
        Ok(())
    }
}
