//! The keys that say what the model is and how it computes, and what llama.cpp has no key for.
//!
//! Knows nothing of tokenizers. Which keys an architecture has is settled by `load_hparams` in
//! llama.cpp's src/models; what is written is what its own converter writes, but where a note says
//! otherwise.

use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::config::{Architecture, Config, LongRope, RopeScaling};
use gguf::export::Quant;
use release::Licence;
use step::Failure;

use crate::format::Value;
use crate::mix;

/// Gemma 3 sees everything in each sixth layer, unless its file says otherwise.
const PATTERN: usize = 6;

/// llama.cpp's name for an architecture.
pub fn architecture(config: &Config) -> &'static str {
    match config.architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Gemma3 => "gemma3",
        Architecture::Phi3 => "phi3",
    }
}

/// Fails by name at what this architecture has no place for in llama.cpp; `origin` is the config.json.
pub fn refuse(config: &Config, origin: &Path) -> Result<(), Failure> {
    let name = architecture(config);
    let refuse = |key: &str, value: &str, what: &str| {
        let message = format!("{}: `{key}` = {value}: llama.cpp's {name} {what}", origin.display());
        Err(Failure::input(message))
    };
    if config.o_bias && name != "llama" {
        return refuse("attention_bias", "true", "adds nothing to what attention gives");
    }
    if matches!(config.rope_scaling, Some(RopeScaling::Llama3(_))) && name != "llama" {
        return refuse("rope_type", "llama3", "has no factors for single frequencies");
    }
    let square = matches!(config.architecture, Architecture::Qwen2 | Architecture::Phi3);
    if square && config.num_heads * config.head_dim != config.hidden_size {
        let what = format!("has heads of hidden_size / heads = {}", {
            config.hidden_size / config.num_heads
        });
        return refuse("head_dim", &config.head_dim.to_string(), &what);
    }
    // It tells 27B by its layers, and takes the scale from there.
    let scale = match (config.architecture, config.num_layers) {
        (Architecture::Gemma3, 62) => config.hidden_size / config.num_heads,
        _ => config.head_dim,
    };
    if config.query_scale != scale {
        let what = format!("divides by the root of {scale}, and no key changes it");
        return refuse("query_pre_attn_scalar", &config.query_scale.to_string(), &what);
    }
    Ok(())
}

/// What llama.cpp will do otherwise than transformers, or only a recent one does.
pub fn notes(config: &Config) -> Vec<String> {
    let name = architecture(config);
    let mut notes = Vec::new();
    if config.architecture == Architecture::Gemma3 {
        if odd_pattern(config) {
            notes.push(format!(
                "full attention is not in each {PATTERN}th layer: an older llama.cpp does \
                 not read gemma3.attention.sliding_window_pattern, and computes something else"
            ));
        }
    } else if let Some(window) = window(config).filter(|window| *window < config.max_positions) {
        notes.push(format!(
            "llama.cpp's {name} has no sliding windows: the file's context_length is the window, \
             {window} of {} positions, within which there is no difference",
            config.max_positions
        ));
    }
    if let Some(LongRope { original_max_positions, .. }) = long_rope(config) {
        notes.push(format!(
            "llama.cpp takes the rotary factors of long rows by the size of its context, not by the \
             row: for the short ones run it with a context of at most {original_max_positions}"
        ));
    }
    notes
}

/// The keys `general.*` and those of the architecture.
pub fn model(
    config: &Config,
    name: &str,
    quant: Quant,
    licence: Option<&Licence>,
) -> Result<Vec<(String, Value)>> {
    let architecture = architecture(config);
    let mut general = vec![
        ("architecture", Value::Text(architecture.into())),
        ("type", Value::Text("model".into())),
        ("name", Value::Text(name.into())),
        ("size_label", Value::Text(size_label(config.parameters()))),
        ("file_type", Value::U32(mix::file_type(quant))),
        ("quantization_version", Value::U32(2)),
    ];
    if let Some(licence) = licence {
        general.push(("license", Value::Text(licence.license.clone())));
        if let Some((organization, name)) = licence.of.split_once('/') {
            general.push(("base_model.count", Value::U32(1)));
            general.push(("base_model.0.name", Value::Text(name.into())));
            general.push(("base_model.0.organization", Value::Text(organization.into())));
        }
    }
    let general = general.into_iter().map(|(key, value)| (format!("general.{key}"), value));
    let own = own(config)?.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
    Ok(general.chain(own).collect())
}

