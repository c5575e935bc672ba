//! Steps that make the web page a model is shipped in.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod chat;

pub static FAMILY: Family =
    Family { name: "site", steps: &[StepDef::of::<chat::Chat>()], build_tools: &[] };
