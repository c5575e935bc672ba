//! The graph of a Llama, read from top to bottom.
//!
//! Operators are ONNX Runtime's (com.microsoft 1), chosen so that one file runs on the CPU, in WASM
//! and on WebGPU: attention and rotary positions in `GroupQueryAttention`, which takes positions
//! from the attention mask; no softcap, no sliding cache, no `position_ids`, since WebGPU ignores
//! or refuses them.
//!
//! B rows, T new tokens, P tokens in the cache, S = P + T.

use std::path::Path;

use checkpoint::config::Config;
use checkpoint::names;
use checkpoint::weights::Weights;
use rayon::prelude::*;

use crate::builder::{Attr, Builder, Dim};
use crate::proto::data_type::{FLOAT, INT32, INT64, UINT8};
use crate::quantise::{self, Quantised};
use crate::{Dtype, Error, Options, Written};

/// Values that share a scale.
const BLOCK: usize = 32;
/// Bits of the embedding and the head: in 4 they cost five times the error of all linear layers.
const HEAD_BITS: u32 = 8;
/// `MatMulNBits` computes in f32: the one level that gives the same tokens on every device.
const ACCURACY_LEVEL: i64 = 1;

pub fn write(
    config: &Config,
    weights: &Weights,
    to: &Path,
    options: Options,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Written, Error> {
    let mut g = Graph {
        b: Builder::new(to, options),
        config,
        weights,
        dtype: options.dtype,
        sizes: [0; 3],
    };
    let (kv, d) = (config.num_kv_heads, config.head_dim);
    let (batch, new, total) =
        (Dim::Named("batch_size"), Dim::Named("sequence_length"), "total_sequence_length");
    g.b.input("input_ids", INT64, &[batch, new]);
    g.b.input("attention_mask", INT64, &[Dim::Named("batch_size"), Dim::Named(total)]);
    // Zero keeps them all, as transformers has it.
    g.b.input("num_logits_to_keep", INT64, &[]);
    // Transformers.js reads the sizes of its empty cache here: heads and width must be numbers.
    let cache =
        |positions| [Dim::Named("batch_size"), Dim::Size(kv), Dim::Named(positions), Dim::Size(d)];
    let logits = [Dim::Named("batch_size"), Dim::Named("num_logits"), Dim::Size(config.vocab_size)];
    g.b.output("logits", FLOAT, &logits);
    for i in 0..config.num_layers {
        for part in ["key", "value"] {
            let past = cache("past_sequence_length");
            g.b.input(&format!("past_key_values.{i}.{part}"), FLOAT, &past);
            g.b.output(&format!("present.{i}.{part}"), FLOAT, &cache(total));
        }
    }

    g.lengths();
    g.rotary(options.max_positions)?;
    let head = g.embedding()?;
    let mut normed = g.first_norm()?;
    let mut residual = "embedding".to_string();
    for i in 0..config.num_layers {
        let attended = g.attention(i, &normed)?;
        let weight = names::layer(i, "post_attention_layernorm");
        (normed, residual) =
            g.add_and_norm(&format!("layers.{i}.ffn"), &attended, &residual, &weight)?;
        let fed = g.feed_forward(i, &normed)?;
        let weight = match i + 1 {
            next if next < config.num_layers => names::layer(next, "input_layernorm"),
            _ => names::NORM.into(),
        };
        (normed, residual) =
            g.add_and_norm(&format!("layers.{i}.out"), &fed, &residual, &weight)?;
        progress(i + 1, config.num_layers);
    }
    g.head(&normed, head)?;

    let [embedding, linear, other] = g.sizes;
    let (graph, chunks) = g.b.finish()?;
    Ok(Written { graph, chunks, embedding, linear, other })
}

struct Graph<'a> {
    b: Builder,
    config: &'a Config,
    weights: &'a Weights,
    dtype: Dtype,
    /// Bytes of the embedding, of linear layers, of all else.
    sizes: [u64; 3],
}

