//! Tiny random Llamas, the same on every machine.
//!
//! Knows nothing of tokenizers: a model folder here is config.json and model.safetensors.

use std::path::Path;

use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::{Dtype, Spec, Writer};
use serde_json::json;

pub const POSITIONS: usize = 64;

/// The figures of config.json that differ between the models of a test.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub vocab: u32,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub tied: bool,
    pub seed: u64,
}

/// Writes a Hugging Face model folder.
pub fn write(dir: &Path, shape: Shape) {
    std::fs::create_dir_all(dir).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
    });
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let config = Config::parse(&config.to_string(), &path).unwrap();

    let specs = names::expected(&config)
        .into_iter()
        .map(|(name, shape)| Spec::new(name, Dtype::F32, &shape))
        .collect();
    let mut writer = Writer::create(&dir.join("model.safetensors"), specs).unwrap();
    for (n, spec) in writer.order().into_iter().enumerate() {
        let width = *spec.shape.last().unwrap();
        let data: Vec<u8> = noise(shape.seed + n as u64)
            // Norms about one; other weights so that each layer changes what it is given.
            .map(|x| {
                if spec.shape.len() == 1 { 1.0 + 0.1 * x } else { 1.5 * x / (width as f32).sqrt() }
            })
            .take(spec.shape.iter().product())
            .flat_map(f32::to_le_bytes)
            .collect();
        writer.write(&spec.name, &data).unwrap();
    }
    writer.finish().unwrap();
}

/// Numbers about zero with a variance of one: sums of three uniform ones from an xorshift.
fn noise(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(move || uniform() + uniform() + uniform()).skip(16)
}
