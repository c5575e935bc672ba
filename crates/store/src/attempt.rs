//! A folder to work in, for one attempt at one action. Gone with the attempt.
//!
//! Knows nothing of what is made in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::cas::remove_folder;
use crate::error::io;
use crate::{Result, Store, lock};

/// A work folder on the store's own disk, so that what is made there moves in by rename.
#[derive(Debug)]
pub struct Attempt {
    path: PathBuf,
    /// The folder itself, locked while the attempt lives: how gc tells a dead one.
    _alive: File,
}

impl Store {
    /// A new, empty folder `attempts/<label>-<unique>/`.
    pub fn attempt(&self, label: &str) -> Result<Attempt> {
        let attempts = self.root().join("attempts");
        let label: String =
            label.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).take(60).collect();
        let folder = tempfile::Builder::new()
            .prefix(&format!("{label}-"))
            .tempdir_in(&attempts)
            .map_err(io("create", &attempts))?;
        let path = folder.keep();
        let alive = File::open(&path).map_err(io("lock", &path))?;
        lock::flock(&alive, FlockOperation::NonBlockingLockExclusive, &path)?;
        Ok(Attempt { path, _alive: alive })
    }
}

impl Attempt {
    /// Absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new folder inside.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).map_err(io("create", &path))?;
        Ok(path)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // What stays behind is swept by gc.
        let _ = remove_folder(&self.path);
    }
}
