//! A pre-norm decoder as a module that can be trained, one forward pass: Llama (Touvron et al.,
//! 2023), what differs from it by biases, norms of heads and windows (Mistral, Qwen2, Qwen3), by
//! fused matrices and positions on a part of a head (Phi-3), and Gemma 3's text.
//!
//! The order of operations, and so of roundings, is that of transformers' modeling_llama.py,
//! modeling_qwen2.py, modeling_qwen3.py and modeling_phi3.py.
//! Knows nothing of files, batches' origins, optimisers or steps.
//!
//! Dimensions: B rows, T positions, C hidden size, H query heads, G key and value heads, D head
//! size, R dimensions of a head that its position turns, V vocabulary, N positions that predict
//! something.

use std::collections::BTreeMap;
use std::slice::{from_mut, from_ref};

use anyhow::Result;
use checkpoint::config::{Architecture, Config};
use checkpoint::names;
use tch::{Device, Kind, Reduction, Tensor};
use train::LOGITS_A_TILE;

use crate::fused;
use crate::linear::{Linear, Weight};
use crate::shim;

/// Rows side by side, and what is to be predicted in them.
pub struct Batch {
    /// [B, T], int64.
    pub ids: Tensor,
    /// [B, T], int64: of how many tokens the row is that each position is in.
    pub lengths: Tensor,
    /// Of rows that are packed end to end; without it rows lie under one another.
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
    /// Which rows they are, from the first to the last.
    pub runs: Vec<Run>,
}

/// Rows of one length, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub rows: i64,
    pub length: i64,
}

pub struct Decoder {
    pub config: Config,
    /// What products are computed in. The residual stream has the kind of the embedding.
    compute: Kind,
    /// [V, C]
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    /// [V, C]: the embedding itself in a tied model.
    head: Linear,
    frequencies: Frequencies,
    /// Of layers with a window, where theirs are others.
    frequencies_near: Option<Frequencies>,
}

