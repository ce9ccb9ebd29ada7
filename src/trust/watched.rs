//! A value that is read from a file, and read again when the file changes.

use std::error::Error;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::interval;

/// The interval at which the file is checked for changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The stamp by which a change of the file is detected: its modification time and its length; on
/// Unix also its inode and change time.
type Stamp = (SystemTime, u64, [i64; 3]);

type Load<T> = Box<dyn Fn(&Path) -> Result<T, Box<dyn Error>> + Send + Sync>;

/// The current content of a file, or a value that never changes.
pub(crate) struct Watched<T> {
    current: ArcSwap<T>,
    file: Option<Source<T>>,
}

struct Source<T> {
    path: PathBuf,
    load: Load<T>,
    stamp: Option<Stamp>,
}

impl<T> From<T> for Watched<T> {
    /// A value that never changes.
    fn from(value: T) -> Self {
        Self { current: ArcSwap::from_pointee(value), file: None }
    }
}

impl<T: PartialEq> Watched<T> {
    /// Loads the file.
    ///
    /// # Errors
    /// The error of `load`.
    pub(crate) fn open<E: Error + 'static>(
        path: &Path,
        load: impl Fn(&Path) -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        // The stamp is taken first, so that a write in between causes a reload.
        let stamp = stamp(path);
        let current = ArcSwap::from_pointee(load(path)?);
        let load: Load<T> = Box::new(move |path| Ok(load(path)?));
        Ok(Self { current, file: Some(Source { path: path.into(), load, stamp }) })
    }

    pub(crate) fn current(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Reloads the file when it changes, then calls `changed` with the values before and after. A
    /// file that can't be used leaves the value unchanged, with a warning. Runs until it is
    /// dropped; for a value that never changes it ends at once.
    pub(crate) async fn watch(&self, changed: impl Fn(&T, &T)) {
        let Some(Source { path, load, stamp }) = &self.file else { return };
        let mut stamp = *stamp;
        let mut ticks = interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            let now = self::stamp(path);
            if now == stamp {
                continue;
            }
            stamp = now;
            match load(path) {
                Ok(value) if value == **self.current.load() => {}
                Ok(value) => {
                    tracing::info!(file = %path.display(), "a changed file is in force");
                    let value = Arc::new(value);
                    let before = self.current.swap(value.clone());
                    changed(&before, &value);
                }
                Err(error) => {
                    tracing::warn!(%error, "a changed file is not in force; what it said before stays so");
                }
            }
        }
    }
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.file.as_ref().map(|file| &file.path);
        f.debug_struct("Watched").field("file", &path).finish_non_exhaustive()
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    #[cfg(unix)]
    let changed = {
        use std::os::unix::fs::MetadataExt;
        [metadata.ino() as i64, metadata.ctime(), metadata.ctime_nsec()]
    };
    #[cfg(not(unix))]
    let changed = [0; 3];
    Some((metadata.modified().ok()?, metadata.len(), changed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::unbounded_channel;

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_in_force_unless_it_is_invalid() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let (tried, mut attempts) = unbounded_channel();
        let load = move |path: &Path| {
            let parsed = fs::read_to_string(path).unwrap().parse::<u32>();
            tried.send(parsed.is_ok()).unwrap();
            parsed
        };
        fs::write(&path, "1").unwrap();
        let watched = Arc::new(Watched::open(&path, load).unwrap());
        let (told, mut changes) = unbounded_channel();
        let watching = watched.clone();
        let _task = tokio::spawn(async move {
            let changed = |before: &u32, now: &u32| told.send((*before, *now)).unwrap();
            watching.watch(changed).await;
        });
        assert_eq!(attempts.recv().await, Some(true));

        fs::write(&path, "22").unwrap();
        assert_eq!(changes.recv().await, Some((1, 22)));
        assert_eq!(attempts.recv().await, Some(true));
        fs::write(&path, "no number").unwrap();
        assert_eq!(attempts.recv().await, Some(false));
        assert_eq!(*watched.current(), 22);
        // The same value in other words is no change.
        fs::write(&path, "0022").unwrap();
        assert_eq!(attempts.recv().await, Some(true));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "333").unwrap();
        assert_eq!(changes.recv().await, Some((22, 333)));
        assert_eq!(*watched.current(), 333);
    }
}
