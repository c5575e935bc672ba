//! Throws away what nothing needs: marks from the results that are kept, sweeps the rest.
//!
//! Knows nothing of recipes: the caller says what is kept.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use step::{ActionKey, BlobDigest, TreeDigest};

use crate::cas::remove_folder;
use crate::error::io;
use crate::{Result, Store, StoreError, lock};

/// What gc keeps, and whatever hangs on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// A result, and the checkpoints of an action that has none yet.
    Action(ActionKey),
    Tree(TreeDigest),
}

#[derive(Debug, Clone, Copy, Default)]
pub struct GcOptions<'a> {
    pub roots: &'a [Root],
    /// Results and checkpoints younger than this stay too.
    pub keep_newer: Duration,
    /// Results that go however young they are, unless they are roots.
    pub drop: &'a [ActionKey],
    /// Only tell.
    pub dry_run: bool,
}

/// What was removed, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    pub results_kept: usize,
    pub results_removed: usize,
    pub blobs_kept: usize,
    pub blobs_removed: usize,
    /// Folders of attempts whose process is dead.
    pub attempts_removed: usize,
    /// Folders of checkpoints that no action will ask for.
    pub scratch_removed: usize,
    /// Disk space given back. A blob that is linked elsewhere too gives none.
    pub bytes_freed: u64,
}

impl Store {
    /// Sweeps the store. [`StoreError::Busy`] while another process has it open: what a running
    /// build has put in belongs to no result yet.
    pub fn gc(&self, options: GcOptions<'_>) -> Result<GcReport> {
        let locks = self.root().join("locks");
        let alone = lock::flock(&self.presence, FlockOperation::NonBlockingLockExclusive, &locks)?;
        let report = match alone {
            true => self.sweep(options),
            false => Err(StoreError::Busy { path: self.root().to_path_buf() }),
        };
        lock::flock(&self.presence, FlockOperation::LockShared, &locks)?;
        report
    }

    /// Bytes of all blobs.
    pub fn size(&self) -> Result<u64> {
        Ok(self.blobs()?.0.iter().map(|blob| blob.size).sum())
    }

    fn sweep(&self, options: GcOptions<'_>) -> Result<GcReport> {
        let mut sweeper = Sweeper::new(options.dry_run);
        let mut report = GcReport::default();
        let mut marked = HashSet::new();
        let mut laid_out = HashSet::new();
        let mut kept_keys = HashSet::new();
        for root in options.roots {
            match root {
                Root::Tree(tree) => self.mark_tree(*tree, &mut marked),
                Root::Action(key) => {
                    kept_keys.insert(*key);
                }
            }
        }
        for key in self.actions().keys()? {
            let path = self.actions().path(key);
            let young = sweeper.is_younger(&path, options.keep_newer);
            let wanted = kept_keys.contains(&key) || (young && !options.drop.contains(&key));
            match self.actions().lookup(key)?.found() {
                Some(result) if wanted => {
                    report.results_kept += 1;
                    self.mark_tree(result.output, &mut marked);
                    self.mark_tree(result.report, &mut marked);
                    laid_out.extend([result.output, result.report].map(|tree| tree.to_string()));
                    marked.insert(result.log);
                    self.mark_action(key, &mut marked);
                }
                _ => {
                    report.results_removed += 1;
                    report.bytes_freed += sweeper.remove(&path)?;
                }
            }
        }
        // Folders that link to a blob hold its space, so they go first.
        for folder in sweeper.children(&self.root().join("trees"))? {
            if !folder.file_name().is_some_and(|n| laid_out.contains(&*n.to_string_lossy())) {
                report.bytes_freed += sweeper.remove(&folder)?;
            }
        }
        let (blobs, _) = self.blobs()?;
        for blob in blobs {
            if marked.contains(&blob.digest) {
                report.blobs_kept += 1;
            } else {
                report.blobs_removed += 1;
                report.bytes_freed += sweeper.remove(&blob.path)?;
            }
        }
        for folder in sweeper.children(&self.root().join("attempts"))? {
            if folder.is_dir() && is_dead(&folder)? {
                report.attempts_removed += 1;
                report.bytes_freed += sweeper.remove(&folder)?;
            }
        }
        for folder in sweeper.children(&self.root().join("scratch"))? {
            let key = folder.file_name().and_then(|n| n.to_str()?.parse::<ActionKey>().ok());
            let awaited = key.is_some_and(|key| {
                !self.actions().path(key).exists()
                    && (kept_keys.contains(&key) || sweeper.is_younger(&folder, options.keep_newer))
            });
            if !awaited {
                report.scratch_removed += 1;
                report.bytes_freed += sweeper.remove(&folder)?;
            }
        }
        // Nobody else is here, so nothing is on its way in, and nobody holds an action.
        for leftovers in ["tmp", "quarantine"] {
            for path in sweeper.children(&self.root().join(leftovers))? {
                report.bytes_freed += sweeper.remove(&path)?;
            }
        }
        for path in sweeper.children(&self.root().join("locks"))? {
            if path.file_name().is_some_and(|name| name != "store") {
                sweeper.remove(&path)?;
            }
        }
        Ok(report)
    }

