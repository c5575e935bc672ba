//! What can go wrong between a model folder and its tokens.

use std::path::PathBuf;

use step::Failure;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("ONNX Runtime is not loaded: `Runtime::init` comes before `Model::open`")]
    NotLoaded,
    #[error("cannot load ONNX Runtime from {}: {message}", path.display())]
    Load { path: PathBuf, message: String },
    #[error("ONNX Runtime is already loaded from {}: it cannot be loaded from {} too", old.display(), new.display())]
    AnotherLoaded { old: PathBuf, new: PathBuf },
    #[error("{}: neither onnx/model*.onnx nor config.json is here", .0.display())]
    NoModel(PathBuf),
    #[error("{}: several graphs ({}), and nobody says which one", dir.display(), names.join(", "))]
    ManyGraphs { dir: PathBuf, names: Vec<String> },
    #[error("{}: the graph {what}", path.display())]
    Graph { path: PathBuf, what: String },
    #[error("{}: {doing}: {message}", path.display())]
    Session { path: PathBuf, doing: &'static str, message: String },
    #[error("{}: {tokens} tokens do not fit into the {positions} that the model holds", path.display())]
    TooLong { path: PathBuf, tokens: usize, positions: usize },
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("the cache cannot be cut: {0}")]
    Cache(String),
    #[error("a prompt without a token: there is nothing to go on from")]
    EmptyPrompt,
    #[error("rows of {0} and {1} tokens in one batch")]
    Ragged(usize, usize),
    /// The graph of a plain model folder could not be written.
    #[error(transparent)]
    Export(#[from] graph::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NotLoaded
            | Error::AnotherLoaded { .. }
            | Error::Ragged(..)
            | Error::Cache(_) => Failure::bug(message),
            Error::Load { .. } => Failure::environment(message)
                .hint("`cargo xtask doctor` tells whether ONNX Runtime is there and how to get it"),
            Error::ManyGraphs { .. } => {
                Failure::input(message).hint("keep one dtype in the folder: one onnx/model*.onnx")
            }
            Error::Graph { .. } => Failure::input(message)
                .hint("`onnx/export` writes graphs that run here: input_ids, attention_mask, past_key_values.N.key and .value"),
            Error::NoModel(_) | Error::TooLong { .. } | Error::EmptyPrompt => {
                Failure::input(message)
            }
            Error::File { .. } | Error::Session { .. } => Failure::environment(message),
            Error::Export(inner) => inner.into(),
        }
    }
}
