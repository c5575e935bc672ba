//! A Hugging Face model folder: config.json, safetensors, tokenizer, chat template.
//!
//! Knows nothing of training or of any export: it reads a folder, refuses what it does not know by
//! name, and writes one that transformers reads.

use std::fs::File;
use std::path::Path;

use serde_json::Value;
use step::Refusal;
use step::definition::KnownInput;

#[cfg(feature = "weights")]
pub mod adapter;
#[cfg(feature = "chat")]
pub mod chat;
pub mod config;
mod error;
pub mod names;
pub mod rotary;
#[cfg(feature = "chat")]
pub mod tokens;
#[cfg(feature = "weights")]
pub mod weights;

pub use error::Error;

/// `model_type` of the architectures that can be trained, merged, exported and measured.
pub const ARCHITECTURES: &[&str] = &["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"];

/// Refuses an architecture that is not one of `built`.
pub fn is_built(architecture: &str, built: &[&str]) -> Result<(), Refusal> {
    if built.contains(&architecture) {
        return Ok(());
    }
    Err(Refusal::NotBuilt { what: format!("architecture {architecture}"), built: are(built) })
}

/// Refuses inputs of an architecture that is not built.
pub fn are_built<'a>(inputs: impl IntoIterator<Item = &'a KnownInput>) -> Result<(), Refusal> {
    let mut known = inputs.into_iter().filter_map(|input| input.facts.architecture.as_deref());
    known.try_for_each(|architecture| is_built(architecture, ARCHITECTURES))
}

/// `llama is`, `llama, mistral and qwen2 are`: how a refusal ends.
fn are(names: &[&str]) -> String {
    match names {
        [] => "nothing is".into(),
        [one] => format!("{one} is"),
        [first @ .., last] => format!("{} and {last} are", first.join(", ")),
    }
}

/// The files of a tokenizer, as transformers, Transformers.js and llama.cpp look for them.
pub const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Copies what goes with a model wherever it goes: tokenizer, chat template, generation
/// defaults, licence and notices. Files that `from` does not have are left out.
pub fn copy_companions(from: &Path, to: &Path) -> Result<(), Error> {
    copy(from, to, |name| {
        is_legal(name) || name == "generation_config.json" || TOKENIZER_FILES.contains(&name)
    })
}

/// Copies licence and notices.
pub fn copy_legal(from: &Path, to: &Path) -> Result<(), Error> {
    copy(from, to, is_legal)
}

fn is_legal(name: &str) -> bool {
    ["LICENSE", "NOTICE", "USE_POLICY"].iter().any(|start| name.starts_with(start))
}

fn copy(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
    for entry in std::fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let entry = entry.map_err(|e| Error::io(from, e))?;
        let name = entry.file_name();
        if wanted(&name.to_string_lossy()) {
            // Not `fs::copy`: it would carry a store's read-only mode along.
            let copied = File::open(entry.path())
                .and_then(|mut from| std::io::copy(&mut from, &mut File::create(to.join(&name))?));
            copied.map_err(|e| Error::io(&entry.path(), e))?;
        }
    }
    Ok(())
}

/// Copies config.json for weights that are now of `dtype`: `bfloat16`; `change` may change more of it.
pub fn copy_config(
    from: &Path,
    to: &Path,
    dtype: &str,
    change: impl FnOnce(&mut Value),
) -> Result<(), Error> {
    let [from, to] = [from, to].map(|dir| dir.join("config.json"));
    let text = std::fs::read(&from).map_err(|e| Error::io(&from, e))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::Parse { path: from, message: e.to_string() })?;
    for key in ["dtype", "torch_dtype"] {
        config[key] = dtype.into();
    }
    change(&mut config);
    let text = format!("{config:#}\n");
    std::fs::write(&to, text).map_err(|e| Error::io(&to, e))
}
