//! `train/lora`: low-rank adapters on a frozen model (Hu et al., 2021), as PEFT writes them.
//!
//! Knows nothing of libtorch: the worker does the training.

use std::collections::BTreeSet;

use checkpoint::config::{Architecture, Config};
use checkpoint::names;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use step::definition::{InputDef, Known, Needs, ParamError, Platform, Refusal, Step};
use step::kind::Kind;

use crate::training::{over, training_step, with_shared};
use crate::work;

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
        /// Names of linear layers, or `all-linear`: every one but the head. Where a model holds
        /// several layers in one matrix, as Phi-3 does, each of their names stands for it: q_proj,
        /// k_proj and v_proj for qkv_proj, gate_proj and up_proj for gate_up_proj.
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

/// Linear layers that can be a target, in the order of the forward pass; of no architecture all.
pub const TARGETS: [&str; 10] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    HEAD,
];

const HEAD: &str = "lm_head";

pub const ALL_LINEAR: &str = "all-linear";

impl Lora {
    /// What B·A is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The targets by the names of this architecture's own layers, sorted.
    pub fn targets(&self, architecture: Architecture) -> Result<Vec<&'static str>, NoTarget> {
        let layers = layers_of(architecture);
        let mut targets = BTreeSet::new();
        for target in &self.target_modules {
            if target == ALL_LINEAR {
                targets.extend(layers.iter().filter(|layer| **layer != HEAD));
                continue;
            }
            let own = names::holder(architecture, target);
            let Some(layer) = layers.iter().find(|layer| **layer == own) else {
                return Err(NoTarget { target: target.clone(), architecture });
            };
            targets.insert(*layer);
        }
        Ok(targets.into_iter().collect())
    }

    /// Numbers in the matrices of an adapter for this base, none for a target that it does not have.
    pub fn parameters(&self, base: &Config) -> usize {
        let targets = self.targets(base.architecture).unwrap_or_default();
        let of = |target: &str| {
            let parts = names::linears(base.architecture).iter();
            match parts
                .filter(|part| names::module(part) == target)
                .find_map(|part| names::linear_shape(base, part))
            {
                Some(shape) => base.num_layers * shape.iter().sum::<usize>(),
                // The head.
                None => base.vocab_size + base.hidden_size,
            }
        };
        self.rank * targets.into_iter().map(of).sum::<usize>()
    }
}

/// A target that the base has no layer for.
#[derive(Debug, thiserror::Error)]
#[error("`{target}` is no linear layer of {}", architecture.model_type())]
pub struct NoTarget {
    pub target: String,
    pub architecture: Architecture,
}

impl NoTarget {
    /// What can be a target instead.
    pub fn hint(&self) -> String {
        let layers = layers_of(self.architecture).join(", ");
        format!("set `target_modules` to one or more of {layers}, or `{ALL_LINEAR}`")
    }
}

/// In the order of the forward pass.
fn layers_of(architecture: Architecture) -> Vec<&'static str> {
    let layers = names::linears(architecture).iter().map(|part| names::module(part));
    layers.chain([HEAD]).collect()
}

impl Step for Lora {
    const NAME: &'static str = "train/lora";
    const ABOUT: &'static str = "Fine-tunes a model with low-rank adapters.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::one("base", &[Kind::Model]),
        InputDef::one("dataset", &[Kind::Dataset]),
        // Where to go on from, instead of from nothing.
        InputDef::optional("adapter", &[Kind::Adapter]),
    ];
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
        work::needs_of_lora(crate::base_config(inputs).as_ref(), self, inputs)
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        crate::dataset_has_column(&self.training(), inputs)?;
        let base = crate::base_architecture(inputs)?;
        match base.map(|architecture| self.targets(architecture)).transpose() {
            Ok(_) => Ok(()),
            Err(none) => Err(Refusal::Wrong { hint: none.hint(), message: none.to_string() }),
        }
    }
}

fn known_targets() -> String {
    format!("one or more of {}, or `{ALL_LINEAR}`", TARGETS.join(", "))
}

