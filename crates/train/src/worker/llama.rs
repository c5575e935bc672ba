//! The Llama family (Touvron et al., 2023) as a module that can be trained: one forward pass.
//!
//! The order of operations, and so of roundings, is that of transformers' modeling_llama.py.
//! Knows nothing of files, batches' origins, optimisers or steps.
//!
//! Dimensions: B rows, T positions, C hidden size, H query heads, G key and value heads, D head
//! size, V vocabulary, N positions that predict something.

use anyhow::Result;
use checkpoint::config::Config;
use checkpoint::names;
use tch::{Device, Kind, Reduction, Tensor};

use crate::fused;

/// Rows side by side, and what is to be predicted in them.
pub struct Batch {
    /// [B, T], int64.
    pub ids: Tensor,
    /// Of rows that are packed end to end; without it rows start at 0 and attend causally.
    pub packed: Option<Packed>,
    /// [N], int64: which of the B·T positions predict.
    pub predicting: Tensor,
    /// [N], int64: the token that each one should predict.
    pub targets: Tensor,
    /// [N], float32: what each one counts.
    pub weights: Tensor,
}

/// Several rows in one sequence.
pub struct Packed {
    /// [T], int64: the position of each token in its own row.
    pub positions: Tensor,
    /// [1, 1, T, T], bool: true where a query may see a key, block-diagonal and causal.
    pub mask: Tensor,
}

pub struct Llama {
    pub config: Config,
    /// What products are computed in. The residual stream has the kind of the embedding.
    compute: Kind,
    /// [V, C]
    embedding: Tensor,
    layers: Vec<Layer>,
    /// [C]
    norm: Tensor,
    /// [V, C]: the embedding itself in a tied model.
    head: Linear,
    rotary: Rotary,
}

impl Llama {
    /// Builds the model from `weight(name, shape)`, which is asked for each tensor in the order of
    /// [`names::expected`].
    pub fn new(
        config: Config,
        compute: Kind,
        mut weight: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut weights = std::collections::BTreeMap::new();
        for (name, shape) in names::expected(&config) {
            weights.insert(name.clone(), weight(&name, &shape)?);
        }
        let mut take = |name: &str| weights.remove(name).expect("the model's own tensor names");
        let embedding = take(names::EMBED);
        let layers = (0..config.num_layers).map(|i| Layer::new(i, &mut take)).collect();
        let norm = take(names::NORM);
        let head = if config.tied { embedding.shallow_clone() } else { take(names::LM_HEAD) };
        let rotary = Rotary::new(&config, embedding.device());
        let head = Linear { name: names::LM_HEAD.into(), weight: head, lora: None };
        Ok(Self { config, compute, embedding, layers, norm, head, rotary })
    }

    /// What the model misses in `batch`: the sum over predicting positions of weight × -ln p, a
    /// float32 tensor of no dimensions. `dropout` is on while training.
    pub fn loss(&self, batch: &Batch, dropout: bool) -> Tensor {
        let x = self.hidden(batch, dropout).index_select(0, &batch.predicting); // [N, C]
        let logits = self.head.forward(&x, dropout).to_kind(Kind::Float); // [N, V]
        let miss =
            logits.cross_entropy_loss::<Tensor>(&batch.targets, None, Reduction::None, -100, 0.0);
        miss.dot(&batch.weights)
    }

    /// [B·T, C], after the last norm, in the compute kind.
    fn hidden(&self, batch: &Batch, dropout: bool) -> Tensor {
        let rotary = match &batch.packed {
            Some(packed) => self.rotary.at(&packed.positions),
            None => self.rotary.first(batch.ids.size()[1]),
        }
        .to_kind(self.compute);
        let mask = batch.packed.as_ref().map(|p| &p.mask);
        let ids = batch.ids.flatten(0, 1);
        let mut x = Tensor::embedding(&self.embedding, &ids, -1, false, false);
        for layer in &self.layers {
            x = layer.forward(&x, &self.config, self.compute, &rotary, mask, dropout);
        }
        rms_norm(&x, &self.norm, self.config.rms_norm_eps, self.compute)
    }

    /// The weights by their names in a checkpoint, in the order of [`names::expected`].
    pub fn weights(&self) -> Vec<(String, Tensor)> {
        let mut all = std::collections::BTreeMap::new();
        all.insert(names::EMBED.to_string(), self.embedding.shallow_clone());
        all.insert(names::NORM.to_string(), self.norm.shallow_clone());
        for (i, layer) in self.layers.iter().enumerate() {
            for linear in layer.linears() {
                all.insert(linear.name.clone(), linear.weight.shallow_clone());
            }
            all.insert(names::layer(i, "input_layernorm"), layer.attention_norm.shallow_clone());
            let norm = layer.mlp_norm.shallow_clone();
            all.insert(names::layer(i, "post_attention_layernorm"), norm);
        }
        if !self.config.tied {
            all.insert(self.head.name.clone(), self.head.weight.shallow_clone());
        }
        let order = names::expected(&self.config).into_iter();
        order.map(|(name, _)| all.remove_entry(&name).expect("the model's own names")).collect()
    }

    /// Every linear layer, in the order of the forward pass, the head last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let layers = self.layers.iter_mut().flat_map(Layer::linears_mut);
        layers.chain(std::iter::once(&mut self.head))
    }
}

struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn new(i: usize, take: &mut impl FnMut(&str) -> Tensor) -> Self {
        let mut linear = |part: &str| {
            let name = names::layer(i, part);
            Linear { weight: take(&name), name, lora: None }
        };
        Self {
            q: linear("self_attn.q_proj"),
            k: linear("self_attn.k_proj"),
            v: linear("self_attn.v_proj"),
            o: linear("self_attn.o_proj"),
            gate: linear("mlp.gate_proj"),
            up: linear("mlp.up_proj"),
            down: linear("mlp.down_proj"),
            attention_norm: take(&names::layer(i, "input_layernorm")),
            mlp_norm: take(&names::layer(i, "post_attention_layernorm")),
        }
    }

    /// [B·T, C] → [B·T, C]
    fn forward(
        &self,
        x: &Tensor,
        config: &Config,
        compute: Kind,
        rotary: &Rotary,
        mask: Option<&Tensor>,
        dropout: bool,
    ) -> Tensor {
        let (h, g) = (config.num_heads as i64, config.num_kv_heads as i64);
        let d = config.head_dim as i64;

        let y = rms_norm(x, &self.attention_norm, config.rms_norm_eps, compute);
        let q = rotary.turn(&self.q.forward(&y, dropout));
        let k = rotary.turn(&self.k.forward(&y, dropout));
        let v = rotary.heads(&self.v.forward(&y, dropout));
        let causal = mask.is_none();
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, causal, None, h != g);
        let y = y.transpose(1, 2).reshape([-1, h * d]);
        let x = x + self.o.forward(&y, dropout);

        let y = rms_norm(&x, &self.mlp_norm, config.rms_norm_eps, compute);
        let y = self.gate.forward(&y, dropout).silu() * self.up.forward(&y, dropout);
        x + self.down.forward(&y, dropout)
    }

    fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        [q, k, v, o, gate, up, down]
    }
}

/// A matrix without bias, with or without an adapter.
pub struct Linear {
    /// In a checkpoint: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// [out, in]
    pub weight: Tensor,
    pub lora: Option<Lora>,
}

/// What PEFT adds to a linear layer: scale · B·A, held in float32 whatever the base is in.
pub struct Lora {
    /// [rank, in]
    pub a: Tensor,
    /// [out, rank]
    pub b: Tensor,
    pub scale: f64,
    /// Of the input, while training.
    pub dropout: f64,
}

impl Linear {
    /// `q_proj`, `lm_head`: what PEFT calls it as a target.
    pub fn module(&self) -> &str {
        let name = self.name.trim_end_matches(".weight");
        name.rsplit('.').next().unwrap_or(name)
    }

    /// [N, in] → [N, out], in the kind of `x`.
    fn forward(&self, x: &Tensor, dropout: bool) -> Tensor {
        let weight = self.weight.to_kind(x.kind());
        let Some(lora) = &self.lora else { return x.linear::<Tensor>(&weight, None) };
        let dropout = dropout && lora.dropout > 0.0;
        if x.kind() == Kind::Float && !dropout {
            return fused::lora_linear(x, &weight, &lora.a, &lora.b, lora.scale);
        }
        let y = x.linear::<Tensor>(&weight, None);
        // Up to float32, add there, round once: as PEFT does with a float32 adapter.
        let x = x.to_kind(Kind::Float).dropout(lora.dropout, dropout);
        let delta = x.linear::<Tensor>(&lora.a, None).linear::<Tensor>(&lora.b, None);
        let kind = y.kind();
        (y + delta * lora.scale).to_kind(kind)
    }
}

/// w · x̂ with x̂ = x / √(mean x² + eps), rounded to the compute kind before w is applied.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, compute: Kind) -> Tensor {
    if fused::takes(x) && compute == Kind::Float {
        return fused::rms_norm(x, weight, eps);
    }
    let x = x.to_kind(Kind::Float);
    let variance = x.square().mean_dim(-1, true, Kind::Float);
    let x = x * (variance + eps).rsqrt();
    weight.to_kind(compute) * x.to_kind(compute)
}

/// Rotary positions (Su et al., 2021): the two halves of a head turn against each other.
struct Rotary {
    /// [T, D]
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(config: &Config, device: Device) -> Self {
        let d = config.head_dim as i64;
        let exponents = Tensor::arange_start_step(0, d, 2, (Kind::Int64, device));
        let exponents = exponents.to_kind(Kind::Float) / d as f64;
        let frequencies = Tensor::pow_scalar(config.rope_theta, &exponents).reciprocal();
        let positions = Tensor::arange(config.max_positions as i64, (Kind::Float, device));
        let angles = positions.outer(&frequencies);
        let angles = Tensor::cat(&[&angles, &angles], -1);
        Self { cos: angles.cos(), sin: angles.sin() }
    }

    /// Of positions 0..t.
    fn first(&self, t: i64) -> Self {
        Self { cos: self.cos.narrow(0, 0, t), sin: self.sin.narrow(0, 0, t) }
    }

    fn at(&self, positions: &Tensor) -> Self {
        Self { cos: self.cos.index_select(0, positions), sin: self.sin.index_select(0, positions) }
    }

    fn to_kind(&self, kind: Kind) -> Self {
        Self { cos: self.cos.to_kind(kind), sin: self.sin.to_kind(kind) }
    }

    /// [B·T, n·D] → [B, n, T, D]
    fn heads(&self, x: &Tensor) -> Tensor {
        let (t, d) = (self.cos.size()[0], self.cos.size()[1]);
        x.view([-1, t, x.size()[1] / d, d]).transpose(1, 2)
    }

    /// [B·T, n·D] → [B, n, T, D], turned by its position.
    fn turn(&self, x: &Tensor) -> Tensor {
        if fused::takes(x) {
            return self.heads(&fused::rotate(x, &self.cos, &self.sin));
        }
        let x = self.heads(x);
        let half = x.size()[3] / 2;
        let turned = Tensor::cat(&[-x.narrow(3, half, half), x.narrow(3, 0, half)], 3);
        x * &self.cos + turned * &self.sin
    }
}
