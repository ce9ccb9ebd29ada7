//! Mesh keys: the secret that the nodes of a mesh share.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use data_encoding::BASE32_NOPAD;
use ring::hmac;

use crate::identity::{NodeId, random_bytes, random_u64};
use crate::private::{self, Others};

/// A mesh key: 256 random bits, shared by the nodes of a mesh.
///
/// The text form is `peerbus-mesh-` and 58 characters of base32 (RFC 4648, lower case), which end
/// in a checksum, so that a typo is detected. A key is always generated, never chosen: anyone who
/// made one connection could guess a short secret offline.
///
/// Neither `Debug` nor any error shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct MeshKey([u8; MeshKey::LEN]);

const PREFIX: &str = "peerbus-mesh-";
/// The domain separators of the HMACs, so that a proof means nothing elsewhere.
const PROOF: &[u8] = b"peerbus mesh proof 1";
const TAG: &[u8] = b"peerbus mdns tag 1";
const FINGERPRINT: &[u8] = b"peerbus fingerprint 1";

/// The length of a proof that its maker holds a mesh key.
pub(crate) const PROOF_LEN: usize = 32;
pub(crate) type Proof = [u8; PROOF_LEN];

/// The end of a connection that makes a proof, so that a proof can't be reflected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Dialler = 1,
    Listener = 2,
}

/// The text is not a mesh key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MeshKeyError {
    /// The text doesn't have the form of a mesh key.
    #[error(
        "not a mesh key: expected {PREFIX} and 58 more characters; \
         `peerbus keygen --mesh` makes one"
    )]
    Format,
    /// The text has the form of a mesh key, but its checksum is wrong.
    #[error("the mesh key has a typo: its checksum is wrong")]
    Checksum,
}

/// A mesh key file that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeshKeyFileError {
    /// The file can't be read or created, or other users can read or replace it.
    #[error("mesh key file {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A line is not a mesh key.
    #[error("mesh key file {path}, line {line}: {source}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// The error of that line.
        source: MeshKeyError,
    },
    /// The file holds no key.
    #[error("mesh key file {path} holds no key", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl MeshKey {
    const LEN: usize = 32;

    /// Draws a new key from the system's random source.
    pub fn generate() -> Self {
        Self(random_bytes())
    }

    /// Draws a new key and keeps it in a new file with mode 0600.
    ///
    /// # Errors
    /// [`MeshKeyFileError::File`] if the file can't be created, exists, or could be replaced by other
    /// users.
    pub fn create(path: &Path) -> Result<Self, MeshKeyFileError> {
        let key = Self::generate();
        private::create_file(path, &format!("{}\n", key.reveal()))
            .map_err(|source| MeshKeyFileError::File { path: path.into(), source })?;
        Ok(key)
    }

    /// Loads the keys of a file, one per line. Empty lines and lines that begin with `#` are
    /// skipped.
    ///
    /// # Errors
    /// [`MeshKeyFileError`] if the file can't be read, other users can read or replace it, or it
    /// holds anything that is not a key.
    pub fn load(path: &Path) -> Result<Vec<Self>, MeshKeyFileError> {
        let path_buf = || path.to_path_buf();
        let file_error = |source| MeshKeyFileError::File { path: path_buf(), source };
        let text = private::read(path, Others::Excluded).map_err(file_error)?;
        let broken = |(line, source)| MeshKeyFileError::Line { path: path_buf(), line, source };
        let keys = Self::parse_all(&text).map_err(broken)?;
        if keys.is_empty() {
            return Err(MeshKeyFileError::Empty { path: path_buf() });
        }
        Ok(keys)
    }

    /// Parses the text of a file. An error comes with the number of its line.
    pub(super) fn parse_all(text: &str) -> Result<Vec<Self>, (usize, MeshKeyError)> {
        let lines = text.lines().map(str::trim).enumerate();
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        lines.map(|(number, line)| line.parse().map_err(|error| (number + 1, error))).collect()
    }

    /// The key as text. Anyone who reads it can join the mesh.
    pub fn reveal(&self) -> String {
        let mut bytes = self.0.to_vec();
        bytes.extend_from_slice(&self.checksum());
        format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    }

    /// Eight characters by which people can tell keys apart; they reveal nothing of the key.
    pub fn fingerprint(&self) -> String {
        let tag = hmac::sign(&self.hmac(), FINGERPRINT);
        BASE32_NOPAD.encode(&tag.as_ref()[..5]).to_ascii_lowercase()
    }

    /// The proof of `role` over bytes that only the two ends of one TLS connection know.
    pub(crate) fn prove(&self, role: Role, exported: &[u8]) -> Proof {
        let mut proof = [0; PROOF_LEN];
        proof.copy_from_slice(hmac::sign(&self.hmac(), &proven(role, exported)).as_ref());
        proof
    }

    /// Returns true if a holder of this key in `role` made `proof`. Takes constant time.
    pub(crate) fn verifies(&self, role: Role, exported: &[u8], proof: &Proof) -> bool {
        hmac::verify(&self.hmac(), &proven(role, exported), proof).is_ok()
    }

    /// The tag in a node's mDNS record: 80 bits in base32. Anyone can repeat it; at most it saves
    /// other nodes a dial.
    pub(crate) fn tag(&self, id: &NodeId) -> String {
        let tag = hmac::sign(&self.hmac(), &[TAG, id.as_bytes()].concat());
        BASE32_NOPAD.encode(&tag.as_ref()[..10]).to_ascii_lowercase()
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }

    fn checksum(&self) -> [u8; 4] {
        crc32c::crc32c(&self.0).to_be_bytes()
    }
}

