//! Files and folders that other users of this host must not read or change. All that a node keeps
//! is opened here, under the rules of sshd's `StrictModes`:
//!
//! * Files and folders belong to this user, or to root.
//! * Others may write to none of them, nor to the folders above: a folder that others may write to,
//!   such as `/tmp`, must be sticky.
//! * Others may not read secrets. The group may read one that belongs to root, as in a container.
//! * Symbolic links are followed only on the way to a file that the user named, if this user or root
//!   made them.
//! * New files are made exclusively, with mode 0600, and new folders with mode 0700.
//!
//! Outside Unix, the system's own rules apply.

#[cfg(not(unix))]
mod elsewhere;
#[cfg(unix)]
mod unix;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

#[cfg(not(unix))]
use elsewhere as system;
#[cfg(unix)]
use unix as system;

use system::{check_folder, check_way, open_named, sync_folder_of};
pub(crate) use system::{close_folder, is_ours};

/// The rights of other users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Others {
    /// They may neither read nor write.
    Excluded,
    /// They may read.
    MayRead,
}

/// The maximum length of a file of keys, names or rules, in bytes.
const MAX_TEXT: u64 = 16 * 1024 * 1024;

/// Reads a file that the user named.
///
/// # Errors
/// The system's error, or one that says who else can read or change the file.
pub(crate) fn read(path: &Path, others: Others) -> io::Result<String> {
    let file = open_named(path, others)?;
    let mut text = String::new();
    file.take(MAX_TEXT + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_TEXT {
        let error = format!("it has more than {} MiB", MAX_TEXT >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, error));
    }
    Ok(text)
}

/// Creates a file with this text, durably.
///
/// # Errors
/// The system's error, also if the file exists; or one that says who else can change the file.
pub(crate) fn create_file(path: &Path, text: &str) -> io::Result<()> {
    check_way(path)?;
    let mut file = create(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            io::Error::new(error.kind(), format!("{error}; name a new file"))
        }
        _ => error,
    })?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() {
        let _best_effort = fs::remove_file(path);
    }
    written?;
    sync_folder_of(path)
}

/// Creates an empty file.
///
/// # Errors
/// The system's error, also if there is anything of that name.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().write(true).create_new(true))
}

/// Creates an empty file in place of any other of that name.
///
/// # Errors
/// The system's error.
pub(crate) fn create_anew(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => create(path),
    }
}

/// Opens a file in a folder of this user. Symbolic links are refused, and so is all that is not a
/// regular file. A new file has mode 0600.
///
/// # Errors
/// The system's error.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    system::open(path, options)
}

/// Creates a folder, and its missing parents, with mode 0700, unless it exists. The result is
/// durable.
///
/// # Errors
/// The system's error, or one that says who else can change or enter the folder.
pub(crate) fn create_folder(path: &Path, others: Others) -> io::Result<()> {
    check_way(path)?;
    let new = path
        .ancestors()
        .take_while(|folder| *folder != Path::new("") && fs::symlink_metadata(folder).is_err());
    let new: Vec<&Path> = new.collect();
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(path)?;
    new.into_iter().try_for_each(sync_folder_of)?;
    check_folder(path, others)
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
mod tests;
