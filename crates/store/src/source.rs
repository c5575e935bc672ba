//! The user's own files and folders, as trees: looked at where they lie, copied in when needed.
//!
//! Knows nothing of who asks. The originals are never touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use step::{BlobDigest, Entry, Tree};

use crate::cas::{refused, tree_name};
use crate::error::io;
use crate::stat_cache::{hash_file, known_digest};
use crate::{Result, Store, StoreError};

/// Names that are never part of a source folder: the debris of tools, not what a person wrote.
pub const SKIPPED: &[&str] = &[".git", "node_modules", ".DS_Store", "__pycache__"];

impl Store {
    /// The tree of a file (one entry, under its name) or a folder, nothing copied. Unchanged files
    /// are known from the stat cache.
    ///
    /// `path` itself may be a symbolic link. A link below it must lead to a file below it too.
    pub fn hash_path(&self, path: &Path) -> Result<Tree> {
        let entries = self.source_entries(path)?.into_iter().map(|(entry, _)| entry).collect();
        Tree::new(entries).map_err(|source| StoreError::Tree { path: path.to_path_buf(), source })
    }

    /// The same tree, with a copy of every file in the store.
    pub fn ingest_copy(&self, path: &Path) -> Result<Tree> {
        let mut entries = Vec::new();
        for (mut entry, file) in self.source_entries(path)? {
            if !self.has_sized(entry.digest, entry.size) {
                // What counts is what was copied, should the file have changed in between.
                (entry.digest, entry.size) = self.put_copy(&file)?;
            }
            entries.push(entry);
        }
        self.put_tree(entries, path)
    }

    fn source_entries(&self, path: &Path) -> Result<Vec<(Entry, PathBuf)>> {
        let mut files = Vec::new();
        match fs::metadata(path).map_err(io("read", path))? {
            m if m.is_dir() => {
                let root = fs::canonicalize(path).map_err(io("read", path))?;
                walk(path, "", &root, &mut files)?;
            }
            m => match refused(m.file_type()) {
                Some(what) => return Err(StoreError::Refused { path: path.into(), what }),
                None => files.push((tree_name("", path)?, path.to_path_buf())),
            },
        }
        let digests = self.digests(&files)?;
        let entry = |((name, file), (digest, size))| (Entry { path: name, digest, size }, file);
        Ok(files.into_iter().zip(digests).map(entry).collect())
    }

    /// Digest and size of each file: those that are not known are read by all threads.
    fn digests(&self, files: &[(String, PathBuf)]) -> Result<Vec<(BlobDigest, u64)>> {
        let mut found = Vec::new();
        let mut unknown = Vec::new();
        for (i, (_, path)) in files.iter().enumerate() {
            let known = known_digest(&self.stat_cache, path)?;
            unknown.extend(known.is_none().then_some(i));
            found.push(known);
        }
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, (BlobDigest, u64))>> {
            let mut done = Vec::new();
            while let Some(i) = unknown.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push((*i, hash_file(&self.stat_cache, &files[*i].1)?));
            }
            Ok(done)
        };
        let more = match unknown.len() {
            0 | 1 => 0,
            many => thread::available_parallelism().map_or(1, usize::from).min(many) - 1,
        };
        let done = thread::scope(|scope| {
            let others: Vec<_> = (0..more).map(|_| scope.spawn(work)).collect();
            let mut done = vec![work()];
            done.extend(
                others.into_iter().map(|other| other.join().expect("hashing does not panic")),
            );
            done
        });
        for part in done {
            for (i, digest) in part? {
                found[i] = Some(digest);
            }
        }
        Ok(found.into_iter().map(|digest| digest.expect("known or hashed")).collect())
    }
}

fn walk(dir: &Path, prefix: &str, root: &Path, out: &mut Vec<(String, PathBuf)>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(io("read", dir))? {
        let entry = entry.map_err(io("read", dir))?;
        let path = entry.path();
        let name = tree_name(prefix, &path)?;
        if SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
            continue;
        }
        let kind = entry.file_type().map_err(io("read", &path))?;
        if kind.is_dir() {
            walk(&path, &name, root, out)?;
        } else if kind.is_symlink() {
            let real = fs::canonicalize(&path).map_err(io("follow", &path))?;
            if !real.starts_with(root) {
                let what = "a symbolic link that leads out of its folder";
                return Err(StoreError::Refused { path, what });
            }
            if !real.is_file() {
                let what = "a symbolic link to something that is no file";
                return Err(StoreError::Refused { path, what });
            }
            out.push((name, real));
        } else if let Some(what) = refused(kind) {
            return Err(StoreError::Refused { path, what });
        } else {
            out.push((name, path));
        }
    }
    Ok(())
}
