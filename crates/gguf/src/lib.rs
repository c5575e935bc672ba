//! Steps that export GGUF models for llama.cpp.
//!
//! The light half: parameters only.

use step::definition::Known;
use step::{Family, Refusal, StepDef};

pub mod adapter;
pub mod export;

pub static FAMILY: Family = Family {
    name: "gguf",
    steps: &[StepDef::of::<export::Export>(), StepDef::of::<adapter::Adapter>()],
    build_tools: &[],
};

/// Refuses architectures that are not built.
fn built(inputs: &Known) -> Result<(), Refusal> {
    for input in inputs.values().flatten() {
        if let Some(architecture) = &input.facts.architecture
            && !checkpoint::ARCHITECTURES.contains(&architecture.as_str())
        {
            return Err(Refusal::NotBuilt {
                what: format!("architecture {architecture}"),
                built: checkpoint::are(checkpoint::ARCHITECTURES),
            });
        }
    }
    Ok(())
}
