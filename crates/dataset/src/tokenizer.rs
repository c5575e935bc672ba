//! `dataset/tokenizer`: a byte-level BPE trained on the rows it will read, with its special tokens
//! and its chat template.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::definition::ParamError;
use step::{Facts, InputDef, Kind, Known, Step};

use crate::rows::{Format, OnBroken};

/// The parameters of `dataset/tokenizer`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// Tokens, special ones counted.
    pub vocab_size: u32,
    /// Each digit a token of its own, so that numbers are read as they are written.
    #[serde(default = "yes")]
    pub single_digits: bool,
    /// They get the first ids, in this order.
    #[serde(default = "chatml")]
    pub special_tokens: Vec<String>,
    /// Ends an answer, and a row of plain text.
    #[serde(default = "end")]
    pub eos_token: String,
    #[serde(default = "pad")]
    pub pad_token: String,
    #[serde(default)]
    pub format: Format,
    #[serde(default)]
    pub on_broken: OnBroken,
    /// Rows that are read, the first ones.
    #[serde(default)]
    pub max_rows: Option<u32>,
}

fn yes() -> bool {
    true
}

fn chatml() -> Vec<String> {
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_string).into()
}

fn end() -> String {
    "<|im_end|>".into()
}

fn pad() -> String {
    "<|endoftext|>".into()
}

impl Step for Tokenizer {
    const NAME: &'static str = "dataset/tokenizer";
    const ABOUT: &'static str = "A byte-level BPE with special tokens and a chat template.";
    const INPUTS: &'static [InputDef] =
        &[InputDef::many("examples", &[Kind::Files]), InputDef::one("template", &[Kind::Files])];
    const OUTPUT: Kind = Kind::Tokenizer;

    fn facts(&self, _: &Known) -> Facts {
        Facts { vocabulary: usize::try_from(self.vocab_size).ok(), ..Facts::default() }
    }

    fn validate(&self) -> Result<(), ParamError> {
        let least = 256 + self.special_tokens.len() as u32;
        if self.vocab_size < least {
            return Err(ParamError::at(
                "vocab_size",
                format!("{} is fewer than the 256 bytes and the special tokens", self.vocab_size),
            )
            .hint(format!("{least} or more")));
        }
        for (key, token) in [("eos_token", &self.eos_token), ("pad_token", &self.pad_token)] {
            if !self.special_tokens.contains(token) {
                return Err(ParamError::at(key, format!("`{token}` is no special token"))
                    .hint(format!("one of {}", self.special_tokens.join(", "))));
            }
        }
        Ok(())
    }
}
