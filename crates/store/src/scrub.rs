//! Reads every blob, moves the bad ones to quarantine, and says which results lose a file.
//!
//! Knows nothing of how to make a lost file again.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use step::{ActionKey, BlobDigest};

use crate::error::io;
use crate::{Result, Store, StoreError};

/// How far a scrub is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    pub blobs: usize,
    pub of_blobs: usize,
    pub bytes: u64,
    pub of_bytes: u64,
}

#[derive(Debug, Default)]
pub struct ScrubReport {
    /// How many were read.
    pub blobs: usize,
    pub bytes: u64,
    /// Now in quarantine.
    pub corrupt: Vec<BlobDigest>,
    /// Blobs that could not be read at all, and why.
    pub unreadable: Vec<StoreError>,
    /// Files in `cas/` that are no blobs. They are left alone.
    pub strangers: Vec<PathBuf>,
    /// What results lack now, before this scrub or because of it.
    pub lost: Vec<LostFile>,
}

/// A file of a result that the store does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostFile {
    pub key: ActionKey,
    pub step: String,
    /// `output`, `report` or `log`. Only a lost output makes the step run again.
    pub part: &'static str,
    /// In the tree; empty for the list of files itself.
    pub path: String,
    pub digest: BlobDigest,
}

/// A blob as it lies on disk.
pub(crate) struct Lying {
    pub digest: BlobDigest,
    pub path: PathBuf,
    pub size: u64,
}

impl Store {
    /// Hashes every blob, on all cores. `progress` is told after each.
    pub fn scrub(&self, progress: &mut dyn FnMut(ScrubProgress)) -> Result<ScrubReport> {
        let (blobs, strangers) = self.blobs()?;
        let mut report = ScrubReport { strangers, ..Default::default() };
        let mut at = ScrubProgress {
            of_blobs: blobs.len(),
            of_bytes: blobs.iter().map(|b| b.size).sum(),
            ..Default::default()
        };
        let next = AtomicUsize::new(0);
        let threads = thread::available_parallelism().map_or(1, usize::from).min(blobs.len());
        thread::scope(|scope| {
            let (results, done) = mpsc::channel();
            for _ in 0..threads {
                let (results, next, blobs) = (results.clone(), &next, &blobs);
                scope.spawn(move || {
                    while let Some(blob) = blobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let checked = self.verify_blob(blob.digest);
                        if results.send((blob.size, blob.digest, checked)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(results);
            for (size, digest, checked) in done {
                at.blobs += 1;
                at.bytes += size;
                match checked {
                    // One that was taken away meanwhile is told of where a result lacks it.
                    Ok(()) | Err(StoreError::Missing { .. }) => {}
                    Err(StoreError::Corrupt { .. }) => report.corrupt.push(digest),
                    Err(other) => report.unreadable.push(other),
                }
                progress(at);
            }
        });
        report.corrupt.sort();
        (report.blobs, report.bytes) = (at.blobs, at.bytes);
        report.lost = self.lost_files()?;
        Ok(report)
    }

    /// Every blob on disk, and every file in `cas/` that is none.
    pub(crate) fn blobs(&self) -> Result<(Vec<Lying>, Vec<PathBuf>)> {
        let (mut blobs, mut strangers) = (Vec::new(), Vec::new());
        let cas = self.root().join("cas");
        for folder in fs::read_dir(&cas).map_err(io("read", &cas))? {
            let folder = folder.map_err(io("read", &cas))?.path();
            if !folder.is_dir() {
                strangers.push(folder);
                continue;
            }
            for file in fs::read_dir(&folder).map_err(io("read", &folder))? {
                let path = file.map_err(io("read", &folder))?.path();
                let digest = path.file_name().and_then(|n| n.to_str()?.parse().ok());
                match digest.filter(|d| self.blob_path(*d) == path) {
                    Some(digest) => {
                        let size = match fs::metadata(&path) {
                            Ok(metadata) => metadata.len(),
                            // Taken away meanwhile: others may use the store.
                            Err(e) if e.kind() == ErrorKind::NotFound => continue,
                            Err(e) => return Err(io("read", &path)(e)),
                        };
                        blobs.push(Lying { digest, path, size });
                    }
                    None => strangers.push(path),
                }
            }
        }
        blobs.sort_by_key(|b| b.digest);
        strangers.sort();
        Ok((blobs, strangers))
    }

    fn lost_files(&self) -> Result<Vec<LostFile>> {
        let mut lost = Vec::new();
        for key in self.actions().keys()? {
            let Some(result) = self.actions().written(key) else { continue };
            let mut add = |part, path: &str, digest| {
                let step = result.step.clone();
                lost.push(LostFile { key, step, part, path: path.into(), digest });
            };
            for (part, tree) in [("output", result.output), ("report", result.report)] {
                match self.tree(tree) {
                    Ok(tree) => tree
                        .entries()
                        .iter()
                        .filter(|e| !self.has_sized(e.digest, e.size))
                        .for_each(|e| add(part, &e.path, e.digest)),
                    Err(_) => add(part, "", BlobDigest::from_bytes(*tree.as_bytes())),
                }
            }
            if !self.has(result.log) {
                add("log", "", result.log);
            }
        }
        Ok(lost)
    }
}
