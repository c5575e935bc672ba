//! `gguf/adapter`: a LoRA adapter as a GGUF file, which llama.cpp adds to its base as it loads it
//! (`--lora`).
//!
//! The base is there for its config: what it weighs does not matter, and in llama.cpp it may be of
//! any type.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::Known;
use step::{InputDef, Kind, Needs, Refusal, Step};

/// The parameters of `gguf/adapter`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// The type of the matrices.
    #[serde(default)]
    pub dtype: Dtype,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    #[default]
    Float32,
    Float16,
}

impl Step for Adapter {
    const NAME: &'static str = "gguf/adapter";
    const ABOUT: &'static str = "A LoRA adapter as one GGUF file, for llama.cpp.";
    const INPUTS: &'static [InputDef] =
        &[InputDef::one("adapter", &[Kind::Adapter]), InputDef::one("base", &[Kind::Model])];
    // No GGUF model: nothing that runs one can run this alone.
    const OUTPUT: Kind = Kind::Files;

    fn needs(&self, _: &Known) -> Needs {
        Needs { threads: Some(1), ..Needs::default() }
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        checkpoint::are_built(inputs.values().flatten())
    }
}
