//! Which type each tensor gets: the mixes of llama-quantize (`llama_tensor_get_type` in
//! src/llama-quant.cpp), for dense models and without an importance matrix.
//!
//! Knows nothing of values. llama-quantize counts the tensors of a kind as they come, and they come
//! by layer: where each layer has one of them, as in all of our architectures, that is the layer.

use checkpoint::config::{Architecture, Config};
use gguf::export::Quant;

use crate::format::Type;

/// What the choice depends on beside the tensor itself.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    quant: Quant,
    layers: usize,
    /// Whether the embedding is the head too.
    tied: bool,
    /// What llama.cpp takes for a 70B: eight heads share a matrix of values, which is then worth more
    /// bits.
    large: bool,
}

impl Mix {
    pub fn new(config: &Config, quant: Quant) -> Self {
        let large = match config.architecture {
            // Mistral is written as a llama.
            Architecture::Llama | Architecture::Mistral => config.num_heads != config.num_kv_heads,
            Architecture::Qwen2 => true,
            _ => false,
        };
        let large = large && config.num_layers == 80;
        Self { quant, layers: config.num_layers, tied: config.tied, large }
    }

    /// The type of the tensor that the file calls `name`.
    pub fn kind(&self, name: &str, shape: &[usize]) -> Type {
        fitting(self.wanted(name, shape), shape.last().copied().unwrap_or(1))
    }

    /// The type that it would have if its rows were whole blocks.
    pub fn wanted(&self, name: &str, shape: &[usize]) -> Type {
        // Vectors are small, and llama.cpp computes with them as they are.
        if shape.len() == 1 {
            return Type::F32;
        }
        let plain = match self.quant {
            Quant::F32 => return Type::F32,
            Quant::F16 => return Type::F16,
            Quant::BF16 => return Type::BF16,
            Quant::Q8 => return Type::Q8_0,
            Quant::Q4 => Type::Q4_0,
            Quant::Q5 => Type::Q5_0,
            Quant::Q4KM => Type::Q4K,
            Quant::Q5KM => Type::Q5K,
            Quant::Q6K => Type::Q6K,
        };
        let name = name.trim_end_matches(".weight");
        let (layer, part) = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, part)) => (layer.parse().unwrap_or_default(), part),
            None => (0, name),
        };
        let medium = matches!(self.quant, Quant::Q4KM | Quant::Q5KM);
        match part {
            "output" => Type::Q6K,
            "token_embd" if self.tied => Type::Q6K,
            "attn_v" | "attn_qkv" | "ffn_down" if medium && self.more_bits(layer) => Type::Q6K,
            "attn_v" | "attn_qkv" if plain == Type::Q4K && self.large => Type::Q5K,
            _ => plain,
        }
    }

    /// `use_more_bits`: the first and the last eighth of the layers, and of those between every third.
    fn more_bits(&self, layer: usize) -> bool {
        let eighth = self.layers / 8;
        layer < eighth || layer >= 7 * self.layers / 8 || (layer - eighth) % 3 == 2
    }
}

/// `tensor_type_fallback`: what comes nearest, for rows that are no whole blocks.
fn fitting(wanted: Type, columns: usize) -> Type {
    let whole = |kind: Type| columns.is_multiple_of(kind.block().0);
    let nearest = match wanted {
        _ if whole(wanted) => wanted,
        Type::Q4K => Type::Q5_0,
        Type::Q5K => Type::Q5_1,
        Type::Q6K => Type::Q8_0,
        other => other,
    };
    if whole(nearest) { nearest } else { Type::F16 }
}

