//! Temporary folders.

use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A new folder with access for this user only; it is removed on drop.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Creates a folder in the system's folder for temporary files.
    pub(crate) fn new() -> anyhow::Result<Self> {
        Self::inside(&std::env::temp_dir())
    }

    pub(crate) fn inside(dir: &Path) -> anyhow::Result<Self> {
        // A name that other users can't take first.
        let random = RandomState::new().hash_one(std::process::id());
        let path = dir.join(format!("peerbus-{}-{random:016x}", std::process::id()));
        create_private(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Creates a folder with access for this user only.
pub(crate) fn create_private(path: &Path) -> anyhow::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).with_context(|| format!("{} can't be created", path.display()))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _left_behind = std::fs::remove_dir_all(&self.0);
    }
}
