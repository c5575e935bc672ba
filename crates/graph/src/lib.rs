//! A causal language model as an ONNX graph: nodes, initializers, quantisation, bytes.
//!
//! Knows nothing of who runs it, nor of the folder around it. Weights are streamed: one tensor is
//! in memory at a time.

mod builder;
mod error;
mod llama;
pub mod proto;
pub mod quantise;

use std::path::{Path, PathBuf};

use checkpoint::config::Config;
use checkpoint::weights::Weights;

pub use error::Error;

/// How weights are stored, by the names that Transformers.js has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    Fp32,
    /// Linear layers in 4 bits, blocks of 32; the embedding, and with it a tied head, in 8.
    Q4,
}

impl Dtype {
    /// What stands after `model` in a file's name.
    pub const fn suffix(self) -> &'static str {
        match self {
            Dtype::Fp32 => "",
            Dtype::Q4 => "_q4",
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub dtype: Dtype,
    /// Positions that the rotary tables hold: the longest text the graph can read.
    pub max_positions: usize,
    /// Bytes of one file of external data. A browser has to hold each in one piece.
    pub chunk: u64,
}

/// What a browser can hold in one piece.
pub const CHUNK: u64 = 256 << 20;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// `model_q4.onnx`; its data lies beside it.
    pub graph: PathBuf,
    /// Files of external data: `model_q4.onnx_data`, `model_q4.onnx_data_1` …
    pub chunks: usize,
    /// Bytes of the embedding (with a tied head), of the linear layers, of all else.
    pub embedding: u64,
    pub linear: u64,
    pub other: u64,
}

/// Writes the graph of the Hugging Face folder `model` into the folder `to`.
///
/// `progress` is told how many blocks of how many are written.
pub fn write(
    model: &Path,
    to: &Path,
    options: Options,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Written, Error> {
    let config = Config::read(model)?;
    config.exportable(&model.join("config.json"))?;
    let weights = Weights::open(model)?;
    weights.check(&config)?;
    if !config.head_dim.is_multiple_of(16) {
        return Err(Error::HeadDim(config.head_dim));
    }
    llama::write(&config, &weights, to, options, progress)
}
