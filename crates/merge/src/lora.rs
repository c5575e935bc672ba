//! `merge/lora`: a model with an adapter's change added to its weights.
//!
//! The base is the original one in 16 or 32 bits, by digest: there is no way to merge into a
//! quantised copy of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, Step};

/// The parameters of `merge/lora`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// The type of the merged weights: the sum is made in f32 and rounded to it once.
    #[serde(default)]
    pub dtype: Dtype,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    #[default]
    BFloat16,
    Float16,
    Float32,
}

impl Dtype {
    /// As config.json spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::BFloat16 => "bfloat16",
            Dtype::Float16 => "float16",
            Dtype::Float32 => "float32",
        }
    }
}

impl Step for Lora {
    const NAME: &'static str = "merge/lora";
    const ABOUT: &'static str = "A model with an adapter's change added to its weights.";
    const INPUTS: &'static [InputDef] =
        &[InputDef::one("base", &[Kind::Model]), InputDef::one("adapter", &[Kind::Adapter])];
    const OUTPUT: Kind = Kind::Model;

    fn supports(&self, inputs: &step::definition::Known) -> Result<(), step::Unsupported> {
        let facts = inputs.values().flatten().filter_map(|i| i.facts.architecture.as_deref());
        for architecture in facts {
            if !checkpoint::ARCHITECTURES.contains(&architecture) {
                return Err(step::Unsupported {
                    what: format!("architecture {architecture}"),
                    built: checkpoint::are(checkpoint::ARCHITECTURES),
                });
            }
        }
        Ok(())
    }
}
