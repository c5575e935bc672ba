//! Steps that export GGUF models for llama.cpp.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod adapter;
pub mod export;

pub static FAMILY: Family = Family {
    name: "gguf",
    steps: &[StepDef::of::<export::Export>(), StepDef::of::<adapter::Adapter>()],
    build_tools: &[],
};