impl Decoder {
    /// Builds the model from `weight(name, shape)`, which is asked for each tensor in the order of
    /// [`names::expected`].
    pub fn new<W: Into<Weight>>(
        config: Config,
        compute: Kind,
        mut weight: impl FnMut(&str, &[usize]) -> Result<W>,
    ) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for (name, shape) in names::expected(&config) {
            weights.insert(name.clone(), weight(&name, &shape)?.into());
        }
        let mut take = |name: &str| weights.remove(name).expect("the model's own tensor names");
        let embedding = take(names::EMBED).dense()?;
        let layers = (0..config.num_layers).map(|i| Layer::new(&config, i, &mut take));
        let layers = layers.collect::<Result<_>>()?;
        let norm = Norm::new(&config, take(names::NORM).dense()?);
        let head = match config.tied {
            true => embedding.shallow_clone().into(),
            false => take(names::LM_HEAD),
        };
        let frequencies = |theta| Frequencies::new(&config, theta, embedding.device());
        let frequencies_near = config.rope_theta_near.map(frequencies);
        let frequencies = frequencies(config.rope_theta);
        let head = Linear { name: names::LM_HEAD.into(), weight: head, bias: None, lora: None };
        Ok(Self { config, compute, embedding, layers, norm, head, frequencies, frequencies_near })
    }

    /// What the model misses in `batch`: the sum over predicting positions of weight × -ln p, by
    /// `divisor`; a float32 tensor of no dimensions. With a `dropout`, adapters drop what its seed
    /// draws.
    pub fn loss(&self, batch: &Batch, divisor: f64, dropout: Option<u64>) -> Tensor {
        let places = Places::new(self, batch);
        let mut x = self.embed(batch);
        for i in 0..self.layers.len() {
            x = self.layer(i, &x, &places, dropout);
        }
        self.miss(&x, batch, divisor, dropout)
    }

    /// Adds the gradient of [`Self::loss`] to that of the parameters. Returns the loss.
    ///
    /// With `checkpointing`, only what goes into each layer is kept, and its inside computed again
    /// on the way back (Chen et al., 2016): the same gradient, to the bit.
    pub fn backward(
        &self,
        batch: &Batch,
        divisor: f64,
        dropout: Option<u64>,
        checkpointing: bool,
    ) -> Result<Tensor> {
        if !checkpointing {
            let loss = self.loss(batch, divisor, dropout);
            loss.backward();
            return Ok(loss.detach());
        }
        let places = Places::new(self, batch);
        let first = self.embed(batch);
        let mut inputs = vec![first.detach()];
        tch::no_grad(|| {
            for i in 0..self.layers.len() {
                inputs.push(self.layer(i, &inputs[i], &places, dropout));
            }
        });
        let last = inputs.pop().expect("as many as layers and one").set_requires_grad(true);
        let loss = self.miss(&last, batch, divisor, dropout);
        loss.backward();
        let mut gradient = last.grad();
        for (i, input) in inputs.into_iter().enumerate().rev() {
            // What comes before the first layer may be frozen.
            let input = input.set_requires_grad(i > 0 || first.requires_grad());
            let output = self.layer(i, &input, &places, dropout);
            if output.requires_grad() {
                shim::backward(&output, &gradient)?;
            }
            gradient = input.grad();
        }
        if first.requires_grad() {
            shim::backward(&first, &gradient)?;
        }
        Ok(loss.detach())
    }

    /// [B·T, C]: what goes into the first layer.
    fn embed(&self, batch: &Batch) -> Tensor {
        let ids = batch.ids.flatten(0, 1);
        let x = Tensor::embedding(&self.embedding, &ids, -1, false, false);
        if self.config.architecture != Architecture::Gemma3 {
            return x;
        }
        // Rounded as the weights are.
        let scale = Tensor::from((self.config.hidden_size as f64).sqrt());
        &x * scale.to_device(x.device()).to_kind(x.kind())
    }

    /// [B·T, C] → [B·T, C]
    fn layer(&self, i: usize, x: &Tensor, places: &Places, dropout: Option<u64>) -> Tensor {
        if let Some(seed) = dropout {
            // Each layer its own, so that it can be computed again.
            tch::manual_seed(seed.wrapping_add(i as u64) as i64);
        }
        let layer = &self.layers[i];
        let near = places.near.as_ref().filter(|_| layer.window.is_some());
        let rotary = near.unwrap_or(&places.rotary);
        layer.forward(x, &self.config, self.compute, rotary, &places.sight, dropout.is_some())
    }

    /// The loss of what comes out of the last layer.
    fn miss(&self, x: &Tensor, batch: &Batch, divisor: f64, dropout: Option<u64>) -> Tensor {
        let Batch { predicting, targets, weights, .. } = batch;
        let x = self.norm.forward(x, self.compute).index_select(0, predicting); // [N, C]
        if let (Weight::Dense(head), None) = (&self.head.weight, &self.head.lora) {
            let head = head.to_kind(x.kind());
            return fused::cross_entropy(&x, &head, targets, weights, divisor, LOGITS_A_TILE);
        }
        let logits = self.head.forward(&x, dropout.is_some()).to_kind(Kind::Float); // [N, V]
        let miss = logits.cross_entropy_loss::<Tensor>(targets, None, Reduction::None, -100, 0.0);
        miss.dot(weights) / divisor
    }

    /// The weights by their names in a checkpoint, in the order of [`names::expected`].
    pub fn weights(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = BTreeMap::new();
        all.insert(names::EMBED.to_string(), self.embedding.shallow_clone());
        all.insert(names::NORM.to_string(), self.norm.weight.shallow_clone());
        for (i, layer) in self.layers.iter().enumerate() {
            let parts = names::linears(self.config.architecture);
            for (part, linear) in parts.iter().zip(layer.linears()) {
                all.insert(names::layer(i, part), linear.weight.dense()?);
                if let Some(bias) = &linear.bias {
                    all.insert(names::bias(i, part), bias.shallow_clone());
                }
            }
            for (head, norm) in ["q", "k"].iter().zip(layer.head_norms.iter().flatten()) {
                let name = names::layer(i, &format!("self_attn.{head}_norm"));
                all.insert(name, norm.weight.shallow_clone());
            }
            for (name, norm) in names::norms(&self.config).iter().zip(&layer.norms) {
                all.insert(names::layer(i, name), norm.weight.shallow_clone());
            }
        }
        if !self.config.tied {
            all.insert(self.head.name.clone(), self.head.weight.dense()?);
        }
        let order = names::expected(&self.config).into_iter();
        Ok(order.map(|(name, _)| all.remove_entry(&name).expect("the model's own names")).collect())
    }

    /// Every linear layer, in the order of the forward pass, the head last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let layers = self.layers.iter_mut().flat_map(Layer::linears_mut);
        layers.chain(std::iter::once(&mut self.head))
    }
}

struct Layer {
    /// How many positions a query sees at most.
    window: Option<usize>,
    /// As [`names::norms`] names them.
    norms: Vec<Norm>,
    /// Of queries and keys: [D] each.
    head_norms: Option<[Norm; 2]>,
    qkv: Joint<3>,
    o: Linear,
    gate_up: Joint<2>,
    down: Linear,
}

