//! What can stand between a model folder and its graph.

use std::path::{Path, PathBuf};

use step::Failure;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("tensor `{0}` holds a value that is no number, or infinite: it cannot be exported")]
    NotFinite(String),
    #[error("hidden_size {0} is no multiple of {1}, the values that share a scale in q4")]
    Width(usize, usize),
    #[error("head_dim {0} is no multiple of 16: ONNX Runtime's attention does not take it")]
    HeadDim(usize),
}

impl Error {
    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Error::Write { path: path.into(), source }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Checkpoint(inner) => inner.into(),
            Error::Write { ref source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Failure::environment(error.to_string()).hint("free some disk space and build again")
            }
            Error::Write { .. } => Failure::environment(error.to_string()),
            Error::NotFinite(_) => Failure::input(error.to_string())
                .hint("the training diverged: look at its loss curve, and lower the learning rate"),
            Error::HeadDim(_) => Failure::input(error.to_string()),
            Error::Width(..) => Failure::input(error.to_string()).hint("export it as fp32"),
        }
    }
}
