//! Where segments lie: a directory, or in tests a disk that crashes on purpose.

#[cfg(unix)]
use std::fs::Metadata;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::identity::random_bytes;
use crate::private;
use crate::sync::lock_unranked as lock;

/// What a journal needs of a disk. Segments are files by number.
pub(super) trait Storage: Send + Sync {
    /// The numbers of the segments that are there, in order.
    fn segments(&self) -> io::Result<Vec<u64>>;
    /// A new, empty segment, to be written once from its start to its end.
    fn create(&self, number: u64) -> io::Result<Box<dyn SegmentFile>>;
    /// Reads at `at` as much as there is, up to the length of `buf`.
    fn read(&self, number: u64, at: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// How long the file is, with the zeros that may lie behind what was written.
    fn length(&self, number: u64) -> io::Result<u64>;
    /// Makes all of a segment last that an earlier life wrote.
    fn sync(&self, number: u64) -> io::Result<()>;
    fn remove(&self, number: u64) -> io::Result<()>;
    /// The whole manifest, if there is one.
    fn manifest(&self) -> io::Result<Option<Vec<u8>>>;
    /// Puts another manifest in the place of the one that is there, so that it lasts; a crash
    /// leaves one of them.
    fn replace_manifest(&self, bytes: &[u8]) -> io::Result<()>;
    /// Writes over a part of it, which takes no room.
    fn write_manifest(&self, at: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was written over last.
    fn sync_manifest(&self) -> io::Result<()>;
    /// Makes what was created and removed last.
    fn sync_directory(&self) -> io::Result<()>;
    /// How many bytes may be written here; `None` if nobody knows.
    fn free(&self) -> Option<u64>;
    /// Takes so many bytes, if it hasn't, to have them when the disk is full.
    fn take_spare(&self, bytes: u64) -> io::Result<()>;
    /// Gives them back; whether there were any.
    fn give_spare(&self) -> io::Result<bool>;
}

/// A segment that is being written.
pub(super) trait SegmentFile: Send {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was appended last.
    fn sync(&mut self) -> io::Result<()>;
    /// Undoes a write that failed, so that nothing of it is left, and makes what was appended
    /// before it last. Nothing can be appended any more.
    fn retract(&mut self) -> io::Result<()>;
    /// Fails if it is no longer there, by [`Gone`].
    fn check(&self) -> io::Result<()>;
}

/// The folder, or a file in it, was removed or replaced while it was in use.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} was removed or replaced while it was in use, with what was stored in it: bring it back, or \
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

/// A directory of this host, locked for as long as this lives.
pub(super) struct Directory {
    path: PathBuf,
    /// The segment that was read from last.
    reading: Mutex<Option<(u64, File)>>,
    manifest: Mutex<Option<File>>,
    /// What it was when it was opened; `None` if it is only looked at.
    opened: Option<Opened>,
    /// Keeps others from writing.
    _reads: Option<File>,
}

struct Opened {
    #[cfg(unix)]
    folder: File,
    _lock: File,
}

/// Marks a directory as a journal's, and is locked by who uses it.
const LOCK: &str = "journal.lock";
const SUFFIX: &str = ".segment";
/// Takes the room that there is to be left when the disk is full.
const SPARE: &str = "spare";
pub(super) const MANIFEST: &str = "manifest";
const NEW_MANIFEST: &str = "manifest.new";

/// The name of a segment's file.
pub(super) fn file_name(number: u64) -> String {
    format!("{number:016x}{SUFFIX}")
}

/// A directory that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Another process has it open.
    #[error("another process uses it")]
    InUse,
    /// It is somebody else's.
    #[error("it holds other files ({0}) and no journal: name an empty or a new folder")]
    Foreign(String),
    /// What the system said.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Directory {
    /// Opens a journal's directory, or makes a new one.
    pub(super) fn open(path: &Path) -> Result<Self, DirectoryError> {
        private::create_folder(path)?;
        let lock = path.join(LOCK);
        if !lock.exists() {
            check_ours(path)?;
        }
        let file = File::options().create(true).truncate(false).write(true).open(&lock)?;
        check_lock(file.try_lock())?;
        let opened = Opened {
            #[cfg(unix)]
            folder: File::open(path)?,
            _lock: file,
        };
        Ok(Self { opened: Some(opened), ..Self::look_at(path) })
    }

    /// Opens a directory to read what is in it: nothing is written, and nobody else can open it to
    /// write meanwhile.
    pub(super) fn open_to_read(path: &Path) -> Result<Self, DirectoryError> {
        let lock = match File::open(path.join(LOCK)) {
            Ok(lock) => lock,
            // Nobody has it open: who does makes one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                check_ours(path)?;
                return Ok(Self::look_at(path));
            }
            Err(error) => return Err(error.into()),
        };
        check_lock(lock.try_lock_shared())?;
        Ok(Self { _reads: Some(lock), ..Self::look_at(path) })
    }

