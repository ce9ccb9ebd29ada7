//! Owners, modes and links of files on Unix.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;

use super::Others;

/// The number of symbolic links followed on one path; Linux's own limit.
const MAX_LINKS: usize = 40;
const STICKY: u32 = 0o1000;
/// The permission bits of others.
const WRITE: u32 = 0o022;
const READ_GROUP: u32 = 0o040;
const ALL: u32 = 0o077;

/// The reason for which a path can't be trusted, and what to do about it.
#[derive(Debug, thiserror::Error)]
struct Exposed {
    path: PathBuf,
    fault: Fault,
}

#[derive(Debug)]
enum Fault {
    /// It belongs to this other user.
    Owner(u32),
    /// A folder or link on the way to it belongs to this other user.
    OwnerAbove(u32),
    /// Others may change the file or folder, which has this mode.
    Writable(u32),
    /// Others may read the file.
    Readable(u32),
    /// Others may enter the folder.
    Enterable(u32),
    /// A link where a file of this program belongs.
    Link,
    /// It is not a file.
    NoFile,
    NoFolder,
}

impl fmt::Display for Exposed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.fault {
            Fault::Owner(uid) => write!(
                f,
                "{path} belongs to another user (uid {uid}): run this as that user, `chown {} \
                 {path}`, or name another place",
                own_uid()
            ),
            Fault::OwnerAbove(uid) => write!(
                f,
                "{path} belongs to another user (uid {uid}), who could put something else there: \
                 run this as that user, or name another place"
            ),
            Fault::Writable(mode) => write!(
                f,
                "{path} can be changed by others (mode {mode:o}): `chmod go-w {path}`, or name \
                 another place"
            ),
            Fault::Readable(mode) => {
                write!(f, "{path} can be read by others (mode {mode:o}): `chmod 600 {path}`")
            }
            Fault::Enterable(mode) => {
                write!(f, "{path} can be entered by others (mode {mode:o}): `chmod 700 {path}`")
            }
            Fault::Link => write!(f, "{path} is a symbolic link: remove it"),
            Fault::NoFile => write!(f, "{path} is not a regular file"),
            Fault::NoFolder => write!(f, "{path} is not a folder"),
        }
    }
}

impl Fault {
    fn error(self, path: &Path) -> io::Error {
        let exposed = Exposed { path: path.to_owned(), fault: self };
        io::Error::new(io::ErrorKind::PermissionDenied, exposed)
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn mode(metadata: &Metadata) -> u32 {
    metadata.mode() & 0o777
}

/// Fails with that fault unless the owner can be trusted: this user; root; or the owner of the root
/// folder, who stands for root in a user namespace that doesn't map it.
fn check_owner(path: &Path, metadata: &Metadata, fault: fn(u32) -> Fault) -> io::Result<()> {
    let owner = metadata.uid();
    if owner == own_uid() || owner == 0 || owner == fs::metadata("/")?.uid() {
        return Ok(());
    }
    Err(fault(owner).error(path))
}

/// Checks that nobody else can change the entries of a folder; in a sticky one, each entry is
/// checked for itself.
fn check_holder(path: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    check_owner(path, &metadata, Fault::OwnerAbove)?;
    if metadata.mode() & WRITE != 0 && metadata.mode() & STICKY == 0 {
        return Err(Fault::Writable(mode(&metadata)).error(path));
    }
    Ok(())
}

/// Follows a path as the system does, and checks each folder and link on the way. Returns the path
/// without links; what lies at its end is not checked, and need not exist.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut at = PathBuf::from("/");
    let mut rest: VecDeque<OsString> = parts(&std::path::absolute(path)?).collect();
    let mut links = 0;
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        check_holder(&at)?;
        at.push(part);
        if is_descriptor(&at) {
            at.extend(rest);
            return Ok(at);
        }
        match fs::symlink_metadata(&at) {
            Ok(metadata) if metadata.is_symlink() => {
                check_owner(&at, &metadata, Fault::OwnerAbove)?;
                links += 1;
                if links > MAX_LINKS {
                    return Err(rustix::io::Errno::LOOP.into());
                }
                let target = fs::read_link(&at)?;
                at.pop();
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                parts(&target).rev().for_each(|part| rest.push_front(part));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                at.extend(rest);
                return Ok(at);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(at)
}

fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    });
    parts.collect::<Vec<_>>().into_iter()
}

