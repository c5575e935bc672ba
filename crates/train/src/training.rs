//! The keys that every training step has: what they mean, and what makes no sense.
//!
//! Knows nothing of libtorch, of architectures, or of what is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use step::ParamError;

/// Declares the parameters of a training step: its own keys, then those that all of them share.
///
/// A macro rather than a nested table, because a recipe writes `learning_rate` beside `rank`, and
/// rather than `serde(flatten)`, because that gives up `deny_unknown_fields`. No key has a serde
/// default: a step's `fill` lays what the recipe says over a table of defaults.
macro_rules! training_step {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[derive(schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// The peak of the schedule.
            pub learning_rate: f64,
            pub schedule: $crate::training::Schedule,
            /// Below 1 a share of all optimiser steps, else their number.
            pub warmup: f64,
            /// Of matrices; embeddings and norms do not decay.
            pub weight_decay: f64,
            pub optimiser: $crate::training::Algorithm,
            /// AdamW's decay of the two moments.
            pub betas: [f64; 2],
            /// How often each row is seen; 2.25 means a quarter of the rows a third time.
            pub epochs: f64,
            /// Tokens of a micro-batch, padding included. A longer row makes a batch of its own.
            pub batch_tokens: usize,
            /// Micro-batches an optimiser step.
            pub gradient_accumulation: usize,
            /// Keeps of each layer only what goes into it, and computes the rest again on the way
            /// back: a quarter more time, a fraction of the memory, the same result.
            pub gradient_checkpointing: bool,
            /// The gradient's 2-norm is scaled down to this; 0: never.
            pub max_grad_norm: f64,
            /// Weight in the loss of a token that the dataset does not mark as supervised.
            pub prompt_weight: f64,
            pub packing: $crate::training::Packing,
            pub order: $crate::training::Order,
            pub compute: $crate::training::Compute,
            pub device: $crate::training::Device,
            pub seed: u64,
            /// Optimiser steps between two measurements of the validation loss; 0: ten a run.
            pub eval_every: u64,
            /// Which weights become the artifact.
            pub keep: $crate::training::Keep,
            /// Optimiser steps between two checkpoints; 0: by the clock.
            pub checkpoint_every: u64,
        }

        impl $name {
            /// The shared keys.
            pub fn training(&self) -> $crate::training::Training {
                $crate::training::Training {
                    learning_rate: self.learning_rate,
                    schedule: self.schedule,
                    warmup: self.warmup,
                    weight_decay: self.weight_decay,
                    optimiser: self.optimiser,
                    betas: self.betas,
                    epochs: self.epochs,
                    batch_tokens: self.batch_tokens,
                    gradient_accumulation: self.gradient_accumulation,
                    gradient_checkpointing: self.gradient_checkpointing,
                    max_grad_norm: self.max_grad_norm,
                    prompt_weight: self.prompt_weight,
                    packing: self.packing,
                    order: self.order.clone(),
                    compute: self.compute,
                    device: self.device,
                    seed: self.seed,
                    eval_every: self.eval_every,
                    keep: self.keep,
                    checkpoint_every: self.checkpoint_every,
                }
            }
        }
    };
}
pub(crate) use training_step;

/// The shared keys, as the trainer takes them. [`training_step`] says what each one means.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup: f64,
    pub weight_decay: f64,
    pub optimiser: Algorithm,
    pub betas: [f64; 2],
    pub epochs: f64,
    pub batch_tokens: usize,
    pub gradient_accumulation: usize,
    pub gradient_checkpointing: bool,
    pub max_grad_norm: f64,
    pub prompt_weight: f64,
    pub packing: Packing,
    pub order: Order,
    pub compute: Compute,
    pub device: Device,
    pub seed: u64,
    pub eval_every: u64,
    pub keep: Keep,
    pub checkpoint_every: u64,
}

/// What turns gradients into updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Two moments, 8 bytes a parameter (Loshchilov & Hutter, 2019).
    Adamw,
    /// The same with moments in 8 bits, 2 bytes a parameter (Dettmers et al., 2022).
    #[serde(rename = "adamw-8bit")]
    Adamw8bit,
    /// The second moment of rows and columns only, next to nothing (Shazeer & Stern, 2018).
    Adafactor,
}

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine, down to 0.
    Cosine,
    /// A straight line, down to 0.
    Linear,
    Constant,
}

/// How rows share a batch. No row ever attends to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// As `never`, unless padding would be more than a fifth of all positions.
    Auto,
    /// Rows end to end in one sequence.
    Always,
    /// Rows of like length under one another, padded to the longest.
    Never,
}

/// Which rows the first epoch begins with (Bengio et al., 2009). It goes through sixteen or more
/// windows of rows, the easiest first, in each of which batches come by chance; so do all rows of
/// later epochs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Any.
    Random,
    /// Short ones.
    Length,
    /// Those of common tokens: by the mean of their tokens' inverse document frequency, a row of
    /// the training split being a document.
    Tfidf,
    /// Those of a low number in this column, which the dataset's `columns` keep.
    Column(String),
}

/// Which weights become the artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Those after the last step.
    Last,
    /// Those of the lowest validation loss, the earlier of two that are equal.
    Best,
}

/// What activations and products are held in. What is trained is always held in float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Compute {
    /// bfloat16 on a GPU, float32 on a processor.
    Auto,
    Float32,
    Bfloat16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// CUDA when there is one.
    Auto,
    Cpu,
    Cuda,
}

impl Training {
    pub fn validate(&self) -> Result<(), ParamError> {
        let range = |key: &str, ok: bool, range: &str| match ok {
            true => Ok(()),
            false => Err(ParamError::at(key, "out of range").hint(format!("`{key}` {range}"))),
        };
        range("learning_rate", self.learning_rate > 0.0, "must be above 0")?;
        range("warmup", self.warmup >= 0.0, "must not be negative")?;
        range("weight_decay", self.weight_decay >= 0.0, "must not be negative")?;
        let below_one = self.betas.iter().all(|b| (0.0..1.0).contains(b));
        range("betas", below_one, "must both lie in 0 ≤ β < 1")?;
        range("epochs", self.epochs > 0.0, "must be above 0")?;
        range("batch_tokens", self.batch_tokens > 0, "must be above 0")?;
        range("gradient_accumulation", self.gradient_accumulation > 0, "must be above 0")?;
        range("max_grad_norm", self.max_grad_norm >= 0.0, "must not be negative; 0 turns it off")?;
        range("prompt_weight", (0.0..=1.0).contains(&self.prompt_weight), "must lie in 0 to 1")
    }
}

/// A step's own defaults over those that all training steps share.
pub(crate) fn with_shared(own: Value) -> Value {
    let shared = json!({
        "schedule": "cosine",
        "optimiser": "adamw",
        "gradient_checkpointing": false,
        "max_grad_norm": 1.0,
        "prompt_weight": 0.0,
        "packing": "auto",
        "order": "random",
        "compute": "auto",
        "device": "auto",
        "seed": 0,
        "eval_every": 0,
        "keep": "last",
        "checkpoint_every": 0,
    });
    match own {
        Value::Object(own) => Value::Object(over(own, shared)),
        _ => shared,
    }
}

/// What the recipe says over a step's defaults: whatever is written wins.
pub(crate) fn over(params: Map<String, Value>, defaults: Value) -> Map<String, Value> {
    let Value::Object(mut all) = defaults else { return params };
    all.extend(params);
    all
}
