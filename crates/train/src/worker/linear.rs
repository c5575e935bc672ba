//! A linear layer: dense or in NF4, with or without a bias, with or without an adapter.
//!
//! Knows nothing of the model around it.

use anyhow::Result;
use checkpoint::names;
use tch::{Kind, Tensor};

use crate::blockwise::Nf4;
use crate::fused;

pub struct Linear {
    /// In a checkpoint: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// [out, in]
    pub weight: Weight,
    /// [out]
    pub bias: Option<Tensor>,
    pub lora: Option<Lora>,
}

/// What a matrix is held in.
pub enum Weight {
    Dense(Tensor),
    /// For QLoRA: frozen.
    Nf4(Nf4),
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

impl From<Tensor> for Weight {
    fn from(weight: Tensor) -> Self {
        Self::Dense(weight)
    }
}

impl Weight {
    /// [out, in]
    pub fn size(&self) -> [i64; 2] {
        match self {
            Self::Dense(weight) => [weight.size()[0], weight.size()[1]],
            Self::Nf4(nf4) => [nf4.rows, nf4.columns],
        }
    }

    /// The matrix itself; NF4 in float32.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.shallow_clone()),
            Self::Nf4(nf4) => nf4.dequantise(Kind::Float),
        }
    }
}

impl Linear {
    /// `q_proj`, `lm_head`: what PEFT calls it as a target.
    pub fn module(&self) -> &str {
        names::module(self.name.trim_end_matches(".weight"))
    }

    /// [N, in] → [N, out], in the kind of `x`. `dropout` is on while training.
    pub fn forward(&self, x: &Tensor, dropout: bool) -> Tensor {
        match (&self.weight, &self.lora) {
            // It may be trained itself.
            (Weight::Dense(weight), None) => {
                let bias = self.bias.as_ref().map(|bias| bias.to_kind(x.kind()));
                x.linear(&weight.to_kind(x.kind()), bias.as_ref())
            }
            (weight, lora) => {
                let dropout = lora.as_ref().filter(|_| dropout).map_or(0.0, |lora| lora.dropout);
                fused::frozen_linear(x, weight, self.bias.as_ref(), lora.as_ref(), dropout)
            }
        }
    }
}
