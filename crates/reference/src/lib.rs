//! A causal language model's forward pass in plain f32: short, slow, without a library of tensors.
//! What an export computes is held to it.
//!
//! Knows nothing of files: weights come a few rows at a time from whoever has them, so that a model
//! need not fit in memory. The formulas are those of transformers' modeling_llama.py,
//! modeling_qwen3.py, modeling_phi3.py and modeling_gemma3.py.
//!
//! Dimensions: T tokens, C hidden size, H query heads, G key and value heads, D head size, R
//! dimensions of a head that its position turns, V vocabulary.

use std::cell::RefCell;
use std::ops::Range;

use checkpoint::Error;
use checkpoint::config::{Architecture, Config};
use checkpoint::names;
use checkpoint::weights::Weights;
use rayon::prelude::*;

mod agreement;
mod probe;
mod product;

pub use agreement::{Agreement, kl, log_softmax, top};
pub use probe::Probe;

/// Whoever has the weights of a model.
pub trait Source: Sync {
    /// Rows of the tensor that a checkpoint calls `name`, as f32 in `out`. A vector is one row.
    fn rows(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error>;
}

impl Source for Weights {
    fn rows(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        Weights::rows(self, name, rows, out)
    }
}

/// The logits after the tokens `ids` at the positions `of`: \[of, V\].
pub fn logits(
    config: &Config,
    source: &dyn Source,
    ids: &[u32],
    of: Range<usize>,
) -> Result<Vec<f32>, Error> {
    let model = Model { config, source, begins: vec![0; ids.len()], see: None };
    model.logits(ids, of)
}

/// Shows `see` what the model's matrices are multiplied with when it reads `rows`, which do not see
/// each other: a checkpoint's name for the matrix, and its input \[T, in\] over the tokens of all
/// rows. A name may come more than once, with the same input. `progress` is told how many layers of
/// how many are done.
pub fn inputs(
    config: &Config,
    source: &dyn Source,
    rows: &[&[u32]],
    see: See,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let mut begins = Vec::new();
    for row in rows {
        begins.extend(std::iter::repeat_n(begins.len(), row.len()));
    }
    let model = Model { config, source, begins, see: Some(RefCell::new(see)) };
    let mut x = model.layers(&rows.concat(), progress)?;
    model.norm(names::NORM, &mut x)?;
    model.show(head(config), &x);
    Ok(())
}

/// XᵀX / T of \[T, in\]: \[in, in\].
pub fn products(x: &[f32], columns: usize) -> Vec<f32> {
    let tokens = x.len() / columns;
    let mut turned = vec![0.0; x.len()];
    turned.par_chunks_exact_mut(tokens).enumerate().for_each(|(column, turned)| {
        for (to, x) in turned.iter_mut().zip(x.chunks_exact(columns)) {
            *to = x[column];
        }
    });
    let read = |rows: Range<usize>, out: &mut Vec<f32>| {
        out.clear();
        out.extend_from_slice(&turned[rows.start * tokens..rows.end * tokens]);
        Ok::<_, std::convert::Infallible>(())
    };
    let Ok(mut products) = product::product(0..columns, &turned, read);
    products.iter_mut().for_each(|product| *product /= tokens as f32);
    products
}

/// The matrix that gives logits.
fn head(config: &Config) -> &'static str {
    if config.tied { names::EMBED } else { names::LM_HEAD }
}

/// Whoever is told of a matrix and its input.
pub type See<'a> = &'a mut dyn FnMut(&str, &[f32]);

struct Model<'a> {
    config: &'a Config,
    source: &'a dyn Source,
    /// For each of T tokens, where its row begins.
    begins: Vec<usize>,
    see: Option<RefCell<See<'a>>>,
}

