//! A causal language model as an ONNX graph: nodes, initializers, quantisation, bytes.
//!
//! Knows nothing of who runs it, nor of the folder around it. Weights are streamed: one tensor is
//! in memory at a time, and of a quantised one a part.

mod builder;
mod calibration;
mod decoder;
mod error;
mod meant;
pub mod proto;
pub mod quantise;
mod sizes;
mod weights;

use std::path::{Path, PathBuf};

use checkpoint::config::Config;
use checkpoint::weights::Weights;

pub use calibration::Calibration;
pub use error::Error;
pub use meant::Meant;
pub use sizes::Sizes;

/// How weights are stored and what is computed in, by the names that Transformers.js has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    Fp32,
    /// Weights, products and the cache in 16 bits; norms, the sums between layers and the logits
    /// in 32.
    Fp16,
    /// Linear layers in 4 bits.
    Q4,
    /// As q4, and the rest as in fp16.
    Q4f16,
    /// Linear layers in 8 bits.
    Int8,
}

impl Dtype {
    /// What stands after `model` in a file's name.
    pub const fn suffix(self) -> &'static str {
        match self {
            Dtype::Fp32 => "",
            Dtype::Fp16 => "_fp16",
            Dtype::Q4 => "_q4",
            Dtype::Q4f16 => "_q4f16",
            Dtype::Int8 => "_int8",
        }
    }

    /// Of linear layers, where they are quantised.
    const fn bits(self) -> Option<u32> {
        match self {
            Dtype::Fp32 | Dtype::Fp16 => None,
            Dtype::Q4 | Dtype::Q4f16 => Some(4),
            Dtype::Int8 => Some(8),
        }
    }

    /// Whether layers compute in 16 bits.
    const fn is_half(self) -> bool {
        matches!(self, Dtype::Fp16 | Dtype::Q4f16)
    }
}

/// How weights are quantised, where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantisation {
    /// Values that share a scale: 32 or 128.
    pub block: usize,
    /// Zero lies in the middle of the levels; else each block says where.
    pub symmetric: bool,
    /// Bits of the embedding and the head: 4 or 8. In 4 they cost five times the error of all
    /// linear layers.
    pub head_bits: u32,
    /// Of 4 bits: a block's range is looked for, and not that of its values.
    pub search: bool,
}

impl Default for Quantisation {
    fn default() -> Self {
        Self { block: 32, symmetric: true, head_bits: 8, search: false }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub dtype: Dtype,
    pub quantisation: Quantisation,
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
    pub sizes: Sizes,
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
    write_for(model, to, options, None, progress)
}

/// [`write`] that rounds by what matrices are multiplied with, where a block's range is looked for.
pub fn write_for(
    model: &Path,
    to: &Path,
    options: Options,
    calibration: Option<&Calibration>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Written, Error> {
    let config = Config::read_to_run(model)?;
    let weights = Weights::open(model)?;
    weights.check(&config)?;
    if !config.head_dim.is_multiple_of(16) {
        return Err(Error::HeadDim(config.head_dim));
    }
    if !config.rotary_dim.is_multiple_of(16) {
        return Err(Error::RotaryDim(config.rotary_dim));
    }
    decoder::write(&config, &weights, to, options, calibration, progress)
}
