//! Takes away what no recipe stands for any more: what is old, or what is too much.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, SystemTime};

use step::{ActionKey, ActionResult, BlobDigest, Failure, TreeDigest};
use store::{GcOptions, GcReport, Root, StoreError};

use crate::links::write_atomic;
use crate::{Engine, Error};

/// What gc keeps beside what targets' names stand for. By default, nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep {
    /// Results younger than this,
    pub newer: Duration,
    /// as long as the store is no larger than so many bytes: the oldest go first.
    pub max_size: Option<u64>,
}

impl Engine {
    /// Keeps every result that a target's name stands for, all results that those were made from,
    /// and what `keep` says; sweeps the rest.
    pub fn gc(&self, keep: Keep, dry_run: bool) -> Result<GcReport, Error> {
        Ok(self.sweep(keep, dry_run)??)
    }

    fn sweep(&self, keep: Keep, dry_run: bool) -> Result<store::Result<GcReport>, Error> {
        let results = self.store().actions().all()?;
        let named = self.stood_for(&results)?;
        let drop = match keep.max_size {
            Some(size) => self.beyond(size, &named, &results)?,
            None => Vec::new(),
        };
        let roots: Vec<Root> = named.into_iter().map(Root::Action).collect();
        let options = GcOptions { roots: &roots, keep_newer: keep.newer, drop: &drop, dry_run };
        Ok(self.store().gc(options))
    }

    /// Holds the store to the `max-size` of `[workspace.metadata.anneal]`, if there is one and
    /// nobody else has the store open: whoever comes last does it. Tells what went.
    pub fn hold_size(&self) -> Result<Option<GcReport>, Error> {
        let added = self.store().take_added();
        if added == 0 {
            return Ok(None);
        }
        let Some(max_size) = self.max_size()? else { return Ok(None) };
        // No less than the store has: to look at every file takes longer than many a build.
        let bound = self.store().root().join("size");
        let known = std::fs::read_to_string(&bound).ok().and_then(|text| text.parse::<u64>().ok());
        let mut size = known.unwrap_or(u64::MAX).saturating_add(added);
        if size > max_size {
            size = self.store().size()?;
        }
        write_atomic(&bound, size.to_string().as_bytes())?;
        if size <= max_size {
            return Ok(None);
        }
        let keep = Keep { newer: Duration::MAX, max_size: Some(max_size) };
        match self.sweep(keep, false)? {
            Err(StoreError::Busy { .. }) => Ok(None),
            swept => Ok(Some(swept?)),
        }
    }

    /// Bytes, from the manifest of the workspace.
    fn max_size(&self) -> Result<Option<u64>, Failure> {
        let path = self.root().join("Cargo.toml");
        let metadata = crate::metadata(self.root());
        let Some(setting) = metadata.get("max-size") else { return Ok(None) };
        setting.as_str().and_then(bytes).map(Some).ok_or_else(|| {
            Failure::input(format!("{}: max-size = {setting} is no size", path.display()))
                .hint("write it as `50 GB`")
        })
    }

    /// The results that names stand for, and all that those were made from.
    fn stood_for(&self, results: &[ActionResult]) -> Result<BTreeSet<ActionKey>, Error> {
        let mut keep: BTreeSet<ActionKey> = self.named()?.into_iter().collect();
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
        Ok(keep)
    }

    /// The oldest of the other results: those that would make the store larger than `size`.
    fn beyond(
        &self,
        size: u64,
        named: &BTreeSet<ActionKey>,
        results: &[ActionResult],
    ) -> Result<Vec<ActionKey>, Error> {
        let mut seen: HashSet<BlobDigest> = HashSet::new();
        let mut adds = |result: &ActionResult| -> Result<u64, Error> {
            let mut bytes = 0;
            for tree in [result.output, result.report] {
                let tree = self.store().tree(tree)?;
                let new = tree.entries().iter().filter(|entry| seen.insert(entry.digest));
                bytes += new.map(|entry| entry.size).sum::<u64>();
            }
            Ok(bytes)
        };
        let mut total = 0;
        for result in results.iter().filter(|r| named.contains(&r.key)) {
            total += adds(result)?;
        }
        let mut others: Vec<_> = results.iter().filter(|r| !named.contains(&r.key)).collect();
        let recorded = |r: &&ActionResult| self.store().actions().recorded(r.key);
        others.sort_by_key(|r| std::cmp::Reverse(recorded(r).unwrap_or(SystemTime::UNIX_EPOCH)));
        let mut drop = Vec::new();
        for result in others {
            // Once one is too much, so are all that are older.
            total += if drop.is_empty() { adds(result)? } else { 0 };
            if total > size {
                drop.push(result.key);
            }
        }
        Ok(drop)
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
}

/// Bytes of `50 GB`, `1.5 TiB`, `800MB`.
pub fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let number: f64 = text[..unit].trim().parse().ok()?;
    let scale = match &text[unit..] {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        "TiB" => 1_099_511_627_776.0,
        _ => return None,
    };
    (number.is_finite() && number >= 0.0).then_some((number * scale) as u64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_have_units() {
        for (text, size) in [
            ("50 GB", Some(50_000_000_000)),
            ("1.5KiB", Some(1536)),
            ("0 B", Some(0)),
            ("50", None),
            ("GB", None),
            ("-1 GB", None),
            ("50 gb", None),
        ] {
            assert_eq!(super::bytes(text), size, "{text}");
        }
    }
}