impl Layer {
    fn new(config: &Config, i: usize, take: &mut impl FnMut(&str) -> Weight) -> Result<Self> {
        let mut linear = |part: &str| {
            let name = names::layer(i, part);
            let bias = names::has_bias(config, part).then(|| take(&names::bias(i, part)).dense());
            anyhow::Ok(Linear { weight: take(&name), name, bias: bias.transpose()?, lora: None })
        };
        let (qkv, gate_up) = match config.architecture {
            Architecture::Phi3 => {
                let [q, kv] = [config.num_heads, config.num_kv_heads]
                    .map(|heads| (heads * config.head_dim) as i64);
                let f = config.intermediate_size as i64;
                (
                    Joint::Fused(linear("self_attn.qkv_proj")?, [q, kv, kv]),
                    Joint::Fused(linear("mlp.gate_up_proj")?, [f, f]),
                )
            }
            _ => (
                Joint::Apart([
                    linear("self_attn.q_proj")?,
                    linear("self_attn.k_proj")?,
                    linear("self_attn.v_proj")?,
                ]),
                Joint::Apart([linear("mlp.gate_proj")?, linear("mlp.up_proj")?]),
            ),
        };
        Ok(Self {
            window: config.windows[i],
            qkv,
            o: linear("self_attn.o_proj")?,
            gate_up,
            down: linear("mlp.down_proj")?,
            head_norms: match config.qk_norm {
                true => Some([
                    Norm::new(config, take(&names::layer(i, "self_attn.q_norm")).dense()?),
                    Norm::new(config, take(&names::layer(i, "self_attn.k_norm")).dense()?),
                ]),
                false => None,
            },
            norms: names::norms(config)
                .iter()
                .map(|name| Ok(Norm::new(config, take(&names::layer(i, name)).dense()?)))
                .collect::<Result<_>>()?,
        })
    }

    /// [B·T, C] → [B·T, C]
    fn forward(
        &self,
        x: &Tensor,
        config: &Config,
        compute: Kind,
        rotary: &Rotary,
        sight: &Sight,
        dropout: bool,
    ) -> Tensor {
        let d = config.head_dim as i64;
        let gemma = config.architecture == Architecture::Gemma3;
        // Gemma's norms stand before and after; the others' before only.
        let after = |y: Tensor, norm: usize| match gemma {
            true => self.norms[norm].forward(&y, compute),
            false => y,
        };

        let y = self.norms[0].forward(x, compute);
        let [q, k, v] = self.qkv.forward(&y, dropout);
        let turned = |x: Tensor, norm: Option<&Norm>| {
            let Some(norm) = norm else { return rotary.turn(&x) };
            let heads = norm.forward(&x.reshape([-1, d]), compute);
            rotary.turn(&heads.view_as(&x))
        };
        let [q_norm, k_norm] = match &self.head_norms {
            Some([q, k]) => [Some(q), Some(k)],
            None => [None, None],
        };
        let (q, k, v) = (turned(q, q_norm), turned(k, k_norm), rotary.heads(&v, d));
        // Libtorch's own where it is the same: it need not be the same bits.
        let own = config.query_scale == config.head_dim;
        let scale = (!own).then(|| (config.query_scale as f64).powf(-0.5));
        let y = sight.attend([q, k, v], self.window, scale);
        let x = x + after(self.o.forward(&y, dropout), 1);

        let y = self.norms[if gemma { 2 } else { 1 }].forward(&x, compute);
        let [gate, up] = self.gate_up.forward(&y, dropout);
        let gate = if gemma { gate.gelu("tanh") } else { gate.silu() };
        let y = gate * up;
        x + after(self.down.forward(&y, dropout), 3)
    }

    /// As [`names::linears`] names them.
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let Self { qkv, o, gate_up, down, .. } = self;
        [qkv.matrices(), from_ref(o), gate_up.matrices(), from_ref(down)].into_iter().flatten()
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let Self { qkv, o, gate_up, down, .. } = self;
        [qkv.matrices_mut(), from_mut(o), gate_up.matrices_mut(), from_mut(down)]
            .into_iter()
            .flatten()
    }
}

/// Layers of one input: a matrix each, or one that holds the rows of all, so many of each.
enum Joint<const PARTS: usize> {
    Apart([Linear; PARTS]),
    Fused(Linear, [i64; PARTS]),
}

