//! `train/full`: a model whose every weight is trained further.
//!
//! Knows nothing of libtorch: the worker does the training.

use std::path::Path;

use checkpoint::config::Config;
use serde_json::{Map, Value, json};
use step::definition::{InputDef, Known, Needs, ParamError, Platform, Refusal, Step};
use step::kind::Kind;

use crate::memory;
use crate::training::{over, training_step};

training_step! {
    /// How it is trained. The weights are held in float32 meanwhile, and written in BF16.
    pub struct Full {}
}

impl Step for Full {
    const NAME: &'static str = "train/full";
    const ABOUT: &'static str = "Fine-tunes all weights of a model.";
    const INPUTS: &'static [InputDef] =
        &[InputDef::one("base", &[Kind::Model]), InputDef::one("dataset", &[Kind::Dataset])];
    const OUTPUT: Kind = Kind::Model;
    const PLATFORM: Platform = Platform::Arch;
    const TOOLS: &'static [&'static str] = &["libtorch"];

    fn fill(params: Map<String, Value>) -> Result<Map<String, Value>, ParamError> {
        Ok(over(params, defaults()))
    }

    fn validate(&self) -> Result<(), ParamError> {
        self.training().validate()
    }

    fn needs(&self, inputs: &Known) -> Needs {
        let config = inputs.get("base").and_then(|base| base.first()?.facts.config.as_ref());
        let config = config.and_then(|config| Config::of(config, Path::new("config.json")).ok());
        memory::needs_of_all(config.as_ref(), &self.training())
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        let base = inputs.get("base").and_then(|base| base.first());
        match base.and_then(|base| base.facts.architecture.as_deref()) {
            Some(found) => crate::architecture_is_built(found, checkpoint::ARCHITECTURES),
            None => Ok(()),
        }
    }
}

/// A tenth of what adapters learn with: every weight moves.
fn defaults() -> Value {
    json!({
        "learning_rate": 2e-5,
        "schedule": "cosine",
        "warmup": 0.05,
        "weight_decay": 0.01,
        "optimiser": "adamw",
        "betas": [0.9, 0.999],
        "epochs": 3.0,
        "batch_tokens": 4 * 512,
        "gradient_accumulation": 4,
        "gradient_checkpointing": false,
        "max_grad_norm": 1.0,
        "prompt_weight": 0.0,
        "packing": "auto",
        "order": "random",
        "compute": "auto",
        "device": "auto",
        "seed": 0,
        "eval_every": 0,
        "keep": "last",
        "checkpoint_every": 0,
    })
}
