//! A file that the user named for a result.

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// A file that gets its content as a whole at the end: until then, an earlier file of that name stays
/// as it is. A symbolic link, which another user may have put there, is refused.
pub(crate) struct OutputFile {
    path: PathBuf,
    /// The file beside it that takes its place; `None` for a device, which is written in place.
    beside: Option<(PathBuf, File)>,
}

impl OutputFile {
    /// Fails if the file can't be written.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let named = || path.display().to_string();
        let beside = match fs::metadata(path) {
            Ok(metadata) if !metadata.is_file() && !metadata.is_dir() => None,
            _ => {
                let link = fs::symlink_metadata(path).is_ok_and(|it| it.is_symlink());
                ensure!(!link, "{} is a symbolic link; name the file itself", path.display());
                ensure!(!path.is_dir(), "{} is a folder; name a file", path.display());
                let random = RandomState::new().hash_one(std::process::id());
                let mut beside = path.as_os_str().to_owned();
                beside.push(format!(".{random:016x}"));
                let file = File::options().write(true).create_new(true).open(&beside);
                Some((PathBuf::from(beside), file.with_context(named)?))
            }
        };
        Ok(Self { path: path.to_owned(), beside })
    }

    pub(crate) fn finish(mut self, text: &str) -> anyhow::Result<()> {
        let written = match &mut self.beside {
            Some((beside, file)) => {
                file.write_all(text.as_bytes()).and_then(|()| fs::rename(beside, &self.path))
            }
            None => fs::write(&self.path, text),
        };
        written.with_context(|| self.path.display().to_string())?;
        self.beside = None;
        Ok(())
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if let Some((beside, _)) = &self.beside {
            let _left_behind = fs::remove_file(beside);
        }
    }
}
