//! A model that can be measured: one face for ONNX Runtime and llama.cpp, so that every model is
//! judged by the same code.
//!
//! Knows nothing of figures. Each model brings its own tokenizer and chat template.

mod gguf;
mod onnx;

use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::chat::Message;
use step::Kind;
use step::worker::{Input, Job};

pub trait Scored {
    fn vocab_size(&self) -> usize;

    /// The logits after each token of rows of one length: [B, T, vocab].
    fn logits(&mut self, rows: &[&[u32]]) -> Result<Vec<f32>>;

    /// The greedy answers to prompts, without the tokens that ended them.
    fn answers(&mut self, prompts: &[Vec<u32>], max_new: usize) -> Result<Vec<Vec<u32>>>;

    /// A conversation by the model's own chat template, up to where its answer begins.
    fn prompt(&self, messages: &[Message]) -> Result<String>;

    /// Special tokens in the text are recognised, none is added.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// Text without special tokens.
    fn decode(&self, ids: &[u32]) -> Result<String>;
}

/// Opens a model by what it is.
pub fn open(job: &Job, input: &Input) -> Result<Box<dyn Scored>> {
    let opened: Result<Box<dyn Scored>> = match input.kind {
        Kind::GgufModel => gguf::open(job, input).map(|m| Box::new(m) as _),
        _ => onnx::open(job, input).map(|m| Box::new(m) as _),
    };
    opened.with_context(|| format!("model `{}`", input.label))
}

/// The models in the order of the table, which is not the recipe's: the order of a list is no part
/// of an action, so nothing may depend on it.
pub fn models(job: &Job) -> Vec<&Input> {
    let rank = |kind| match kind {
        Kind::Model => 0,
        Kind::OnnxModel => 1,
        _ => 2,
    };
    let mut models: Vec<&Input> = job.inputs("models").iter().collect();
    models.sort_by_key(|m| (rank(m.kind), m.label.clone()));
    models
}

/// Bytes of all files of an artifact.
pub fn size(dir: &Path) -> Result<u64> {
    let context = || format!("cannot read {}", dir.display());
    let mut total = 0;
    for entry in dir.read_dir().with_context(context)? {
        let entry = entry.with_context(context)?;
        // An artifact's files may be links into the store.
        let meta = entry.path().metadata().with_context(context)?;
        total += if meta.is_dir() { size(&entry.path())? } else { meta.len() };
    }
    Ok(total)
}
