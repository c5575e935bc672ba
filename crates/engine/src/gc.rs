//! Takes away what no recipe stands for any more.

use std::collections::BTreeSet;
use std::time::Duration;

use step::{ActionKey, TreeDigest};

use store::{GcOptions, GcReport, Root};

use crate::{Engine, Error};

impl Engine {
    /// Keeps every result younger than `age`, every result that a target's name stands for, and
    /// all results that those were made from; sweeps the rest.
    pub fn gc(&self, age: Duration, dry_run: bool) -> Result<GcReport, Error> {
        let mut keep: BTreeSet<ActionKey> = self.named()?.into_iter().collect();
        let results = self.store().actions().all()?;
        let by_output = |tree: TreeDigest| results.iter().filter(move |r| r.output == tree);
        let mut open: Vec<ActionKey> = keep.iter().copied().collect();
        while let Some(key) = open.pop() {
            let inputs = self.action(key).map(|a| a.inputs).unwrap_or_default();
            for made in inputs.into_values().flat_map(by_output) {
                if keep.insert(made.key) {
                    open.push(made.key);
                }
            }
        }
        // Folders that link to a blob hold its space: those nobody needs go first.
        if !dry_run {
            self.drop_trees(&keep)?;
        }
        let roots: Vec<Root> = keep.into_iter().map(Root::Action).collect();
        Ok(self.store().gc(GcOptions { roots: &roots, keep_newer: age, dry_run })?)
    }

    /// The keys that targets' names stand for.
    fn named(&self) -> Result<Vec<ActionKey>, Error> {
        let mut keys = Vec::new();
        let mut open = vec![self.store().root().join("targets")];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if let Some(key) =
                    std::fs::read(&path).ok().and_then(|b| serde_json::from_slice(&b).ok())
                {
                    keys.push(key);
                }
            }
        }
        Ok(keys)
    }

    /// Drops materialised folders, which are links into the store, save those of kept results.
    /// Any other is made again when it is needed.
    fn drop_trees(&self, keep: &BTreeSet<ActionKey>) -> Result<(), Error> {
        let results = self.store().actions().all()?;
        let kept = results.iter().filter(|r| keep.contains(&r.key));
        let live: BTreeSet<String> =
            kept.flat_map(|r| [r.output.to_string(), r.report.to_string()]).collect();
        let trees = self.store().root().join("trees");
        for entry in std::fs::read_dir(&trees).into_iter().flatten().flatten() {
            if !live.contains(&*entry.file_name().to_string_lossy()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }
}
