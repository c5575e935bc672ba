//! `train/full`: a model whose every weight is trained further.
//!
//! Knows nothing of libtorch: the worker does the training.

use serde_json::{Map, Value, json};
use step::definition::{InputDef, Known, Needs, ParamError, Platform, Refusal, Step};
use step::kind::Kind;

use crate::training::{over, training_step, with_shared};
use crate::work;

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
        work::needs_of_all(crate::base_config(inputs).as_ref(), &self.training(), inputs)
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        crate::dataset_has_column(&self.training(), inputs)?;
        crate::base_architecture(inputs).map(drop)
    }
}

/// A tenth of what adapters learn with: every weight moves.
fn defaults() -> Value {
    with_shared(json!({
        "learning_rate": 2e-5,
        "warmup": 0.05,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "epochs": 3.0,
        "batch_tokens": 4 * 512,
        "gradient_accumulation": 4,
    }))
}
