//! A folder as data: sorted (path, digest, size). Its digest names an artifact.
//!
//! Knows nothing of modes, owners or times: two folders with the same files are the same tree.

use serde::{Deserialize, Serialize};

use crate::canonical;
use crate::digest::{BlobDigest, TreeDigest};

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Relative, `/` between folders, no `.` or `..`.
    pub path: String,
    pub digest: BlobDigest,
    /// Bytes.
    pub size: u64,
}

/// The files of a folder.
///
/// Invariant: sorted by path, no path twice, every path safe to join to a folder. Hence private.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Entry>", into = "Vec<Entry>")]
pub struct Tree {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    #[error("the path `{0}` cannot stand in a tree: it must be relative, without `.` or `..`")]
    UnsafePath(String),
    #[error("the path `{0}` stands in the tree twice")]
    Twice(String),
}

impl Tree {
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, TreeError> {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        for entry in &entries {
            if !is_safe(&entry.path) {
                return Err(TreeError::UnsafePath(entry.path.clone()));
            }
        }
        if let Some(pair) = entries.windows(2).find(|w| w[0].path == w[1].path) {
            return Err(TreeError::Twice(pair[0].path.clone()));
        }
        Ok(Self { entries })
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Bytes of all files together.
    pub fn size(&self) -> u64 {
        self.entries.iter().map(|e| e.size).sum()
    }

    pub fn digest(&self) -> TreeDigest {
        TreeDigest::of(&canonical::to_vec(self))
    }
}

impl TryFrom<Vec<Entry>> for Tree {
    type Error = TreeError;

    fn try_from(entries: Vec<Entry>) -> Result<Self, TreeError> {
        Tree::new(entries)
    }
}

impl From<Tree> for Vec<Entry> {
    fn from(tree: Tree) -> Self {
        tree.entries
    }
}

fn is_safe(path: &str) -> bool {
    !path.contains('\\')
        && !path.contains('\0')
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str) -> Entry {
        Entry { path: path.into(), digest: BlobDigest::of(b""), size: 0 }
    }

    #[test]
    fn order_of_entries_does_not_matter() {
        let a = Tree::new(vec![entry("b"), entry("a/c")]).unwrap();
        let b = Tree::new(vec![entry("a/c"), entry("b")]).unwrap();
        assert_eq!(a.digest(), b.digest());
    }

    #[test]
    fn hostile_paths_are_refused() {
        for path in ["/etc/passwd", "../x", "a/../b", "", "a//b", "./a", "a\\b"] {
            assert_eq!(Tree::new(vec![entry(path)]), Err(TreeError::UnsafePath(path.into())));
        }
        assert_eq!(Tree::new(vec![entry("a"), entry("a")]), Err(TreeError::Twice("a".into())));
    }
}
