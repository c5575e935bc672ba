//! Steps that measure models: perplexity, exact match.
//!
//! This is the light half: parameters, inputs, gates. It loads no model.

pub mod exact_match;
pub mod perplexity;
pub mod require;

use step::{Family, Kind, Known, Refusal, StepDef};

pub static FAMILY: Family = Family {
    name: "eval",
    steps: &[StepDef::of::<perplexity::Perplexity>(), StepDef::of::<exact_match::ExactMatch>()],
    // The worker links llama.cpp: that is how a GGUF file is judged by what will run it.
    build_tools: &["cmake", "libclang"],
};

/// A rebuild may differ by what another processor rounds otherwise.
const TOLERANCE: f64 = 0.01;

/// A plain model runs on a graph that is written here; the others bring what they run on.
fn supports(inputs: &Known) -> Result<(), Refusal> {
    let plain = inputs.get("models").into_iter().flatten().filter(|m| m.kind == Kind::Model);
    checkpoint::are_built(plain)
}

fn test() -> String {
    "test".into()
}