/// Returns true for what the process was given open, such as `/dev/stdin` or a shell's `<(…)`.
fn is_descriptor(path: &Path) -> bool {
    path.starts_with("/proc/self")
        || (cfg!(not(target_os = "linux")) && path.starts_with("/dev/fd"))
}

pub(super) fn check_way(path: &Path) -> io::Result<()> {
    resolve(path).map(drop)
}

pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // A named pipe fails, instead of waiting for another process.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = options.custom_flags(flags.bits() as i32).mode(0o600).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::LOOP.raw_os_error() => Fault::Link.error(path),
        _ => error,
    })?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(Fault::NoFile.error(path)),
    }
}

/// Opens a file that the user named, to read it. The opened file itself is checked, so that it
/// can't be replaced between the check and the reading.
pub(super) fn open_named(path: &Path, others: Others) -> io::Result<File> {
    let real = resolve(path)?;
    let mut options = OpenOptions::new();
    options.read(true);
    if is_descriptor(&real) {
        let file = options.open(path)?;
        if file.metadata()?.is_file() {
            check_file(path, &file.metadata()?, others)?;
        }
        return Ok(file);
    }
    let file = options.custom_flags(OFlags::NOFOLLOW.bits() as i32).open(&real)?;
    check_file(path, &file.metadata()?, others)?;
    Ok(file)
}

fn check_file(path: &Path, metadata: &Metadata, others: Others) -> io::Result<()> {
    if !metadata.is_file() && !metadata.file_type().is_fifo() {
        return Err(Fault::NoFile.error(path));
    }
    check_owner(path, metadata, Fault::Owner)?;
    let mode = mode(metadata);
    // A secret that an orchestrator mounts belongs to root, and its reader is in the group.
    let is_lent = metadata.uid() != own_uid() && mode & (ALL & !READ_GROUP) == 0;
    match others {
        Others::Excluded if mode & ALL != 0 && !is_lent => Err(Fault::Readable(mode).error(path)),
        Others::MayRead if mode & WRITE != 0 => Err(Fault::Writable(mode).error(path)),
        _ => Ok(()),
    }
}

/// Checks a folder, and the way to it. A folder from which others are excluded must belong to this
/// user.
pub(super) fn check_folder(path: &Path, others: Others) -> io::Result<()> {
    let real = resolve(path)?;
    let metadata = fs::symlink_metadata(&real)?;
    if !metadata.is_dir() {
        return Err(Fault::NoFolder.error(path));
    }
    check_owner(path, &metadata, Fault::Owner)?;
    let mode = mode(&metadata);
    match others {
        Others::Excluded if metadata.uid() != own_uid() => {
            Err(Fault::Owner(metadata.uid()).error(path))
        }
        Others::Excluded if mode & ALL != 0 => Err(Fault::Enterable(mode).error(path)),
        Others::MayRead if mode & WRITE != 0 => Err(Fault::Writable(mode).error(path)),
        _ => Ok(()),
    }
}

/// Closes a folder of this user to others, if they could read in it, but change nothing.
///
/// # Errors
/// The system's error, or one that says who else can change the folder.
pub(crate) fn close_folder(path: &Path) -> io::Result<()> {
    check_folder(path, Others::MayRead)?;
    let metadata = fs::metadata(path)?;
    if metadata.uid() != own_uid() {
        return Err(Fault::Owner(metadata.uid()).error(path));
    }
    if mode(&metadata) & ALL != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Returns true if a folder exists, belongs to this user, and can't be changed by others.
pub(crate) fn is_ours(folder: &Path) -> bool {
    let belongs = || fs::metadata(folder).is_ok_and(|it| it.is_dir() && it.uid() == own_uid());
    belongs() && check_folder(folder, Others::MayRead).is_ok()
}

/// Makes a new name in a folder durable: neither the sync of the file itself nor that of a folder
/// inside does.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) => Path::new("."),
        None => return Ok(()),
    };
    match File::open(folder) {
        Ok(folder) => folder.sync_all(),
        // A folder that is writable but not readable can't be synced.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
    }
}
