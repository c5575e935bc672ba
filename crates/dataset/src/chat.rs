//! `dataset/chat`: conversations, cleaned, split and tokenised.
//!
//! The chat template is the tokenizer's own, so what is trained on is what the model will be asked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::ParamError;
use step::{Facts, InputDef, Kind, Known, Step};

use crate::rows::{Format, OnBroken};

/// The parameters of `dataset/chat`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Chat {
    #[serde(default)]
    pub format: Format,
    #[serde(default)]
    pub on_broken: OnBroken,
    /// Keys of a row with a number each, kept beside what it says: `difficulty`.
    #[serde(default)]
    pub columns: Vec<String>,
    /// Tokens that a row may have; longer rows are left out and counted.
    #[serde(default = "two_thousand")]
    pub max_len: u32,
    /// Rows that are kept at most, chosen by their content and `seed`.
    #[serde(default)]
    pub max_rows: Option<u32>,
    /// Shares of the rows. A row's place hangs on its content and `seed` alone.
    #[serde(default)]
    pub split: Split,
    #[serde(default = "forty_two")]
    pub seed: u64,
}

/// What a row of `<split>.jsonl` says.
const OWN_KEYS: [&str; 2] = ["messages", "text"];

fn two_thousand() -> u32 {
    2048
}

fn forty_two() -> u64 {
    42
}

/// Shares that sum to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    #[serde(default)]
    pub train: f64,
    #[serde(default)]
    pub validation: f64,
    #[serde(default)]
    pub test: f64,
}

impl Default for Split {
    fn default() -> Self {
        Self { train: 1.0, validation: 0.0, test: 0.0 }
    }
}

impl Split {
    /// Name and share of each split, in the order in which rows are dealt out.
    pub fn shares(&self) -> [(&'static str, f64); 3] {
        [("train", self.train), ("validation", self.validation), ("test", self.test)]
    }
}

impl Step for Chat {
    const NAME: &'static str = "dataset/chat";
    const ABOUT: &'static str = "Conversations, cleaned, split and tokenised.";
    const INPUTS: &'static [InputDef] = &[
        InputDef::many("examples", &[Kind::Files]),
        InputDef::one("tokenizer", &[Kind::Tokenizer, Kind::Model]),
    ];
    const OUTPUT: Kind = Kind::Dataset;

    fn validate(&self) -> Result<(), ParamError> {
        let shares = self.split.shares().map(|(_, share)| share);
        if shares.iter().any(|share| !(0.0..=1.0).contains(share)) {
            return Err(ParamError::at("split", "a share is a number from 0 to 1"));
        }
        let sum: f64 = shares.iter().sum();
        if (sum - 1.0).abs() > 1e-9 {
            return Err(ParamError::at("split", format!("the shares sum to {sum}, not to 1"))
                .hint("for example { train = 0.8, validation = 0.1, test = 0.1 }"));
        }
        for (i, column) in self.columns.iter().enumerate() {
            let at = |what: &str| {
                Err(ParamError::at(format!("columns[{i}]"), format!("`{column}` {what}")))
            };
            if OWN_KEYS.contains(&column.as_str()) {
                return at("is what a row says, not a number beside it");
            }
            if self.columns[..i].contains(column) {
                return at("is named twice");
            }
        }
        if self.max_len < 2 {
            return Err(ParamError::at("max_len", "a row of one token teaches nothing"));
        }
        Ok(())
    }

    fn facts(&self, inputs: &Known) -> Facts {
        let tokenizer = inputs.get("tokenizer").and_then(|known| known.first());
        let known = tokenizer.map(|tokenizer| tokenizer.facts.clone()).unwrap_or_default();
        Facts { columns: Some(self.columns.clone()), ..known }
    }
}
