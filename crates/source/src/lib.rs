//! Steps that bring in what others made: Hugging Face repositories, URLs.
//!
//! The light half: parameters and pins. What is fetched is named by its SHA-256 before it is
//! fetched, so a result can only be the pinned bytes.

use step::{Family, StepDef};

pub mod huggingface;
pub mod url;

pub static FAMILY: Family = Family {
    name: "source",
    steps: &[StepDef::of::<huggingface::HuggingFace>(), StepDef::of::<url::Url>()],
    build_tools: &[],
};
