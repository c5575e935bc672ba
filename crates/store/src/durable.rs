//! What a build puts in reaches the disk once, at its end, not file by file.
//!
//! Knows nothing of what the data is.
//!
//! Before the first file goes in, a mark in `unsynced/` is put on disk: it names this boot of the
//! machine. [`Store::settle`] writes everything out and takes the mark away. Whoever opens the store
//! and finds a mark of another boot knows that there was a power cut, and holds whatever came in
//! since that mark to its digests before anything of it is used. A kill is no power cut: the
//! kernel still has what was written.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use crate::error::io;
use crate::{Result, Store, lock};

/// A file system may round a file's time down by this much.
const COARSE: Duration = Duration::from_secs(2);

/// Says that data of this process may not be on disk yet.
#[derive(Debug)]
pub(crate) struct Mark {
    path: PathBuf,
    /// Held while the process lives: how others tell that it has not finished.
    _alive: File,
}

impl Store {
    /// To be called before a file gets its name in the store.
    pub(crate) fn goes_in(&self, file: &File, path: &Path) -> Result<()> {
        let size = file.metadata().map_err(io("write", path))?.len();
        self.added.fetch_add(size, Ordering::Relaxed);
        let mut mark = self.mark.lock().expect("no panic while holding it");
        if mark.is_none() {
            let Some(boot) = boot() else {
                // Nobody could tell a power cut later.
                return file.sync_data().map_err(io("write", path));
            };
            *mark = Some(self.put_mark(&boot)?);
        }
        Ok(())
    }

    /// Counts what another process has put in for this one.
    pub fn note_added(&self, bytes: u64) {
        self.added.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that have come in through this store since it was asked last.
    pub fn take_added(&self) -> u64 {
        self.added.swap(0, Ordering::Relaxed)
    }

    fn put_mark(&self, boot: &str) -> Result<Mark> {
        let dir = self.root().join("unsynced");
        let file = tempfile::Builder::new()
            .prefix(&format!("{}-", std::process::id()))
            .tempfile_in(&dir)
            .map_err(io("write", &dir))?;
        let (mut file, path) = file.keep().map_err(|e| io("write", &dir)(e.error))?;
        lock::flock(&file, FlockOperation::NonBlockingLockExclusive, &path)?;
        file.write_all(boot.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(&dir)?.sync_all())
            .map_err(io("write", &path))?;
        Ok(Mark { path, _alive: file })
    }

    /// Writes out whatever has come in. Done too when the store is dropped.
    pub fn settle(&self) -> Result<()> {
        let mut mark = self.mark.lock().expect("no panic while holding it");
        let Some(Mark { path, _alive }) = mark.take() else { return Ok(()) };
        #[cfg(target_os = "linux")]
        rustix::fs::syncfs(&self.presence).map_err(|e| io("write", self.root())(e.into()))?;
        fs::remove_file(&path).map_err(io("remove", &path))?;
        // What processes that were killed have left is on disk now too.
        let boot = boot();
        for (path, of) in self.marks()? {
            if Some(&of) == boot.as_ref() && is_dead(&path)? {
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// After a power cut: what came in since the oldest mark is read, and what is damaged moves to
    /// quarantine. Its results then count as lost.
    pub(crate) fn recover(&self) -> Result<()> {
        let boot = boot();
        let mut marks = self.marks()?;
        marks.retain(|(_, of)| Some(of) != boot.as_ref());
        let times = marks.iter().filter_map(|(path, _)| modified(path));
        let Some(since) = times.min().map(|oldest| oldest - COARSE) else { return Ok(()) };
        for blob in self.blobs()?.0 {
            if modified(&blob.path).is_none_or(|at| at >= since) {
                // Whoever needs it hears that it is not there any more.
                let _ = self.verify_blob(blob.digest);
            }
        }
        // It may know digests of files that are damaged now.
        let _ = fs::remove_file(self.root().join("stat-cache"));
        marks.iter().for_each(|(path, _)| _ = fs::remove_file(path));
        Ok(())
    }

    /// The marks, each with the boot that it names.
    fn marks(&self) -> Result<Vec<(PathBuf, String)>> {
        let dir = self.root().join("unsynced");
        let mut marks = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io("read", &dir))?.flatten() {
            // One that is gone by now was taken away by its owner.
            if let Ok(boot) = fs::read_to_string(entry.path()) {
                marks.push((entry.path(), boot));
            }
        }
        Ok(marks)
    }
}

fn is_dead(mark: &Path) -> Result<bool> {
    match File::open(mark) {
        Ok(file) => lock::flock(&file, FlockOperation::NonBlockingLockExclusive, mark),
        Err(_) => Ok(false),
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// Which boot of the machine this is, where the system tells.
fn boot() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_string())
}
