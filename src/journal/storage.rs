//! Storage of segments: a directory, or in tests a disk that crashes on purpose.

#[cfg(unix)]
use std::fs::Metadata;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::identity::random_bytes;
use crate::private::{self, Others};
use crate::sync::lock_unranked as lock;

/// The disk operations that a journal needs. Segments are files, identified by number.
pub(super) trait Storage: Send + Sync {
    /// Returns the numbers of the existing segments, in ascending order.
    fn segments(&self) -> io::Result<Vec<u64>>;
    /// Creates an empty segment, to be written once from start to end.
    fn create(&self, number: u64) -> io::Result<Box<dyn SegmentFile>>;
    /// Reads from offset `at` until `buf` is full or the file ends; returns the bytes read.
    fn read(&self, number: u64, at: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Returns the length of the file, including zeros after its data.
    fn length(&self, number: u64) -> io::Result<u64>;
    /// Syncs a segment that an earlier process wrote.
    fn sync(&self, number: u64) -> io::Result<()>;
    fn remove(&self, number: u64) -> io::Result<()>;
    /// Returns the whole manifest, if there is one.
    fn manifest(&self) -> io::Result<Option<Vec<u8>>>;
    /// Replaces the manifest atomically and durably: a crash leaves the old one or the new one.
    fn replace_manifest(&self, bytes: &[u8]) -> io::Result<()>;
    /// Overwrites a part of the manifest in place, which needs no disk space.
    fn write_manifest(&self, at: u64, bytes: &[u8]) -> io::Result<()>;
    /// Syncs the manifest.
    fn sync_manifest(&self) -> io::Result<()>;
    /// Syncs the directory: creations and removals become durable.
    fn sync_directory(&self) -> io::Result<()>;
    /// Returns the number of free bytes; `None` if unknown.
    fn free(&self) -> Option<u64>;
    /// Reserves that many bytes for when the disk is full, unless they are reserved already.
    fn take_spare(&self, bytes: u64) -> io::Result<()>;
    /// Releases the reserved bytes; returns true if there were any.
    fn give_spare(&self) -> io::Result<bool>;
}

/// A segment that is being written.
pub(super) trait SegmentFile: Send {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Syncs the appended bytes.
    fn sync(&mut self) -> io::Result<()>;
    /// Undoes a failed write completely, and syncs what was appended before it. Nothing can be
    /// appended afterwards.
    fn retract(&mut self) -> io::Result<()>;
    /// Fails with [`Gone`] if the file was removed or replaced.
    fn check(&self) -> io::Result<()>;
}

/// The folder, or a file in it, was removed or replaced while in use.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} was removed or replaced while in use, with the messages stored in it: restore it, or \
     restart with a new folder",
    path = .0.display()
)]
pub(super) struct Gone(PathBuf);

impl Gone {
    pub(super) fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }

    fn error(path: &Path) -> io::Error {
        io::Error::new(io::ErrorKind::NotFound, Self(path.to_owned()))
    }
}

/// A local directory, locked for the lifetime of this value.
pub(super) struct Directory {
    path: PathBuf,
    /// The segment read last.
    reading: Mutex<Option<(u64, File)>>,
    manifest: Mutex<Option<File>>,
    /// The folder and its lock, as opened; `None` if opened only to read.
    opened: Option<Opened>,
    /// The shared lock that keeps other processes from writing.
    _reads: Option<File>,
}

struct Opened {
    #[cfg(unix)]
    folder: File,
    _lock: File,
}

/// The lock file, which marks a directory as a journal's. Its user locks it.
const LOCK: &str = "journal.lock";
const SUFFIX: &str = ".segment";
/// The spare file, which reserves space for when the disk is full.
const SPARE: &str = "spare";
pub(super) const MANIFEST: &str = "manifest";
const NEW_MANIFEST: &str = "manifest.new";

/// Returns the file name of a segment.
pub(super) fn file_name(number: u64) -> String {
    format!("{number:016x}{SUFFIX}")
}

