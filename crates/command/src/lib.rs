//! The step that runs a program of the user's own.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod run;
pub mod template;

pub static FAMILY: Family =
    Family { name: "command", steps: &[StepDef::of::<run::Run>()], build_tools: &[] };
