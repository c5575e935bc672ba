//! The graph of a decoder, read from top to bottom.
//!
//! Operators are ONNX Runtime's (com.microsoft 1), chosen so that one file runs on the CPU, in WASM
//! and on WebGPU: attention and rotary positions in `GroupQueryAttention`, which takes positions
//! from the attention mask; no softcap, no sliding cache, no `position_ids`, since WebGPU ignores
//! or refuses them; norms of heads as nodes, since the CPU refuses them inside.
//!
//! What is added up from layer to layer and what is normed is f32, whatever layers compute in.
//!
//! B rows, T new tokens, P tokens in the cache, S = P + T.

use std::path::Path;

use checkpoint::config::{Architecture, Config};
use checkpoint::names;
use checkpoint::weights::Weights;

use crate::builder::{Attr, Builder, Dim};
use crate::proto::data_type::{FLOAT, INT32, INT64};
use crate::weights::{Embedding, Writer};
use crate::{Calibration, Error, Options, Sizes, Written};

pub fn write(
    config: &Config,
    weights: &Weights,
    to: &Path,
    options: Options,
    calibration: Option<&Calibration>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Written, Error> {
    let b = Builder::new(to, options);
    let w = Writer::new(b, weights, config.hidden_size, options, calibration)?;
    let mut g = Graph { w, config, constants: Vec::new() };
    g.ports();
    g.lengths();
    let far = g.rotary("", config.rope_theta, options.max_positions)?;
    let near = match config.rope_theta_near {
        Some(theta) => Some(g.rotary("_near", theta, options.max_positions)?),
        None => None,
    };
    // Gemma's norms stand before and after; the others' before only.
    let before_ffn = match config.architecture {
        Architecture::Gemma3 => "pre_feedforward_layernorm",
        _ => "post_attention_layernorm",
    };
    let (mut residual, embedding) = g.embedding()?;
    let mut x = g.norm("layers.0.normed", &residual, &names::layer(0, "input_layernorm"))?;
    for i in 0..config.num_layers {
        let near = near.as_ref().filter(|_| config.windows[i].is_some());
        let attended = g.attention(i, &x, near.unwrap_or(&far))?;
        let attended = g.norm_after(i, "self_attn", attended, "post_attention_layernorm")?;
        let weight = names::layer(i, before_ffn);
        (x, residual) = g.add_and_norm(i, "ffn", &attended, &residual, &weight)?;
        let fed = g.feed_forward(i, &x)?;
        let fed = g.norm_after(i, "mlp", fed, "post_feedforward_layernorm")?;
        let weight = match i + 1 {
            next if next < config.num_layers => names::layer(next, "input_layernorm"),
            _ => names::NORM.into(),
        };
        (x, residual) = g.add_and_norm(i, "out", &fed, &residual, &weight)?;
        progress(i + 1, config.num_layers);
    }
    g.head(&x, &embedding)?;

    let [embedding, linear, other] = g.w.sizes;
    let (graph, chunks) = g.w.b.finish()?;
    Ok(Written { graph, chunks, sizes: Sizes { embedding, linear, other } })
}

struct Graph<'a> {
    w: Writer<'a>,
    config: &'a Config,
    /// The shapes that layers share and that are written.
    constants: Vec<&'static str>,
}

/// Cosines and sines, [positions, R/2].
type Rotary = [String; 2];

