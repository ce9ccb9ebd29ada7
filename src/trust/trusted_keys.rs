//! The file of trusted public keys, reloaded when it changes.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::interval;

use crate::identity::{NodeId, NodeIdError};
use crate::private::{self, LoosePermissions};

/// A trusted keys file that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustedKeysError {
    /// The file can't be read.
    #[error("trusted keys {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A line is invalid.
    #[error("trusted keys {path}, line {line}: {source}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// The fault of the line.
        source: TrustedLine,
    },
    /// Other users can write to the file.
    #[error("trusted keys {path} can be written by others (mode {mode:o}): chmod go-w it", path = path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// The permission bits.
        mode: u32,
    },
}

/// The fault of a line in a trusted keys file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustedLine {
    /// The line has too few or too many fields.
    #[error("expected a name, a node id, and optionally roles separated by commas")]
    Fields,
    /// The second field is not a node id.
    #[error("{text:?}: {source}")]
    NodeId {
        /// The field.
        text: String,
        /// Its fault.
        source: NodeIdError,
    },
    /// The key occurs on an earlier line.
    #[error("the node id of {0:?} occurs twice; remove one of the lines")]
    Twice(String),
}

/// The owner of a trusted key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trusted {
    pub(crate) name: String,
    pub(crate) roles: Vec<String>,
}

impl Trusted {
    pub(crate) fn has_role(&self, role: &str) -> bool {
        self.roles.iter().any(|it| it == role)
    }
}

/// The trusted public keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TrustedKeys(HashMap<NodeId, Trusted>);

impl TrustedKeys {
    pub(crate) fn get(&self, id: &NodeId) -> Option<&Trusted> {
        self.0.get(id)
    }

    fn load(path: &Path) -> Result<Self, TrustedKeysError> {
        let file_error = |source| TrustedKeysError::File { path: path.into(), source };
        let text = fs::read_to_string(path).map_err(file_error)?;
        if let Some(LoosePermissions(mode)) =
            private::writable_by_others(path).map_err(file_error)?
        {
            return Err(TrustedKeysError::Mode { path: path.into(), mode });
        }
        let broken = |(line, source)| TrustedKeysError::Line { path: path.into(), line, source };
        Self::parse(&text).map_err(broken)
    }

    pub(super) fn parse(text: &str) -> Result<Self, (usize, TrustedLine)> {
        let mut keys = HashMap::new();
        for (number, line) in text.lines().enumerate() {
            let mut fields = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(name) = fields.next() else { continue };
            let wrong = |fault| (number + 1, fault);
            let (id, roles) = match (fields.next(), fields.next(), fields.next()) {
                (Some(id), roles, None) => (id, roles.unwrap_or_default()),
                _ => return Err(wrong(TrustedLine::Fields)),
            };
            let id = id
                .parse()
                .map_err(|source| wrong(TrustedLine::NodeId { text: id.to_owned(), source }))?;
            let roles = roles.split(',').filter(|role| !role.is_empty()).map(str::to_owned);
            let trusted = Trusted { name: name.to_owned(), roles: roles.collect() };
            if keys.insert(id, trusted).is_some() {
                return Err(wrong(TrustedLine::Twice(name.to_owned())));
            }
        }
        Ok(Self(keys))
    }
}

/// The interval at which the file is checked for changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The stamp by which a change of the file is detected: its modification time and its length; on
/// Unix also its inode and change time.
type Stamp = (SystemTime, u64, [i64; 3]);

/// The current trusted keys of a file.
#[derive(Debug)]
pub(crate) struct Watched {
    path: PathBuf,
    keys: ArcSwap<TrustedKeys>,
    stamp: Option<Stamp>,
}

impl Watched {
    /// Loads the file.
    ///
    /// # Errors
    /// [`TrustedKeysError`] if the file can't be used.
    pub(crate) fn open(path: &Path) -> Result<Self, TrustedKeysError> {
        // The stamp is taken first, so that a write in between causes a reload.
        let stamp = stamp(path);
        let keys = ArcSwap::from_pointee(TrustedKeys::load(path)?);
        Ok(Self { path: path.into(), keys, stamp })
    }

    pub(crate) fn keys(&self) -> Arc<TrustedKeys> {
        self.keys.load_full()
    }

    /// Reloads the file when it changes, then calls `changed` with the keys before and after. A
    /// file that can't be used leaves the keys unchanged, with a warning. Runs until it is dropped.
    pub(crate) async fn watch(self: Arc<Self>, changed: impl Fn(&TrustedKeys, &TrustedKeys)) {
        let mut stamp = self.stamp;
        let mut ticks = interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            let now = self::stamp(&self.path);
            if now == stamp {
                continue;
            }
            stamp = now;
            match TrustedKeys::load(&self.path) {
                Ok(keys) if keys == **self.keys.load() => {}
                Ok(keys) => {
                    tracing::info!(keys = keys.0.len(), "the trusted keys have changed");
                    let keys = Arc::new(keys);
                    let before = self.keys.swap(keys.clone());
                    changed(&before, &keys);
                }
                Err(error) => {
                    tracing::warn!(%error, "trusted keys not reloaded; the old ones stay in force");
                }
            }
        }
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    #[cfg(unix)]
    let changed = {
        use std::os::unix::fs::MetadataExt;
        [metadata.ino() as i64, metadata.ctime(), metadata.ctime_nsec()]
    };
    #[cfg(not(unix))]
    let changed = [0; 3];
    Some((metadata.modified().ok()?, metadata.len(), changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_key_and_its_roles() {
        let (one, two) = (NodeId::from_bytes([1; 32]), NodeId::from_bytes([2; 32]));
        let text = format!("# tills\n\ntill-1 {one} tills,readers # left door\nbilling\t{two}\n");
        let keys = TrustedKeys::parse(&text).unwrap();
        assert_eq!(keys.get(&one).unwrap().roles, ["tills", "readers"]);
        assert_eq!(keys.get(&two).unwrap().name, "billing");
        assert_eq!(keys.get(&NodeId::from_bytes([3; 32])), None);
    }

    #[test]
    fn what_makes_no_sense_is_named_by_its_line() {
        let id = NodeId::from_bytes([1; 32]);
        let weak = NodeId::BROKER.to_string();
        let no_id = |text: &str, source| TrustedLine::NodeId { text: text.into(), source };
        let faults = [
            ("till\n".to_owned(), (1, TrustedLine::Fields)),
            (format!("\ntill {id} a b\n"), (2, TrustedLine::Fields)),
            ("till abc\n".to_owned(), (1, no_id("abc", NodeIdError::Format))),
            (format!("till {weak}\n"), (1, no_id(&weak, NodeIdError::SmallOrder))),
            (format!("a {id}\nb {id}\n"), (2, TrustedLine::Twice("b".into()))),
        ];
        for (text, fault) in faults {
            assert_eq!(TrustedKeys::parse(&text), Err(fault), "{text}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        assert!(matches!(Watched::open(&path), Err(TrustedKeysError::Mode { mode: 0o664, .. })));
    }
}
