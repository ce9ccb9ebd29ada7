//! Files and folders that are for this user alone.

use std::io;
use std::path::Path;

/// The mode of a file that others may read or write.
pub(crate) struct LoosePermissions(pub(crate) u32);

/// Creates a file with mode 0600.
///
/// # Errors
/// What the system says; also if it is there already.
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

/// Makes a name last that is new in its folder: neither the file's own sync nor that of a folder
/// beneath does.
#[cfg(unix)]
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) => Path::new("."),
        None => return Ok(()),
    };
    match std::fs::File::open(folder) {
        Ok(folder) => folder.sync_all(),
        // One that may be written to but not read can't be synced.
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

/// The mode of a file that others than this user may read or write.
#[cfg(unix)]
pub(crate) fn looser(path: &Path) -> io::Result<Option<LoosePermissions>> {
    let mode = mode(path)?;
    Ok((mode & 0o077 != 0).then_some(LoosePermissions(mode)))
}

/// The mode of a file that others than this user may write.
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

/// Makes a folder with mode 0700, and those above it, unless it is there. What is made lasts.
///
/// # Errors
/// What the system says.
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
