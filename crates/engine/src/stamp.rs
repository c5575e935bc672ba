//! Whether a file has moved since it was looked at last.
//!
//! Knows nothing of what is in it. The store's cache of digests has its own, by inode.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What moves when a file changes: device, inode, size, mtime and ctime in nanoseconds. No call sets
/// a ctime back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp([i64; 5]);

impl Stamp {
    /// Of the file, or of what a link leads to; `None` if there is none.
    pub fn of(path: &Path) -> Option<Self> {
        let m = path.metadata().ok()?;
        let time = |s: i64, ns: i64| s.wrapping_mul(1_000_000_000).wrapping_add(ns);
        let (mtime, ctime) = (time(m.mtime(), m.mtime_nsec()), time(m.ctime(), m.ctime_nsec()));
        Some(Self([m.dev() as i64, m.ino() as i64, m.len() as i64, mtime, ctime]))
    }

    /// Nanoseconds since 1970.
    pub fn ctime(&self) -> i64 {
        self.0[4]
    }
}
