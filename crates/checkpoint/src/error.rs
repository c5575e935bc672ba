//! What can be wrong with a model folder. Every variant names its file.

use std::path::{Path, PathBuf};

use step::Failure;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read or write {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} does not parse: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("{path} has no `{key}`")]
    MissingKey { path: PathBuf, key: &'static str },
    #[error(
        "{path}: architecture `{found}` is not built yet; {}",
        crate::are(crate::ARCHITECTURES)
    )]
    Architecture { path: PathBuf, found: String },
    #[error("{path}: `{key}` = {value} changes what the model computes, and is not built yet")]
    UnsupportedKey { path: PathBuf, key: String, value: String },
    #[error("{path}: the weights are quantised already ({how})")]
    Quantised { path: PathBuf, how: String },
    #[error("{path}: {message}")]
    Config { path: PathBuf, message: String },
    #[error("{path} is no safetensors file: {message}")]
    Header { path: PathBuf, message: String },
    #[error("{path} has no tensor `{name}`")]
    MissingTensor { path: PathBuf, name: String },
    #[error("{path} has a tensor `{name}` that this architecture does not know")]
    UnknownTensor { path: PathBuf, name: String },
    #[error("{path}: tensor `{name}` has shape {found:?}, the config asks for {expected:?}")]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{path}: tensor `{name}` is {dtype}; f32, f16 and bf16 are understood")]
    Dtype { path: PathBuf, name: String, dtype: String },
    #[error("{path}: {message}")]
    Template { path: PathBuf, message: String },
    #[error("{path}: {message}")]
    Tokenizer { path: PathBuf, message: String },
    #[error("{path}: {message}")]
    Adapter { path: PathBuf, message: String, hint: &'static str },
}

impl Error {
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), source }
    }

    /// The failure, with the folder called what a person knows it by.
    pub fn called(self, dir: &Path, origin: &str) -> Failure {
        let failure = Failure::from(self);
        let message = failure.message.replace(&*dir.to_string_lossy(), origin);
        Failure { message, ..failure }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match &error {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Failure::environment(error.to_string()).hint("free some disk space and build again")
            }
            Error::Io { .. } => Failure::environment(error.to_string()),
            Error::Quantised { .. } => Failure::input(error.to_string()).hint(
                "name the original model in 16 bits: training quantises it by itself (`bits = 4`), \
                 and so do exports",
            ),
            Error::Adapter { hint, .. } => Failure::input(error.to_string()).hint(*hint),
            _ => Failure::input(error.to_string()),
        }
    }
}
