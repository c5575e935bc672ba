//! Cas and ActionCache on local disk: atomic, verified, read-only blobs.
//!
//! Knows nothing of recipes, steps or workers: it keeps trees and results under their digests.
//!
//! ```text
//! artifacts/v1/
//!   version            the format, 1
//!   cas/ab/<64 hex>    blobs, read-only; a tree's canonical JSON is a blob like any other
//!   actions/ab/<key>.json   one ActionResult each, written once
//!   attempts/<unique>/ where a running step works; dies with it
//!   scratch/<key>/     what a killed attempt leaves to the next one: checkpoints
//!   trees/             artifacts laid out for steps and people: links to blobs, made again at need
//!   tools/             fetched tools, unpacked; kept by their owner
//!   quarantine/        blobs that no longer had their digest, kept as evidence until gc
//!   tmp/               files on their way into the store
//!   locks/             who runs which action
//!   unsynced/          marks of builds whose data may not be on disk yet
//!   stat-cache         digests of source files by inode and times; may be lost
//! ```
//!
//! # What survives what
//! Every file is written under `tmp/` (or in an attempt), then renamed: after a kill a name in
//! `cas/` holds its whole content or does not exist. After a power cut, too: what a build that it
//! broke off had put in is held to its digests before it is used (see `durable`). A result that
//! has lost its files counts as lost, which costs a rebuild and no error.

mod actions;
mod attempt;
mod cas;
mod durable;
mod error;
mod gc;
mod lock;
mod scrub;
mod source;
mod stat_cache;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64};

use rustix::fs::FlockOperation;
use step::{ActionKey, BlobDigest};

pub use actions::{ActionCache, Lookup};
pub use attempt::Attempt;
pub use cas::Incoming;
pub use error::StoreError;
pub use gc::{GcOptions, GcReport, Root};
pub use lock::{Guard, Holder};
pub use scrub::{LostFile, ScrubProgress, ScrubReport};
pub use source::SKIPPED;

use error::io;
use stat_cache::StatCache;

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The format of the store. It is also the last part of the store's path.
pub const FORMAT: u32 = 1;

/// A store on local disk. Cheap to open; safe to share between threads and processes.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    stat_cache: Mutex<StatCache>,
    /// Whether the file system shares the blocks of two files, as far as is known.
    clones: AtomicBool,
    /// Bytes that came in.
    added: AtomicU64,
    /// There while data may not be on disk yet.
    mark: Mutex<Option<durable::Mark>>,
    /// Held shared for as long as the store is open; [`Store::gc`] needs it for itself alone.
    presence: File,
}

impl Store {
    /// Opens the store at `root` (`artifacts/v1`), making it if it is not there.
    ///
    /// A store on a read-only disk opens as long as it is complete; writing to it then fails.
    pub fn open(root: &Path) -> Result<Self> {
        const FOLDERS: [&str; 9] =
            ["", "cas", "actions", "attempts", "scratch", "tools", "quarantine", "tmp", "unsynced"];
        for folder in FOLDERS {
            let path = root.join(folder);
            if !path.is_dir() {
                fs::create_dir_all(&path).map_err(io("create", &path))?;
            }
        }
        // Attempts are handed to workers, whose own working folder is another one.
        let root = fs::canonicalize(root).map_err(io("find", root))?;
        check_version(&root.join("version"))?;
        let locks = root.join("locks");
        fs::create_dir_all(&locks).map_err(io("create", &locks))?;
        let presence = lock::open(&locks.join("store"))?;
        lock::flock(&presence, FlockOperation::LockShared, &locks)?;
        let stat_cache = Mutex::new(StatCache::at(root.join("stat-cache")));
        let store = Self {
            root,
            stat_cache,
            clones: AtomicBool::new(true),
            added: AtomicU64::new(0),
            mark: Mutex::new(None),
            presence,
        };
        store.recover()?;
        Ok(store)
    }

    /// Absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where fetched tools live, by the path that no link leads to: what is compiled with them
    /// remembers it, and workspaces may share one folder of them. The store never looks inside.
    pub fn tools_dir(&self) -> PathBuf {
        let dir = self.root.join("tools");
        dir.canonicalize().unwrap_or(dir)
    }

    /// Where the blob lies, or would.
    pub fn blob_path(&self, digest: BlobDigest) -> PathBuf {
        let hex = digest.to_string();
        self.root.join("cas").join(&hex[..2]).join(hex)
    }

    /// The results of actions.
    pub fn actions(&self) -> ActionCache<'_> {
        ActionCache::new(self)
    }

    /// The folder in which attempts of one action leave checkpoints to each other; made if absent.
    pub fn scratch(&self, key: ActionKey) -> Result<PathBuf> {
        let path = self.root.join("scratch").join(key.to_string());
        fs::create_dir_all(&path).map_err(io("create", &path))?;
        Ok(path)
    }

    /// Removes what attempts of this action left: its result is in.
    pub fn clear_scratch(&self, key: ActionKey) -> Result<()> {
        cas::remove_folder(&self.root.join("scratch").join(key.to_string()))
    }

    /// Writes the stat cache, if there is something new in it. Also done when the store is dropped.
    pub fn save_stat_cache(&self) {
        self.stat_cache.lock().expect("no panic while holding it").save(&self.root.join("tmp"));
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.save_stat_cache();
        // Its mark stays if this fails, and the next one to open the store tries again.
        let _ = self.settle();
    }
}

fn check_version(path: &Path) -> Result<()> {
    match fs::read_to_string(path) {
        Ok(text) => match text.trim().parse::<u32>() {
            Ok(FORMAT) => Ok(()),
            Ok(found) => Err(StoreError::Format { path: path.into(), found }),
            Err(_) => Err(StoreError::Malformed {
                path: path.into(),
                message: format!("expected `{FORMAT}`, found `{}`", text.trim()),
            }),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let folder = path.parent().expect("a file in the store").join("tmp");
            tempfile::NamedTempFile::new_in(folder)
                .and_then(|mut file| {
                    file.write_all(format!("{FORMAT}\n").as_bytes())?;
                    Ok(file.persist(path)?)
                })
                .map(drop)
                .map_err(io("write", path))
        }
        Err(e) => Err(io("read", path)(e)),
    }
}

#[cfg(test)]
mod tests;
