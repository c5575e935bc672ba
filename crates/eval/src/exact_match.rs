//! `eval/exact-match`: how often models give exactly the expected answer.
//!
//! Loads no model: this is what a recipe says and what a plan needs to know.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{InputDef, Kind, Known, ParamError, Rebuild, Refusal, Step};

use crate::require::{self, Require};

/// Greedy answers against the last assistant turn of each row, white space around them aside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExactMatch {
    /// The split of the dataset that is asked.
    #[serde(default = "crate::test")]
    pub split: String,
    /// Only the first so many rows.
    #[serde(default)]
    pub max_rows: Option<usize>,
    /// An answer that is longer is cut, and so is wrong.
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: usize,
    /// What the figure is called in tables and in `require`.
    #[serde(default = "metric")]
    pub metric: String,
    /// The model that the others are compared with, by its name in `models`. By default the first
    /// in the order of the table: plain models before ONNX before GGUF, then by name.
    #[serde(default)]
    pub reference: Option<String>,
    /// Bounds on figures, by model. Unmet, the step fails.
    #[serde(default)]
    pub require: Require,
}

impl ExactMatch {
    /// The figures, as they stand in eval.json and in `require`: the share of right answers, by
    /// how much it is lower than the reference's, and the share of answers that are the
    /// reference's, right or wrong.
    pub fn figures(&self) -> [String; 3] {
        [self.metric.clone(), format!("{}_drop", self.metric), "same_answers".into()]
    }
}

fn max_new_tokens() -> usize {
    64
}

fn metric() -> String {
    "exact_match".into()
}

impl Step for ExactMatch {
    const NAME: &'static str = "eval/exact-match";
    const ABOUT: &'static str = "Counts how often models give exactly the expected answer.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::many("models", &[Kind::Model, Kind::OnnxModel, Kind::GgufModel]),
        InputDef::one("dataset", &[Kind::Dataset]),
    ];
    const OUTPUT: Kind = Kind::Metrics;
    const REBUILD: Rebuild = Rebuild::WithinTolerance(crate::TOLERANCE);
    const TOOLS: &'static [&'static str] = &["onnxruntime"];

    fn validate(&self) -> Result<(), ParamError> {
        for (key, value) in
            [("max_rows", self.max_rows), ("max_new_tokens", Some(self.max_new_tokens))]
        {
            if value == Some(0) {
                return Err(ParamError::at(key, "must be at least 1"));
            }
        }
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if self.metric.is_empty() || !self.metric.chars().all(plain) {
            let message = format!("`{}` is no name for a figure", self.metric);
            return Err(ParamError::at("metric", message)
                .hint("lower-case letters, digits and `_`, for example `exact_match`"));
        }
        let figures = self.figures();
        require::check(&self.require, &figures.each_ref().map(String::as_str))
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
        (StepDef::of::<ExactMatch>().resolve)(map)
    }

    #[test]
    fn the_figure_bears_the_name_that_the_recipe_gives_it() {
        let require = json!({"gguf": {"right": ">= 0.9", "right_drop": "<= 0.02"}});
        let params = resolve(json!({"metric": "right", "require": require})).unwrap();
        assert_eq!(params["max_new_tokens"], 64);
        assert_eq!(params["require"], require);
    }

    #[test]
    fn what_a_recipe_gets_wrong_is_named() {
        for (params, path) in [
            (json!({"max_rows": 0}), "max_rows"),
            (json!({"max_new_tokens": 0}), "max_new_tokens"),
            (json!({"metric": "Exact Match"}), "metric"),
            (
                json!({"metric": "right", "require": {"a": {"exact_match": "> 0"}}}),
                "require.a.exact_match",
            ),
            (json!({"require": {"a": {"exact_match": "90 %"}}}), "require.a.exact_match"),
        ] {
            assert_eq!(resolve(params.clone()).unwrap_err().path, path, "{params}");
        }
    }
}