/// The key that this user's nodes share on this host; the first node creates it. If the file is
/// removed, the running nodes write their key again; if another key is there by then, they prove
/// and accept both.
#[derive(Debug)]
pub(crate) struct HostKeys {
    path: PathBuf,
    /// The last one read is first.
    keys: ArcSwap<Vec<MeshKey>>,
}

impl HostKeys {
    /// Loads the key from the private folder of this user's nodes.
    ///
    /// # Errors
    /// [`MeshKeyFileError`] if it can be neither read nor created.
    pub(super) fn open(folder: &Path) -> Result<Self, MeshKeyFileError> {
        let path = folder.join("host.key");
        let key = load_or_keep(&path, &MeshKey::generate())?;
        Ok(Self { path, keys: ArcSwap::from_pointee(vec![key]) })
    }

    pub(super) fn keys(&self) -> Arc<Vec<MeshKey>> {
        self.keys.load_full()
    }

    /// Reads the file again, or writes it again if it is gone.
    pub(super) fn renew(&self) -> Result<(), MeshKeyFileError> {
        let keys = self.keys();
        let Some(newest) = keys.first() else { return Ok(()) };
        let there = load_or_keep(&self.path, newest)?;
        if there != *newest {
            let earlier = keys.iter().filter(|key| **key != there).cloned();
            let all = std::iter::once(there.clone()).chain(earlier).take(MAX_HOST_KEYS);
            self.keys.store(Arc::new(all.collect()));
        }
        Ok(())
    }
}

/// The most keys that a node proves when the file was replaced; a peer accepts up to 8 proofs.
const MAX_HOST_KEYS: usize = 8;

/// Loads the key of a file, which is created with `key` if it is missing.
fn load_or_keep(path: &Path, key: &MeshKey) -> Result<MeshKey, MeshKeyFileError> {
    if !path.exists() {
        let fresh = path.with_extension(format!("key.{:016x}", random_u64()));
        let made = private::create_file(&fresh, &key.reveal());
        // A hard link never replaces a key that another node has just created.
        let _there_already = made.and_then(|()| fs::hard_link(&fresh, path));
        let _never_made = fs::remove_file(&fresh);
    }
    MeshKey::load(path).map(|mut keys| keys.remove(0))
}

