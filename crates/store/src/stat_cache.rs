//! Digests of source files by device, inode, size and times, so that unchanged gigabytes are not
//! read again. Losing it costs time only.
//!
//! # When an entry may be trusted
//! Whoever changes a file moves its ctime, and no call sets a ctime back: not even a change of the
//! same size whose mtime is restored goes unseen. What could go unseen is a change made so soon
//! after the last one that the file system gives both the same time (the coarsest gives 2 s). So a
//! digest is remembered only if the file's ctime lay at least 2 s before the hashing began, and if
//! nothing in its metadata moved while it was hashed: any later change then has a later ctime.
//! A younger file (racy, as git says) is hashed again each time until it is old enough.
//!
//! Not caught: pages written through a shared memory map that was dirty before the hashing began,
//! and a clock set back to the exact nanosecond.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use step::BlobDigest;

use crate::cas;
use crate::error::io;
use crate::{Result, StoreError};

/// The first line of the file. Another one means another format, and an empty cache.
const HEADER: &str = "anneal stat-cache 1";
/// The coarsest clock of a file system, in nanoseconds.
const RACY: i128 = 2_000_000_000;
/// Above this, entries that nobody asked for in this run are dropped.
const PLENTY: usize = 200_000;

#[derive(Debug)]
pub(crate) struct StatCache {
    path: PathBuf,
    /// Read when the first file is looked for.
    entries: Option<HashMap<(u64, u64), Known>>,
    changed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    stamp: Stamp,
    digest: BlobDigest,
    used: bool,
}

/// What moves when a file changes. Times are nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    size: u64,
    mtime: i128,
    ctime: i128,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let nanoseconds = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        Self {
            size: metadata.len(),
            mtime: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a change after `now` is sure to show.
    fn settled(&self, now: i128) -> bool {
        now - self.ctime >= RACY
    }
}

impl StatCache {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path, entries: None, changed: false }
    }

    fn entries(&mut self) -> &mut HashMap<(u64, u64), Known> {
        let path = &self.path;
        self.entries.get_or_insert_with(|| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let mut lines = text.lines();
            match lines.next() {
                Some(HEADER) => lines.filter_map(parse).collect(),
                _ => HashMap::new(),
            }
        })
    }

    /// The digest of the file with this metadata, if it is known for sure.
    pub(crate) fn get(&mut self, metadata: &Metadata) -> Option<BlobDigest> {
        let known = self.entries().get_mut(&(metadata.dev(), metadata.ino()))?;
        known.used = true;
        (known.stamp == Stamp::of(metadata)).then_some(known.digest)
    }

    fn insert(&mut self, metadata: &Metadata, digest: BlobDigest) {
        let known = Known { stamp: Stamp::of(metadata), digest, used: true };
        self.entries().insert((metadata.dev(), metadata.ino()), known);
        self.changed = true;
    }

    /// Replaces the file, if there is something new. A cache that cannot be written is no error.
    pub(crate) fn save(&mut self, tmp: &Path) {
        if !self.changed {
            return;
        }
        let entries = self.entries();
        if entries.len() > PLENTY {
            entries.retain(|_, known| known.used);
        }
        let mut text = format!("{HEADER}\n");
        for ((dev, ino), Known { stamp, digest, .. }) in entries {
            let Stamp { size, mtime, ctime } = stamp;
            let _ = writeln!(text, "{dev} {ino} {size} {mtime} {ctime} {digest}");
        }
        let saved = tempfile::NamedTempFile::new_in(tmp).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.persist(&self.path)?;
            Ok(())
        });
        self.changed = saved.is_err();
    }
}

/// Digest and size of the file at `path`, if the cache knows them.
pub(crate) fn known_digest(
    cache: &Mutex<StatCache>,
    path: &Path,
) -> Result<Option<(BlobDigest, u64)>> {
    let metadata = fs::metadata(path).map_err(io("read", path))?;
    let digest = cache.lock().expect("no panic while holding it").get(&metadata);
    Ok(digest.map(|digest| (digest, metadata.len())))
}

/// Hashes the file at `path`, and remembers it if that is safe.
pub(crate) fn hash_file(cache: &Mutex<StatCache>, path: &Path) -> Result<(BlobDigest, u64)> {
    let file = File::open(path).map_err(io("read", path))?;
    let before = file.metadata().map_err(io("read", path))?;
    let began = now();
    let (digest, size) = cas::hash(&file).map_err(io("read", path))?;
    let after = file.metadata().map_err(io("read", path))?;
    if Stamp::of(&before) != Stamp::of(&after) || size != after.len() {
        return Err(StoreError::Moved { path: path.to_path_buf() });
    }
    if Stamp::of(&after).settled(began) {
        cache.lock().expect("no panic while holding it").insert(&after, digest);
    }
    Ok((digest, size))
}

fn now() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(0)
}

fn parse(line: &str) -> Option<((u64, u64), Known)> {
    let mut words = line.split(' ');
    let mut next = || words.next();
    let key = (next()?.parse().ok()?, next()?.parse().ok()?);
    let stamp = Stamp {
        size: next()?.parse().ok()?,
        mtime: next()?.parse().ok()?,
        ctime: next()?.parse().ok()?,
    };
    let digest = next()?.parse().ok()?;
    words.next().is_none().then_some((key, Known { stamp, digest, used: false }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_at_rest_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "a").unwrap();
        let stamp = Stamp::of(&fs::metadata(&path).unwrap());
        for (seconds_later, settled) in [(0, false), (1, false), (2, true), (60, true), (-5, false)]
        {
            let now = stamp.ctime + seconds_later * 1_000_000_000;
            assert_eq!(stamp.settled(now), settled, "{seconds_later} s after the change");
        }
    }

    #[test]
    fn a_broken_file_is_an_empty_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stat-cache");
        let digest = BlobDigest::of(b"");
        for (text, entries) in [
            (format!("{HEADER}\n1 2 3 4 5 {digest}\n"), 1),
            (format!("{HEADER}\n1 2 3 4 5 {digest} 6\n1 2 3\n\n-1 2 3 4 5 {digest}\n"), 0),
            (format!("anneal stat-cache 2\n1 2 3 4 5 {digest}\n"), 0),
            (String::new(), 0),
        ] {
            fs::write(&path, &text).unwrap();
            assert_eq!(StatCache::at(path.clone()).entries().len(), entries, "{text}");
        }
    }
}
