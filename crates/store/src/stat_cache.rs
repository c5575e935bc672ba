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
//! The store's own files are young whenever they come in or get another name, for a link moves their
//! ctime. Theirs is followed through that: what was known before the link is known after it, and
//! written down once the clock has moved on and the file has not.
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
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use step::BlobDigest;

use crate::cas;
use crate::error::io;
use crate::{Result, StoreError};

/// The first line of the file. Another one means another format, and an empty cache.
const HEADER: &str = "anneal stat-cache 1";
/// The coarsest clock of a file system, in nanoseconds.
const RACY: i128 = 2_000_000_000;
/// The longest that the kernel's clock for files may stand still.
const TICK: Duration = Duration::from_millis(20);
/// Above this, entries that nobody asked for in this run are dropped.
const PLENTY: usize = 200_000;

#[derive(Debug)]
pub(crate) struct StatCache {
    path: PathBuf,
    /// Read when the first file is looked for.
    entries: Option<HashMap<(u64, u64), Known>>,
    changed: bool,
    /// The store's own files that this process hashed or linked: known here, not yet to others.
    young: HashMap<(u64, u64), Young>,
}

#[derive(Debug)]
struct Young {
    path: PathBuf,
    stamp: Stamp,
    digest: BlobDigest,
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
        Self { path, entries: None, changed: false, young: HashMap::new() }
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
        let (file, stamp) = ((metadata.dev(), metadata.ino()), Stamp::of(metadata));
        if let Some(young) = self.young.get(&file).filter(|young| young.stamp == stamp) {
            return Some(young.digest);
        }
        let known = self.entries().get_mut(&file)?;
        known.used = true;
        (known.stamp == stamp).then_some(known.digest)
    }

    /// Follows a file of the store, `path`, that was `before` and had `digest`: it has been given a
    /// name, which moved nothing but its ctime.
    pub(crate) fn follow(&mut self, path: &Path, before: &Metadata, digest: BlobDigest) {
        let Ok(after) = fs::metadata(path) else { return };
        let (was, stamp) = (Stamp::of(before), Stamp::of(&after));
        if before.ino() == after.ino() && (was.size, was.mtime) == (stamp.size, stamp.mtime) {
            let young = Young { path: path.into(), stamp, digest };
            self.young.insert((after.dev(), after.ino()), young);
        }
    }

    /// Writes down the young ones that have not moved since. A file system whose clock is coarse
    /// shows whole seconds: there they stay unknown.
    fn grow_up(&mut self) {
        let young = std::mem::take(&mut self.young);
        let Some(latest) = young.values().map(|young| young.stamp.ctime).max() else { return };
        if latest % 1_000_000_000 == 0 {
            return;
        }
        // The kernel stamps files by a clock of its own, which ticks every few milliseconds.
        let deadline = Instant::now() + TICK;
        while coarse_now() <= latest {
            if Instant::now() > deadline {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        for Young { path, stamp, digest } in young.into_values() {
            if let Ok(metadata) = fs::metadata(&path)
                && Stamp::of(&metadata) == stamp
            {
                self.insert(&metadata, digest);
            }
        }
    }

    fn insert(&mut self, metadata: &Metadata, digest: BlobDigest) {
        let known = Known { stamp: Stamp::of(metadata), digest, used: true };
        self.entries().insert((metadata.dev(), metadata.ino()), known);
        self.changed = true;
    }

    /// Replaces the file, if there is something new. A cache that cannot be written is no error.
    pub(crate) fn save(&mut self, tmp: &Path) {
        self.grow_up();
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

/// The clock by which the kernel stamps files.
fn coarse_now() -> i128 {
    #[cfg(target_os = "linux")]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
    }
    #[cfg(not(target_os = "linux"))]
    now()
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

    #[test]
    fn the_stores_own_files_are_known_through_links_and_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let open = || crate::Store::open(&dir.path().join("v1")).unwrap();
        let (made, laid_out) = (dir.path().join("made"), dir.path().join("laid-out"));
        fs::create_dir(&made).unwrap();
        fs::write(made.join("file"), "bytes").unwrap();
        let store = open();
        let tree = store.ingest(&made).unwrap();
        let partial = dir.path().join("partial");
        store.materialise(&tree, &partial, true).unwrap();
        fs::rename(partial, &laid_out).unwrap();
        drop(store);

        let store = open();
        let (file, blob) = (laid_out.join("file"), store.blob_path(tree.entries()[0].digest));
        let known = |path: &Path| known_digest(&store.stat_cache, path).unwrap().map(|k| k.0);
        assert_eq!(known(&blob), Some(tree.entries()[0].digest));
        assert_eq!(known(&file), known(&blob));

        // Altered within the same size, its mtime restored.
        let modified = fs::metadata(&blob).unwrap().modified().unwrap();
        fs::set_permissions(&blob, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let mut altered = File::options().write(true).open(&blob).unwrap();
        altered.write_all(b"BYTES").unwrap();
        altered.set_modified(modified).unwrap();
        assert_eq!(known(&blob), None);
        let again = store.materialise(&tree, &dir.path().join("again"), true);
        assert!(matches!(again, Err(StoreError::Corrupt { .. })), "{again:?}");
    }
}
