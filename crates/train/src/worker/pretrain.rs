//! `train/pretrain`: random weights, trained, as a Hugging Face model folder in BF16.
//!
//! Knows nothing of how training goes: that is fit.rs.

use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::chat::Tokenizer;
use checkpoint::config::Config;
use checkpoint::weights::Dtype;
use serde_json::{Value, json};
use step::Failure;
use step::definition::TFLOP;
use step::worker::Job;
use tch::{Device, Kind, Tensor};
use train::{Pretrain, work};

use crate::data::Dataset;
use crate::decoder::Decoder;
use crate::device;
use crate::fit::fit;
use crate::optimiser::Trainable;
use crate::tensor;

pub fn run(job: &Job) -> Result<()> {
    let params: Pretrain = job.params()?;
    let training = params.training();
    let tokenizer = job.input("tokenizer")?;
    let config = config(&params, &tokenizer.path)?;
    let data = Dataset::open(job, tokenizer, config.vocab_size, config.max_positions)?;
    let place = device::prepare(job, &training, config.parameters())?;

    let model = first(&params, config, place.compute, place.device)?;
    let trainables = model.weights()?.into_iter().map(|(name, tensor)| Trainable {
        decays: tensor.dim() == 2 && name != checkpoint::names::EMBED,
        name,
        tensor,
    });
    let outcome = fit(job, &training, &model, trainables.collect(), &data, place.device)?;
    job.metric(TFLOP, outcome.share * work::of_all(&model.config, &training, data.train.split()));
    job.metric("parameters", model.weights()?.iter().map(|(_, w)| w.numel() as f64).sum());

    write(&model, &tokenizer.path, job.out())
}

/// The model before training. The weights are the same whatever the device.
pub fn first(params: &Pretrain, config: Config, compute: Kind, device: Device) -> Result<Decoder> {
    tch::manual_seed(params.seed as i64);
    Decoder::new(config, compute, |name, shape| {
        let shape = shape.iter().map(|n| *n as i64).collect::<Vec<_>>();
        let weight = match first_std(params, name) {
            Some(std) => Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?.f_normal_(0.0, std)?,
            None => Tensor::f_ones(shape, (Kind::Float, Device::Cpu))?,
        };
        Ok(weight.to_device(device).set_requires_grad(true))
    })
}

/// The standard deviation that a tensor starts with; none for norms, which start at 1.
fn first_std(params: &Pretrain, name: &str) -> Option<f64> {
    if name == checkpoint::names::EMBED {
        return Some(params.embedding_std);
    }
    if name.ends_with("norm.weight") {
        return None;
    }
    let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
    let depth = if residual { (2.0 * params.num_layers as f64).sqrt() } else { 1.0 };
    Some(params.linear_std / depth)
}

/// The shape from the parameters, the vocabulary and special tokens from the tokenizer.
fn config(params: &Pretrain, tokenizer: &Path) -> Result<Config> {
    let tokens = Tokenizer::from_dir(tokenizer).map_err(Failure::from)?;
    let special = SpecialTokens::read(tokenizer)?;
    let config = params.config(tokens.vocab_size()).ok_or_else(|| {
        Failure::bug(format!("architecture {} is not built", params.architecture))
    })?;
    Ok(Config {
        bos_token_id: special.id("bos_token"),
        eos_token_ids: tokens.end_ids(),
        pad_token_id: special.id("pad_token"),
        ..config
    })
}

/// The tokens that a tokenizer folder gives a role.
struct SpecialTokens {
    /// tokenizer_config.json
    config: Value,
    /// tokenizer.json
    tokenizer: Value,
}

impl SpecialTokens {
    fn read(dir: &Path) -> Result<Self> {
        let read = |name: &str| -> Result<Value> {
            let path = dir.join(name);
            let text =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_slice(&text)
                .map_err(|e| Failure::input(format!("{} is no JSON: {e}", path.display())).into())
        };
        Ok(Self { config: read("tokenizer_config.json")?, tokenizer: read("tokenizer.json")? })
    }

    /// The id of the token in the role `bos_token` and so on; a token is text, or an object with
    /// its text as `content`.
    fn id(&self, role: &str) -> Option<u32> {
        let token = &self.config[role];
        let text = token.as_str().or_else(|| token["content"].as_str())?;
        let added = self.tokenizer["added_tokens"].as_array()?;
        let id = added.iter().find(|token| token["content"] == text)?["id"].as_u64()?;
        u32::try_from(id).ok()
    }
}

/// The model folder: config, weights rounded once to BF16, and the tokenizer as it came.
fn write(model: &Decoder, tokenizer: &Path, out: &Path) -> Result<()> {
    checkpoint::copy_companions(tokenizer, out).map_err(Failure::from)?;
    let json = |name: &str, value: &Value| -> Result<()> {
        let path = out.join(name);
        let text = serde_json::to_string_pretty(value)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    let config = &model.config;
    json("config.json", &config.to_json())?;
    json(
        "generation_config.json",
        &json!({
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_ids,
            "pad_token_id": config.pad_token_id,
        }),
    )?;

    let weights = model.weights()?.into_iter().collect();
    tensor::write(&out.join("model.safetensors"), Dtype::BF16, &weights)
}
