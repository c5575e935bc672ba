//! Advisory locks between processes: one builder an action.
//!
//! Knows nothing of what is done under a lock. The kernel lets go of it when its holder dies, so
//! there are no stale ones.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use step::ActionKey;

use crate::error::io;
use crate::{Result, Store};

/// Who holds a lock: as far as it could write that down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holder {
    pub pid: Option<u32>,
    pub host: Option<String>,
}

/// An action's lock, held until this is dropped.
#[derive(Debug)]
pub struct Guard {
    /// Closing it lets go.
    _file: File,
}

impl Store {
    /// Waits until nobody else runs this action; `waiting` hears once, before the wait, whom for.
    pub fn lock(&self, key: ActionKey, waiting: &mut dyn FnMut(&Holder)) -> Result<Guard> {
        let path = self.root().join("locks").join(key.to_string());
        let mut file = open(&path)?;
        if !flock(&file, FlockOperation::NonBlockingLockExclusive, &path)? {
            waiting(&holder(&path));
            flock(&file, FlockOperation::LockExclusive, &path)?;
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let line = format!("{} {host}\n", std::process::id());
        // Only for the eyes of those who wait: no reason to fail.
        let _ = file.set_len(0).and_then(|()| file.write_all(line.as_bytes()));
        Ok(Guard { _file: file })
    }
}

/// A lock file, made if absent. Rust opens files close-on-exec, so no worker inherits the lock.
pub(crate) fn open(path: &Path) -> Result<File> {
    let writable = OpenOptions::new().create(true).append(true).open(path);
    writable.or_else(|why| File::open(path).map_err(|_| why)).map_err(io("lock", path))
}

/// Whether the lock was had. File systems without locks count as having given it: they are rare,
/// and losing a race there wastes work but harms nothing, because results are written once.
pub(crate) fn flock(file: &File, how: FlockOperation, path: &Path) -> Result<bool> {
    loop {
        match rustix::fs::flock(file, how) {
            Ok(()) | Err(Errno::NOTSUP | Errno::NOSYS | Errno::NOLCK | Errno::BADF) => {
                return Ok(true);
            }
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(e) => return Err(io("lock", path)(e.into())),
        }
    }
}

fn holder(path: &Path) -> Holder {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut words = text.split_whitespace();
    Holder {
        pid: words.next().and_then(|w| w.parse().ok()),
        host: words.next().map(str::to_string),
    }
}