    fn mark_tree(&self, digest: TreeDigest, marked: &mut HashSet<BlobDigest>) {
        // Marked it may be without its files: as the input of an action.
        marked.insert(BlobDigest::from_bytes(*digest.as_bytes()));
        if let Ok(tree) = self.tree(digest) {
            marked.extend(tree.entries().iter().map(|e| e.digest));
        }
    }

    /// What `why` compares: the action, the lists of its inputs' files, the parts of its code.
    /// The input files themselves stay only if something else keeps them.
    fn mark_action(&self, key: ActionKey, marked: &mut HashSet<BlobDigest>) {
        marked.insert(BlobDigest::from_bytes(*key.as_bytes()));
        if let Ok(action) = self.action(key) {
            marked.insert(BlobDigest::from_bytes(*action.code.as_bytes()));
            for tree in action.inputs.values() {
                marked.insert(BlobDigest::from_bytes(*tree.as_bytes()));
            }
        }
    }
}

struct Sweeper {
    dry_run: bool,
    now: SystemTime,
    /// How many names of a file would be gone by now, in a dry run.
    gone: HashMap<(u64, u64), u64>,
}

impl Sweeper {
    fn new(dry_run: bool) -> Self {
        Self { dry_run, now: SystemTime::now(), gone: HashMap::new() }
    }

    fn is_younger(&self, path: &Path, age: Duration) -> bool {
        let modified = fs::metadata(path).and_then(|m| m.modified());
        modified.is_ok_and(|at| self.now.duration_since(at).map_or(true, |since| since < age))
    }

    fn children(&self, dir: &Path) -> Result<Vec<std::path::PathBuf>> {
        let mut paths = Vec::new();
        if !dir.exists() {
            return Ok(paths);
        }
        for entry in fs::read_dir(dir).map_err(io("read", dir))? {
            paths.push(entry.map_err(io("read", dir))?.path());
        }
        paths.sort();
        Ok(paths)
    }

    /// Removes a file or a folder; returns the bytes given back.
    fn remove(&mut self, path: &Path) -> Result<u64> {
        let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(0) };
        if metadata.is_dir() {
            let mut freed = 0;
            for child in self.children(path)? {
                freed += self.remove(&child)?;
            }
            if !self.dry_run {
                remove_folder(path)?;
            }
            return Ok(freed);
        }
        let mut names = metadata.nlink();
        if self.dry_run {
            let gone = self.gone.entry((metadata.dev(), metadata.ino())).or_default();
            names -= *gone;
            *gone += 1;
        } else {
            fs::remove_file(path).map_err(io("remove", path))?;
        }
        Ok(if names == 1 { metadata.len() } else { 0 })
    }
}

fn is_dead(attempt: &Path) -> Result<bool> {
    let folder = File::open(attempt).map_err(io("lock", attempt))?;
    lock::flock(&folder, FlockOperation::NonBlockingLockExclusive, attempt)
}
