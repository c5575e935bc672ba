//! Steps that make datasets and tokenizers.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod chat;
pub mod rows;
pub mod tokenizer;

pub static FAMILY: Family = Family {
    name: "dataset",
    steps: &[StepDef::of::<chat::Chat>(), StepDef::of::<tokenizer::Tokenizer>()],
    build_tools: &[],
};