/// The error of opening a journal's directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Another process has the directory open.
    #[error("another process uses it")]
    InUse,
    /// The directory holds other files and no journal.
    #[error("it holds other files ({0}) and no journal: name an empty or a new folder")]
    Foreign(String),
    /// The operating system reported an error.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Directory {
    /// Opens a journal's directory, or creates one.
    pub(super) fn open(path: &Path) -> Result<Self, DirectoryError> {
        private::create_folder(path, Others::MayRead)?;
        let lock = path.join(LOCK);
        if !lock.exists() {
            check_ours(path)?;
        }
        private::close_folder(path)?;
        let file = private::open(&lock, File::options().create(true).truncate(false).write(true))?;
        check_lock(file.try_lock())?;
        let opened = Opened {
            #[cfg(unix)]
            folder: File::open(path)?,
            _lock: file,
        };
        Ok(Self { opened: Some(opened), ..Self::look_at(path) })
    }

    /// Opens a directory to read it. Writes nothing; no process can open it for writing meanwhile.
    pub(super) fn open_to_read(path: &Path) -> Result<Self, DirectoryError> {
        let lock = match read(&path.join(LOCK)) {
            Ok(lock) => lock,
            // No process has it open: opening creates the lock file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                check_ours(path)?;
                return Ok(Self::look_at(path));
            }
            Err(error) => return Err(error.into()),
        };
        check_lock(lock.try_lock_shared())?;
        Ok(Self { _reads: Some(lock), ..Self::look_at(path) })
    }

    /// Accesses a directory that another process may use, without a lock. Writes nothing.
    pub(super) fn look_at(path: &Path) -> Self {
        let (reading, manifest) = (Mutex::default(), Mutex::default());
        Self { path: path.to_owned(), reading, manifest, opened: None, _reads: None }
    }

    /// Fails with [`Gone`] if the path no longer leads to the opened folder.
    #[cfg(unix)]
    fn check(&self) -> io::Result<()> {
        match &self.opened {
            Some(opened) => check_same(&opened.folder.metadata()?, &self.path, &self.path),
            None => Ok(()),
        }
    }

    #[cfg(not(unix))]
    fn check(&self) -> io::Result<()> {
        Ok(())
    }

    fn segment(&self, number: u64) -> PathBuf {
        self.path.join(file_name(number))
    }

    fn with_manifest(&self, act: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        let mut manifest = lock(&self.manifest);
        let file = match &mut *manifest {
            Some(file) => file,
            none => {
                let path = self.path.join(MANIFEST);
                none.insert(private::open(&path, File::options().write(true))?)
            }
        };
        act(file)
    }
}

fn check_lock(locked: Result<(), TryLockError>) -> Result<(), DirectoryError> {
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(DirectoryError::InUse),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Refuses a folder that holds files, but none of a journal.
fn check_ours(path: &Path) -> Result<(), DirectoryError> {
    let mut foreign = None;
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(SUFFIX) || name == MANIFEST {
            return Ok(());
        }
        foreign.get_or_insert(name);
    }
    foreign.map_or(Ok(()), |name| Err(DirectoryError::Foreign(name)))
}

/// Fails with [`Gone`] for `folder` unless the path leads to that file.
#[cfg(unix)]
fn check_same(open: &Metadata, path: &Path, folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let gone = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
    match fs::metadata(path) {
        Ok(there) if there.dev() == open.dev() && there.ino() == open.ino() => Ok(()),
        Ok(_) => Err(Gone::error(folder)),
        Err(error) if gone.contains(&error.kind()) => Err(Gone::error(folder)),
        Err(error) => Err(error),
    }
}

