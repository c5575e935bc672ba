//! Steps that train: pretraining from scratch, LoRA, all weights.
//!
//! The light half: what the steps take. Knows nothing of libtorch, which only the worker links.

pub mod full;
pub mod lora;
mod memory;
pub mod pretrain;
pub mod training;
pub mod work;

use std::path::Path;

use checkpoint::config::{Architecture, Config};
use step::{Family, Known, Refusal, StepDef};

pub use full::Full;
pub use lora::Lora;
pub use pretrain::Pretrain;

use crate::training::{Order, Training};

/// Logits that the loss is computed for at a time: 128 MB of them, and as much of their gradient.
pub const LOGITS_A_TILE: usize = 1 << 25;

pub static FAMILY: Family = Family {
    name: "train",
    steps: &[StepDef::of::<Pretrain>(), StepDef::of::<Lora>(), StepDef::of::<Full>()],
    build_tools: &["libtorch"],
};

/// Whether the dataset, where it is known, keeps the column that rows come by.
fn dataset_has_column(training: &Training, inputs: &Known) -> Result<(), Refusal> {
    let Order::Column(name) = &training.order else { return Ok(()) };
    let Some(dataset) = inputs.get("dataset").and_then(|dataset| dataset.first()) else {
        return Ok(());
    };
    match &dataset.facts.columns {
        Some(columns) if !columns.contains(name) => Err(Refusal::Wrong {
            message: format!("`{}` keeps no column `{name}`", dataset.label),
            hint: keep_column(name),
        }),
        _ => Ok(()),
    }
}

/// What to do for rows that are to come by a column that is not there.
pub fn keep_column(name: &str) -> String {
    format!("give `columns = [\"{name}\"]` to the dataset, whose rows have a number for it")
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
    checkpoint::is_built(found, checkpoint::ARCHITECTURES)?;
    Ok(Architecture::of(found))
}
