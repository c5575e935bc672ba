//! From Hugging Face's tensors to llama.cpp's: names, and the order of rows.
//!
//! Knows nothing of bytes. The list is closed: what is not on it is no tensor of the architecture.

use checkpoint::config::Config;
use checkpoint::names;
use gguf::export::Quant;

use crate::format::Info;
use crate::mix::Mix;

/// One tensor on its way.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// In the checkpoint.
    pub source: String,
    pub info: Info,
    /// How its rows are dealt anew.
    pub rows: Rows,
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
}

/// All tensors of the file, in its order.
pub fn plan(config: &Config, quant: Quant) -> Vec<Tensor> {
    let mix = Mix::new(config, quant);
    let shapes = names::expected(config);
    let tensors = shapes.into_iter().map(|(source, shape)| {
        let name = name(&source);
        let rows = match source.rsplit('.').nth(1) {
            Some("q_proj" | "k_proj") => Rows::Interleaved { head_dim: config.head_dim },
            _ => Rows::AsTheyAre,
        };
        let kind = mix.kind(&name, &shape);
        Tensor { source, info: Info { name, shape, kind }, rows }
    });
    tensors.collect()
}

fn name(source: &str) -> String {
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
    let part = match part.trim_end_matches(".weight") {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        other => unreachable!("`checkpoint::names` has no {other}"),
    };
    format!("blk.{block}.{part}.weight")
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
    }

    #[test]
    fn names_and_rows() {
        let config = r#"{"model_type":"llama","hidden_size":64,"num_hidden_layers":11,
            "num_attention_heads":4,"num_key_value_heads":2,"intermediate_size":72,
            "vocab_size":96,"tie_word_embeddings":false}"#;
        let config = Config::parse(config, std::path::Path::new("config.json")).unwrap();
        let tensors = plan(&config, Quant::Q8);
        let find = |name: &str| tensors.iter().find(|t| t.info.name == name).unwrap();
        assert_eq!(find("output.weight").source, "lm_head.weight");
        assert_eq!(find("blk.3.attn_k.weight").rows, Rows::Interleaved { head_dim: 16 });
        assert_eq!(find("blk.3.attn_v.weight").rows, Rows::AsTheyAre);
        assert_eq!(tensors.len(), 3 + 11 * 9);
    }
}
