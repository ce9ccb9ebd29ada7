//! Node identities: Ed25519 key pairs and the ids made of them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::{Serialize, Serializer};

use crate::opaque::opaque;
use crate::private::{self, Others};

/// A node's identity: its Ed25519 public key, written in base32 without padding (RFC 4648), 52
/// lower-case characters.
///
/// The id is stable across restarts if the node has an identity file; otherwise it is drawn anew at
/// each start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// The length in bytes.
    pub const LEN: usize = 32;

    /// The id of the broker in broker mode ([`Config::broker`](crate::Config::broker)). No node has
    /// it, since no key pair does.
    pub const BROKER: Self = Self([0; Self::LEN]);

    /// An id from the bytes of a public key.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes of the public key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight characters, for people; not unique.
    pub fn short(&self) -> String {
        if *self == Self::BROKER {
            return "(broker)".into();
        }
        let mut text = self.to_string();
        text.truncate(8);
        text
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

impl Serialize for NodeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The text is not a node id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a node id: expected 52 characters of base32 (a-z, 2-7)")]
#[non_exhaustive]
pub struct NodeIdError;

impl FromStr for NodeId {
    type Err = NodeIdError;
    fn from_str(text: &str) -> Result<Self, NodeIdError> {
        let bytes =
            BASE32_NOPAD.decode(text.to_ascii_uppercase().as_bytes()).map_err(|_| NodeIdError)?;
        bytes.try_into().map(Self).map_err(|_| NodeIdError)
    }
}

/// A random number drawn at each start of a node, so that an earlier run is never mistaken for the
/// current one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(pub(crate) u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The key pair of a node.
pub struct Identity {
    id: NodeId,
    /// The private key, PKCS#8 DER.
    pkcs8: Vec<u8>,
}

opaque!(Identity, |it| id: it.id);

/// An identity file that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file can't be read or created, or other users can read or replace it.
    #[error("identity file {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file exists, but holds no Ed25519 key.
    #[error(
        "identity file {path} holds no Ed25519 private key in PKCS#8 PEM; \
         to start with a new identity, name a file that does not exist yet",
        path = path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
    },
}

const PEM_HEAD: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_TAIL: &str = "-----END PRIVATE KEY-----";

impl Identity {
    /// Draws a new identity, for this run only.
    pub fn ephemeral() -> Self {
        Self::from_pkcs8(&generate()).expect("a key that was just generated parses")
    }

    /// Loads the identity kept in `path` (PKCS#8 PEM). A missing file is created with a new key and
    /// mode 0600.
    ///
    /// # Errors
    /// [`IdentityError`] if the file can't be read or written, other users can read or replace it, or
    /// it holds no Ed25519 key.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match Self::load(path) {
            Err(IdentityError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Self::create(path)
            }
            loaded => loaded,
        }
    }

    /// Loads the identity kept in `path` (PKCS#8 PEM).
    ///
    /// # Errors
    /// [`IdentityError`] if the file can't be read, other users can read or replace it, or it holds
    /// no Ed25519 key.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let file_error = |source| IdentityError::File { path: path.into(), source };
        let format = || IdentityError::Format { path: path.into() };
        let pem = private::read(path, Others::Excluded).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => format(),
            _ => file_error(error),
        })?;
        decode_pem(&pem).and_then(|der| Self::from_pkcs8(&der)).ok_or_else(format)
    }

    /// Draws a new identity and keeps it in a new file with mode 0600 (PKCS#8 PEM).
    ///
    /// # Errors
    /// [`IdentityError::File`] if the file can't be written, exists, or could be replaced by other
    /// users.
    pub fn create(path: &Path) -> Result<Self, IdentityError> {
        let der = generate();
        private::create_file(path, &encode_pem(&der))
            .map_err(|source| IdentityError::File { path: path.into(), source })?;
        Ok(Self::from_pkcs8(&der).expect("a key that was just generated parses"))
    }

    /// The public key.
    pub fn node_id(&self) -> NodeId {
        self.id
    }

    /// The private key, PKCS#8 DER.
    pub(crate) fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok()?;
        let id = NodeId(key.public_key().as_ref().try_into().ok()?);
        Some(Self { id, pkcs8: der.to_vec() })
    }
}

fn generate() -> Vec<u8> {
    Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .expect("the system's random source works")
        .as_ref()
        .to_vec()
}

fn encode_pem(der: &[u8]) -> String {
    format!("{PEM_HEAD}\n{}\n{PEM_TAIL}\n", data_encoding::BASE64.encode(der))
}

fn decode_pem(pem: &str) -> Option<Vec<u8>> {
    let body = pem.split_once(PEM_HEAD)?.1.split_once(PEM_TAIL)?.0;
    let text: String = body.split_whitespace().collect();
    data_encoding::BASE64.decode(text.as_bytes()).ok()
}

impl IdentityError {
    /// Returns true if the file does not exist.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Eight random bytes from the system.
pub(crate) fn random_u64() -> u64 {
    u64::from_le_bytes(random_bytes())
}

pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system's random source works");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_id_survives_being_written_and_read() {
        let id = Identity::ephemeral().node_id();
        let text = id.to_string();
        assert_eq!(text.len(), 52);
        assert_eq!(text.parse::<NodeId>().unwrap(), id);
        assert!("abc".parse::<NodeId>().is_err());
    }

    #[test]
    fn an_identity_file_keeps_the_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        let first = Identity::load_or_create(&path).unwrap().node_id();
        let second = Identity::load_or_create(&path).unwrap().node_id();
        assert_eq!(first, second);
    }

    #[test]
    fn a_file_that_is_no_key_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        private::create_file(&path, "shopping list").unwrap();
        let error = Identity::load_or_create(&path).err().unwrap();
        assert!(matches!(error, IdentityError::Format { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "shopping list");
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        Identity::load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Identity::load_or_create(&path).err().unwrap();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}
