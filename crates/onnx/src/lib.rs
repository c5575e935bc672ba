//! Steps that export ONNX models for ONNX Runtime and Transformers.js.
//!
//! The light half: parameters only.

use step::{Family, StepDef};

pub mod export;

pub static FAMILY: Family =
    Family { name: "onnx", steps: &[StepDef::of::<export::Export>()], build_tools: &[] };
