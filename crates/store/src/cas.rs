//! Blobs and trees: how bytes get in, and out again.
//!
//! Knows nothing of actions. Blobs are read-only, and no name in `cas/` ever holds half a file.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use step::{BlobDigest, Entry, Tree, TreeDigest, canonical};
use tempfile::NamedTempFile;

use crate::error::io;
use crate::stat_cache::{Stamp, known_digest};
use crate::{Result, Store, StoreError};

impl Store {
    /// Keeps `bytes`.
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<BlobDigest> {
        let digest = BlobDigest::of(bytes);
        if !self.has_sized(digest, bytes.len() as u64) {
            let mut file = self.temp_file()?;
            file.write_all(bytes).map_err(io("write", file.path()))?;
            self.keep(file, digest)?;
        }
        Ok(digest)
    }

    /// Keeps a copy of the file at `path`, hashed as it is copied: what is kept is what was hashed.
    pub fn put_file(&self, path: &Path) -> Result<BlobDigest> {
        Ok(self.put_copy(path)?.0)
    }

    /// Keeps the file at `path`, which is gone from there afterwards.
    pub fn take_file(&self, path: &Path) -> Result<BlobDigest> {
        Ok(self.take(path)?.0)
    }

    /// A blob that comes in piece by piece, from somewhere that nobody vouches for.
    pub fn receive(&self) -> Result<Incoming<'_>> {
        let file = self.temp_file()?;
        Ok(Incoming { store: self, file, hasher: blake3::Hasher::new(), size: 0 })
    }

    /// Moves the files of a finished folder into the store; the folder itself is left without them.
    ///
    /// Empty folders do not count. Symbolic links and special files are refused by name, and then
    /// nothing has moved.
    pub fn ingest(&self, dir: &Path) -> Result<Tree> {
        let mut entries = Vec::new();
        for (name, path) in files_below(dir)? {
            let (digest, size) = self.take(&path)?;
            entries.push(Entry { path: name, digest, size });
        }
        self.put_tree(entries, dir)
    }

    /// Whether the blob is there. Its bytes are not looked at.
    pub fn has(&self, digest: BlobDigest) -> bool {
        self.blob_path(digest).is_file()
    }

    /// The blob's bytes, checked.
    pub fn blob(&self, digest: BlobDigest) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let bytes = fs::read(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => StoreError::Missing { digest, path: path.clone() },
            _ => io("read", &path)(e),
        })?;
        match BlobDigest::of(&bytes) == digest {
            true => Ok(bytes),
            false => Err(self.quarantine(digest, &path)),
        }
    }

    /// Reads the whole blob. One whose bytes are not its own moves to quarantine.
    pub fn verify_blob(&self, digest: BlobDigest) -> Result<()> {
        let path = self.blob_path(digest);
        let file = File::open(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => StoreError::Missing { digest, path: path.clone() },
            _ => io("read", &path)(e),
        })?;
        let before = file.metadata().map_err(io("read", &path))?;
        match hash(&file).map_err(io("read", &path))?.0 == digest {
            true => {
                let after = file.metadata().map_err(io("read", &path))?;
                if Stamp::of(&before) == Stamp::of(&after) {
                    self.follow(&path, &before, digest);
                }
                Ok(())
            }
            false => Err(self.quarantine(digest, &path)),
        }
    }

    fn follow(&self, path: &Path, before: &Metadata, digest: BlobDigest) {
        self.stat_cache.lock().expect("no panic while holding it").follow(path, before, digest);
    }

    /// Whether the blob is there as it was when it was hashed last.
    fn is_known(&self, digest: BlobDigest) -> bool {
        let known = known_digest(&self.stat_cache, &self.blob_path(digest));
        known.is_ok_and(|known| known.is_some_and(|(known, _)| known == digest))
    }

    /// The files of an artifact, from the tree's own blob.
    pub fn tree(&self, digest: TreeDigest) -> Result<Tree> {
        let blob = BlobDigest::from_bytes(*digest.as_bytes());
        let bytes = self.blob(blob)?;
        serde_json::from_slice(&bytes).map_err(|e| StoreError::Malformed {
            path: self.blob_path(blob),
            message: format!("no tree: {e}"),
        })
    }

    /// Lays the files of `tree` out below `dest`, read-only: as clones where the file system has
    /// them, else as hard links, else as copies.
    ///
    /// With `verify` every blob that may have moved since it was hashed last is hashed first. A blob
    /// that is missing or corrupt is an error that names it by its path in the tree; `dest` is then
    /// incomplete.
    pub fn materialise(&self, tree: &Tree, dest: &Path, verify: bool) -> Result<()> {
        fs::create_dir_all(dest).map_err(io("create", dest))?;
        for entry in tree.entries() {
            if verify && !self.is_known(entry.digest) {
                self.verify_blob(entry.digest).map_err(|e| in_tree(e, &entry.path))?;
            }
            let target = dest.join(&entry.path);
            let parent = target.parent().expect("a path below dest");
            fs::create_dir_all(parent).map_err(io("create", parent))?;
            self.lay_out(entry, &target)?;
        }
        Ok(())
    }

    /// The first file of `tree` that is not there in its full size.
    pub(crate) fn first_missing<'a>(&self, tree: &'a Tree) -> Option<&'a Entry> {
        tree.entries().iter().find(|e| !self.has_sized(e.digest, e.size))
    }

    /// Whether a blob of this size is there. Its bytes are not looked at.
    pub fn has_sized(&self, digest: BlobDigest, size: u64) -> bool {
        fs::metadata(self.blob_path(digest)).is_ok_and(|m| m.is_file() && m.len() == size)
    }

    /// Makes a tree of entries whose blobs are in, and keeps its canonical form too.
    pub(crate) fn put_tree(&self, entries: Vec<Entry>, origin: &Path) -> Result<Tree> {
        let tree = Tree::new(entries)
            .map_err(|source| StoreError::Tree { path: origin.to_path_buf(), source })?;
        self.put_bytes(&canonical::to_vec(&tree))?;
        Ok(tree)
    }

    pub(crate) fn put_copy(&self, path: &Path) -> Result<(BlobDigest, u64)> {
        let source = File::open(path).map_err(io("read", path))?;
        let copy = self.temp_file()?;
        let (digest, size) = match clone_file(&source, copy.as_file()) {
            true => hash(File::open(copy.path()).map_err(io("read", copy.path()))?)
                .map_err(io("read", copy.path()))?,
            false => copy_hashed(source, path, copy.as_file(), copy.path())?,
        };
        if !self.has_sized(digest, size) {
            self.keep(copy, digest)?;
        }
        Ok((digest, size))
    }

    fn take(&self, path: &Path) -> Result<(BlobDigest, u64)> {
        let file = File::open(path).map_err(io("read", path))?;
        let metadata = file.metadata().map_err(io("read", path))?;
        // A file with a second name can be written through it: only a copy is ours alone.
        let taken = match metadata.nlink() > 1 {
            true => self.put_copy(path)?,
            false => {
                let (digest, size) = hash(&file).map_err(io("read", path))?;
                if !self.has_sized(digest, size) {
                    self.seal(&file, path)?;
                    let dest = self.blob_path(digest);
                    match in_folder(&dest, || fs::rename(path, &dest)) {
                        Ok(()) => {
                            self.follow(&dest, &metadata, digest);
                            return Ok((digest, size));
                        }
                        Err(e) if e.kind() == ErrorKind::CrossesDevices => {
                            self.put_copy(path)?;
                        }
                        Err(e) => return Err(io("write", &dest)(e)),
                    }
                }
                (digest, size)
            }
        };
        fs::remove_file(path).map_err(io("remove", path))?;
        Ok(taken)
    }

    fn temp_file(&self) -> Result<NamedTempFile> {
        let dir = self.root.join("tmp");
        NamedTempFile::new_in(&dir).map_err(io("write", &dir))
    }

    /// Gives a complete temporary file its name.
    fn keep(&self, file: NamedTempFile, digest: BlobDigest) -> Result<()> {
        self.seal(file.as_file(), file.path())?;
        let dest = self.blob_path(digest);
        // Whoever else writes this name writes the same bytes.
        let file = file.into_temp_path();
        in_folder(&dest, || fs::rename(&file, &dest)).map_err(io("write", &dest))?;
        // It is not there any more.
        let _ = file.keep();
        Ok(())
    }

    fn seal(&self, file: &File, path: &Path) -> Result<()> {
        file.set_permissions(Permissions::from_mode(0o444)).map_err(io("write", path))?;
        self.goes_in(file, path)
    }

    fn lay_out(&self, entry: &Entry, target: &Path) -> Result<()> {
        let source = self.blob_path(entry.digest);
        let blob = File::open(&source).map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                StoreError::Missing { digest: entry.digest, path: entry.path.clone().into() }
            }
            _ => io("read", &source)(e),
        })?;
        let dir = target.parent().expect("a path below dest");
        if self.clones.load(Ordering::Relaxed) {
            let copy = NamedTempFile::new_in(dir).map_err(io("write", dir))?;
            if clone_file(&blob, copy.as_file()) {
                return finish(copy, target);
            }
            // Nor will it clone the next one.
            self.clones.store(false, Ordering::Relaxed);
        }
        let before = blob.metadata().map_err(io("read", &source))?;
        let known = self.stat_cache.lock().expect("no panic while holding it").get(&before);
        match fs::hard_link(&source, target) {
            Ok(()) => {
                known.into_iter().for_each(|digest| self.follow(&source, &before, digest));
                Ok(())
            }
            Err(e)
                if e.kind() == ErrorKind::AlreadyExists || e.kind() == ErrorKind::StorageFull =>
            {
                Err(io("write", target)(e))
            }
            // Another disk, too many links, or a file system without them.
            Err(_) => {
                let mut copy = NamedTempFile::new_in(dir).map_err(io("write", dir))?;
                std::io::copy(&mut &blob, copy.as_file_mut()).map_err(io("write", target))?;
                finish(copy, target)
            }
        }
    }

    /// Moves a blob that is not what its name says out of the way.
    pub(crate) fn quarantine(&self, digest: BlobDigest, path: &Path) -> StoreError {
        let quarantine = self.root.join("quarantine").join(digest.to_string());
        match fs::rename(path, &quarantine) {
            Ok(()) => StoreError::Corrupt { digest, path: path.to_path_buf(), quarantine },
            // Whoever found it out at the same time was faster.
            Err(e) if e.kind() == ErrorKind::NotFound => {
                StoreError::Missing { digest, path: path.to_path_buf() }
            }
            Err(e) => io("quarantine the corrupt", path)(e),
        }
    }
}

