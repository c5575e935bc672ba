//! adapter_config.json of a plain LoRA adapter, in the one form in which ours are written.
//!
//! Knows nothing of where the adapter came from.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// What the config tells.
#[derive(Debug, Default)]
pub struct Plain<'a> {
    pub rank: usize,
    pub alpha: f64,
    pub rslora: bool,
    pub dropout: f64,
    /// Sorted. PEFT writes them in the order of a set.
    pub targets: &'a [&'a str],
    /// The base's name on the hub, and which of its revisions.
    pub base: Option<&'a str>,
    pub revision: Option<&'a str>,
    /// Of modules where these are others, by full names, which no order of patterns changes.
    pub other_ranks: BTreeMap<&'a str, usize>,
    pub other_alphas: BTreeMap<&'a str, f64>,
}

impl Plain<'_> {
    /// As PEFT 0.21 writes it.
    pub fn to_json(&self) -> Value {
        let alphas: BTreeMap<_, _> =
            self.other_alphas.iter().map(|(module, alpha)| (*module, whole(*alpha))).collect();
        json!({
            "alpha_pattern": alphas,
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": whole(self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "peft_version": "0.21.0",
            "r": self.rank,
            "rank_pattern": self.other_ranks,
            "revision": self.revision,
            "target_modules": self.targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.rslora,
        })
    }
}

/// PEFT writes an alpha of 32 as `32`.
fn whole(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e9 { json!(x as i64) } else { json!(x) }
}
