//! Steps that train: pretraining from scratch, LoRA, all weights.
//!
//! The light half: what the steps take. Knows nothing of libtorch, which only the worker links.

pub mod full;
pub mod lora;
mod memory;
pub mod pretrain;
pub mod training;

use std::path::Path;

use checkpoint::config::{Architecture, Config};
use step::{Family, Known, Refusal, StepDef};

pub use full::Full;
pub use lora::Lora;
pub use pretrain::Pretrain;

/// Logits that the loss is computed for at a time: 128 MB of them, and as much of their gradient.
pub const LOGITS_A_TILE: usize = 1 << 25;

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

/// The config of the model that is trained further, where it is known.
fn base_config(inputs: &Known) -> Option<Config> {
    let config = inputs.get("base")?.first()?.facts.config.as_ref()?;
    Config::of(config, Path::new("config.json")).ok()
}

/// Its architecture, where it is known: one that can be trained.
fn base_architecture(inputs: &Known) -> Result<Option<Architecture>, Refusal> {
    let base = inputs.get("base").and_then(|base| base.first());
    let Some(found) = base.and_then(|base| base.facts.architecture.as_deref()) else {
        return Ok(None);
    };
    architecture_is_built(found, checkpoint::ARCHITECTURES)?;
    Ok(Architecture::of(found))
}