fn proven(role: Role, exported: &[u8]) -> Vec<u8> {
    [PROOF, &[role as u8], exported].concat()
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshKey({})", self.fingerprint())
    }
}

impl FromStr for MeshKey {
    type Err = MeshKeyError;
    fn from_str(text: &str) -> Result<Self, MeshKeyError> {
        let body = text.strip_prefix(PREFIX).ok_or(MeshKeyError::Format)?;
        let bytes = BASE32_NOPAD
            .decode(body.to_ascii_uppercase().as_bytes())
            .map_err(|_| MeshKeyError::Format)?;
        let (key, checksum) = bytes.split_first_chunk().ok_or(MeshKeyError::Format)?;
        let key = Self(*key);
        match checksum.len() {
            4 if checksum == key.checksum() => Ok(key),
            4 => Err(MeshKeyError::Checksum),
            _ => Err(MeshKeyError::Format),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_being_written_and_read_and_a_typo_is_noticed() {
        let key = MeshKey::generate();
        let text = key.reveal();
        assert_eq!(text.parse(), Ok(key));
        let last = if text.ends_with('a') { "b" } else { "a" };
        let typo = format!("{}{last}", &text[..text.len() - 1]);
        assert!(typo.parse::<MeshKey>().is_err());
        let place = PREFIX.len() + 3;
        let other = if &text[place..=place] == "q" { "r" } else { "q" };
        let typo = format!("{}{other}{}", &text[..place], &text[place + 1..]);
        assert_eq!(typo.parse::<MeshKey>(), Err(MeshKeyError::Checksum));
        for text in ["", "hunter2", PREFIX, "peerbus-mesh-aaaa"] {
            assert_eq!(text.parse::<MeshKey>(), Err(MeshKeyError::Format), "{text}");
        }
    }

    #[test]
    fn a_proof_holds_for_one_key_one_role_and_one_connection() {
        let (key, other) = (MeshKey::generate(), MeshKey::generate());
        let proof = key.prove(Role::Dialler, b"this connection");
        assert!(key.verifies(Role::Dialler, b"this connection", &proof));
        assert!(!other.verifies(Role::Dialler, b"this connection", &proof));
        assert!(!key.verifies(Role::Listener, b"this connection", &proof), "reflected");
        assert!(!key.verifies(Role::Dialler, b"another connection", &proof), "replayed");
    }

    #[test]
    fn what_is_shown_tells_nothing_of_the_key() {
        let key = MeshKey::generate();
        let shown =
            format!("{key:?} {} {}", key.fingerprint(), key.tag(&NodeId::from_bytes([1; 32])));
        let secret = key.reveal()[PREFIX.len()..].to_owned();
        for start in 0..secret.len() - 8 {
            assert!(!shown.contains(&secret[start..start + 8]), "{shown}");
        }
    }

    #[test]
    fn a_file_has_a_key_a_line_and_its_faults_are_named_without_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.key");
        let (one, two) = (MeshKey::generate(), MeshKey::generate());
        let text = format!("# since May\n{}\n\n{}\n", one.reveal(), two.reveal());
        private::create_file(&path, &text).unwrap();
        assert_eq!(MeshKey::load(&path).unwrap(), [one.clone(), two]);

        let broken = dir.path().join("broken.key");
        private::create_file(&broken, &format!("{}\n{}x\n", one.reveal(), one.reveal())).unwrap();
        let error = MeshKey::load(&broken).err().unwrap();
        assert!(matches!(error, MeshKeyFileError::Line { line: 2, .. }), "{error}");
        assert!(!error.to_string().contains(&one.reveal()));

        let empty = dir.path().join("empty.key");
        private::create_file(&empty, "# none yet\n").unwrap();
        assert!(matches!(MeshKey::load(&empty), Err(MeshKeyFileError::Empty { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.key");
        private::create_file(&path, &MeshKey::generate().reveal()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = MeshKey::load(&path).err().unwrap();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}