impl<const PARTS: usize> Joint<PARTS> {
    /// [N, in] → [N, out] each.
    fn forward(&self, x: &Tensor, dropout: bool) -> [Tensor; PARTS] {
        match self {
            Joint::Apart(all) => all.each_ref().map(|linear| linear.forward(x, dropout)),
            Joint::Fused(linear, widths) => {
                let parts = linear.forward(x, dropout).split_with_sizes(widths, 1);
                parts.try_into().expect("a part for each width")
            }
        }
    }

    fn matrices(&self) -> &[Linear] {
        match self {
            Joint::Apart(all) => all,
            Joint::Fused(one, _) => from_ref(one),
        }
    }

    fn matrices_mut(&mut self) -> &mut [Linear] {
        match self {
            Joint::Apart(all) => all,
            Joint::Fused(one, _) => from_mut(one),
        }
    }
}

/// What the layers share of a batch: where its tokens stand, and which see each other.
struct Places {
    rotary: Rotary,
    /// Of layers with a window, where theirs is another one.
    near: Option<Rotary>,
    sight: Sight,
}

impl Places {
    fn new(model: &Decoder, batch: &Batch) -> Self {
        Self {
            rotary: model.frequencies.of(batch, model.compute),
            near: model.frequencies_near.as_ref().map(|near| near.of(batch, model.compute)),
            sight: Sight::new(&model.config.windows, batch),
        }
    }
}

/// Which keys a query may see: those before it in its own row, of a layer with a window the
/// nearest.
struct Sight {
    /// Of packed rows.
    runs: Option<Vec<Run>>,
    /// [t, t], bool, by a window and the length t of rows that are longer.
    near: BTreeMap<(usize, i64), Tensor>,
}

impl Sight {
    fn new(windows: &[Option<usize>], batch: &Batch) -> Self {
        let runs = batch.packed.as_ref().map(|packed| packed.runs.clone());
        let lengths = match &runs {
            Some(runs) => runs.iter().map(|run| run.length).collect(),
            None => vec![batch.ids.size()[1]],
        };
        let mut near = BTreeMap::new();
        for window in windows.iter().flatten().copied() {
            for length in lengths.iter().copied().filter(|length| (window as i64) < *length) {
                near.entry((window, length)).or_insert_with(|| {
                    let ones = Tensor::ones([length, length], (Kind::Bool, batch.ids.device()));
                    ones.tril(0).logical_and(&ones.triu(1 - window as i64))
                });
            }
        }
        Self { runs, near }
    }

    /// [B, n, T, D], with H heads of queries → [B·T, H·D]
    ///
    /// Packed rows attend alone, those of one length in one call: a mask over all of them would take
    /// T² of time and of memory. On CUDA, rows of many lengths are as many launches; its kernel for
    /// rows of any length is not used.
    fn attend(&self, qkv: [Tensor; 3], window: Option<usize>, scale: Option<f64>) -> Tensor {
        let Some(runs) = &self.runs else { return self.rows(&qkv, window, scale) };
        let sizes: Vec<i64> = runs.iter().map(|run| run.rows * run.length).collect();
        // [n, rows·length, D] each. Not by `narrow`, whose gradient is as long as all of them.
        let parts = qkv.map(|x| x.squeeze_dim(0).split_with_sizes(&sizes, 1));
        let rows = runs.iter().enumerate().map(|(i, run)| {
            let under_one_another =
                |x: &Vec<Tensor>| x[i].unflatten(1, [run.rows, run.length]).transpose(0, 1);
            self.rows(&parts.each_ref().map(under_one_another), window, scale)
        });
        Tensor::cat(&rows.collect::<Vec<_>>(), 0)
    }

    /// The same of rows under one another.
    fn rows(&self, [q, k, v]: &[Tensor; 3], window: Option<usize>, scale: Option<f64>) -> Tensor {
        let (heads, length, size) = (q.size()[1], q.size()[2], q.size()[3]);
        let near = window.and_then(|window| self.near.get(&(window, length)));
        let (causal, grouped) = (near.is_none(), heads != k.size()[1]);
        let y = Tensor::scaled_dot_product_attention(q, k, v, near, 0.0, causal, scale, grouped);
        y.transpose(1, 2).reshape([-1, heads * size])
    }
}

/// w · x̂ with x̂ = x / √(mean x² + eps), over the last dimension.
struct Norm {
    weight: Tensor,
    eps: f64,
    /// Gemma's weights count from 0: (1 + w) · x̂, rounded after the product and not before it.
    shifted: bool,
}

impl Norm {
    fn new(config: &Config, weight: Tensor) -> Self {
        let shifted = config.architecture == Architecture::Gemma3;
        Self { weight, eps: config.rms_norm_eps, shifted }
    }

