//! From Hugging Face's tensors to llama.cpp's: names, and the order of rows.
//!
//! Knows nothing of bytes. The list is closed: what is not on it is no tensor of the architecture.

use std::f32::consts::PI;

use checkpoint::config::{Architecture, Config, Llama3, RopeScaling};
use checkpoint::names;
use gguf::export::Quant;

use crate::format::{Info, Type};
use crate::mix::Mix;

/// One tensor on its way.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// In the checkpoint.
    pub source: String,
    pub info: Info,
    /// How its rows are dealt anew; those of a vector are its values.
    pub rows: Rows,
    /// Added to each value: Gemma's norms multiply by 1 + w, llama.cpp by what the file says.
    pub plus: f32,
}

impl Tensor {
    /// How many rows stay whole, and of how many values.
    pub fn rows_and_columns(&self) -> (usize, usize) {
        match (self.info.shape.as_slice(), self.rows) {
            ([values], Rows::Interleaved { .. }) => (*values, 1),
            _ => self.info.rows(),
        }
    }
}

/// Where the rows of the file come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    AsTheyAre,
    /// Of each head, the two halves take turns: Hugging Face rotates the dimensions `i` and
    /// `i + head_dim / 2` together, llama.cpp `2i` and `2i + 1`.
    Interleaved {
        head_dim: usize,
    },
}

impl Rows {
    /// The row of the checkpoint that becomes the file's row `row`.
    pub fn source(self, row: usize) -> usize {
        match self {
            Rows::AsTheyAre => row,
            Rows::Interleaved { head_dim } => {
                let (head, at) = (row / head_dim, row % head_dim);
                head * head_dim + at % 2 * (head_dim / 2) + at / 2
            }
        }
    }

    /// The row of the file that the checkpoint's row `row` becomes.
    pub fn place(self, row: usize) -> usize {
        match self {
            Rows::AsTheyAre => row,
            Rows::Interleaved { head_dim } => {
                let (head, at) = (row / head_dim, row % head_dim);
                head * head_dim + at % (head_dim / 2) * 2 + at / (head_dim / 2)
            }
        }
    }
}

/// All tensors of the checkpoint, in the file's order.
pub fn plan(config: &Config, quant: Quant) -> Vec<Tensor> {
    use Architecture::{Gemma3, Llama, Mistral};
    let mix = Mix::new(config, quant);
    let turns = matches!(config.architecture, Llama | Mistral);
    let shapes = names::expected(config);
    let tensors = shapes.into_iter().map(|(source, shape)| {
        let name = name(&source, config.architecture);
        let rows = match source.rsplit('.').nth(1) {
            Some("q_proj" | "k_proj") if turns => Rows::Interleaved { head_dim: config.head_dim },
            _ => Rows::AsTheyAre,
        };
        let gemma_norm = config.architecture == Gemma3 && source.ends_with("norm.weight");
        let plus = if gemma_norm { 1.0 } else { 0.0 };
        let kind = mix.kind(&name, &shape);
        Tensor { source, info: Info { name, shape, kind }, rows, plus }
    });
    tensors.collect()
}

/// What is no tensor of the checkpoint and stands before them: by what each wavelength of the
/// rotary positions is multiplied.
pub fn factors(config: &Config) -> Vec<(Info, Vec<f32>)> {
    let single = |factors: &[f64]| factors.iter().map(|x| *x as f32).collect();
    let factors: Vec<(&str, Vec<f32>)> = match &config.rope_scaling {
        None => Vec::new(),
        Some(RopeScaling::Llama3(scaling)) => {
            vec![("rope_freqs", stretches(config.rope_theta, config.head_dim, scaling))]
        }
        Some(RopeScaling::LongRope(scaling)) => vec![
            ("rope_factors_long", single(&scaling.long_factor)),
            ("rope_factors_short", single(&scaling.short_factor)),
        ],
    };
    let named = factors.into_iter().map(|(name, values)| {
        let (name, shape) = (format!("{name}.weight"), vec![values.len()]);
        (Info { name, shape, kind: Type::F32 }, values)
    });
    named.collect()
}

/// Llama 3.1's, by the very operations of the converter: in f32, and what divides a number by a tensor
/// in torch multiplies it by the inverse.
fn stretches(theta: f64, dims: usize, scaling: &Llama3) -> Vec<f32> {
    let Llama3 { factor, low_freq_factor: low, high_freq_factor: high, .. } = *scaling;
    let original = scaling.original_max_positions;
    let stretch = |pair: usize| {
        let frequency = 1.0 / (theta as f32).powf((2 * pair) as f32 / dims as f32);
        let wave = frequency.recip() * (2.0 * PI);
        if wave < (original / high) as f32 {
            return 1.0;
        }
        if wave > (original / low) as f32 {
            return factor as f32;
        }
        let smooth = (wave.recip() * original as f32 - low as f32) / (high - low) as f32;
        1.0 / ((1.0 - smooth) / factor as f32 + smooth)
    };
    (0..dims / 2).map(stretch).collect()
}

