//! `train/pretrain`: a small language model from scratch, all weights.
//!
//! Knows nothing of libtorch: the worker does the training.

use checkpoint::config::{Architecture, Config};
use serde_json::{Map, Value, json};
use step::definition::{Facts, InputDef, Known, Needs, ParamError, Platform, Refusal, Step};
use step::kind::Kind;

use crate::training::{over, training_step, with_shared};
use crate::work;

/// `model_type` of what can be trained from scratch.
const ARCHITECTURES: &[&str] = &["llama"];

training_step! {
    /// The shape of the model, how it starts, how it is trained.
    pub struct Pretrain {
        /// `model_type` of config.json.
        pub architecture: String,
        pub hidden_size: usize,
        pub num_layers: usize,
        pub num_heads: usize,
        /// Fewer than `num_heads`: grouped-query attention.
        pub num_kv_heads: usize,
        /// By default hidden_size / num_heads.
        pub head_dim: usize,
        pub intermediate_size: usize,
        pub rms_norm_eps: f64,
        pub rope_theta: f64,
        /// The longest sequence that the model promises to take.
        pub max_positions: usize,
        /// The head is the embedding.
        pub tied: bool,
        /// Standard deviation of the linear layers' first weights. Those that write to the
        /// residual stream (o_proj, down_proj) get it divided by √(2·layers), as in GPT-2.
        pub linear_std: f64,
        pub embedding_std: f64,
    }
}

impl Step for Pretrain {
    const NAME: &'static str = "train/pretrain";
    const ABOUT: &'static str = "Trains a small language model from scratch.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::one("tokenizer", &[Kind::Tokenizer]),
        InputDef::one("dataset", &[Kind::Dataset]),
    ];
    const OUTPUT: Kind = Kind::Model;
    const PLATFORM: Platform = Platform::Arch;
    const TOOLS: &'static [&'static str] = &["libtorch"];

    fn fill(params: Map<String, Value>) -> Result<Map<String, Value>, ParamError> {
        let number = |key| params.get(key).and_then(Value::as_u64);
        let mut defaults = defaults();
        if let (Some(hidden), Some(heads)) = (number("hidden_size"), number("num_heads")) {
            defaults["head_dim"] = json!(hidden / heads.max(1)); // validate refuses 0 by name
            defaults["num_kv_heads"] = json!(heads);
        }
        Ok(over(params, defaults))
    }

    fn validate(&self) -> Result<(), ParamError> {
        for (key, size) in [
            ("hidden_size", self.hidden_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("max_positions", self.max_positions),
        ] {
            if size == 0 {
                return Err(ParamError::at(key, "must be above 0"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(ParamError::at("num_kv_heads", "must divide `num_heads`"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ParamError::at("head_dim", "must be even: rotary positions turn pairs"));
        }
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("linear_std", self.linear_std),
            ("embedding_std", self.embedding_std),
        ] {
            if value <= 0.0 {
                return Err(ParamError::at(key, "must be above 0"));
            }
        }
        self.training().validate()
    }

    fn facts(&self, inputs: &Known) -> Facts {
        let vocabulary = vocabulary(inputs);
        let config = vocabulary.and_then(|size| self.config(size));
        Facts {
            architecture: Some(self.architecture.clone()),
            vocabulary,
            config: config.map(|config| config.to_json()),
            ..Facts::default()
        }
    }

    fn needs(&self, inputs: &Known) -> Needs {
        let config = vocabulary(inputs).and_then(|size| self.config(size));
        work::needs_of_all(config.as_ref(), &self.training(), inputs)
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        crate::dataset_has_column(&self.training(), inputs)?;
        checkpoint::is_built(&self.architecture, ARCHITECTURES)
    }
}

impl Pretrain {
    /// The model's shape with a vocabulary of so many tokens, none of them special yet; `None` if
    /// the architecture is not built.
    pub fn config(&self, vocab_size: usize) -> Option<Config> {
        let known = ARCHITECTURES.contains(&self.architecture.as_str());
        Some(Config {
            architecture: Architecture::of(&self.architecture).filter(|_| known)?,
            hidden_size: self.hidden_size,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            intermediate_size: self.intermediate_size,
            vocab_size,
            max_positions: self.max_positions,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            rope_scaling: None,
            rotary_dim: self.head_dim,
            rope_theta_near: None,
            query_scale: self.head_dim,
            qkv_bias: false,
            o_bias: false,
            qk_norm: false,
            windows: vec![None; self.num_layers],
            tied: self.tied,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            dtype: "bfloat16".into(),
            int8: false,
        })
    }
}

fn vocabulary(inputs: &Known) -> Option<usize> {
    inputs.get("tokenizer")?.first()?.facts.vocabulary
}

fn defaults() -> Value {
    with_shared(json!({
        "architecture": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_positions": 2048,
        "tied": true,
        "linear_std": 0.02,
        "embedding_std": 0.02,
        "learning_rate": 1e-3,
        "warmup": 0.05,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "epochs": 1.0,
        "batch_tokens": 4096,
        "gradient_accumulation": 1,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use step::StepDef;

    const DEF: StepDef = StepDef::of::<Pretrain>();

    fn resolve(change: Value) -> Result<Value, ParamError> {
        let shape = json!({
            "hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 512,
        });
        let Value::Object(change) = change else { unreachable!("tests pass objects") };
        (DEF.resolve)(over(change, shape))
    }

    #[test]
    fn what_is_left_out_is_filled_in() {
        let params = resolve(json!({"learning_rate": 2e-3})).unwrap();
        for (key, value) in [
            ("head_dim", json!(64)),
            ("num_kv_heads", json!(4)),
            ("learning_rate", json!(2e-3)),
            ("schedule", json!("cosine")),
        ] {
            assert_eq!(params[key], value, "{key}");
        }
    }

    #[test]
    fn errors_name_the_key() {
        for (change, path) in [
            (json!({"num_kv_heads": 3}), "num_kv_heads"),
            (json!({"num_heads": 0}), "num_heads"),
            (json!({"head_dim": 63}), "head_dim"),
            (json!({"betas": [0.9, 1.0]}), "betas"),
            (json!({"epochs": 0}), "epochs"),
            (json!({"schedule": "cosin"}), "schedule"),
        ] {
            let error = resolve(change.clone()).expect_err("out of range");
            assert_eq!(error.path, path, "{change}");
        }
        let error = resolve(json!({"learningrate": 1.0})).unwrap_err();
        assert!(error.message.contains("learningrate"), "{error}");
    }

    #[test]
    fn architectures_are_refused_by_name() {
        let params = resolve(json!({"architecture": "mamba"})).unwrap();
        let refused = (DEF.supports)(&params, &Known::new()).unwrap_err();
        assert_eq!(refused.to_string(), "architecture mamba is not built yet: llama is");
    }
}