/// A blob on its way in. Dropped before its end, it was never there.
pub struct Incoming<'a> {
    store: &'a Store,
    file: NamedTempFile,
    hasher: blake3::Hasher,
    size: u64,
}

impl Incoming<'_> {
    /// The next bytes of it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        self.file.write_all(bytes).map_err(io("write", self.file.path()))
    }

    /// Keeps it if it is the blob of this digest; else hands back all that came.
    pub fn finish(self, digest: BlobDigest) -> Result<Result<(), File>> {
        let Self { store, file, hasher, size } = self;
        if hasher.finalize().as_bytes() != digest.as_bytes() {
            return Ok(Err(file.into_file()));
        }
        if !store.has_sized(digest, size) {
            store.keep(file, digest)?;
        }
        Ok(Ok(()))
    }
}

/// Gives a laid-out copy its name, read-only.
fn finish(copy: NamedTempFile, target: &Path) -> Result<()> {
    let mode = Permissions::from_mode(0o444);
    copy.as_file().set_permissions(mode).map_err(io("write", target))?;
    copy.persist_noclobber(target).map(drop).map_err(|e| io("write", target)(e.error))
}

/// Removes a folder and all below it; one that is not there is gone already.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// The digest and size of what `reader` gives.
pub(crate) fn hash(mut reader: impl Read) -> std::io::Result<(BlobDigest, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok((BlobDigest::from_bytes(*hasher.finalize().as_bytes()), size)),
            n => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
        }
    }
}

