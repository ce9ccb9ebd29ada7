//! Files and folders with access for this user only.

use std::io;
use std::path::Path;

/// The permission bits of a file that are looser than wanted.
pub(crate) struct LoosePermissions(pub(crate) u32);

/// Creates a file with mode 0600.
///
/// # Errors
/// The system's error; also if the file exists.
#[cfg(unix)]
pub(crate) fn create_file(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    sync_folder_of(path)
}

/// Makes a new name in a folder durable: neither the sync of the file itself nor that of a folder
/// inside does.
#[cfg(unix)]
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) => Path::new("."),
        None => return Ok(()),
    };
    match std::fs::File::open(folder) {
        Ok(folder) => folder.sync_all(),
        // A folder that is writable but not readable can't be synced.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(not(unix))]
pub(crate) fn create_file(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The permission bits of a file, if other users may read or write it.
#[cfg(unix)]
pub(crate) fn looser(path: &Path) -> io::Result<Option<LoosePermissions>> {
    let mode = mode(path)?;
    Ok((mode & 0o077 != 0).then_some(LoosePermissions(mode)))
}

/// The permission bits of a file, if other users may write it.
#[cfg(unix)]
pub(crate) fn writable_by_others(path: &Path) -> io::Result<Option<LoosePermissions>> {
    let mode = mode(path)?;
    Ok((mode & 0o022 != 0).then_some(LoosePermissions(mode)))
}

#[cfg(unix)]
fn mode(path: &Path) -> io::Result<u32> {
    use std::os::unix::fs::PermissionsExt;
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o777)
}

#[cfg(not(unix))]
pub(crate) fn writable_by_others(_: &Path) -> io::Result<Option<LoosePermissions>> {
    Ok(None)
}

#[cfg(not(unix))]
pub(crate) fn looser(_: &Path) -> io::Result<Option<LoosePermissions>> {
    Ok(None)
}

/// Creates a folder with mode 0700, and its missing parents, unless it exists. The result is
/// durable.
///
/// # Errors
/// The system's error.
#[cfg(unix)]
pub(crate) fn create_folder(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let new = path.ancestors().take_while(|folder| {
        *folder != Path::new("") && std::fs::symlink_metadata(folder).is_err()
    });
    let new: Vec<&Path> = new.collect();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    new.into_iter().try_for_each(sync_folder_of)
}

#[cfg(not(unix))]
pub(crate) fn create_folder(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)
}
