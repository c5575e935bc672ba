//! Steps that train: pretraining from scratch, LoRA, all weights.
//!
//! The light half: what the steps take. Knows nothing of libtorch, which only the worker links.

pub mod full;
pub mod lora;
mod memory;
pub mod pretrain;
pub mod training;

use step::{Family, Refusal, StepDef};

pub use full::Full;
pub use lora::Lora;
pub use pretrain::Pretrain;

pub static FAMILY: Family = Family {
    name: "train",
    steps: &[StepDef::of::<Pretrain>(), StepDef::of::<Lora>(), StepDef::of::<Full>()],
    build_tools: &["libtorch"],
};

fn architecture_is_built(architecture: &str, built: &[&str]) -> Result<(), Refusal> {
    if built.contains(&architecture) {
        return Ok(());
    }
    Err(Refusal::NotBuilt {
        what: format!("architecture {architecture}"),
        built: checkpoint::are(built),
    })
}