impl Model<'_> {
    fn logits(&self, ids: &[u32], of: Range<usize>) -> Result<Vec<f32>, Error> {
        let c = self.config;
        let mut x = self.layers(ids, &mut |_, _| ())?;
        let last = &mut x[of.start * c.hidden_size..of.end * c.hidden_size];
        self.norm(names::NORM, last)?;
        self.product(head(c), 0..c.vocab_size, last)
    }

    /// What comes out of the last layer: [T, C].
    fn layers(
        &self,
        ids: &[u32],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<f32>, Error> {
        let c = self.config;
        let mut x = Vec::new(); // [T, C]
        let mut row = Vec::new();
        for id in ids {
            self.source.rows(names::EMBED, *id as usize..*id as usize + 1, &mut row)?;
            x.extend_from_slice(&row);
        }
        if c.architecture == Architecture::Gemma3 {
            let scale = (c.hidden_size as f32).sqrt();
            x.iter_mut().for_each(|x| *x *= scale);
        }
        let angles = Angles::new(c, c.rope_theta, &self.begins);
        let near = c.rope_theta_near.map(|theta| Angles::new(c, theta, &self.begins));
        for i in 0..c.num_layers {
            let near = near.as_ref().filter(|_| c.windows[i].is_some());
            self.layer(i, &mut x, near.unwrap_or(&angles))?;
            progress(i + 1, c.num_layers);
        }
        Ok(x)
    }

    /// x += attention(norm(x)); x += mlp(norm(x)): [T, C]. Gemma's norms stand after, too.
    fn layer(&self, i: usize, x: &mut [f32], angles: &Angles) -> Result<(), Error> {
        let norms = names::norms(self.config);
        let (before, after) = match norms {
            [a, b, c, d] => ([a, c], [Some(b), Some(d)]),
            [a, b, ..] => ([a, b], [None, None]),
            _ => unreachable!("a layer has two norms or four"),
        };
        for part in 0..2 {
            let mut y = x.to_vec();
            self.norm(&names::layer(i, before[part]), &mut y)?;
            let mut y = match part {
                0 => self.attention(i, &y, angles)?,
                _ => self.feed_forward(i, &y)?,
            };
            if let Some(norm) = after[part] {
                self.norm(&names::layer(i, norm), &mut y)?;
            }
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        }
        Ok(())
    }

    fn attention(&self, i: usize, x: &[f32], angles: &Angles) -> Result<Vec<f32>, Error> {
        let c = self.config;
        let (heads, groups, d) = (c.num_heads, c.num_kv_heads, c.head_dim);
        let [mut q, mut k, v] = match c.architecture {
            Architecture::Phi3 => {
                let (q, kv) = (heads * d, groups * d);
                let part = |rows| self.linear(i, "self_attn.qkv_proj", rows, x);
                [part(0..q)?, part(q..q + kv)?, part(q + kv..q + 2 * kv)?]
            }
            _ => {
                let part = |name: &str, heads: usize| self.linear(i, name, 0..heads * d, x);
                [
                    part("self_attn.q_proj", heads)?,
                    part("self_attn.k_proj", groups)?,
                    part("self_attn.v_proj", groups)?,
                ]
            }
        };
        for (x, norm, heads) in
            [(&mut q, "self_attn.q_norm", heads), (&mut k, "self_attn.k_norm", groups)]
        {
            if c.qk_norm {
                self.norm(&names::layer(i, norm), x)?;
            }
            angles.turn(x, heads, d);
        }
        let scale = (c.query_scale as f32).powf(-0.5);
        let window = c.windows[i].unwrap_or(usize::MAX);
        let begins = &self.begins;
        let mut out = vec![0.0; begins.len() * heads * d]; // [T, H, D]
        out.par_chunks_mut(heads * d).enumerate().for_each(|(t, out)| {
            let keys = begins[t].max((t + 1).saturating_sub(window))..t + 1;
            for (h, out) in out.chunks_exact_mut(d).enumerate() {
                let group = h * groups / heads;
                let of = |all: &[f32], s: usize| -> Range<usize> {
                    let from = s * (all.len() / begins.len()) + group * d;
                    from..from + d
                };
                let q = &q[(t * heads + h) * d..][..d];
                let scores: Vec<f32> =
                    keys.clone().map(|s| scale * dot(q, &k[of(&k, s)])).collect();
                let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let shares: Vec<f32> = scores.iter().map(|s| (s - highest).exp()).collect();
                let sum: f32 = shares.iter().sum();
                for (s, share) in keys.clone().zip(shares) {
                    let v = &v[of(&v, s)];
                    out.iter_mut().zip(v).for_each(|(out, v)| *out += share / sum * v);
                }
            }
        });
        self.linear(i, "self_attn.o_proj", 0..c.hidden_size, &out)
    }

    /// down(act(gate(x)) · up(x))
    fn feed_forward(&self, i: usize, x: &[f32]) -> Result<Vec<f32>, Error> {
        let c = self.config;
        let f = c.intermediate_size;
        let [gate, up] = match c.architecture {
            Architecture::Phi3 => {
                [0..f, f..2 * f].map(|rows| self.linear(i, "mlp.gate_up_proj", rows, x))
            }
            _ => ["mlp.gate_proj", "mlp.up_proj"].map(|name| self.linear(i, name, 0..f, x)),
        };
        let act = match c.architecture {
            Architecture::Gemma3 => gelu,
            _ => |x: f32| x / (1.0 + (-x).exp()),
        };
        let y: Vec<f32> = gate?.iter().zip(up?).map(|(gate, up)| act(*gate) * up).collect();
        self.linear(i, "mlp.down_proj", 0..c.hidden_size, &y)
    }

    /// Rows of a linear layer: [T, in] → [T, rows].
    fn linear(
        &self,
        i: usize,
        part: &str,
        rows: Range<usize>,
        x: &[f32],
    ) -> Result<Vec<f32>, Error> {
        let name = names::layer(i, part);
        self.show(&name, x);
        let mut y = self.product(&name, rows.clone(), x)?;
        if names::has_bias(self.config, part) {
            let mut bias = Vec::new();
            self.source.rows(&names::bias(i, part), 0..1, &mut bias)?;
            for y in y.chunks_exact_mut(rows.len()) {
                y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, bias)| *y += bias);
            }
        }
        Ok(y)
    }

    fn show(&self, name: &str, x: &[f32]) {
        if let Some(see) = &self.see {
            (see.borrow_mut())(name, x);
        }
    }

    /// x · Wᵀ for some rows of W: [n, in] → [n, rows].
    fn product(&self, name: &str, rows: Range<usize>, x: &[f32]) -> Result<Vec<f32>, Error> {
        product::product(rows, x, |rows, out| self.source.rows(name, rows, out))
    }

    /// w · x / √(mean x² + eps) of each stretch of x that is as long as w. Gemma's weights count from 0.
    fn norm(&self, name: &str, x: &mut [f32]) -> Result<(), Error> {
        let mut weight = Vec::new();
        self.source.rows(name, 0..1, &mut weight)?;
        if self.config.architecture == Architecture::Gemma3 {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        for x in x.chunks_exact_mut(weight.len()) {
            let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
            let scale = 1.0 / (mean + self.config.rms_norm_eps as f32).sqrt();
            x.iter_mut().zip(&weight).for_each(|(x, w)| *x *= scale * w);
        }
        Ok(())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// With the tanh, as Gemma has it (Hendrycks & Gimpel, 2016).
fn gelu(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// Cosines and sines of what positions turn by: [T, R/2] each.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl Angles {
    /// LongRope's factors are those of the longest row.
    fn new(config: &Config, theta: f64, begins: &[usize]) -> Self {
        let rotary = config.rotary(theta);
        let positions = || begins.iter().enumerate().map(|(t, begin)| t - begin);
        let longest = positions().max().map_or(0, |last| last + 1);
        let frequencies = match rotary.short {
            Some((short, most)) if longest <= most => short,
            _ => rotary.frequencies,
        };
        let of = |function: fn(f32) -> f32| -> Vec<f32> {
            let angles = positions().flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
            angles.map(|angle| function(angle) * rotary.factor).collect()
        };
        Self { cos: of(f32::cos), sin: of(f32::sin), pairs: frequencies.len() }
    }

    /// [T, heads, D]: the two halves of what turns of a head turn against each other.
    fn turn(&self, x: &mut [f32], heads: usize, d: usize) {
        for (i, head) in x.chunks_exact_mut(d).enumerate() {
            let at = i / heads * self.pairs;
            let (low, high) = head[..2 * self.pairs].split_at_mut(self.pairs);
            for (pair, (low, high)) in low.iter_mut().zip(high).enumerate() {
                let (cos, sin) = (self.cos[at + pair], self.sin[at + pair]);
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Models and logits by transformers: see make.py beside them.
    #[test]
    fn logits_are_those_of_transformers() {
        for name in ["llama", "mistral", "qwen2", "qwen3", "phi3", "phi3-short", "gemma3"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
            let dir = dir.join("../train/src/worker/golden").join(name);
            let config = Config::read(&dir).unwrap();
            let weights = Weights::open(&dir).unwrap();
            let expected = Weights::open_file(&dir.join("expected.safetensors")).unwrap();
            let ids = expected.get("ids").unwrap();
            let (rows, length) = (ids.shape[0], ids.shape[1]);
            let ids: Vec<u32> =
                ids.data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b) as u32).collect();
            let expected = expected.get("logits").unwrap().to_f32().unwrap();
            assert_eq!(ids.len(), rows * length);
            for (row, expected) in
                ids.chunks(length).zip(expected.chunks(length * config.vocab_size))
            {
                let found = logits(&config, &weights, row, 0..length).unwrap();
                let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                let off =
                    found.iter().zip(expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
                assert!(off <= 1e-5 * largest, "{name}: off by {off}, the largest is {largest}");
                let last = logits(&config, &weights, row, length - 1..length).unwrap();
                assert_eq!(last, found[(length - 1) * config.vocab_size..]);
            }
        }
    }
}
