//! Steps that take in adapters which others trained.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod peft;

pub static FAMILY: Family =
    Family { name: "adapter", steps: &[StepDef::of::<peft::Peft>()], build_tools: &[] };
