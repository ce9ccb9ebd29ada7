//! Files and folders of other users. Root can make them; for anybody else these tests are skipped.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(unix, feature = "cli"))]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const ROOT: u32 = 0;
const USER: u32 = 1;
const STRANGER: u32 = 65534;

/// A folder that all users share, as `/tmp` is.
struct Shared(TempDir);

impl Shared {
    /// `None` if this test can't act for other users.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
        let shared = Self(dir);
        let works =
            |uid| shared.command(uid, &["--version"]).output().is_ok_and(|it| it.status.success());
        let is_root = rustix::process::geteuid().is_root();
        if !is_root || !works(USER) {
            println!(
                "SKIPPED: only root can act for other users, who must be able to run {}",
                BINARY
            );
            return None;
        }
        Some(shared)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A folder of that user.
    fn folder(&self, name: &str, owner: u32, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        path
    }

    fn command(&self, uid: u32, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(args).uid(uid).gid(uid).stdin(Stdio::null()).current_dir("/");
        command.env_remove("XDG_RUNTIME_DIR").env("TMPDIR", self.0.path());
        command
    }

    fn run(&self, uid: u32, args: &[&str]) -> Output {
        self.command(uid, args).output().unwrap()
    }
}

const BINARY: &str = env!("CARGO_BIN_EXE_peerbus");
const PEERS: [&str; 4] = ["peers", "--wait", "10ms", "--no-mdns"];

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn fails(output: &Output, told: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    for told in told {
        assert!(stderr.contains(told), "{stderr:?} does not say {told:?}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_taken_folder_for_sockets_is_named_and_there_are_ways_without_it() {
    let Some(shared) = Shared::new() else { return };
    shared.folder("peerbus-1", STRANGER, 0o700);
    let told = ["peerbus-1 belongs to another user (uid 65534)", "--runtime-dir", "--no-local"];
    fails(&shared.run(USER, &PEERS), &told);
    let own = shared.path("own");
    succeeds(&shared.run(USER, &[&PEERS[..], &["--runtime-dir", text(&own)]].concat()));
    succeeds(&shared.command(USER, &PEERS).env("PEERBUS_RUNTIME_DIR", &own).output().unwrap());
    let key = shared.path("mesh.key");
    succeeds(&shared.run(USER, &["keygen", "--mesh", text(&key)]));
    let keyed = ["--no-local", "--mesh-key-file", text(&key)];
    succeeds(&shared.run(USER, &[&PEERS[..], &keyed].concat()));
    // A link to a folder of the user is no better than the folder itself, if a stranger made it.
    fs::remove_dir(shared.path("peerbus-1")).unwrap();
    symlink(&own, shared.path("peerbus-1")).unwrap();
    std::os::unix::fs::lchown(shared.path("peerbus-1"), Some(STRANGER), None).unwrap();
    fails(&shared.run(USER, &PEERS), &["belongs to another user (uid 65534)"]);
}

#[test]
fn the_runtime_folder_of_another_user_is_left_alone() {
    let Some(shared) = Shared::new() else { return };
    for (owner, other) in [(USER, ROOT), (ROOT, USER)] {
        let runtime = shared.folder(&format!("run-{owner}"), owner, 0o700);
        let peers = |uid| shared.command(uid, &PEERS).env("XDG_RUNTIME_DIR", &runtime).output();
        succeeds(&peers(other).unwrap());
        assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0, "uid {other} left something");
        assert!(shared.path(&format!("peerbus-{other}")).is_dir());
        succeeds(&peers(owner).unwrap());
        assert_eq!(fs::metadata(runtime.join("peerbus")).unwrap().uid(), owner);
    }
}

#[test]
fn nothing_is_stored_in_a_folder_of_another_user() {
    let Some(shared) = Shared::new() else { return };
    let victims = shared.folder("victims", USER, 0o755);
    let precious = victims.join("precious");
    fs::write(&precious, "precious").unwrap();
    chown(&precious, Some(USER), Some(USER)).unwrap();
    let store = shared.folder("store", STRANGER, 0o777);
    for journal in ["outbox", "inbox"] {
        let folder = shared.folder(&format!("store/{journal}"), STRANGER, 0o777);
        for name in ["spare", "manifest", "manifest.new", "journal.lock"] {
            symlink(&precious, folder.join(name)).unwrap();
        }
    }
    let send = ["send", "nobody", "top secret", "--guaranteed", "--no-mdns", "--wait", "10ms"];
    let before = fs::read_dir(store.join("outbox")).unwrap().count();
    fails(
        &shared.run(USER, &[&send[..], &["--outbox", text(&store)]].concat()),
        &["belongs to another user (uid 65534)", "name another place"],
    );
    fails(&shared.run(USER, &["outbox", "purge", "--all", text(&store)]), &["another user"]);
    assert_eq!(fs::read_dir(store.join("outbox")).unwrap().count(), before);
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
}

#[test]
fn root_reads_a_users_store_and_changes_it_only_as_that_user() {
    let Some(shared) = Shared::new() else { return };
    let store = shared.path("store");
    let send = ["send", "nobody", "kept", "--guaranteed", "--no-mdns", "--wait", "10ms"];
    succeeds(&shared.run(USER, &[&send[..], &["--outbox", text(&store)]].concat()));
    let listed = shared.run(ROOT, &["outbox", "list", "--json", text(&store)]);
    succeeds(&listed);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("kept"), "{listed:?}");
    assert_eq!(listed.stderr, b"", "its node could start");
    let purge = ["outbox", "purge", text(&store), "1"];
    fails(&shared.run(ROOT, &purge), &["run this as that user"]);
    succeeds(&shared.run(USER, &purge));
}

#[test]
fn a_key_is_taken_from_its_user_or_from_root_alone() {
    let Some(shared) = Shared::new() else { return };
    let key = shared.path("mesh.key");
    succeeds(&shared.run(ROOT, &["keygen", "--mesh", text(&key)]));
    let show = ["keygen", "--mesh", "--show", text(&key)];
    // As an orchestrator mounts it.
    chown(&key, Some(ROOT), Some(USER)).unwrap();
    fs::set_permissions(&key, Permissions::from_mode(0o440)).unwrap();
    succeeds(&shared.run(USER, &show));
    fs::set_permissions(&key, Permissions::from_mode(0o444)).unwrap();
    fails(&shared.run(USER, &show), &["can be read by others", "chmod 600"]);
    fs::set_permissions(&key, Permissions::from_mode(0o440)).unwrap();
    chown(&key, Some(STRANGER), Some(USER)).unwrap();
    fails(&shared.run(USER, &show), &["belongs to another user (uid 65534)"]);
    // A stranger can't make a command create its file elsewhere, either.
    symlink(shared.path("elsewhere"), shared.path("new.key")).unwrap();
    std::os::unix::fs::lchown(shared.path("new.key"), Some(STRANGER), None).unwrap();
    let made = shared.run(USER, &["keygen", "--mesh", text(&shared.path("new.key"))]);
    fails(&made, &["another user"]);
    assert!(!shared.path("elsewhere").exists());
}
