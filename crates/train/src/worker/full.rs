//! `train/full`: every weight of a base, trained, as a Hugging Face model folder in BF16.
//!
//! Knows nothing of how training goes: that is fit.rs.

use anyhow::Result;
use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype, Weights};
use step::Failure;
use step::definition::TFLOP;
use step::worker::Job;
use tch::Kind;
use train::{Full, work};

use crate::data::Dataset;
use crate::decoder::Decoder;
use crate::device;
use crate::fit::fit;
use crate::optimiser::Trainable;
use crate::tensor;

pub fn run(job: &Job) -> Result<()> {
    let params: Full = job.params()?;
    let training = params.training();
    let base = job.input("base")?;
    let config = Config::read(&base.path).map_err(Failure::from)?;
    let data = Dataset::open(job, base, config.vocab_size, config.max_positions)?;
    let place = device::prepare(job, &training, config.parameters())?;

    let weights = Weights::open(&base.path).map_err(Failure::from)?;
    weights.check(&config).map_err(Failure::from)?;
    let model = Decoder::new(config, place.compute, |name, _| {
        let weight = tensor::read(&weights, name)?;
        Ok(weight.to_device(place.device).to_kind(Kind::Float).set_requires_grad(true))
    })?;
    drop(weights);
    let trainables = model.weights()?.into_iter().map(|(name, tensor)| Trainable {
        decays: tensor.dim() == 2 && name != names::EMBED,
        name,
        tensor,
    });
    let outcome = fit(job, &training, &model, trainables.collect(), &data, place.device)?;
    job.metric(TFLOP, outcome.share * work::of_all(&model.config, &training, data.train.split()));

    checkpoint::copy_companions(&base.path, job.out()).map_err(Failure::from)?;
    checkpoint::copy_config(&base.path, job.out(), "bfloat16", |_| ()).map_err(Failure::from)?;
    let weights = model.weights()?.into_iter().collect();
    tensor::write(&job.out().join("model.safetensors"), Dtype::BF16, &weights)
}
