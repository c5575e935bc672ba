//! `train/lora`: low-rank adapters on a frozen model (Hu et al., 2021), as PEFT writes them.
//!
//! Knows nothing of libtorch: the worker does the training.

use std::path::Path;

use checkpoint::config::Config;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use step::definition::{InputDef, Known, Needs, ParamError, Platform, Step, Unsupported};
use step::kind::Kind;

use crate::memory;
use crate::training::{Device, over, training_step};

training_step! {
    /// What the adapter is, and how it is trained.
    pub struct Lora {
        /// Where the keys that the recipe leaves out come from.
        pub preset: Preset,
        /// Rows of A and columns of B.
        pub rank: usize,
        /// The adapter's output is scaled by alpha / rank.
        pub alpha: f64,
        /// By alpha / √rank instead (Kalajdzievski, 2023), so that high ranks learn as fast.
        pub rslora: bool,
        /// Of the adapter's input, while training.
        pub dropout: f64,
        /// Names of linear layers, or `all-linear`: every one but the head.
        pub target_modules: Vec<String>,
        /// What the frozen weights are held in: 16, or 4 for QLoRA.
        pub bits: u8,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    Quick,
    Balanced,
    HighQuality,
}

/// Linear layers that can be a target, in the order of the forward pass.
pub const TARGETS: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"];

pub const ALL_LINEAR: &str = "all-linear";

impl Lora {
    /// What B·A is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The targets by their own names, sorted.
    pub fn targets(&self) -> Vec<&str> {
        let all_linear = self.target_modules.iter().any(|t| t == ALL_LINEAR);
        let named = |t: &str| self.target_modules.iter().any(|own| own == t);
        let mut targets: Vec<_> =
            TARGETS.into_iter().filter(|t| named(t) || (all_linear && *t != "lm_head")).collect();
        targets.sort_unstable();
        targets
    }
}

impl Step for Lora {
    const NAME: &'static str = "train/lora";
    const ABOUT: &'static str = "Fine-tunes a model with low-rank adapters.";
    const INPUTS: &'static [InputDef] =
        &[InputDef::one("base", &[Kind::Model]), InputDef::one("dataset", &[Kind::Dataset])];
    const OUTPUT: Kind = Kind::Adapter;
    const PLATFORM: Platform = Platform::Arch;
    const TOOLS: &'static [&'static str] = &["libtorch"];

    fn fill(params: Map<String, Value>) -> Result<Map<String, Value>, ParamError> {
        let preset = match params.get("preset") {
            None => Preset::Balanced,
            Some(name) => {
                Preset::deserialize(name).map_err(|e| ParamError::at("preset", e.to_string()))?
            }
        };
        let mut all = over(params, defaults(preset));
        if let Some(Value::String(one)) = all.get("target_modules") {
            let one = json!([one]);
            all.insert("target_modules".into(), one);
        }
        Ok(all)
    }

    fn validate(&self) -> Result<(), ParamError> {
        if self.rank == 0 {
            return Err(ParamError::at("rank", "must be above 0"));
        }
        if self.alpha <= 0.0 {
            return Err(ParamError::at("alpha", "must be above 0"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(ParamError::at("dropout", "must lie in 0 ≤ dropout < 1"));
        }
        if ![4, 16].contains(&self.bits) {
            return Err(ParamError::at("bits", "must be 16, or 4 for QLoRA"));
        }
        if self.target_modules.is_empty() {
            return Err(ParamError::at("target_modules", "must name a layer").hint(known_targets()));
        }
        let known = |t: &String| t == ALL_LINEAR || TARGETS.contains(&t.as_str());
        if let Some(i) = self.target_modules.iter().position(|t| !known(t)) {
            let name = &self.target_modules[i];
            return Err(ParamError::at(
                format!("target_modules[{i}]"),
                format!("`{name}` is no linear layer of the models that can be trained"),
            )
            .hint(known_targets()));
        }
        self.training().validate()
    }

    fn needs(&self, inputs: &Known) -> Needs {
        let config = inputs.get("base").and_then(|base| base.first()?.facts.config.as_ref());
        let config = config.and_then(|config| Config::of(config, Path::new("config.json")).ok());
        let memory = config.map(|config| memory::lora(&config, self));
        Needs { accelerator: self.device != Device::Cpu, memory, ..Needs::default() }
    }

    fn supports(&self, inputs: &Known) -> Result<(), Unsupported> {
        if self.bits == 4 {
            return Err(Unsupported {
                what: "QLoRA (bits = 4)".into(),
                built: "bits = 16 is".into(),
            });
        }
        let base = inputs.get("base").and_then(|base| base.first());
        match base.and_then(|base| base.facts.architecture.as_deref()) {
            Some(architecture) => {
                crate::architecture_is_built(architecture, checkpoint::ARCHITECTURES)
            }
            None => Ok(()),
        }
    }
}

fn known_targets() -> String {
    format!("one or more of {}, or `{ALL_LINEAR}`", TARGETS.join(", "))
}

/// The presets of the field, a micro-batch counted as so many rows of 512 tokens.
fn defaults(preset: Preset) -> Value {
    let quick = json!({
        "preset": "quick",
        "rank": 8,
        "alpha": 16.0,
        "rslora": false,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "bits": 16,
        "learning_rate": 3e-4,
        "schedule": "cosine",
        "warmup": 50.0,
        "weight_decay": 0.0,
        "optimiser": "adamw",
        "betas": [0.9, 0.999],
        "epochs": 1.0,
        "batch_tokens": 8 * 512,
        "gradient_accumulation": 1,
        "gradient_checkpointing": false,
        "max_grad_norm": 1.0,
        "prompt_weight": 0.0,
        "packing": "auto",
        "compute": "auto",
        "device": "auto",
        "seed": 0,
        "eval_every": 0,
        "checkpoint_every": 0,
    });
    let change = match preset {
        Preset::Quick => json!({}),
        Preset::Balanced => json!({
            "preset": "balanced",
            "rank": 32,
            "alpha": 64.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "learning_rate": 2e-4,
            "warmup": 100.0,
            "epochs": 3.0,
            "batch_tokens": 4 * 512,
            "gradient_accumulation": 4,
        }),
        Preset::HighQuality => json!({
            "preset": "high-quality",
            "rank": 128,
            "alpha": 256.0,
            "dropout": 0.1,
            "target_modules": [ALL_LINEAR],
            "learning_rate": 1e-4,
            "warmup": 200.0,
            "weight_decay": 0.01,
            "epochs": 5.0,
            "batch_tokens": 2 * 512,
            "gradient_accumulation": 8,
        }),
    };
    let Value::Object(change) = change else { unreachable!("the tables above are objects") };
    Value::Object(over(change, quick))
}

#[cfg(test)]
mod tests {
    use super::*;
    use step::StepDef;

    const DEF: StepDef = StepDef::of::<Lora>();

    fn resolve(params: Value) -> Result<Value, ParamError> {
        let Value::Object(params) = params else { unreachable!("tests pass objects") };
        (DEF.resolve)(params)
    }

    #[test]
    fn whatever_is_written_wins_over_the_preset() {
        for (params, rank, rate, targets) in [
            (json!({}), 32, 2e-4, json!(["q_proj", "k_proj", "v_proj", "o_proj"])),
            (json!({"preset": "quick"}), 8, 3e-4, json!(["q_proj", "v_proj"])),
            (json!({"preset": "quick", "rank": 16}), 16, 3e-4, json!(["q_proj", "v_proj"])),
            (json!({"preset": "high-quality"}), 128, 1e-4, json!(["all-linear"])),
            (json!({"target_modules": "all-linear"}), 32, 2e-4, json!(["all-linear"])),
        ] {
            let full = resolve(params.clone()).unwrap();
            assert_eq!(full["rank"], rank, "{params}");
            assert_eq!(full["learning_rate"], rate, "{params}");
            assert_eq!(full["target_modules"], targets, "{params}");
        }
    }

    #[test]
    fn errors_name_the_key() {
        for (params, path) in [
            (json!({"preset": "fast"}), "preset"),
            (json!({"rank": 0}), "rank"),
            (json!({"bits": 8}), "bits"),
            (json!({"dropout": 1.0}), "dropout"),
            (json!({"target_modules": []}), "target_modules"),
            (json!({"target_modules": ["q_proj", "qproj"]}), "target_modules[1]"),
            (json!({"warmup": -1}), "warmup"),
        ] {
            let error = resolve(params.clone()).expect_err("out of range");
            assert_eq!(error.path, path, "{params}");
        }
    }

    #[test]
    fn targets_are_sorted_and_all_linear_leaves_the_head_alone() {
        let targets = |modules: Value| {
            let params = resolve(json!({"target_modules": modules})).unwrap();
            let lora = Lora::deserialize(&params).unwrap();
            lora.targets().into_iter().map(String::from).collect::<Vec<_>>()
        };
        assert_eq!(targets(json!(["v_proj", "q_proj", "q_proj"])), ["q_proj", "v_proj"]);
        assert_eq!(targets(json!(["all-linear"])).len(), 7);
        assert_eq!(targets(json!(["all-linear", "lm_head"])).len(), 8);
    }

    #[test]
    fn scales_are_those_of_peft() {
        for (rslora, scale) in [(false, 2.0), (true, 8.0)] {
            let params = resolve(json!({"rank": 16, "alpha": 32, "rslora": rslora})).unwrap();
            assert_eq!(Lora::deserialize(&params).unwrap().scale(), scale);
        }
    }

    #[test]
    fn qlora_is_refused_by_name() {
        let params = resolve(json!({"bits": 4})).unwrap();
        let refused = (DEF.supports)(&params, &Known::new()).unwrap_err();
        assert_eq!(refused.to_string(), "QLoRA (bits = 4) is not built yet: bits = 16 is");
    }
}
