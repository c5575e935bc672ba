//! Steps that fold adapters into their base.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod lora;

pub static FAMILY: Family =
    Family { name: "merge", steps: &[StepDef::of::<lora::Lora>()], build_tools: &[] };
