//! `peerbus keygen`

use std::path::PathBuf;

use clap::Args;
use peerbus::{Identity, MeshKey};
use serde_json::json;

#[derive(Args)]
pub(crate) struct Keygen {
    /// File for the new key; must not exist
    #[arg(required_unless_present = "mesh")]
    file: Option<PathBuf>,
    /// Make a mesh key instead of an identity. Without FILE, the key itself is printed; with FILE,
    /// a fingerprint to tell keys apart
    #[arg(long)]
    mesh: bool,
    /// Print the public data of an existing file, and create none
    #[arg(long, requires = "file")]
    show: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Keygen {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match (&self.file, self.mesh) {
            (Some(file), true) => {
                let keys = match self.show {
                    true => MeshKey::load(file)?,
                    false => vec![MeshKey::create(file)?],
                };
                let prints: Vec<String> = keys.iter().map(MeshKey::fingerprint).collect();
                let value = json!({ "fingerprints": prints, "file": file });
                crate::output::line(self.json, &value, || prints.join("\n"))?;
                Ok(())
            }
            (Some(file), false) => {
                let identity = match self.show {
                    true => Identity::load(file)?,
                    false => Identity::create(file)?,
                };
                let id = identity.node_id();
                let value = json!({ "node_id": id, "file": file });
                crate::output::line(self.json, &value, || id.to_string())?;
                Ok(())
            }
            (None, _) => {
                let key = MeshKey::generate().reveal();
                crate::output::line(self.json, &json!({ "mesh_key": key }), || key.clone())?;
                Ok(())
            }
        }
    }
}
