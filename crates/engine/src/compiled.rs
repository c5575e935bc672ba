//! A worker that was compiled and may be run again: nothing that goes into it has changed.
//!
//! cargo knows that too, but takes a tenth of a second to say so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use step::CodeDigest;

use crate::links::write_atomic;
use crate::stamp::Stamp;

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
    stamp: Option<Stamp>,
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
        Self { code, env, flags: flags(), path: path.into(), stamp: Stamp::of(path) }
    }

    /// The worker that `record` tells of, if it would come out the same.
    pub fn still(
        record: &Path,
        code: CodeDigest,
        env: &BTreeMap<String, String>,
    ) -> Option<PathBuf> {
        let known: Self = serde_json::from_slice(&std::fs::read(record).ok()?).ok()?;
        let now = Some(Stamp::of(&known.path)?);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_run_again_if_nothing_of_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (worker, record) = (dir.path().join("worker"), dir.path().join("workers/w.json"));
        std::fs::write(&worker, "1").unwrap();
        let env = BTreeMap::from([("LIBTORCH".to_string(), "/a".to_string())]);
        let code = CodeDigest::of(b"code");
        assert_eq!(Compiled::still(&record, code, &env), None);
        Compiled::new(&worker, code, env.clone()).write(&record);
        assert_eq!(Compiled::still(&record, code, &env), Some(worker.clone()));
        assert_eq!(Compiled::still(&record, CodeDigest::of(b"other"), &env), None);
        assert_eq!(Compiled::still(&record, code, &BTreeMap::new()), None);
        std::fs::write(&worker, "22").unwrap();
        assert_eq!(Compiled::still(&record, code, &env), None);
        std::fs::remove_file(&worker).unwrap();
        assert_eq!(Compiled::still(&record, code, &env), None);
    }
}
