//! Where artifacts lie for steps and people: folders of links into the store, and names for them.
//!
//! Knows nothing of how an artifact came about.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use step::{ActionResult, Failure, TreeDigest};
use store::StoreError;

use crate::target::TargetId;
use crate::{Engine, Error, cannot};

impl Engine {
    /// A read-only folder with the files of `tree`. Made once; held to its digest each time (the
    /// stat cache makes that cheap), and made again if somebody changed it.
    pub fn materialise(&self, tree: TreeDigest) -> Result<PathBuf, Error> {
        let path = self.store.root().join("trees").join(tree.to_string());
        let aside = || self.store.root().join("tmp").join(format!("tree-{}", unique()));
        if path.is_dir() {
            if self.is_intact(&path, tree) {
                return Ok(path);
            }
            // Somebody else may be quicker.
            let altered = aside();
            if std::fs::rename(&path, &altered).is_ok() {
                remove(&altered)?;
            }
        }
        let partial = aside();
        let laid_out = self.store.materialise(&self.store.tree(tree)?, &partial, true);
        let done = laid_out.map_err(Error::from).and_then(|()| Ok(rename(&partial, &path)?));
        if partial.exists() {
            let _ = remove(&partial);
        }
        done.map(|()| path)
    }

    fn is_intact(&self, folder: &Path, tree: TreeDigest) -> bool {
        const TRIES: usize = 100;
        // While it is looked at, another builder may give a file of it another name.
        let mut looks = (0..TRIES).map(|_| self.store.hash_path(folder));
        let now = looks.find(|now| !matches!(now, Err(StoreError::Moved { .. })));
        now.is_some_and(|now| now.is_ok_and(|now| now.digest() == tree))
    }

    /// Makes the target's name stand for `result`: links, and the pointer last. Whoever finds the
    /// pointer as it should be need not look at what was made before it.
    pub(crate) fn point(&self, target: &TargetId, result: &ActionResult) -> Result<(), Error> {
        let pointer = self.pointer(target);
        let text = serde_json::to_vec(&result.key).expect("a key serialises to JSON");
        let link = self.link(target);
        // Made again if somebody changed what it leads to.
        let folder = self.materialise(result.output)?;
        let leads_there =
            std::fs::read_link(&link).is_ok_and(|to| to.file_name() == folder.file_name());
        if leads_there && std::fs::read(&pointer).is_ok_and(|old| old == text) {
            return Ok(());
        }
        symlink(&folder, &link)?;
        let report = link.with_file_name(format!("{}.report", target.target));
        if self.store.tree(result.report)?.entries().is_empty() {
            let _ = std::fs::remove_file(&report);
        } else {
            symlink(&self.materialise(result.report)?, &report)?;
        }
        write_atomic(&pointer, &text)?;
        self.note_in_history(target, result.key);
        Ok(())
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    std::fs::remove_dir_all(path).map_err(cannot("remove", path))
}

/// Moves a finished folder to its place. Somebody else may have been there first.
fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    let parent = to.parent().expect("a place in a folder");
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::rename(from, to))
        .or_else(|e| if to.is_dir() { Ok(()) } else { Err(e) })
        .map_err(cannot("write", to))
}

pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let io = cannot("write", path);
    let partial = path.with_extension(format!("{}.tmp", unique()));
    std::fs::create_dir_all(path.parent().expect("a file in a folder")).map_err(&io)?;
    std::fs::write(&partial, bytes).map_err(&io)?;
    std::fs::rename(&partial, path).map_err(io)
}

/// A link at `at` that says `to`, put there in one move. Relative, so that the workspace may move.
fn symlink(to: &Path, at: &Path) -> Result<(), Failure> {
    let io = cannot("link", at);
    let name = to.file_name().expect("trees have names");
    let version = Path::new("..").join(format!("v{}", store::FORMAT)).join("trees").join(name);
    let partial = at.with_file_name(format!(".{}.tmp", unique()));
    std::fs::create_dir_all(at.parent().expect("a link in a folder")).map_err(&io)?;
    let _ = std::fs::remove_file(&partial);
    std::os::unix::fs::symlink(&version, &partial).map_err(&io)?;
    std::fs::rename(&partial, at).map_err(io)
}

/// A part of a file name that nobody else uses now.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