fn own(config: &Config) -> Result<Vec<(&'static str, Value)>> {
    let number = |what: usize| u32::try_from(what).map(Value::U32).context("beyond 32 bits");
    let single = |what: f64| Value::F32(what as f32);
    let mut keys = vec![
        ("block_count", number(config.num_layers)?),
        ("context_length", number(context_length(config))?),
        ("embedding_length", number(config.hidden_size)?),
        ("feed_forward_length", number(config.intermediate_size)?),
        ("attention.head_count", number(config.num_heads)?),
        ("attention.head_count_kv", number(config.num_kv_heads)?),
        ("attention.layer_norm_rms_epsilon", single(config.rms_norm_eps)),
        ("rope.freq_base", single(config.rope_theta)),
    ];
    use Architecture::{Gemma3, Llama, Mistral, Phi3, Qwen2, Qwen3};
    // The others are held to hidden_size / heads.
    if matches!(config.architecture, Llama | Mistral | Qwen3 | Gemma3) {
        keys.push(("attention.key_length", number(config.head_dim)?));
        keys.push(("attention.value_length", number(config.head_dim)?));
    }
    match config.architecture {
        Llama | Mistral => {
            keys.push(("rope.dimension_count", number(config.rotary_dim)?));
            keys.push(("vocab_size", number(config.vocab_size)?));
        }
        Qwen2 | Qwen3 => {}
        Gemma3 => {
            if let Some(window) = window(config) {
                keys.push(("attention.sliding_window", number(window)?));
                if odd_pattern(config) {
                    let near = config.windows.iter().map(|w| i32::from(w.is_some())).collect();
                    keys.push(("attention.sliding_window_pattern", Value::I32s(near)));
                }
            }
            if let Some(near) = config.rope_theta_near {
                keys.push(("rope.freq_base_swa", single(near)));
            }
        }
        Phi3 => {
            keys.push(("rope.dimension_count", number(config.rotary_dim)?));
            // Read and not used; 0 tells Phi-4 from Phi-3.
            keys.push(("attention.sliding_window", number(window(config).unwrap_or(0))?));
            let long = long_rope(config);
            let original = long.map_or(config.max_positions, |l| l.original_max_positions);
            keys.push(("rope.scaling.original_context_length", number(original)?));
            if let Some(LongRope { attention_factor, .. }) = long {
                keys.push(("rope.scaling.attn_factor", single(*attention_factor)));
            }
        }
    }
    Ok(keys)
}

/// As many positions as llama.cpp computes rightly: but for Gemma it knows no windows.
fn context_length(config: &Config) -> usize {
    match window(config) {
        Some(window) if config.architecture != Architecture::Gemma3 => {
            window.min(config.max_positions)
        }
        _ => config.max_positions,
    }
}

/// The one size that a model's windows have.
fn window(config: &Config) -> Option<usize> {
    config.windows.iter().flatten().min().copied()
}

/// Whether a Gemma's windows are in other layers than those where llama.cpp looks for them unasked.
fn odd_pattern(config: &Config) -> bool {
    let is_near = config.windows.iter().map(Option::is_some);
    window(config).is_some() && !is_near.eq((1..=config.num_layers).map(|i| i % PATTERN != 0))
}

fn long_rope(config: &Config) -> Option<&LongRope> {
    match &config.rope_scaling {
        Some(RopeScaling::LongRope(long)) => Some(long),
        _ => None,
    }
}

