//! The file of trusted public keys.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::identity::{NodeId, NodeIdError};
use crate::private::{self, Others};

/// A trusted keys file that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustedKeysError {
    /// The file can't be read, or other users can change it.
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

    /// Returns true if a key has that name or role.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.0.values().any(|it| it.name == name || it.has_role(name))
    }

    pub(super) fn load(path: &Path) -> Result<Self, TrustedKeysError> {
        let file_error = |source| TrustedKeysError::File { path: path.into(), source };
        let text = private::read(path, Others::MayRead).map_err(file_error)?;
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
        use std::fs;
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        let error = TrustedKeys::load(&path).err().unwrap();
        assert!(error.to_string().contains("chmod go-w"), "{error}");
    }
}
