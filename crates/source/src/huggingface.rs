//! `source/huggingface`: a model or dataset repository of the Hugging Face hub, pinned.
//!
//! Knows nothing of the network: the lock says which commit and which bytes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use step::definition::Known;
use step::{Facts, InputDef, Kind, ParamError, Step};

/// The parameters of `source/huggingface`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HuggingFace {
    /// `google/gemma-3-270m-it`.
    pub repo: String,
    /// Branch, tag or commit; the lock pins what it meant when it was asked.
    #[serde(default = "main")]
    pub rev: String,
    #[serde(default, rename = "type")]
    pub repo_type: RepoType,
    /// Globs of the files to take; empty takes what a model (or dataset) is read from.
    #[serde(default)]
    pub files: Vec<String>,
    /// `model_type` of config.json. Declared here, so that a plan can be judged before anything is
    /// fetched; checked against the file when it comes.
    #[serde(default)]
    pub architecture: Option<String>,
    /// Written by `cargo xtask lock`.
    #[serde(default)]
    pub lock: Option<Pin>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RepoType {
    #[default]
    Model,
    Dataset,
}

/// What a revision meant: a commit and its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    pub commit: String,
    /// Path in the repository → what it holds.
    pub files: BTreeMap<String, PinnedFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PinnedFile {
    /// Bytes.
    pub size: u64,
    /// 64 lower-case hexadecimal digits.
    pub sha256: String,
}

fn main() -> String {
    "main".into()
}

impl HuggingFace {
    /// The globs that say which files are taken.
    pub fn globs(&self) -> Vec<&str> {
        match (self.files.as_slice(), self.repo_type) {
            ([], RepoType::Model) => vec![
                "config.json",
                "generation_config.json",
                "*.safetensors",
                "model.safetensors.index.json",
                "tokenizer*",
                "special_tokens_map.json",
                "chat_template.jinja",
                "LICENSE*",
                "NOTICE*",
                "USE_POLICY*",
                "README.md",
            ],
            ([], RepoType::Dataset) => vec!["**/*.jsonl", "**/*.json", "README.md", "LICENSE*"],
            (files, _) => files.iter().map(String::as_str).collect(),
        }
    }
}

impl Step for HuggingFace {
    const NAME: &'static str = "source/huggingface";
    const ABOUT: &'static str = "A model or dataset repository of the Hugging Face hub, pinned.";
    const INPUTS: &'static [InputDef] = &[];
    const OUTPUT: Kind = Kind::Model;
    const NETWORK: bool = true;
    const LOCKED: bool = true;

    fn output(params: &Map<String, Value>) -> Kind {
        match params.get("type").and_then(Value::as_str) {
            Some("dataset") => Kind::Files,
            _ => Kind::Model,
        }
    }

    fn validate(&self) -> Result<(), ParamError> {
        let parts: Vec<&str> = self.repo.split('/').collect();
        let plain = |part: &&str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        if parts.len() > 2 || !parts.iter().all(plain) {
            return Err(ParamError::at("repo", format!("`{}` is no repository", self.repo))
                .hint("write it as `owner/name`"));
        }
        Ok(())
    }

    fn facts(&self, _: &Known) -> Facts {
        Facts { architecture: self.architecture.clone(), ..Facts::default() }
    }
}
