//! What can go wrong with a model on llama.cpp.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("llama.cpp cannot load {path}: {message}")]
    Load { path: PathBuf, message: String },
    #[error("llama.cpp cannot be started: {message}")]
    Backend { message: String },
    #[error("the model has no chat template")]
    NoTemplate,
    #[error("the chat template: {message}")]
    Template { message: String },
    #[error("no tokens")]
    Empty,
    #[error("token {id} is beyond the vocabulary of {vocab_size}")]
    Token { id: u32, vocab_size: usize },
    #[error("{tokens} tokens are more than the {max} positions of the model's context")]
    TooLong { tokens: usize, max: usize },
    #[error("{tokens} tokens, but {marks} marks of what is supervised")]
    Marks { tokens: usize, marks: usize },
    #[error("llama.cpp fails to compute: {message}")]
    Decode { message: String },
}
