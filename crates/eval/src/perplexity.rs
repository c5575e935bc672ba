//! `eval/perplexity`: how likely models find the answers of a dataset, and how they differ.
//!
//! Loads no model: this is what a recipe says and what a plan needs to know.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, Known, ParamError, Rebuild, Refusal, Step};

use crate::require::{self, Require};

/// Perplexity over the supervised tokens of a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Perplexity {
    /// The split of the dataset that is read.
    #[serde(default = "crate::test")]
    pub split: String,
    /// Only the first so many rows.
    #[serde(default)]
    pub max_rows: Option<usize>,
    /// The model that the others are compared with, by its name in `models`. By default the first
    /// in the order of the table: plain models before ONNX before GGUF, then by name.
    #[serde(default)]
    pub reference: Option<String>,
    /// Bounds on figures, by model. Unmet, the step fails.
    #[serde(default)]
    pub require: Require,
}

impl Perplexity {
    /// The figures, as they stand in eval.json and in `require`.
    pub const FIGURES: &'static [&'static str] = &[
        "perplexity",
        "nll",
        "bits_per_token",
        "perplexity_ratio",
        "kl",
        "top1_agreement",
        "same_tokens",
    ];
}

impl Step for Perplexity {
    const NAME: &'static str = "eval/perplexity";
    const ABOUT: &'static str = "Measures how likely models find a dataset's answers.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::many("models", &[Kind::Model, Kind::OnnxModel, Kind::GgufModel]),
        InputDef::one("dataset", &[Kind::Dataset]),
    ];
    const OUTPUT: Kind = Kind::Metrics;
    const REBUILD: Rebuild = Rebuild::WithinTolerance(crate::TOLERANCE);
    const TOOLS: &'static [&'static str] = &["onnxruntime"];

    fn validate(&self) -> Result<(), ParamError> {
        if self.max_rows == Some(0) {
            return Err(ParamError::at("max_rows", "0 rows tell nothing"));
        }
        require::check(&self.require, Self::FIGURES)
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        crate::supports(inputs)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::StepDef;

    use super::*;

    fn resolve(params: Value) -> Result<Value, ParamError> {
        let Value::Object(map) = params else { unreachable!("tests pass objects") };
        (StepDef::of::<Perplexity>().resolve)(map)
    }

    #[test]
    fn defaults_are_filled_in_and_bounds_are_canonical() {
        assert_eq!(
            resolve(json!({"require": {"onnx-int4": {"perplexity_ratio": "<1.05"}}})),
            Ok(json!({
                "split": "test", "max_rows": null, "reference": null,
                "require": {"onnx-int4": {"perplexity_ratio": "< 1.05"}}
            }))
        );
    }

    #[test]
    fn what_a_recipe_gets_wrong_is_named() {
        for (params, path, message) in [
            (json!({"max_rows": 0}), "max_rows", "0 rows tell nothing"),
            (
                json!({"require": {"gguf": {"kl": "0.1"}}}),
                "require.gguf.kl",
                "`0.1` is no bound: write `<`, `<=`, `==`, `>=` or `>` and a number, for example `>= 0.9`",
            ),
            (
                json!({"require": {"gguf": {"exact_match": ">= 0.9"}}}),
                "require.gguf.exact_match",
                "`exact_match` is not measured by this step",
            ),
        ] {
            let error = resolve(params).unwrap_err();
            assert_eq!((error.path.as_str(), error.message.as_str()), (path, message));
        }
    }
}
