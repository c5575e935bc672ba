//! What an artifact is: the word that lets a recipe be checked before anything runs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The kind of an artifact. ARCHITECTURE.md lists the files that each one holds.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Files as they came: from the recipe's folder, a URL, or a dataset repository.
    Files,
    /// Tokenised rows with what is supervised, and the same rows as text.
    Dataset,
    /// `tokenizer.json` and its companions, chat template included.
    Tokenizer,
    /// A Hugging Face model folder.
    Model,
    /// A PEFT adapter folder.
    Adapter,
    /// A Transformers.js model folder.
    OnnxModel,
    /// A folder with one GGUF file, the Modelfile that Ollama imports it by, and its licence.
    GgufModel,
    /// Measurements: `eval.json` and `eval.md`.
    Metrics,
    /// A static web site.
    Site,
}

impl Kind {
    pub const ALL: &'static [Kind] = &[
        Kind::Files,
        Kind::Dataset,
        Kind::Tokenizer,
        Kind::Model,
        Kind::Adapter,
        Kind::OnnxModel,
        Kind::GgufModel,
        Kind::Metrics,
        Kind::Site,
    ];

    /// How people call it, article included.
    pub const fn article(self) -> &'static str {
        match self {
            Kind::Files => "files",
            Kind::Dataset => "a dataset",
            Kind::Tokenizer => "a tokenizer",
            Kind::Model => "a model",
            Kind::Adapter => "an adapter",
            Kind::OnnxModel => "an ONNX model",
            Kind::GgufModel => "a GGUF model",
            Kind::Metrics => "metrics",
            Kind::Site => "a site",
        }
    }
}
