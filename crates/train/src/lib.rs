//! Steps that train: pretraining from scratch, LoRA.
//!
//! The light half: what the steps take. Knows nothing of libtorch, which only the worker links.

pub mod lora;
mod memory;
pub mod pretrain;
pub mod training;

use step::{Family, StepDef, Unsupported};

pub use lora::Lora;
pub use pretrain::Pretrain;

pub static FAMILY: Family = Family {
    name: "train",
    steps: &[StepDef::of::<Pretrain>(), StepDef::of::<Lora>()],
    build_tools: &["libtorch"],
};

fn architecture_is_built(architecture: &str, built: &[&str]) -> Result<(), Unsupported> {
    if built.contains(&architecture) {
        return Ok(());
    }
    Err(Unsupported { what: format!("architecture {architecture}"), built: checkpoint::are(built) })
}