/// What the head is made of, once the embedding is written.
enum Head {
    /// The embedding's own bytes, \[V, H\] in f32.
    TiedFloat,
    /// The embedding's own bytes, quantised.
    TiedQuantised,
    Own,
}

impl Graph<'_> {
    /// `GroupQueryAttention` wants S − 1 of each row, and the largest S.
    fn lengths(&mut self) {
        let b = &mut self.b;
        let (one, axis) = (b.integers("one", &[1], &[1]), b.integers("last_axis", &[1], &[-1]));
        let read = b.node(
            "ReduceSum",
            "rows_length",
            &["attention_mask", &axis],
            &[("keepdims", Attr::Int(0))],
        );
        let before = b.node("Sub", "rows_length_before", &[&read, &one], &[]);
        b.node("Cast", "seqlens_k", &[&before], &[("to", Attr::Int(INT32.into()))]);
        let shape = b.node("Shape", "mask_shape", &["attention_mask"], &[]);
        let at = b.integers("index_one", &[], &[1]);
        let total = b.node("Gather", "mask_length", &[&shape, &at], &[("axis", Attr::Int(0))]);
        b.node("Cast", "total_length", &[&total], &[("to", Attr::Int(INT32.into()))]);
    }

    /// cos and sin of p · θ^(−2i/d) for each position p and pair i, in f32 as transformers has it:
    /// \[positions, d/2\].
    fn rotary(&mut self, positions: usize) -> Result<(), Error> {
        let (d, theta) = (self.config.head_dim, self.config.rope_theta as f32);
        let frequencies: Vec<f32> =
            (0..d / 2).map(|i| 1.0 / theta.powf((2 * i) as f32 / d as f32)).collect();
        let angles: Vec<f32> =
            (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f)).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        for (name, table) in [("cos_cache", cos), ("sin_cache", sin)] {
            self.b.floats(name, &[positions, d / 2], &table)?;
            self.sizes[2] += 4 * table.len() as u64;
        }
        Ok(())
    }

    /// Token ids → `embedding` \[B, T, H\].
    fn embedding(&mut self) -> Result<Head, Error> {
        let (v, h) = (self.config.vocab_size, self.config.hidden_size);
        let values = self.values(names::EMBED)?;
        let tied = self.config.tied;
        match self.dtype {
            Dtype::Fp32 => {
                self.b.floats("embed_tokens", &[v, h], &values)?;
                self.sizes[0] += 4 * values.len() as u64;
                self.b.node("Gather", "embedding", &["embed_tokens", "input_ids"], &[]);
                Ok(if tied { Head::TiedFloat } else { Head::Own })
            }
            Dtype::Q4 if !h.is_multiple_of(BLOCK) => Err(Error::Width(h, BLOCK)),
            Dtype::Q4 => {
                let q = quantise::symmetric(&values, h, HEAD_BITS, BLOCK);
                let blocks = h / BLOCK;
                self.sizes[0] += (q.data.len() + 4 * q.scales.len()) as u64;
                let place = self.b.tensor("embed_tokens", UINT8, &[v, h], &q.data)?;
                self.b.floats("embed_tokens_scales", &[v, blocks], &q.scales)?;
                if tied {
                    // One copy of the bytes, under the shape that each operator asks for.
                    self.b.tensor_at("lm_head", UINT8, &[v, blocks, BLOCK], &place);
                }
                self.b.contrib(
                    "GatherBlockQuantized",
                    "embedding",
                    &["embed_tokens", "input_ids", "embed_tokens_scales"],
                    &["embedding"],
                    &[
                        ("bits", Attr::Int(HEAD_BITS.into())),
                        ("block_size", Attr::Int(BLOCK as i64)),
                        ("gather_axis", Attr::Int(0)),
                        ("quantize_axis", Attr::Int(1)),
                    ],
                );
                Ok(if tied { Head::TiedQuantised } else { Head::Own })
            }
        }
    }

    fn first_norm(&mut self) -> Result<String, Error> {
        let weight = names::layer(0, "input_layernorm");
        self.vector(&weight)?;
        let attrs = [
            ("epsilon", Attr::Float(self.config.rms_norm_eps as f32)),
            ("axis", Attr::Int(-1)),
            ("stash_type", Attr::Int(1)),
        ];
        let inputs = ["embedding", weight.as_str()];
        Ok(self.b.node("SimplifiedLayerNormalization", "layers.0.normed", &inputs, &attrs))
    }

    /// The residual with `x` added, normed and as it is.
    fn add_and_norm(
        &mut self,
        name: &str,
        x: &str,
        residual: &str,
        weight: &str,
    ) -> Result<(String, String), Error> {
        self.vector(weight)?;
        let (normed, sum) = (format!("{name}.normed"), format!("{name}.residual"));
        self.b.contrib(
            "SkipSimplifiedLayerNormalization",
            &normed,
            &[residual, x, weight],
            &[&normed, "", "", &sum],
            &[("epsilon", Attr::Float(self.config.rms_norm_eps as f32))],
        );
        Ok((normed, sum))
    }

    fn attention(&mut self, i: usize, x: &str) -> Result<String, Error> {
        let c = self.config;
        let name = format!("layers.{i}.self_attn");
        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        let qkv = qkv.map(|part| names::layer(i, part));
        let packed =
            self.linear(&format!("{name}.qkv_proj"), x, &qkv.each_ref().map(String::as_str))?;
        let (key, value) =
            (format!("past_key_values.{i}.key"), format!("past_key_values.{i}.value"));
        self.b.contrib(
            "GroupQueryAttention",
            &name,
            &[&packed, "", "", &key, &value, "seqlens_k", "total_length", "cos_cache", "sin_cache"],
            &[&name, &format!("present.{i}.key"), &format!("present.{i}.value")],
            &[
                ("num_heads", Attr::Int(c.num_heads as i64)),
                ("kv_num_heads", Attr::Int(c.num_kv_heads as i64)),
                ("scale", Attr::Float(1.0 / (c.head_dim as f32).sqrt())),
                ("do_rotary", Attr::Int(1)),
                ("rotary_interleaved", Attr::Int(0)),
                ("local_window_size", Attr::Int(-1)),
            ],
        );
        self.linear(&format!("{name}.o_proj"), &name, &[&names::layer(i, "self_attn.o_proj")])
    }

    /// down(silu(gate(x)) · up(x)).
    fn feed_forward(&mut self, i: usize, x: &str) -> Result<String, Error> {
        let name = format!("layers.{i}.mlp");
        let part = |part: &str| format!("{name}.{part}");
        let gate = self.linear(&part("gate_proj"), x, &[&names::layer(i, "mlp.gate_proj")])?;
        let up = self.linear(&part("up_proj"), x, &[&names::layer(i, "mlp.up_proj")])?;
        let sigmoid = self.b.node("Sigmoid", &part("sigmoid"), &[&gate], &[]);
        let silu = self.b.node("Mul", &part("silu"), &[&gate, &sigmoid], &[]);
        let product = self.b.node("Mul", &part("gated"), &[&silu, &up], &[]);
        self.linear(&part("down_proj"), &product, &[&names::layer(i, "mlp.down_proj")])
    }

    /// The last `num_logits_to_keep` positions → `logits` \[B, n, V\].
    fn head(&mut self, x: &str, head: Head) -> Result<(), Error> {
        let b = &mut self.b;
        let one = b.integers("shape_one", &[1], &[1]);
        let keep = b.node("Reshape", "logits_to_keep", &["num_logits_to_keep", &one], &[]);
        let from = b.node("Neg", "logits_from", &[&keep], &[]);
        let to = b.integers("logits_to", &[1], &[i64::MAX]);
        let axis = b.integers("positions_axis", &[1], &[1]);
        let last = b.node("Slice", "last_hidden", &[x, &from, &to, &axis], &[]);
        let (v, h) = (self.config.vocab_size, self.config.hidden_size);
        match head {
            Head::TiedFloat => {
                // Folded once, when the session is made.
                let head = self.b.node("Transpose", "lm_head", &["embed_tokens"], &[]);
                self.b.node("MatMul", "logits", &[&last, &head], &[]);
            }
            Head::TiedQuantised => self.matmul_n_bits(
                "logits",
                [&last, "lm_head", "embed_tokens_scales"],
                [v, h],
                HEAD_BITS,
            ),
            Head::Own => {
                let values = self.values(names::LM_HEAD)?;
                self.dense("logits", &last, &values, [v, h], HEAD_BITS)?;
            }
        }
        Ok(())
    }

    /// x · Wᵀ, the rows of several weights one below the other.
    fn linear(&mut self, name: &str, x: &str, weights: &[&str]) -> Result<String, Error> {
        let mut values = Vec::new();
        let mut shape = [0, 0];
        for weight in weights {
            let tensor = self.weights.get(weight)?;
            shape = [shape[0] + tensor.shape[0], tensor.shape[1]];
            values.extend(self.values(weight)?);
        }
        self.dense(name, x, &values, shape, 4)?;
        Ok(name.into())
    }

    /// `values` \[N, K\] as a layer: `bits` where weights are quantised.
    fn dense(
        &mut self,
        name: &str,
        x: &str,
        values: &[f32],
        [n, k]: [usize; 2],
        bits: u32,
    ) -> Result<(), Error> {
        let weight = format!("{name}.weight");
        match self.dtype {
            Dtype::Fp32 => {
                self.b.floats(&weight, &[k, n], &transposed(values, n, k))?;
                self.sizes[1] += 4 * values.len() as u64;
                self.b.node("MatMul", name, &[x, &weight], &[]);
            }
            Dtype::Q4 => {
                let Quantised { data, scales } = quantise::symmetric(values, k, bits, BLOCK);
                let blocks = k.div_ceil(BLOCK);
                let width = BLOCK * bits as usize / 8;
                self.sizes[1] += (data.len() + 4 * scales.len()) as u64;
                self.b.tensor(&weight, UINT8, &[n, blocks, width], &data)?;
                let scale = format!("{name}.scales");
                self.b.floats(&scale, &[n, blocks], &scales)?;
                self.matmul_n_bits(name, [x, &weight, &scale], [n, k], bits);
            }
        }
        Ok(())
    }

    fn matmul_n_bits(&mut self, name: &str, inputs: [&str; 3], [n, k]: [usize; 2], bits: u32) {
        let attrs = [
            ("K", Attr::Int(k as i64)),
            ("N", Attr::Int(n as i64)),
            ("bits", Attr::Int(bits.into())),
            ("block_size", Attr::Int(BLOCK as i64)),
            ("accuracy_level", Attr::Int(ACCURACY_LEVEL)),
        ];
        self.b.contrib("MatMulNBits", name, &inputs, &[name], &attrs);
    }

    /// A weight as an initializer under its own name.
    fn vector(&mut self, name: &str) -> Result<(), Error> {
        let values = self.values(name)?;
        self.sizes[2] += 4 * values.len() as u64;
        self.b.floats(name, &[values.len()], &values).map(|_| ())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, Error> {
        let values = self.weights.get(name)?.to_f32()?;
        match values.iter().all(|v| v.is_finite()) {
            true => Ok(values),
            false => Err(Error::NotFinite(name.into())),
        }
    }
}

/// \[N, K\] → \[K, N\].
fn transposed(values: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(n).enumerate().for_each(|(column, row)| {
        for (i, value) in row.iter_mut().enumerate() {
            *value = values[i * k + column];
        }
    });
    out
}
