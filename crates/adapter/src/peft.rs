//! `adapter/peft`: an adapter that PEFT saved, checked and brought into one form.
//!
//! Its files are a folder, or what `source/huggingface` fetched of a repository.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::Known;
use step::{InputDef, Kind, Needs, Refusal, Step};

/// The parameters of `adapter/peft`: everything is in the adapter's own config.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Peft {}

impl Step for Peft {
    const NAME: &'static str = "adapter/peft";
    const ABOUT: &'static str =
        "A LoRA adapter that PEFT saved, checked and brought into one form.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::one("files", &[Kind::Files, Kind::Model]),
        InputDef::optional("base", &[Kind::Model]),
    ];
    const OUTPUT: Kind = Kind::Adapter;

    fn needs(&self, _: &Known) -> Needs {
        Needs { threads: Some(1), ..Needs::default() }
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        checkpoint::are_built(inputs.get("base").into_iter().flatten())
    }
}
