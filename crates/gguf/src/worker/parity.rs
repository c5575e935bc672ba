//! The finished file held to the checkpoint: what both compute after the same tokens.
//!
//! Knows nothing of llama.cpp: the weights of both go through the same forward pass in f32, so that
//! what is apart is apart by the file's weights: a row at the wrong place as well as a rounded one.

use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::config::Config;
use checkpoint::weights::Weights;
use gguf::export::Quant;
use reference::{Agreement, Probe};
use step::Failure;

use crate::read::{AsCheckpoint, Written};
use crate::tensors::Tensor;

/// Holds the file at `path`, made of the checkpoint in `dir`, to it; gives what the probe did not reach.
pub fn check(
    path: &Path,
    dir: &Path,
    config: &Config,
    weights: &Weights,
    tensors: &[Tensor],
    quant: Quant,
) -> Result<(Agreement, Vec<String>)> {
    let Probe { ids, of, notes } = Probe::new(dir, config);
    let file = Written::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = AsCheckpoint::new(&file, tensors);
    let expected = reference::logits(config, weights, &ids, of.clone()).map_err(Failure::from)?;
    let found = reference::logits(config, &file, &ids, of).map_err(Failure::from)?;
    let agreement = Agreement::of(&expected, &found, config.vocab_size);
    let most = most(quant);
    // A NaN is beyond any limit.
    if agreement.kl <= most {
        return Ok((agreement, notes));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let message = format!(
        "{name} does not compute what the checkpoint does: KL = {:.3} over {} positions, at most \
         {most} is what {} may lose; {:.0} % of the likeliest tokens are the same",
        agreement.kl,
        expected.len() / config.vocab_size,
        quant.name(),
        agreement.top1 * 100.0
    );
    Err(Failure::input(message)
        .hint("export with more bits; `parity = false` writes the file as it is")
        .into())
}

/// Nats: ten times and more what was seen of trained models.
const fn most(quant: Quant) -> f64 {
    match quant {
        Quant::F32 => 1e-6,
        Quant::F16 => 1e-3,
        Quant::BF16 => 1e-2,
        Quant::Q8 => 0.05,
        Quant::Q6K => 0.1,
        Quant::Q5 | Quant::Q5KM => 0.25,
        Quant::Q4 | Quant::Q4KM => 0.5,
    }
}