impl Graph<'_> {
    fn ports(&mut self) {
        let c = self.config;
        let (kv, d, v) = (c.num_kv_heads, c.head_dim, c.vocab_size);
        let float = self.w.float();
        let b = &mut self.w.b;
        let (batch, new, total) =
            (Dim::Named("batch_size"), Dim::Named("sequence_length"), "total_sequence_length");
        b.input("input_ids", INT64, &[batch, new]);
        b.input("attention_mask", INT64, &[Dim::Named("batch_size"), Dim::Named(total)]);
        // Zero keeps them all, as transformers has it.
        b.input("num_logits_to_keep", INT64, &[]);
        // Transformers.js reads the sizes of its empty cache here: heads and width must be numbers.
        let cache = |positions| {
            [Dim::Named("batch_size"), Dim::Size(kv), Dim::Named(positions), Dim::Size(d)]
        };
        let logits = [Dim::Named("batch_size"), Dim::Named("num_logits"), Dim::Size(v)];
        b.output("logits", FLOAT, &logits);
        for i in 0..c.num_layers {
            for part in ["key", "value"] {
                let past = cache("past_sequence_length");
                b.input(&format!("past_key_values.{i}.{part}"), float, &past);
                b.output(&format!("present.{i}.{part}"), float, &cache(total));
            }
        }
    }

    /// `GroupQueryAttention` wants S − 1 of each row, and the largest S.
    fn lengths(&mut self) {
        let b = &mut self.w.b;
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

    /// cos and sin of p · f for each position p and frequency f, in f32 as transformers has it.
    fn rotary(&mut self, suffix: &str, theta: f64, positions: usize) -> Result<Rotary, Error> {
        let rotary = self.config.rotary(theta);
        let pairs = rotary.frequencies.len();
        let angles = |frequencies: &[f32], positions: usize| -> Vec<f32> {
            (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f)).collect()
        };
        // LongRope's for short rows are all that is needed where no row is longer.
        let (angles, most) = match &rotary.short {
            None => (angles(&rotary.frequencies, positions), None),
            Some((short, most)) if *most >= positions => (angles(short, positions), None),
            Some((short, most)) => {
                let all = [angles(short, *most), angles(&rotary.frequencies, positions)];
                (all.concat(), Some(*most))
            }
        };
        let factor = rotary.factor;
        let cos: Vec<f32> = angles.iter().map(|a| a.cos() * factor).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin() * factor).collect();
        let names = ["cos_cache", "sin_cache"].map(|name| format!("{name}{suffix}"));
        for (name, table) in names.iter().zip([cos, sin]) {
            self.w.floats(name, &[table.len() / pairs, pairs], &table)?;
        }
        Ok(match most {
            None => names,
            Some(most) => self.long_or_short(&names, most),
        })
    }

    /// Of tables in which `most` rows for short texts stand above those for longer ones: the S that
    /// are needed. By the longest row of a batch, as transformers chooses. Keys in the cache stay as
    /// they were turned: to go on as if all had been read at once, a row that outgrows `most` has to
    /// be read again, which transformers does.
    fn long_or_short(&mut self, tables: &[String; 2], most: usize) -> Rotary {
        let b = &mut self.w.b;
        let one = b.integers("shape_of_one", &[1], &[1]);
        let length = b.node("Reshape", "rotary_length", &["mask_length", &one], &[]);
        let most = b.integers("rotary_short", &[1], &[most as i64]);
        let zero = b.integers("rotary_from_zero", &[1], &[0]);
        let is_long = b.node("Greater", "rotary_is_long", &[&length, &most], &[]);
        let from = b.node("Where", "rotary_from", &[&is_long, &most, &zero], &[]);
        let to = b.node("Add", "rotary_to", &[&from, &length], &[]);
        tables.each_ref().map(|table| {
            b.node("Slice", &format!("{table}.chosen"), &[table, &from, &to, &zero], &[])
        })
    }

    /// Token ids → the first residual \[B, T, H\].
    fn embedding(&mut self) -> Result<(String, Embedding), Error> {
        let embedding = self.w.embedding("embedding", names::EMBED, self.config.tied)?;
        let mut x = self.w.widened("embedding.widened", "embedding");
        if self.config.architecture == Architecture::Gemma3 {
            let scale = (self.config.hidden_size as f32).sqrt();
            let scale = self.w.b.float("embedding_scale", scale);
            x = self.w.b.node("Mul", "embedding.scaled", &[&x, &scale], &[]);
        }
        Ok((x, embedding))
    }

    /// Gemma's weights count from 0.
    fn norm_weight(&mut self, name: &str) -> Result<(), Error> {
        let shift = if self.config.architecture == Architecture::Gemma3 { 1.0 } else { 0.0 };
        self.w.norm(name, shift)
    }

    /// RMS norm of the last dimension.
    fn norm(&mut self, name: &str, x: &str, weight: &str) -> Result<String, Error> {
        self.norm_weight(weight)?;
        let attrs = [
            ("epsilon", Attr::Float(self.config.rms_norm_eps as f32)),
            ("axis", Attr::Int(-1)),
            ("stash_type", Attr::Int(1)),
        ];
        Ok(self.w.b.node("SimplifiedLayerNormalization", name, &[x, weight], &attrs))
    }

    /// What a half of a layer gives, normed before it is added up where the architecture does so.
    fn norm_after(
        &mut self,
        i: usize,
        half: &str,
        x: String,
        weight: &str,
    ) -> Result<String, Error> {
        match self.config.architecture {
            Architecture::Gemma3 => {
                self.norm(&format!("layers.{i}.{half}.normed"), &x, &names::layer(i, weight))
            }
            _ => Ok(x),
        }
    }

    /// The residual with `x` added, normed and as it is.
    fn add_and_norm(
        &mut self,
        i: usize,
        name: &str,
        x: &str,
        residual: &str,
        weight: &str,
    ) -> Result<(String, String), Error> {
        self.norm_weight(weight)?;
        let (normed, sum) =
            (format!("layers.{i}.{name}.normed"), format!("layers.{i}.{name}.residual"));
        self.w.b.contrib(
            "SkipSimplifiedLayerNormalization",
            &normed,
            &[residual, x, weight],
            &[&normed, "", "", &sum],
            &[("epsilon", Attr::Float(self.config.rms_norm_eps as f32))],
        );
        Ok((normed, sum))
    }

    fn attention(&mut self, i: usize, x: &str, [cos, sin]: &Rotary) -> Result<String, Error> {
        let c = self.config;
        let name = format!("layers.{i}.self_attn");
        let x = self.w.narrowed(&format!("{name}.input"), x);
        let parts: &[&str] = match c.architecture {
            Architecture::Phi3 => &["self_attn.qkv_proj"],
            _ => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        };
        let packed = self.linear(i, &format!("{name}.qkv_proj"), &x, parts)?;
        let [q, k, v] = match c.qk_norm {
            true => self.normed_heads(i, &name, &packed)?,
            false => [packed, String::new(), String::new()],
        };
        let (key, value) =
            (format!("past_key_values.{i}.key"), format!("past_key_values.{i}.value"));
        self.w.b.contrib(
            "GroupQueryAttention",
            &name,
            &[&q, &k, &v, &key, &value, "seqlens_k", "total_length", cos, sin],
            &[&name, &format!("present.{i}.key"), &format!("present.{i}.value")],
            &[
                ("num_heads", Attr::Int(c.num_heads as i64)),
                ("kv_num_heads", Attr::Int(c.num_kv_heads as i64)),
                ("scale", Attr::Float(1.0 / (c.query_scale as f32).sqrt())),
                ("do_rotary", Attr::Int(1)),
                ("rotary_interleaved", Attr::Int(0)),
                // As transformers counts it: with the token itself.
                ("local_window_size", Attr::Int(c.windows[i].map_or(-1, |window| window as i64))),
            ],
        );
        let y = self.linear(i, &format!("{name}.o_proj"), &name, &["self_attn.o_proj"])?;
        Ok(self.w.widened(&format!("{name}.output"), &y))
    }

    /// Queries, keys and values apart; of the first two, each head is normed.
    fn normed_heads(&mut self, i: usize, name: &str, x: &str) -> Result<[String; 3], Error> {
        let c = self.config;
        let (d, q, kv) = (c.head_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let sizes = self.constant("qkv_sizes", &[q, kv, kv].map(|n| n as i64));
        let [queries, keys, values] = ["q", "k", "v"].map(|part| format!("{name}.{part}"));
        self.w.b.split(&format!("{name}.qkv"), x, &sizes, &[&queries, &keys, &values]);
        // Zero keeps B.
        let one_head = self.constant("shape_of_heads", &[0, -1, d as i64]);
        let mut normed = |x: &str, part: &str, shape: &'static str, width: usize| {
            let x = self.w.widened(&format!("{x}.widened"), x);
            let heads = self.w.b.node("Reshape", &format!("{x}.heads"), &[&x, &one_head], &[]);
            let weight = names::layer(i, &format!("self_attn.{part}"));
            let heads = self.norm(&format!("{x}.normed"), &heads, &weight)?;
            let shape = self.constant(shape, &[0, -1, width as i64]);
            let rows = self.w.b.node("Reshape", &format!("{x}.rows"), &[&heads, &shape], &[]);
            Ok::<_, Error>(self.w.narrowed(&format!("{x}.narrowed"), &rows))
        };
        Ok([
            normed(&queries, "q_norm", "shape_of_queries", q)?,
            normed(&keys, "k_norm", "shape_of_keys", kv)?,
            values,
        ])
    }

    /// down(act(gate(x)) · up(x)).
    fn feed_forward(&mut self, i: usize, x: &str) -> Result<String, Error> {
        let name = format!("layers.{i}.mlp");
        let part = |part: &str| format!("{name}.{part}");
        let x = self.w.narrowed(&part("input"), x);
        let gate = self.linear(i, &part("gate_proj"), &x, &["mlp.gate_proj"])?;
        let up = self.linear(i, &part("up_proj"), &x, &["mlp.up_proj"])?;
        let b = &mut self.w.b;
        let active = match self.config.architecture {
            Architecture::Gemma3 => {
                b.node("Gelu", &part("gelu"), &[&gate], &[("approximate", Attr::Text("tanh"))])
            }
            _ => {
                let sigmoid = b.node("Sigmoid", &part("sigmoid"), &[&gate], &[]);
                b.node("Mul", &part("silu"), &[&gate, &sigmoid], &[])
            }
        };
        let product = b.node("Mul", &part("gated"), &[&active, &up], &[]);
        let y = self.linear(i, &part("down_proj"), &product, &["mlp.down_proj"])?;
        Ok(self.w.widened(&part("output"), &y))
    }

    /// The last `num_logits_to_keep` positions → `logits` \[B, n, V\].
    fn head(&mut self, x: &str, embedding: &Embedding) -> Result<(), Error> {
        let b = &mut self.w.b;
        let one = b.integers("shape_one", &[1], &[1]);
        let keep = b.node("Reshape", "logits_to_keep", &["num_logits_to_keep", &one], &[]);
        let from = b.node("Neg", "logits_from", &[&keep], &[]);
        let to = b.integers("logits_to", &[1], &[i64::MAX]);
        let axis = b.integers("positions_axis", &[1], &[1]);
        let last = b.node("Slice", "last_hidden", &[x, &from, &to, &axis], &[]);
        let narrow = self.w.narrowed("last_hidden.narrowed", &last);
        let name = if narrow == last { "logits" } else { "logits.narrow" };
        match self.config.tied {
            true => self.w.tied_head(name, &narrow, embedding),
            false => self.w.own_head(name, &narrow, names::LM_HEAD)?,
        }
        self.w.widened("logits", name);
        Ok(())
    }

    /// Layers named as [`names::LINEARS`] names them, the rows of one below those of the other.
    fn linear(&mut self, i: usize, name: &str, x: &str, parts: &[&str]) -> Result<String, Error> {
        let c = self.config;
        let f = c.intermediate_size;
        let weights: Vec<_> = parts
            .iter()
            .map(|part| match (c.architecture, *part) {
                // One matrix holds the rows of both.
                (Architecture::Phi3, "mlp.gate_proj") => ("mlp.gate_up_proj", Some(0..f)),
                (Architecture::Phi3, "mlp.up_proj") => ("mlp.gate_up_proj", Some(f..2 * f)),
                (_, part) => (part, None),
            })
            .map(|(part, rows)| (names::layer(i, part), rows))
            .collect();
        let biased = parts.iter().filter(|part| names::has_bias(c, part));
        let biases: Vec<String> = biased.map(|part| names::bias(i, part)).collect();
        self.w.linear(name, x, &weights, &biases)
    }

    /// Integers that several layers share, written once.
    fn constant(&mut self, name: &'static str, values: &[i64]) -> String {
        if !self.constants.contains(&name) {
            self.constants.push(name);
            self.w.b.integers(name, &[values.len()], values);
        }
        name.into()
    }
}
