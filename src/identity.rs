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
    /// it: it is a key of small order, and refused wherever a node id comes in.
    pub const BROKER: Self = Self([0; Self::LEN]);

    /// An id from the bytes of a public key that comes from another node or a person.
    ///
    /// # Errors
    /// [`NodeIdError::SmallOrder`] if anyone could sign for the key: one of the curve's eight points
    /// of small order, for which some signatures need no private key (RFC 8032, section 8.9;
    /// Chalkias and others, *Taming the many EdDSAs*). [`NodeId::BROKER`] is one of them.
    pub fn checked(bytes: [u8; 32]) -> Result<Self, NodeIdError> {
        let [y @ .., last] = bytes;
        // The highest bit is the sign of x.
        let is_it =
            |(small, last_of_it): &([u8; 31], u8)| y == *small && last & 0x7f == *last_of_it;
        match SMALL_ORDER.iter().any(is_it) {
            true => Err(NodeIdError::SmallOrder),
            false => Ok(Self(bytes)),
        }
    }

    /// An id from the bytes of a known public key, unchecked. [`NodeId::checked`] is for bytes from
    /// elsewhere.
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

/// The y coordinates of the points of small order on Curve25519, as encoded in a public key: of the
/// orders 4, 1, 8, 8 and 2, and those that are not reduced, p and p + 1.
const SMALL_ORDER: [([u8; 31], u8); 7] = [
    ([0; 31], 0),
    (starting_with(1, 0), 0),
    (
        [
            0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef,
            0x98, 0xf0, 0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88,
            0x6d, 0x53, 0xfc,
        ],
        0x05,
    ),
    (
        [
            0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10,
            0x67, 0x0f, 0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77,
            0x92, 0xac, 0x03,
        ],
        0x7a,
    ),
    (starting_with(0xec, 0xff), 0x7f),
    (starting_with(0xed, 0xff), 0x7f),
    (starting_with(0xee, 0xff), 0x7f),
];

const fn starting_with(first: u8, rest: u8) -> [u8; 31] {
    let mut bytes = [rest; 31];
    bytes[0] = first;
    bytes
}

/// The text or the bytes are not a node id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeIdError {
    /// The text doesn't have the form of a node id.
    #[error("not a node id: expected 52 characters of base32 (a-z, 2-7)")]
    Format,
    /// The key is of small order.
    #[error(
        "not a node id: a public key of small order, for which anyone can sign; \
         `peerbus keygen` makes a key"
    )]
    SmallOrder,
}

impl FromStr for NodeId {
    type Err = NodeIdError;
    fn from_str(text: &str) -> Result<Self, NodeIdError> {
        let bytes = BASE32_NOPAD
            .decode(text.to_ascii_uppercase().as_bytes())
            .map_err(|_| NodeIdError::Format)?;
        Self::checked(bytes.try_into().map_err(|_| NodeIdError::Format)?)
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
    fn a_key_for_which_anyone_can_sign_is_no_node_id() {
        // Each encoding, with either sign.
        for (y, last) in SMALL_ORDER {
            for sign in [0, 0x80] {
                let mut bytes = [0; 32];
                bytes[..31].copy_from_slice(&y);
                bytes[31] = last | sign;
                assert_eq!(NodeId::checked(bytes), Err(NodeIdError::SmallOrder));
                let text = NodeId::from_bytes(bytes).to_string();
                assert_eq!(text.parse::<NodeId>(), Err(NodeIdError::SmallOrder));
            }
        }
        assert!(NodeId::BROKER.to_string().parse::<NodeId>().is_err());
        let id = Identity::ephemeral().node_id();
        assert_eq!(NodeId::checked(*id.as_bytes()), Ok(id));
    }

    /// Signatures of a key of small order need no private key: this is why such keys are refused.
    #[test]
    fn the_signature_check_alone_lets_a_key_of_small_order_pass() {
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, neutral);
        let signature = [neutral, [0; 32]].concat();
        assert!(key.verify(b"anything", &signature).is_ok());
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
