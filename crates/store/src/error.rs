//! What can go wrong in the store. Every variant names a path.

use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use step::tree::TreeError;
use step::{BlobDigest, Failure};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: Error },

    #[error("the disk is full: cannot {doing} {}", path.display())]
    NoSpace { doing: &'static str, path: PathBuf },

    #[error("the store is read-only: cannot {doing} {}", path.display())]
    ReadOnly { doing: &'static str, path: PathBuf },

    #[error("{} says format {found}, this program knows {}", path.display(), crate::FORMAT)]
    Format { path: PathBuf, found: u32 },

    /// A blob that is not there. `path` is its place in a tree where it is known, else in the store.
    #[error("the store has lost {} ({})", path.display(), digest)]
    Missing { digest: BlobDigest, path: PathBuf },

    /// A blob whose bytes are not its digest's. It lies in quarantine now.
    #[error("{} is corrupt: its bytes are not those of {digest}", path.display())]
    Corrupt { digest: BlobDigest, path: PathBuf, quarantine: PathBuf },

    /// A symbolic link, a socket, a name that is not Unicode.
    #[error("{} is {what}", path.display())]
    Refused { path: PathBuf, what: &'static str },

    #[error("{}: {source}", path.display())]
    Tree { path: PathBuf, source: TreeError },

    /// A file of the store itself that does not parse.
    #[error("{} is not what it should be: {message}", path.display())]
    Malformed { path: PathBuf, message: String },

    /// A file changed while it was read.
    #[error("{} changed while it was read", path.display())]
    Moved { path: PathBuf },

    /// Another process has the store open.
    #[error("{} is in use by another process", path.display())]
    Busy { path: PathBuf },
}

/// Names the act and the path of an I/O error, and recognises the ones that need another answer.
pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(Error) -> StoreError {
    move |source| {
        let path = path.to_path_buf();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                StoreError::NoSpace { doing, path }
            }
            ErrorKind::ReadOnlyFilesystem => StoreError::ReadOnly { doing, path },
            _ => StoreError::Io { doing, path, source },
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Failure::environment(text).hint("check who owns the folder and its permissions")
            }
            StoreError::Io { .. } => Failure::environment(text),
            StoreError::NoSpace { .. } => Failure::environment(text).hint(
                "free some space, for example with `cargo xtask gc`, and build again: finished steps are kept",
            ),
            StoreError::ReadOnly { .. } => Failure::environment(text)
                .hint("make the disk writable, or move `artifacts` to one that is"),
            StoreError::Format { .. } => Failure::environment(text).hint(
                "a newer Anneal wrote this store: update, or move the folder away to begin a new one",
            ),
            StoreError::Missing { .. } => Failure::environment(text)
                .hint("build again: what is missing is made again, the rest is kept"),
            StoreError::Corrupt { quarantine, .. } => Failure::environment(text).hint(format!(
                "it was moved to {}; build again to make it anew, and check the disk",
                quarantine.display()
            )),
            StoreError::Refused { .. } => {
                Failure::input(text).hint("only plain files and folders with Unicode names can be kept")
            }
            StoreError::Tree { .. } => Failure::input(text),
            StoreError::Malformed { path, .. } => {
                Failure::environment(text).hint(format!("remove {}", path.display()))
            }
            StoreError::Moved { .. } => {
                Failure::input(text).hint("build again once nothing writes to it any more")
            }
            StoreError::Busy { .. } => {
                Failure::environment(text).hint("wait until the other build has ended")
            }
        }
    }
}