/// Large enough for BLAKE3's widest vectors, small enough for the cache.
const BUFFER: usize = 1 << 18;

fn copy_hashed(
    mut source: File,
    source_path: &Path,
    mut copy: &File,
    copy_path: &Path,
) -> Result<(BlobDigest, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    loop {
        match source.read(&mut buffer).map_err(io("read", source_path))? {
            0 => return Ok((BlobDigest::from_bytes(*hasher.finalize().as_bytes()), size)),
            n => {
                hasher.update(&buffer[..n]);
                copy.write_all(&buffer[..n]).map_err(io("write", copy_path))?;
                size += n as u64;
            }
        }
    }
}

/// Shares the blocks of `source` with `copy`, where the file system can.
fn clone_file(source: &File, copy: &File) -> bool {
    #[cfg(target_os = "linux")]
    return rustix::fs::ioctl_ficlone(copy, source).is_ok();
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (source, copy);
        false
    }
}

/// Does what puts a file at `dest`, whose folder is made if there is none.
fn in_folder(dest: &Path, put: impl Fn() -> std::io::Result<()>) -> std::io::Result<()> {
    put().or_else(|e| match (e.kind(), dest.parent()) {
        (ErrorKind::NotFound, Some(folder)) => {
            fs::create_dir_all(folder)?;
            put()
        }
        _ => Err(e),
    })
}