fn name(source: &str, architecture: Architecture) -> String {
    let plain = match source {
        names::EMBED => Some("token_embd"),
        names::NORM => Some("output_norm"),
        names::LM_HEAD => Some("output"),
        _ => None,
    };
    if let Some(name) = plain {
        return format!("{name}.weight");
    }
    let mut parts = source.trim_start_matches("model.layers.").splitn(2, '.');
    let (block, part) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (part, leaf) = part.rsplit_once('.').unwrap_or((part, "weight"));
    let gemma = architecture == Architecture::Gemma3;
    let part = match part {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        // Phi-3's gate is the upper half of this matrix.
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        // The one name for two places: before the MLP, and in Gemma after attention.
        "post_attention_layernorm" if gemma => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        other => unreachable!("`checkpoint::names` has no {other}"),
    };
    format!("blk.{block}.{part}.{leaf}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `reshape(heads, 2, rows / heads / 2, columns).swapaxes(1, 2)`, as the converter writes it.
    #[test]
    fn rows_are_dealt_as_the_converter_does() {
        let (heads, head_dim) = (3, 8);
        let mut expected = Vec::new();
        for head in 0..heads {
            for j in 0..head_dim / 2 {
                for half in 0..2 {
                    expected.push(head * head_dim + half * (head_dim / 2) + j);
                }
            }
        }
        let rows = Rows::Interleaved { head_dim };
        let dealt: Vec<usize> = (0..heads * head_dim).map(|row| rows.source(row)).collect();
        assert_eq!(dealt, expected);
        assert_eq!(dealt[..4], [0, 4, 1, 5]);
        assert!(dealt.iter().enumerate().all(|(at, row)| rows.place(*row) == at));
    }

    #[test]
    fn names_and_types() {
        let config = r#"{"model_type":"llama","hidden_size":64,"num_hidden_layers":11,
            "num_attention_heads":4,"num_key_value_heads":2,"intermediate_size":72,
            "vocab_size":96,"tie_word_embeddings":false}"#;
        let config = Config::parse(config, std::path::Path::new("config.json")).unwrap();
        let tensors = plan(&config, Quant::Q8);
        let find = |name: &str| tensors.iter().find(|t| t.info.name == name).unwrap();
        assert_eq!(find("blk.10.attn_output.weight").info.kind, Type::Q8_0);
        // 72 columns are no whole blocks.
        assert_eq!(find("blk.10.ffn_down.weight").info.kind, Type::F16);
        assert_eq!(find("blk.0.ffn_norm.weight").info.kind, Type::F32);
        assert_eq!(find("output.weight").source, "lm_head.weight");
        assert_eq!(find("blk.3.attn_k.weight").rows, Rows::Interleaved { head_dim: 16 });
        assert_eq!(find("blk.3.attn_v.weight").rows, Rows::AsTheyAre);
        assert_eq!(tensors.len(), 3 + 11 * 9);
    }
    #[test]
    fn each_architecture_has_its_own_names() {
        let shape = r#""hidden_size":64,"num_hidden_layers":1,"num_attention_heads":4,"head_dim":16,
            "num_key_value_heads":2,"intermediate_size":72,"vocab_size":96"#;
        // Name in the file, the checkpoint's tensor, whether its rows are dealt anew, what is added.
        for (keys, name, source, dealt, plus) in [
            (
                r#""model_type":"llama","attention_bias":true"#,
                "attn_q.bias",
                "self_attn.q_proj.bias",
                true,
                0.0,
            ),
            (
                r#""model_type":"llama","attention_bias":true"#,
                "attn_v.bias",
                "self_attn.v_proj.bias",
                false,
                0.0,
            ),
            (
                r#""model_type":"llama","attention_bias":true"#,
                "attn_output.bias",
                "self_attn.o_proj.bias",
                false,
                0.0,
            ),
            (r#""model_type":"mistral""#, "attn_k.weight", "self_attn.k_proj.weight", true, 0.0),
            (r#""model_type":"qwen2""#, "attn_k.bias", "self_attn.k_proj.bias", false, 0.0),
            (
                r#""model_type":"qwen3""#,
                "attn_q_norm.weight",
                "self_attn.q_norm.weight",
                false,
                0.0,
            ),
            (r#""model_type":"phi3""#, "attn_qkv.weight", "self_attn.qkv_proj.weight", false, 0.0),
            (r#""model_type":"phi3""#, "ffn_up.weight", "mlp.gate_up_proj.weight", false, 0.0),
            (
                r#""model_type":"gemma3_text""#,
                "attn_k_norm.weight",
                "self_attn.k_norm.weight",
                false,
                1.0,
            ),
            (
                r#""model_type":"gemma3_text""#,
                "post_attention_norm.weight",
                "post_attention_layernorm.weight",
                false,
                1.0,
            ),
            (
                r#""model_type":"gemma3_text""#,
                "ffn_norm.weight",
                "pre_feedforward_layernorm.weight",
                false,
                1.0,
            ),
            (
                r#""model_type":"gemma3_text""#,
                "post_ffw_norm.weight",
                "post_feedforward_layernorm.weight",
                false,
                1.0,
            ),
            (
                r#""model_type":"gemma3_text""#,
                "attn_v.weight",
                "self_attn.v_proj.weight",
                false,
                0.0,
            ),
        ] {
            let json = format!("{{{shape},{keys}}}");
            let config = Config::parse(&json, std::path::Path::new("config.json")).unwrap();
            let tensors = plan(&config, Quant::F16);
            let found = tensors.iter().find(|t| t.info.name == format!("blk.0.{name}"));
            let found = found.unwrap_or_else(|| panic!("{keys}: no {name}"));
            assert_eq!(found.source, format!("model.layers.0.{source}"));
            assert_eq!((found.rows != Rows::AsTheyAre, found.plus), (dealt, plus), "{keys} {name}");
        }
    }

    /// What the converter writes for Llama 3.2 1B, but for the last bit of a power.
    #[test]
    fn stretches_are_those_of_the_converter() {
        let scaling = Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192.0,
        };
        let blended = [1.651_329_3, 3.292_262_8, 9.666_731];
        let expected = [[1.0; 15].as_slice(), &blended, &[32.0; 14]].concat();
        let found = stretches(500_000.0, 64, &scaling);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{found} for {expected}");
        }
    }
}