/// The presets of the field, a micro-batch counted as so many rows of 512 tokens.
fn defaults(preset: Preset) -> Value {
    let quick = with_shared(json!({
        "preset": "quick",
        "rank": 8,
        "alpha": 16.0,
        "rslora": false,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "bits": 16,
        "learning_rate": 3e-4,
        "warmup": 50.0,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "epochs": 1.0,
        "batch_tokens": 8 * 512,
        "gradient_accumulation": 1,
    }));
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
    use step::definition::KnownInput;

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
        use Architecture::{Llama, Phi3};
        let attention = json!(["q_proj", "k_proj", "v_proj", "o_proj"]);
        let all = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj";
        let fused = "down_proj gate_up_proj o_proj qkv_proj";
        let no_qkv = "`qkv_proj` is no linear layer of llama";
        for (architecture, modules, targets) in [
            (Llama, json!(["v_proj", "q_proj", "q_proj"]), Ok("q_proj v_proj")),
            (Llama, json!(["all-linear"]), Ok(all)),
            (Llama, json!(["lm_head", "q_proj"]), Ok("lm_head q_proj")),
            (Llama, json!(["qkv_proj"]), Err(no_qkv)),
            (Phi3, json!(["q_proj", "v_proj"]), Ok("qkv_proj")),
            (Phi3, attention, Ok("o_proj qkv_proj")),
            (Phi3, json!(["up_proj", "lm_head"]), Ok("gate_up_proj lm_head")),
            (Phi3, json!(["all-linear"]), Ok(fused)),
            (Phi3, json!(["gate_up_proj", "qkv_proj", "o_proj", "down_proj"]), Ok(fused)),
        ] {
            let params = resolve(json!({"target_modules": modules})).unwrap();
            let found = Lora::deserialize(&params).unwrap().targets(architecture);
            let found = found.map(|all| all.join(" ")).map_err(|none| none.to_string());
            assert_eq!(found.as_deref().map_err(|none| none.as_str()), targets, "{modules}");
        }
    }

    #[test]
    fn a_layer_that_the_base_does_not_have_is_refused_before_training() {
        let refused = |architecture: &str, target: &str| {
            let params = resolve(json!({"target_modules": target})).unwrap();
            let facts =
                step::Facts { architecture: Some(architecture.into()), ..Default::default() };
            let base = KnownInput { label: String::new(), kind: Kind::Model, facts };
            let known = Known::from([("base".to_string(), vec![base])]);
            (DEF.supports)(&params, &known).map_err(|refused| refused.to_string())
        };
        assert_eq!(refused("phi3", "q_proj"), Ok(()));
        assert_eq!(
            refused("mistral", "gate_up_proj").unwrap_err(),
            "`gate_up_proj` is no linear layer of mistral: set `target_modules` to one or more of \
             q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, or `all-linear`"
        );
    }

    #[test]
    fn a_column_that_the_dataset_does_not_keep_is_refused_before_training() {
        let params = resolve(json!({"order": {"column": "difficulty"}})).unwrap();
        let supports = |columns: Option<&[&str]>| {
            let columns = columns.map(|all| all.iter().map(ToString::to_string).collect());
            let facts = step::Facts { columns, ..Default::default() };
            let dataset = KnownInput { label: "rows".into(), kind: Kind::Dataset, facts };
            let known = Known::from([("dataset".to_string(), vec![dataset])]);
            (DEF.supports)(&params, &known).map_err(|refused| refused.to_string())
        };
        assert_eq!(supports(Some(&["difficulty", "length"])), Ok(()));
        assert_eq!(supports(None), Ok(()));
        assert_eq!(
            supports(Some(&[])).unwrap_err(),
            "`rows` keeps no column `difficulty`: give `columns = [\"difficulty\"]` to \
             the dataset, whose rows have a number for it"
        );
    }

    #[test]
    fn scales_are_those_of_peft() {
        for (rslora, scale) in [(false, 2.0), (true, 8.0)] {
            let params = resolve(json!({"rank": 16, "alpha": 32, "rslora": rslora})).unwrap();
            assert_eq!(Lora::deserialize(&params).unwrap().scale(), scale);
        }
    }
}