fn in_tree(error: StoreError, path: &str) -> StoreError {
    let path = PathBuf::from(path);
    match error {
        StoreError::Missing { digest, .. } => StoreError::Missing { digest, path },
        StoreError::Corrupt { digest, quarantine, .. } => {
            StoreError::Corrupt { digest, path, quarantine }
        }
        other => other,
    }
}

/// Every file below `dir` with its name in a tree, sorted. Anything else is refused by name.
fn files_below(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    fn visit(dir: &Path, prefix: &str, out: &mut Vec<(String, PathBuf)>) -> Result<()> {
        for entry in fs::read_dir(dir).map_err(io("read", dir))? {
            let entry = entry.map_err(io("read", dir))?;
            let path = entry.path();
            let name = tree_name(prefix, &path)?;
            let kind = entry.file_type().map_err(io("read", &path))?;
            match refused(kind) {
                Some(what) => return Err(StoreError::Refused { path, what }),
                None if kind.is_dir() => visit(&path, &name, out)?,
                None => out.push((name, path)),
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    visit(dir, "", &mut out)?;
    out.sort();
    Ok(out)
}

/// `prefix/name`, as trees write paths.
pub(crate) fn tree_name(prefix: &str, path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| StoreError::Refused {
        path: path.to_path_buf(),
        what: "a name that is not Unicode",
    })?;
    if name.contains('\\') {
        return Err(StoreError::Refused {
            path: path.to_path_buf(),
            what: "a name with a backslash",
        });
    }
    Ok(if prefix.is_empty() { name.to_string() } else { format!("{prefix}/{name}") })
}

/// What `kind` is, unless it is a file or a folder.
pub(crate) fn refused(kind: fs::FileType) -> Option<&'static str> {
    if kind.is_symlink() {
        Some("a symbolic link")
    } else if kind.is_file() || kind.is_dir() {
        None
    } else {
        Some("a special file (socket, pipe or device)")
    }
}