    /// In the compute kind.
    fn forward(&self, x: &Tensor, compute: Kind) -> Tensor {
        let shifted = self.shifted.then(|| self.weight.to_kind(Kind::Float) + 1.0);
        if fused::takes(x) && compute == Kind::Float {
            return fused::rms_norm(x, shifted.as_ref().unwrap_or(&self.weight), self.eps);
        }
        let x = x.to_kind(Kind::Float);
        let variance = x.square().mean_dim(-1, true, Kind::Float);
        let x = x * (variance + self.eps).rsqrt();
        match shifted {
            Some(weight) => (x * weight).to_kind(compute),
            None => self.weight.to_kind(compute) * x.to_kind(compute),
        }
    }
}

/// How fast the pairs of a head turn from one position to the next.
struct Frequencies {
    /// [R/2]
    every: Tensor,
    /// LongRope's, of rows that are no longer than so many positions.
    short: Option<(Tensor, i64)>,
    /// What cosines and sines are multiplied by.
    factor: f64,
    /// D
    head_dim: i64,
}

impl Frequencies {
    fn new(config: &Config, theta: f64, device: Device) -> Self {
        let rotary = config.rotary(theta);
        let tensor = |all: &[f32]| Tensor::from_slice(all).to_device(device);
        Self {
            every: tensor(&rotary.frequencies),
            short: rotary.short.map(|(short, most)| (tensor(&short), most as i64)),
            factor: f64::from(rotary.factor),
            head_dim: config.head_dim as i64,
        }
    }

    /// Of the positions of a batch.
    ///
    /// LongRope's factors are chosen by the length of each row, as transformers does with a row
    /// alone, whatever other rows stand beside it.
    fn of(&self, batch: &Batch, kind: Kind) -> Rotary {
        let (rows, length) = (batch.ids.size()[0], batch.ids.size()[1]);
        let positions = match &batch.packed {
            Some(packed) => packed.positions.to_kind(Kind::Float),
            None => Tensor::arange(length, (Kind::Float, batch.ids.device())),
        };
        let mut angles = positions.outer(&self.every);
        if let Some((short, most)) = &self.short {
            let [long, short] = [angles, positions.outer(short)].map(|all| all.repeat([rows, 1]));
            let is_long = batch.lengths.gt(*most).view([-1, 1]);
            angles = long.where_self(&is_long, &short);
        }
        let angles = Tensor::cat(&[&angles, &angles], -1);
        let table = |table: Tensor| match self.factor {
            1.0 => table.to_kind(kind),
            factor => (table * factor).to_kind(kind),
        };
        let (cos, sin) = (table(angles.cos()), table(angles.sin()));
        Rotary { cos, sin, head_dim: self.head_dim, length }
    }
}

/// Rotary positions (Su et al., 2021): the two halves of what turns of a head turn against each
/// other.
struct Rotary {
    /// [T, R], or [B·T, R] where rows of one batch turn by different angles.
    cos: Tensor,
    sin: Tensor,
    /// D
    head_dim: i64,
    /// T
    length: i64,
}

impl Rotary {
    /// [B·T, n·size] → [B, n, T, size]
    fn heads(&self, x: &Tensor, size: i64) -> Tensor {
        x.view([-1, self.length, x.size()[1] / size, size]).transpose(1, 2)
    }

    /// [B·T, n·D] → [B, n, T, D], turned by its position.
    fn turn(&self, x: &Tensor) -> Tensor {
        let (d, r) = (self.head_dim, self.cos.size()[1]);
        if r == d {
            return self.turn_whole(x);
        }
        let heads = x.view([x.size()[0], -1, d]);
        let [turning, rest] = [(0, r), (r, d - r)]
            .map(|(from, size)| heads.narrow(2, from, size).reshape([x.size()[0], -1]));
        Tensor::cat(&[self.turn_whole(&turning), self.heads(&rest, d - r)], 3)
    }

    /// [B·T, n·R] → [B, n, T, R]
    fn turn_whole(&self, x: &Tensor) -> Tensor {
        let r = self.cos.size()[1];
        if fused::takes(x) {
            return self.heads(&fused::rotate(x, &self.cos, &self.sin), r);
        }
        let x = self.heads(x, r);
        let half = r / 2;
        let turned = Tensor::cat(&[-x.narrow(3, half, half), x.narrow(3, 0, half)], 3);
        let [cos, sin] = [&self.cos, &self.sin].map(|table| table.view([-1, 1, self.length, r]));
        x * cos + turned * sin
    }
}

#[cfg(test)]
mod tests;
