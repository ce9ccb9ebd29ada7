//! The file of public keys that are let in, and what becomes of it while the node runs.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::interval;

use crate::identity::NodeId;
use crate::private::{self, LoosePermissions};

/// A file of trusted keys that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustedKeysError {
    /// The file can't be read.
    #[error("trusted keys {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line that makes no sense.
    #[error("trusted keys {path}, line {line}: {source}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        source: TrustedLine,
    },
    /// The file can be written by others.
    #[error("trusted keys {path} can be written by others (mode {mode:o}): chmod go-w it", path = path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// What is wrong with a line of a file of trusted keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustedLine {
    /// It has too few fields, or too many.
    #[error("it takes a name, a node id, and roles separated by commas, if any")]
    Fields,
    /// The second field is no node id.
    #[error("{0:?} is no node id (52 characters of base32; `peerbus keygen` prints it)")]
    NodeId(String),
    /// The key is in the file already.
    #[error("the node id of {0:?} is there already")]
    Twice(String),
}

/// Who a trusted key belongs to.
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

/// The public keys that are let in.
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

    fn parse(text: &str) -> Result<Self, (usize, TrustedLine)> {
        let mut keys = HashMap::new();
        for (number, line) in text.lines().enumerate() {
            let mut fields = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(name) = fields.next() else { continue };
            let wrong = |fault| (number + 1, fault);
            let (id, roles) = match (fields.next(), fields.next(), fields.next()) {
                (Some(id), roles, None) => (id, roles.unwrap_or_default()),
                _ => return Err(wrong(TrustedLine::Fields)),
            };
            let id = id.parse().map_err(|_| wrong(TrustedLine::NodeId(id.to_owned())))?;
            let roles = roles.split(',').filter(|role| !role.is_empty()).map(str::to_owned);
            let trusted = Trusted { name: name.to_owned(), roles: roles.collect() };
            if keys.insert(id, trusted).is_some() {
                return Err(wrong(TrustedLine::Twice(name.to_owned())));
            }
        }
        Ok(Self(keys))
    }
}

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What tells that a file is another than before: when it was written, how long it is, and on
/// Unix which file it is and when its mode or name changed.
type Stamp = (SystemTime, u64, [i64; 3]);

/// The trusted keys of a file, as they are now.
#[derive(Debug)]
pub(crate) struct Watched {
    path: PathBuf,
    keys: ArcSwap<TrustedKeys>,
    stamp: Option<Stamp>,
}

impl Watched {
    /// # Errors
    /// [`TrustedKeysError`] if the file can't be used.
    pub(crate) fn open(path: &Path) -> Result<Self, TrustedKeysError> {
        // Taken first: what is written meanwhile is read again.
        let stamp = stamp(path);
        let keys = ArcSwap::from_pointee(TrustedKeys::load(path)?);
        Ok(Self { path: path.into(), keys, stamp })
    }

    pub(crate) fn keys(&self) -> Arc<TrustedKeys> {
        self.keys.load_full()
    }

    /// Reads the file again when it changes, and then calls `changed` with the keys before and
    /// after. A file that can't be used
    /// leaves the keys as they were, with a warning. Runs until it is dropped.
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
                    tracing::warn!(%error, "the trusted keys stay as they were");
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
        let faults = [
            ("till\n".to_owned(), (1, TrustedLine::Fields)),
            (format!("\ntill {id} a b\n"), (2, TrustedLine::Fields)),
            ("till abc\n".to_owned(), (1, TrustedLine::NodeId("abc".into()))),
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
