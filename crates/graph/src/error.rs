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
    #[error("tensor `{0}` holds a value of more than 65504: 16 bits cannot hold it")]
    TooLarge(String),
    #[error("what `{0}` is multiplied with is no number, or infinite: nothing can be calibrated")]
    Calibration(String),
    #[error("hidden_size {0} is no multiple of 32, the values that share a scale")]
    Width(usize),
    #[error("head_dim {0} is no multiple of 16: ONNX Runtime's attention does not take it")]
    HeadDim(usize),
    #[error(
        "positions turn {0} dimensions of a head, no multiple of 16: ONNX Runtime's attention does not take it"
    )]
    RotaryDim(usize),
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
            Error::NotFinite(_) | Error::Calibration(_) => Failure::input(error.to_string())
                .hint("the training diverged: look at its loss curve, and lower the learning rate"),
            Error::HeadDim(_) | Error::RotaryDim(_) => Failure::input(error.to_string()),
            Error::TooLarge(_) => {
                Failure::input(error.to_string()).hint("export it as fp32, q4 or int8")
            }
            Error::Width(_) => Failure::input(error.to_string()).hint("export it as fp32 or fp16"),
        }
    }
}
