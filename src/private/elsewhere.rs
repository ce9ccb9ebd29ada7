//! Where files have neither an owner nor a mode that this program knows.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use super::Others;

pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.open(path)
}

pub(super) fn open_named(path: &Path, _: Others) -> io::Result<File> {
    File::open(path)
}

pub(super) fn check_way(_: &Path) -> io::Result<()> {
    Ok(())
}

pub(super) fn check_folder(_: &Path, _: Others) -> io::Result<()> {
    Ok(())
}

pub(crate) fn close_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

pub(crate) fn is_ours(folder: &Path) -> bool {
    folder.is_dir()
}

pub(super) fn sync_folder_of(_: &Path) -> io::Result<()> {
    Ok(())
}
