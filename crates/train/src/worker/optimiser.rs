//! AdamW over everything that is trained, and the learning rate over time.
//!
//! Knows nothing of models or data.

use anyhow::Result;
use tch::{Kind, Tensor};
use train::training::{Schedule, Training};

use crate::shim::{self, Moments};

/// A tensor that is trained: a float32 leaf that requires its gradient.
pub struct Trainable {
    /// As in the artifact.
    pub name: String,
    pub tensor: Tensor,
    /// Whether weight decay acts on it.
    pub decays: bool,
}

pub struct Optimiser {
    pub names: Vec<String>,
    /// Those that decay first: they are the first `decaying`.
    pub params: Vec<Tensor>,
    pub first: Vec<Tensor>,
    pub second: Vec<Tensor>,
    steps: Vec<Tensor>,
    decaying: usize,
    betas: [f64; 2],
    weight_decay: f64,
    max_grad_norm: f64,
}

const EPS: f64 = 1e-8;

impl Optimiser {
    pub fn new(mut trainables: Vec<Trainable>, training: &Training) -> Self {
        trainables.sort_by_key(|t| !t.decays); // stable
        let decaying = trainables.iter().filter(|t| t.decays).count();
        let (names, params): (Vec<_>, Vec<_>) =
            trainables.into_iter().map(|t| (t.name, t.tensor)).unzip();
        let zeros = || params.iter().map(|p| p.detach().zeros_like()).collect();
        let count = |p: &Tensor| Tensor::zeros([0_i64; 0], (Kind::Float, p.device()));
        Self {
            first: zeros(),
            second: zeros(),
            steps: params.iter().map(count).collect(),
            names,
            params,
            decaying,
            betas: training.betas,
            weight_decay: training.weight_decay,
            max_grad_norm: training.max_grad_norm,
        }
    }

    /// Tells how many updates the moments have seen, when they come from a checkpoint.
    pub fn set_steps(&mut self, steps: usize) {
        for count in &mut self.steps {
            let _ = count.fill_(steps as f64);
        }
    }

    /// Clips the gradients and applies them. Returns their 2-norm before clipping, a tensor of no
    /// dimensions, which nobody has waited for.
    pub fn step(&mut self, rate: f64) -> Result<Tensor> {
        let (norm, divisor) = shim::gradient_norm(&self.params, self.max_grad_norm)?;
        let all = self.params.len();
        for (range, decay) in [(0..self.decaying, self.weight_decay), (self.decaying..all, 0.0)] {
            let state = Moments {
                params: &self.params[range.clone()],
                first: &self.first[range.clone()],
                second: &self.second[range.clone()],
                steps: &self.steps[range],
            };
            shim::adamw(state, &divisor, rate, self.betas, EPS, decay)?;
        }
        Ok(norm)
    }
}

/// The learning rate of optimiser step `step` (from 0) of `steps`.
pub fn rate(training: &Training, step: usize, steps: usize) -> f64 {
    let warmup = warmup_steps(training, steps);
    if step < warmup {
        return training.learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (steps - warmup) as f64;
    training.learning_rate
        * match training.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
}

/// Never more than half of a run: a short one would end before its peak.
pub fn warmup_steps(training: &Training, steps: usize) -> usize {
    let asked = match training.warmup {
        share if share < 1.0 => (share * steps as f64).round() as usize,
        count => count as usize,
    };
    asked.min(steps / 2)
}