impl Storage for Directory {
    fn segments(&self) -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            numbers.extend(number.and_then(|number| u64::from_str_radix(number, 16).ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn create(&self, number: u64) -> io::Result<Box<dyn SegmentFile>> {
        self.check()?;
        let path = self.segment(number);
        let file = private::create(&path)?;
        Ok(Box::new(Growing::new(file, path)))
    }

    fn read(&self, number: u64, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut reading = lock(&self.reading);
        if reading.as_ref().is_none_or(|(open, _)| *open != number) {
            *reading = Some((number, read(&self.segment(number))?));
        }
        let (_, file) = reading.as_mut().expect("it was opened just now");
        file.seek(SeekFrom::Start(at))?;
        let mut read = 0;
        while read < buf.len() {
            match file.read(&mut buf[read..]) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    fn length(&self, number: u64) -> io::Result<u64> {
        Ok(fs::symlink_metadata(self.segment(number))?.len())
    }

    fn sync(&self, number: u64) -> io::Result<()> {
        read(&self.segment(number))?.sync_data()
    }

    fn remove(&self, number: u64) -> io::Result<()> {
        lock(&self.reading).take_if(|(open, _)| *open == number);
        fs::remove_file(self.segment(number))
    }

    fn manifest(&self) -> io::Result<Option<Vec<u8>>> {
        let mut file = match read(&self.path.join(MANIFEST)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn replace_manifest(&self, bytes: &[u8]) -> io::Result<()> {
        let (new, path) = (self.path.join(NEW_MANIFEST), self.path.join(MANIFEST));
        let mut file = private::create_anew(&new)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        if let Err(error) = written.and_then(|()| fs::rename(&new, path)) {
            let _best_effort = fs::remove_file(new);
            return Err(error);
        }
        *lock(&self.manifest) = Some(file);
        self.sync_directory()
    }

    fn write_manifest(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.with_manifest(|file| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)
        })
    }

    fn sync_manifest(&self) -> io::Result<()> {
        self.with_manifest(|file| file.sync_data())
    }

    #[cfg(unix)]
    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    #[cfg(not(unix))]
    fn sync_directory(&self) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> Option<u64> {
        Some(disk(&self.path)?.free)
    }

    fn take_spare(&self, bytes: u64) -> io::Result<()> {
        let path = self.path.join(SPARE);
        if fs::symlink_metadata(&path).is_ok_and(|spare| spare.is_file() && spare.len() == bytes) {
            return Ok(());
        }
        let filled = fill(&path, bytes);
        if filled.is_err() {
            let _best_effort = fs::remove_file(path);
        }
        filled
    }

    fn give_spare(&self) -> io::Result<bool> {
        match fs::remove_file(self.path.join(SPARE)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The size and free space of a file system, in bytes.
pub(super) struct FileSystem {
    pub(super) size: u64,
    /// The space available to unprivileged users.
    pub(super) free: u64,
}

/// Returns the file system of a folder, which need not exist yet; `None` if unknown.
#[cfg(unix)]
pub(super) fn disk(folder: &Path) -> Option<FileSystem> {
    let there = folder.ancestors().find(|it| it.exists()).filter(|it| *it != Path::new(""));
    let it = rustix::fs::statvfs(there.unwrap_or(Path::new("."))).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(it.f_frsize);
    Some(FileSystem { size: bytes(it.f_blocks), free: bytes(it.f_bavail) })
}

#[cfg(not(unix))]
pub(super) fn disk(_: &Path) -> Option<FileSystem> {
    None
}

fn read(path: &Path) -> io::Result<File> {
    private::open(path, File::options().read(true))
}

/// Writes that many random bytes, which no file system can compress.
fn fill(path: &Path, bytes: u64) -> io::Result<()> {
    const AT_ONCE: u64 = 64 * 1024;
    let mut file = private::create_anew(path)?;
    let mut left = bytes;
    while left > 0 {
        let part = left.min(AT_ONCE);
        file.write_all(&random_bytes::<{ AT_ONCE as usize }>()[..part as usize])?;
        left -= part;
    }
    Ok(())
}

/// A file preallocated before it is written, so that a sync need not store a new length too. Its
/// data is followed by zeros, which are truncated when the file is closed.
struct Growing {
    file: File,
    path: PathBuf,
    written: u64,
    /// The preallocated length; `None` once the system refuses to preallocate.
    reserved: Option<u64>,
    /// A write failed: its bytes don't count.
    failed: bool,
    /// A sync failed: the content on disk is unknown, and the file is left as it is.
    unsure: bool,
}

/// The unit of preallocation, in bytes.
pub(super) const RESERVED: u64 = 1024 * 1024;

impl Growing {
    fn new(file: File, path: PathBuf) -> Self {
        Self { file, path, written: 0, reserved: Some(0), failed: false, unsure: false }
    }

    fn reserve(&mut self, end: u64) {
        if let Some(reserved) = self.reserved.filter(|reserved| *reserved < end) {
            if is_scarce(&self.file) {
                // The space is needed for data.
                self.reserved = None;
                return;
            }
            let more = (end - reserved).next_multiple_of(RESERVED);
            let given = allocate(&self.file, reserved, more);
            self.reserved = given.then_some(reserved + more);
        }
    }
}

/// Returns true if there is too little free space to preallocate.
#[cfg(unix)]
fn is_scarce(file: &File) -> bool {
    let free = |it: rustix::fs::StatVfs| it.f_bavail.saturating_mul(it.f_frsize);
    rustix::fs::fstatvfs(file).is_ok_and(|it| free(it) < 4 * RESERVED)
}

#[cfg(not(unix))]
fn is_scarce(_: &File) -> bool {
    false
}

#[cfg(target_os = "linux")]
fn allocate(file: &File, from: u64, length: u64) -> bool {
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), from, length).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn allocate(_: &File, _: u64, _: u64) -> bool {
    false
}

impl SegmentFile for Growing {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier write to the segment failed"));
        }
        self.reserve(self.written + bytes.len() as u64);
        let wrote = self.file.write_all(bytes);
        match wrote {
            Ok(()) => self.written += bytes.len() as u64,
            Err(_) => self.failed = true,
        }
        wrote
    }

    fn sync(&mut self) -> io::Result<()> {
        let synced = self.file.sync_data();
        self.unsure |= synced.is_err();
        synced
    }

    fn retract(&mut self) -> io::Result<()> {
        self.failed = true;
        self.file.set_len(self.written)?;
        self.sync()
    }

    #[cfg(unix)]
    fn check(&self) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(&self.path);
        check_same(&self.file.metadata()?, &self.path, folder)
    }

    #[cfg(not(unix))]
    fn check(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        if !self.unsure {
            let _best_effort = self.file.set_len(self.written);
        }
    }
}
