//! The names and shapes of a model's tensors, as Hugging Face writes them.

use crate::config::{Architecture, Config};

pub const EMBED: &str = "model.embed_tokens.weight";
pub const NORM: &str = "model.norm.weight";
pub const LM_HEAD: &str = "lm_head.weight";

/// The linear layers of a block, in the order in which they are used; but see [`linears`].
pub const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Those of Phi-3: a matrix holds the rows of several layers.
const FUSED: [&str; 4] =
    ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];

/// The linear layers of a block as this architecture's checkpoints hold them.
pub fn linears(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Phi3 => &FUSED,
        _ => &LINEARS,
    }
}

/// `q_proj` of `self_attn.q_proj`.
pub fn module(part: &str) -> &str {
    part.rsplit('.').next().unwrap_or(part)
}

/// The module that holds the one called `module` in this architecture: itself, or the one that it is
/// fused into.
pub fn holder(architecture: Architecture, module: &str) -> &str {
    match (architecture, module) {
        (Architecture::Phi3, "q_proj" | "k_proj" | "v_proj") => "qkv_proj",
        (Architecture::Phi3, "gate_proj" | "up_proj") => "gate_up_proj",
        _ => module,
    }
}

/// `model.layers.3.self_attn.q_proj.weight`.
pub fn layer(index: usize, part: &str) -> String {
    format!("model.layers.{index}.{part}.weight")
}

/// Whether `name` is the matrix of a linear layer of a block.
pub fn is_linear(name: &str) -> bool {
    let part = name.strip_suffix(".weight").unwrap_or_default();
    LINEARS.iter().chain(&FUSED).any(|linear| part.ends_with(linear))
}

/// `model.layers.3.self_attn.q_proj.bias`.
pub fn bias(index: usize, part: &str) -> String {
    format!("model.layers.{index}.{part}.bias")
}

/// Whether a linear layer named in [`linears`] has a bias.
pub fn has_bias(config: &Config, part: &str) -> bool {
    match part {
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => config.qkv_bias,
        "self_attn.o_proj" => config.o_bias,
        _ => false,
    }
}

/// \[out, in\] of a linear layer named in [`linears`].
pub fn linear_shape(config: &Config, part: &str) -> Option<[usize; 2]> {
    let (h, q) = (config.hidden_size, config.num_heads * config.head_dim);
    let (kv, f) = (config.num_kv_heads * config.head_dim, config.intermediate_size);
    Some(match part {
        "self_attn.q_proj" => [q, h],
        "self_attn.k_proj" | "self_attn.v_proj" => [kv, h],
        "self_attn.o_proj" => [h, q],
        "mlp.gate_proj" | "mlp.up_proj" => [f, h],
        "mlp.down_proj" => [h, f],
        "self_attn.qkv_proj" => [q + 2 * kv, h],
        "mlp.gate_up_proj" => [2 * f, h],
        _ => return None,
    })
}

/// The norms of the residual stream in a block, in the order in which they are used.
pub fn norms(config: &Config) -> &'static [&'static str] {
    match config.architecture {
        Architecture::Gemma3 => &[
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ],
        _ => &["input_layernorm", "post_attention_layernorm"],
    }
}

/// Every tensor that a checkpoint of this config holds, with its shape.
pub fn expected(config: &Config) -> Vec<(String, Vec<usize>)> {
    let h = config.hidden_size;
    let mut all = vec![(EMBED.to_string(), vec![config.vocab_size, h])];
    for i in 0..config.num_layers {
        for part in linears(config.architecture) {
            let shape = linear_shape(config, part).expect("a name of the list");
            all.push((layer(i, part), shape.to_vec()));
            if has_bias(config, part) {
                all.push((bias(i, part), vec![shape[0]]));
            }
        }
        if config.qk_norm {
            all.push((layer(i, "self_attn.q_norm"), vec![config.head_dim]));
            all.push((layer(i, "self_attn.k_norm"), vec![config.head_dim]));
        }
        for norm in norms(config) {
            all.push((layer(i, norm), vec![h]));
        }
    }
    all.push((NORM.to_string(), vec![h]));
    if !config.tied {
        all.push((LM_HEAD.to_string(), vec![config.vocab_size, h]));
    }
    all
}
