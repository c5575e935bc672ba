//! A worker that was compiled and may be run again: nothing that goes into it has changed.
//!
//! cargo knows that too, but takes a tenth of a second to say so.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use step::CodeDigest;

use crate::execute::write_atomic;

/// What a worker was compiled from, and the file that came out.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Compiled {
    /// Sources, dependencies, toolchain and profile.
    code: CodeDigest,
    /// What cargo was told of tools.
    env: BTreeMap<String, String>,
    /// What cargo was told by whoever called us.
    flags: BTreeMap<String, String>,
    path: PathBuf,
    /// Device, inode, size, mtime and ctime.
    stamp: [i64; 7],
}

/// The variables that change what cargo makes, or where.
const FLAGS: [&str; 5] = [
    "CARGO_TARGET_DIR",
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "RUSTUP_TOOLCHAIN",
];

impl Compiled {
    pub fn new(path: &Path, code: CodeDigest, env: BTreeMap<String, String>) -> Self {
        let stamp = path.metadata().map_or([0; 7], |m| stamp(&m));
        Self { code, env, flags: flags(), path: path.into(), stamp }
    }

    /// The worker that `record` tells of, if it would come out the same.
    pub fn still(
        record: &Path,
        code: CodeDigest,
        env: &BTreeMap<String, String>,
    ) -> Option<PathBuf> {
        let known: Self = serde_json::from_slice(&std::fs::read(record).ok()?).ok()?;
        let now = stamp(&known.path.metadata().ok()?);
        let same = known.code == code && known.env == *env && known.flags == flags();
        (same && known.stamp == now).then_some(known.path)
    }

    pub fn write(&self, record: &Path) {
        let text = serde_json::to_vec(self).expect("records serialise to JSON");
        // Losing it costs a call of cargo.
        let _ = write_atomic(record, &text);
    }
}

fn flags() -> BTreeMap<String, String> {
    let set = FLAGS.iter().filter_map(|name| Some((name.to_string(), std::env::var(name).ok()?)));
    set.collect()
}

fn stamp(m: &Metadata) -> [i64; 7] {
    let (mtime, ctime) = ([m.mtime(), m.mtime_nsec()], [m.ctime(), m.ctime_nsec()]);
    [m.dev() as i64, m.ino() as i64, m.len() as i64, mtime[0], mtime[1], ctime[0], ctime[1]]
}
