//! Discovery on this host: nodes of one user and mesh find each other by the sockets in a folder.
//!
//! ```text
//!  $XDG_RUNTIME_DIR/peerbus/        mode 0700
//!    default/                       the mesh's name
//!      k3vq7a2m.sock                one node; a new name at each start
//!    host.key                       the key that they prove over loopback TCP
//! ```
//!
//! Where `$XDG_RUNTIME_DIR` is not set, or belongs to another user (as after `sudo -E`), the folder is
//! `peerbus-UID` in the system's folder for temporary files.
//!
//! A logout or a cleaner of temporary files may remove all of it. Running nodes then make it again.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::interval;

use super::{Discovered, Sink};
use crate::address::MeshName;
use crate::engine::{Sighting, TargetKey};
use crate::identity::random_bytes;
use crate::peer::{Address, Source};
use crate::private::{self, Others};

/// The scan interval. A new node dials the sockets that it finds, so rescans catch rare races only.
const RESCAN: Duration = Duration::from_secs(2);
/// The age from which a socket that refuses connections counts as left behind by a dead process.
const STALE_AFTER: Duration = Duration::from_secs(5);

/// Creates the mesh's folder, for this user alone.
///
/// # Errors
/// The folder, and the reason it can't be used: it belongs to another user, or others may enter.
pub(crate) fn prepare(
    root: Option<&Path>,
    mesh: &MeshName,
) -> Result<PathBuf, (PathBuf, io::Error)> {
    let root = root.map_or_else(default_root, Path::to_path_buf);
    let dir = root.join(mesh.as_str());
    for dir in [&root, &dir] {
        private::create_folder(dir, Others::Excluded).map_err(|source| (dir.clone(), source))?;
    }
    Ok(dir)
}

/// The path of a new socket in a mesh's folder.
pub(crate) fn fresh_socket(dir: &Path) -> PathBuf {
    let name = data_encoding::BASE32_NOPAD.encode(&random_bytes::<5>()).to_ascii_lowercase();
    dir.join(format!("{name}.sock"))
}

/// Returns the sockets of a folder; `None` if it can't be read now, for example for want of a file
/// descriptor.
fn sockets(dir: &Path) -> Option<HashSet<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(HashSet::new()),
        Err(_) => return None,
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_socket = |path: &PathBuf| path.extension().is_some_and(|it| it == "sock");
    Some(paths.filter(is_socket).collect())
}

fn default_root() -> PathBuf {
    let fallback = std::env::temp_dir().join(shared_name());
    let dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    // The XDG specification tells programs to ignore relative paths.
    match dir.filter(|dir| dir.is_absolute()) {
        Some(dir) if private::is_ours(&dir) => dir.join("peerbus"),
        Some(dir) => {
            let (dir, instead) = (dir.display(), fallback.display());
            tracing::info!(%dir, %instead, "XDG_RUNTIME_DIR is not this user's own: not used");
            fallback
        }
        None => fallback,
    }
}

/// The name of the folder in a place that all users share.
#[cfg(unix)]
fn shared_name() -> String {
    format!("peerbus-{}", rustix::process::geteuid().as_raw())
}

#[cfg(not(unix))]
fn shared_name() -> String {
    "peerbus".into()
}

/// Reports sockets that appear and disappear in the folder of this node's own, which is left out.
/// Before each scan, `renew` checks that the own one is still there, and returns it; `None` if the
/// node has none. Runs until it is dropped.
pub(crate) async fn watch(mut renew: impl FnMut() -> Option<PathBuf> + Send, sink: Sink) {
    let mut known = HashSet::new();
    let mut ticks = interval(RESCAN);
    loop {
        ticks.tick().await;
        let Some(own) = renew() else { continue };
        let Some(mut found) = own.parent().and_then(sockets) else { continue };
        found.remove(&own);
        for path in found.difference(&known) {
            let addresses = vec![Address::Local(path.clone())];
            sink(Discovered::Seen(Sighting { source: Source::Local, id: None, addresses }));
        }
        for path in known.difference(&found) {
            sink(Discovered::Gone(TargetKey::Address(Address::Local(path.clone()))));
        }
        known = found;
    }
}

/// Removes a socket that refused a connection, if it is old enough that its process must be dead: a
/// new one may be about to listen. Anything else at that path stays.
pub(crate) fn remove_if_stale(path: &Path) {
    let metadata = fs::symlink_metadata(path).ok().filter(is_socket);
    let age = metadata.and_then(|metadata| metadata.modified().ok());
    if age.and_then(|at| at.elapsed().ok()).is_some_and(|age| age >= STALE_AFTER) {
        tracing::debug!(path = %path.display(), "removing the socket of a dead process");
        let _gone_already = fs::remove_file(path);
    }
}

#[cfg(unix)]
fn is_socket(metadata: &fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type())
}

#[cfg(not(unix))]
fn is_socket(_: &fs::Metadata) -> bool {
    true
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_folder_that_others_can_enter_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (dir, error) = prepare(Some(root.path()), &MeshName::default()).err().unwrap();
        assert_eq!(dir, root.path());
        assert!(error.to_string().contains("chmod 700"), "{error}");
    }

    #[test]
    fn a_dead_socket_is_removed_once_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let dead = dir.path().join("dead.sock");
        drop(UnixListener::bind(&dead).unwrap());
        remove_if_stale(&dead);
        assert!(dead.exists(), "it may be about to listen");
        set_modified(&dead, std::time::SystemTime::now() - 2 * STALE_AFTER);
        remove_if_stale(&dead);
        assert!(!dead.exists());
    }

    /// Sets the time by a command, since a socket can't be opened.
    fn set_modified(path: &Path, at: std::time::SystemTime) {
        let stamp = at.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let set = std::process::Command::new("touch")
            .arg("-d")
            .arg(format!("@{stamp}"))
            .arg(path)
            .status()
            .unwrap();
        assert!(set.success());
    }
}
