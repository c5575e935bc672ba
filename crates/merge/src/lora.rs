//! `merge/lora`: a model with the changes of adapters added to its weights.
//!
//! The base is the original one in 16 or 32 bits, by digest: there is no way to merge into a
//! quantised copy of it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::Known;
use step::{InputDef, Kind, ParamError, Refusal, Step};

/// The parameters of `merge/lora`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// The type of the merged weights: the sum is made in f32 and rounded to it once.
    #[serde(default)]
    pub dtype: Dtype,
    /// What each adapter's change is multiplied by, by the adapter's name. One alone needs none.
    #[serde(default)]
    pub weights: BTreeMap<String, f64>,
}

impl Lora {
    pub fn weight(&self, adapter: &str) -> f64 {
        self.weights.get(adapter).copied().unwrap_or(1.0)
    }

    /// Holds `weights` to the adapters that there are.
    fn weighed(&self, inputs: &Known) -> Result<(), Refusal> {
        let refuse =
            |message: String, hint: &str| Err(Refusal::Wrong { message, hint: hint.into() });
        let of = |name| inputs.get(name).into_iter().flatten().map(|input| input.label.as_str());
        let (one, many): (Vec<&str>, Vec<&str>) =
            (of("adapter").collect(), of("adapters").collect());
        const EITHER: &str = "set `adapter`, or `adapters` and their `weights`";
        let names = match (one.is_empty(), many.is_empty()) {
            (true, true) => return refuse("there is no adapter to merge".into(), EITHER),
            (false, false) => return refuse("`adapter` stands beside `adapters`".into(), EITHER),
            _ => [one, many].concat(),
        };
        if let Some(twice) = (1..names.len()).find(|i| names[..*i].contains(&names[*i])) {
            let what = format!("two adapters are called `{}`", names[twice]);
            return refuse(what, "weights go by name: rename the target of one of them");
        }
        let all: Vec<String> = names.iter().map(|name| format!("\"{name}\" = …")).collect();
        let all = format!("set `weights = {{ {} }}`", all.join(", "));
        if let Some(unknown) = self.weights.keys().find(|key| !names.contains(&key.as_str())) {
            return refuse(format!("there is a weight for `{unknown}`, which is not merged"), &all);
        }
        let needed = names.len() > 1 || !self.weights.is_empty();
        match names.iter().find(|name| needed && !self.weights.contains_key(**name)) {
            Some(name) => refuse(format!("there is no weight for `{name}`"), &all),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    #[default]
    BFloat16,
    Float16,
    Float32,
    /// Linear layers in 8 bits with a scale a row, the rest in bfloat16 (compressed-tensors, W8A16):
    /// to run, not to build on.
    Int8,
}

impl Dtype {
    /// As config.json spells the type of what is no matrix in 8 bits.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::BFloat16 | Dtype::Int8 => "bfloat16",
            Dtype::Float16 => "float16",
            Dtype::Float32 => "float32",
        }
    }
}

impl Step for Lora {
    const NAME: &'static str = "merge/lora";
    const ABOUT: &'static str = "A model with the changes of adapters added to its weights.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::one("base", &[Kind::Model]),
        InputDef::optional("adapter", &[Kind::Adapter]),
        InputDef::many("adapters", &[Kind::Adapter]),
    ];
    const OUTPUT: Kind = Kind::Model;

    fn validate(&self) -> Result<(), ParamError> {
        match self.weights.iter().find(|(_, weight)| !weight.is_finite() || **weight == 0.0) {
            Some((name, weight)) => {
                let message = format!("a weight of {weight} merges nothing");
                Err(ParamError::at(format!("weights.{name}"), message)
                    .hint("leave the adapter out, or give it a number"))
            }
            None => Ok(()),
        }
    }

    fn supports(&self, inputs: &Known) -> Result<(), Refusal> {
        self.weighed(inputs)?;
        checkpoint::are_built(inputs.values().flatten())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::definition::KnownInput;
    use step::{Facts, StepDef};

    use super::*;

    const DEF: StepDef = StepDef::of::<Lora>();

    fn resolve(weights: Value) -> Result<Value, ParamError> {
        let Value::Object(map) = json!({"weights": weights}) else { unreachable!("an object") };
        (DEF.resolve)(map)
    }

    #[test]
    fn adapters_and_weights_go_together() {
        let known = |label: &&str| KnownInput {
            label: label.to_string(),
            kind: Kind::Adapter,
            facts: Facts::default(),
        };
        let cases: [(&[&str], &[&str], Value, &str); 9] = [
            (&["a"], &[], json!({}), ""),
            (&["a"], &[], json!({"a": 0.5}), ""),
            (&[], &["a", "b"], json!({"a": 0.7, "b": -0.3}), ""),
            (&[], &[], json!({}), "there is no adapter to merge"),
            (&["a"], &["b"], json!({}), "`adapter` stands beside `adapters`"),
            (&[], &["a", "a"], json!({"a": 1}), "two adapters are called `a`"),
            (&[], &["a", "b"], json!({}), "there is no weight for `a`"),
            (&[], &["a", "b"], json!({"a": 1}), "set `weights = { \"a\" = …, \"b\" = … }`"),
            (&["a"], &[], json!({"b": 1}), "there is a weight for `b`, which is not merged"),
        ];
        for (one, many, weights, message) in cases {
            let inputs = [("adapter", one), ("adapters", many)];
            let inputs: Known = inputs
                .into_iter()
                .map(|(name, labels)| (name.to_string(), labels.iter().map(known).collect()))
                .collect();
            let said = (DEF.supports)(&resolve(weights).unwrap(), &inputs);
            let said = said.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(said.contains(message) && said.is_empty() == message.is_empty(), "{said}");
        }
    }

    #[test]
    fn a_weight_that_merges_nothing_is_refused() {
        assert_eq!(resolve(json!({"a": 0.0})).unwrap_err().path, "weights.a");
    }
}