    /// Looks at a directory that somebody may use, to write nothing.
    pub(super) fn look_at(path: &Path) -> Self {
        let (reading, manifest) = (Mutex::default(), Mutex::default());
        Self { path: path.to_owned(), reading, manifest, opened: None, _reads: None }
    }

    /// Fails if the path leads to another folder by now, or to none.
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
            none => none.insert(File::options().write(true).open(self.path.join(MANIFEST))?),
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

/// Refuses a folder that holds something, and nothing of a journal.
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

/// Fails by [`Gone`] of `folder` unless the path leads to that file.
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
        let file = File::options().create_new(true).write(true).open(&path)?;
        Ok(Box::new(Growing::new(file, path)))
    }

    fn read(&self, number: u64, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut reading = lock(&self.reading);
        if reading.as_ref().is_none_or(|(open, _)| *open != number) {
            *reading = Some((number, File::open(self.segment(number))?));
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
        Ok(fs::metadata(self.segment(number))?.len())
    }

    fn sync(&self, number: u64) -> io::Result<()> {
        File::open(self.segment(number))?.sync_data()
    }

    fn remove(&self, number: u64) -> io::Result<()> {
        lock(&self.reading).take_if(|(open, _)| *open == number);
        fs::remove_file(self.segment(number))
    }

    fn manifest(&self) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path.join(MANIFEST)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replace_manifest(&self, bytes: &[u8]) -> io::Result<()> {
        let (new, path) = (self.path.join(NEW_MANIFEST), self.path.join(MANIFEST));
        let mut file = File::options().create(true).truncate(true).write(true).open(&new)?;
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
        if fs::metadata(&path).is_ok_and(|spare| spare.len() == bytes) {
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

/// A file system, in bytes.
pub(super) struct FileSystem {
    pub(super) size: u64,
    /// What its users may still take of it.
    pub(super) free: u64,
}

/// What a folder lies on, or will when it is made; `None` if nobody knows.
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

/// Writes so many bytes, which no file system can store in less.
fn fill(path: &Path, bytes: u64) -> io::Result<()> {
    const AT_ONCE: u64 = 64 * 1024;
    let mut file = File::options().create(true).truncate(true).write(true).open(path)?;
    let mut left = bytes;
    while left > 0 {
        let part = left.min(AT_ONCE);
        file.write_all(&random_bytes::<{ AT_ONCE as usize }>()[..part as usize])?;
        left -= part;
    }
    Ok(())
}

/// A file that has its room before it is written, so that a sync needn't store a new length too.
/// Behind what was written it is zeros; they are cut off when it is done.
struct Growing {
    file: File,
    path: PathBuf,
    written: u64,
    /// How long the file is; `None` once the system won't give it room in advance.
    reserved: Option<u64>,
    /// A write failed: what was written of it doesn't count.
    failed: bool,
    /// A sync failed: nobody knows what is on the disk, and the file is left as it is.
    unsure: bool,
}

/// How much room a file is given at a time, in bytes.
pub(super) const RESERVED: u64 = 1024 * 1024;

impl Growing {
    fn new(file: File, path: PathBuf) -> Self {
        Self { file, path, written: 0, reserved: Some(0), failed: false, unsure: false }
    }

    fn reserve(&mut self, end: u64) {
        if let Some(reserved) = self.reserved.filter(|reserved| *reserved < end) {
            if is_scarce(&self.file) {
                // It is wanted for what is written.
                self.reserved = None;
                return;
            }
            let more = (end - reserved).next_multiple_of(RESERVED);
            let given = allocate(&self.file, reserved, more);
            self.reserved = given.then_some(reserved + more);
        }
    }
}

/// Whether there is too little room left to give some in advance.
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
            return Err(io::Error::other("a write to it failed before"));
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
