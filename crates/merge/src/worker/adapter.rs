//! A PEFT adapter folder, refused by name where it is more than plain LoRA.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use checkpoint::weights::Weights;
use serde::Deserialize;
use serde_json::Value;
use step::Failure;

/// What an adapter adds to one linear layer: `scale · B · A`.
pub struct Delta {
    /// \[rank, in\], row-major.
    pub a: Vec<f32>,
    /// \[out, rank\], row-major.
    pub b: Vec<f32>,
    pub rank: usize,
    pub scale: f32,
}

/// The keys of adapter_config.json that decide what is added. Others are left to PEFT.
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    modules_to_save: Value,
    #[serde(default)]
    rank_pattern: BTreeMap<String, Value>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, Value>,
}

/// Reads an adapter: the name of the weight that it changes → the change.
pub fn read(dir: &Path) -> anyhow::Result<BTreeMap<String, Delta>> {
    let path = dir.join("adapter_config.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: AdapterConfig = serde_json::from_slice(&text)
        .map_err(|e| Failure::input(format!("{}: {e}", path.display())))?;
    refuse(&config, &path)?;

    let rank = config.r as f64;
    let scale = config.lora_alpha / if config.use_rslora { rank.sqrt() } else { rank };
    let weights = Weights::open(dir).map_err(Failure::from)?;
    let mut deltas = BTreeMap::new();
    for name in weights.names() {
        let module = name.strip_prefix("base_model.model.");
        let Some((module, part)) = module.and_then(|m| m.rsplit_once(".lora_")) else {
            return Err(Failure::input(format!(
                "{}: `{name}` is no part of a plain LoRA adapter",
                dir.display()
            ))
            .into());
        };
        if part != "A.weight" {
            continue; // B comes with its A
        }
        let b_name = format!("base_model.model.{module}.lora_B.weight");
        let a = weights.get(name).map_err(Failure::from)?;
        let b = weights.get(&b_name).map_err(Failure::from)?;
        let fits = a.shape.len() == 2
            && b.shape.len() == 2
            && a.shape[0] == config.r
            && b.shape[1] == config.r;
        if !fits {
            return Err(Failure::input(format!(
                "{}: `{module}` has A {:?} and B {:?}, the config says r = {}",
                dir.display(),
                a.shape,
                b.shape,
                config.r
            ))
            .into());
        }
        let delta = Delta {
            a: a.to_f32().map_err(Failure::from)?,
            b: b.to_f32().map_err(Failure::from)?,
            rank: config.r,
            scale: scale as f32,
        };
        deltas.insert(format!("{module}.weight"), delta);
    }
    if deltas.is_empty() {
        return Err(
            Failure::input(format!("{}: the adapter changes nothing", dir.display())).into()
        );
    }
    Ok(deltas)
}

fn refuse(config: &AdapterConfig, path: &Path) -> Result<(), Failure> {
    let bias = config.bias.as_deref().unwrap_or("none");
    let saved = match &config.modules_to_save {
        Value::Array(modules) => !modules.is_empty(),
        other => !other.is_null(),
    };
    let cases = [
        (config.peft_type != "LORA", format!("peft_type = {}", config.peft_type)),
        (config.use_dora, "use_dora".into()),
        (saved, "modules_to_save".into()),
        (bias != "none", format!("bias = {bias}")),
        (config.fan_in_fan_out, "fan_in_fan_out".into()),
        (!config.rank_pattern.is_empty(), "rank_pattern".into()),
        (!config.alpha_pattern.is_empty(), "alpha_pattern".into()),
        (config.r == 0, "r = 0".into()),
    ];
    match cases.into_iter().find(|(found, _)| *found) {
        Some((_, what)) => Err(Failure::input(format!(
            "{}: {what} is not built yet; plain LoRA is",
            path.display()
        ))),
        None => Ok(()),
    }
}