/// `general.file_type`.
pub const fn file_type(quant: Quant) -> u32 {
    match quant {
        Quant::F32 => 0,
        Quant::F16 => 1,
        Quant::Q4 => 2,
        Quant::Q8 => 7,
        Quant::Q5 => 8,
        Quant::Q4KM => 15,
        Quant::Q5KM => 17,
        Quant::Q6K => 18,
        Quant::BF16 => 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Type::{F16, F32, Q4_0, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

    fn mix(quant: Quant, changes: serde_json::Value) -> Mix {
        let mut config = serde_json::json!({"model_type": "llama", "hidden_size": 256,
            "num_hidden_layers": 11, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 512, "vocab_size": 96, "tie_word_embeddings": false});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Mix::new(&Config::of(&config, std::path::Path::new("config.json")).unwrap(), quant)
    }

    /// The layers out of `layers` in which `part` is a Q6_K.
    fn raised(quant: Quant, layers: usize, part: &str) -> Vec<usize> {
        let mix = mix(quant, serde_json::json!({"num_hidden_layers": layers}));
        let name = |layer| format!("blk.{layer}.{part}.weight");
        (0..layers).filter(|layer| mix.kind(&name(*layer), &[256, 256]) == Q6K).collect()
    }

    /// As llama-quantize prints them for models of so many layers.
    #[test]
    fn some_layers_get_more_bits() {
        for (layers, expected) in [
            (1, &[0][..]),
            (2, &[1]),
            (5, &[2, 4]),
            (9, &[0, 3, 6, 7, 8]),
            (18, &[0, 1, 4, 7, 10, 13, 15, 16, 17]),
            (22, &[0, 1, 4, 7, 10, 13, 16, 19, 20, 21]),
        ] {
            for quant in [Quant::Q4KM, Quant::Q5KM] {
                for part in ["attn_v", "attn_qkv", "ffn_down"] {
                    assert_eq!(raised(quant, layers, part), expected, "{part} of {layers}");
                }
                assert!(raised(quant, layers, "ffn_up").is_empty());
            }
        }
    }

    #[test]
    fn each_mix_has_a_type_for_each_tensor() {
        use Quant::{Q4, Q4KM, Q5, Q5KM, Q8};
        for (quant, tied, name, columns, expected) in [
            (Q4, false, "token_embd", 256, Q4_0),
            (Q4, true, "token_embd", 256, Q6K),
            (Q4, true, "token_embd", 320, Q8_0),
            (Q4, false, "output", 256, Q6K),
            (Q4, false, "blk.1.attn_v", 256, Q4_0),
            (Q4, false, "blk.1.attn_q", 72, F16),
            (Q5, false, "blk.0.ffn_down", 320, Q5_0),
            (Q8, false, "output", 256, Q8_0),
            (Q8, true, "token_embd", 72, F16),
            (Q4KM, false, "token_embd", 256, Q4K),
            (Q4KM, true, "token_embd", 640, Q8_0),
            (Q4KM, false, "output", 72, F16),
            (Q4KM, false, "blk.1.attn_q", 320, Q5_0),
            (Q4KM, false, "blk.0.ffn_down", 320, Q8_0),
            (Q5KM, false, "blk.1.attn_k", 256, Q5K),
            (Q5KM, false, "blk.1.attn_k", 320, Q5_1),
            (Q5KM, false, "blk.1.attn_k", 72, F16),
            (Quant::Q6K, false, "blk.1.ffn_up", 256, Q6K),
            (Quant::Q6K, false, "blk.1.ffn_up", 32, Q8_0),
            (Quant::F16, false, "output", 72, F16),
            (Quant::F32, true, "token_embd", 72, F32),
        ] {
            let mix = mix(quant, serde_json::json!({"tie_word_embeddings": tied}));
            let kind = mix.kind(&format!("{name}.weight"), &[8, columns]);
            assert_eq!(kind, expected, "{} {name} {columns}", quant.name());
        }
        assert_eq!(mix(Q4, serde_json::json!({})).kind("blk.0.ffn_norm.weight", &[256]), F32);
    }

    #[test]
    fn a_70b_has_better_values() {
        let value = |changes| mix(Quant::Q4KM, changes).kind("blk.10.attn_v.weight", &[256, 256]);
        assert_eq!(value(serde_json::json!({"num_hidden_layers": 80})), Q5K);
        let alone = serde_json::json!({"num_hidden_layers": 80, "num_key_value_heads": 4});
        assert_eq!(value(alone), Q4K);
        assert_eq!(value(serde_json::json!({"num_hidden_layers": 79})), Q4K);
    }
}