/// `135M`, `3.1M`, `1.1B`: two digits at least, as llama.cpp's converter labels models.
fn size_label(parameters: usize) -> String {
    let (scaled, unit) = match parameters as f64 {
        n if n > 1e9 => (n / 1e9, "B"),
        n if n > 1e6 => (n / 1e6, "M"),
        n => (n / 1e3, "K"),
    };
    if scaled.round() < 10.0 { format!("{scaled:.1}{unit}") } else { format!("{scaled:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_two_digits() {
        for (parameters, label) in [
            (99_104, "99K"),
            (3_141_592, "3.1M"),
            (134_515_008, "135M"),
            (999_600_000, "1000M"),
            (1_100_048_384, "1.1B"),
        ] {
            assert_eq!(size_label(parameters), label);
        }
    }
    /// A small model of the architecture, with more keys.
    fn config(model_type: &str, more: &str) -> Config {
        let json = format!(
            r#"{{"model_type":"{model_type}","hidden_size":64,"num_hidden_layers":7,
            "num_attention_heads":4,"num_key_value_heads":2,"intermediate_size":72,"vocab_size":96,
            "max_position_embeddings":64,"query_pre_attn_scalar":16{more}}}"#
        );
        Config::parse(&json, Path::new("config.json")).unwrap()
    }

    #[test]
    fn what_has_no_place_is_refused_by_name() {
        let llama3 = r#","rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":1,
            "high_freq_factor":4,"original_max_position_embeddings":32}"#;
        for (model_type, more, message) in [
            ("llama", r#","attention_bias":true,"head_dim":8"#, None),
            ("llama", llama3, None),
            ("qwen3", r#","head_dim":8"#, None),
            ("gemma3_text", r#","sliding_window":5"#, None),
            (
                "qwen3",
                r#","attention_bias":true"#,
                Some(
                    "`attention_bias` = true: llama.cpp's qwen3 adds nothing to what attention gives",
                ),
            ),
            (
                "qwen2",
                llama3,
                Some(
                    "`rope_type` = llama3: llama.cpp's qwen2 has no factors for single frequencies",
                ),
            ),
            (
                "phi3",
                r#","head_dim":8"#,
                Some("`head_dim` = 8: llama.cpp's phi3 has heads of hidden_size / heads = 16"),
            ),
            (
                "gemma3_text",
                r#","head_dim":8"#,
                Some(
                    "`query_pre_attn_scalar` = 16: llama.cpp's gemma3 divides by the root of 8, and \
                     no key changes it",
                ),
            ),
        ] {
            let refused = refuse(&config(model_type, more), Path::new("config.json"));
            let expected = message.map_or(Ok(()), |m| Err(format!("config.json: {m}")));
            assert_eq!(refused.map_err(|e| e.message), expected);
        }
    }

    #[test]
    fn windows_that_llama_cpp_does_not_know_end_the_context() {
        let window = r#","sliding_window":9,"use_sliding_window":true,"max_window_layers":5"#;
        for (model_type, more, length, pattern, said) in [
            ("mistral", window, 9, None, "llama.cpp's llama has no sliding windows: the file's"),
            ("qwen2", window, 9, None, "llama.cpp's qwen2 has no sliding windows: the file's"),
            ("phi3", r#","sliding_window":64"#, 64, None, ""),
            ("gemma3_text", r#","sliding_window":9"#, 64, None, ""),
            (
                "gemma3_text",
                r#","sliding_window":9,"sliding_window_pattern":4"#,
                64,
                Some(vec![1, 1, 1, 0, 1, 1, 1]),
                "full attention is not in each 6th layer",
            ),
        ] {
            let config = config(model_type, more);
            let keys = own(&config).unwrap();
            let find = |key: &str| keys.iter().find(|(k, _)| *k == key).map(|(_, v)| v.clone());
            assert_eq!(find("context_length"), Some(Value::U32(length)));
            let found = find("attention.sliding_window_pattern");
            assert_eq!(found, pattern.map(Value::I32s));
            let notes = notes(&config);
            assert_eq!(notes.len(), usize::from(!said.is_empty()), "{notes:?}");
            assert!(notes.iter().all(|n| n.starts_with(said)), "{notes:?}");
        }
    }
}
