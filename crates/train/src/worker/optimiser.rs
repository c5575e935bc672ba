//! What is trained, what its optimiser remembers of it, and the learning rate over time.
//!
//! Knows nothing of models or data.

use anyhow::Result;
use tch::{Kind, Tensor};
use train::training::{Algorithm, Schedule, Training};

use crate::blockwise;
use crate::update::{self, Moments, Squares, Update};

/// A tensor that is trained: a float32 leaf that requires its gradient.
pub struct Trainable {
    /// As in the artifact.
    pub name: String,
    pub tensor: Tensor,
    /// Whether weight decay acts on it.
    pub decays: bool,
}

pub struct Optimiser {
    /// Those that decay first.
    all: Vec<(Trainable, State)>,
    /// Updates so far.
    done: usize,
    betas: [f64; 2],
    weight_decay: f64,
    max_grad_norm: f64,
}

/// What is remembered of one parameter.
enum State {
    AdamW { first: Tensor, second: Tensor, step: Tensor },
    AdamW8bit(blockwise::Moments),
    Adafactor(Squares),
}

const EPS: f64 = 1e-8;

/// Smaller parameters keep their moments in float32, as with bitsandbytes.
const SMALLEST_IN_8_BITS: usize = 4096;

impl State {
    fn new(algorithm: Algorithm, param: &Tensor) -> Self {
        match algorithm {
            Algorithm::Adafactor => Self::Adafactor(Squares::new(param)),
            Algorithm::Adamw8bit if param.numel() >= SMALLEST_IN_8_BITS => {
                Self::AdamW8bit(blockwise::Moments::new(param))
            }
            Algorithm::Adamw | Algorithm::Adamw8bit => Self::AdamW {
                first: param.detach().zeros_like(),
                second: param.detach().zeros_like(),
                step: Tensor::zeros([0_i64; 0], (Kind::Float, param.device())),
            },
        }
    }

    /// What a checkpoint keeps.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::AdamW { first, second, .. } => vec![("first", first), ("second", second)],
            Self::AdamW8bit(state) => vec![
                ("first", &state.first),
                ("first_scales", &state.first_scales),
                ("second", &state.second),
                ("second_scales", &state.second_scales),
            ],
            Self::Adafactor(Squares::Each(second)) => vec![("second", second)],
            Self::Adafactor(Squares::Factored { rows, columns }) => {
                vec![("rows", rows), ("columns", columns)]
            }
        }
    }
}

impl Optimiser {
    pub fn new(mut trainables: Vec<Trainable>, training: &Training) -> Self {
        trainables.sort_by_key(|t| !t.decays); // stable
        let state = |trainable: Trainable| {
            let state = State::new(training.optimiser, &trainable.tensor);
            (trainable, state)
        };
        Self {
            all: trainables.into_iter().map(state).collect(),
            done: 0,
            betas: training.betas,
            weight_decay: training.weight_decay,
            max_grad_norm: training.max_grad_norm,
        }
    }

    /// Every parameter and what is remembered of it, by names of their own.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.all.iter().flat_map(|(trainable, state)| {
            let param = std::iter::once(("param", &trainable.tensor));
            let all = param.chain(state.tensors());
            all.map(|(part, tensor)| (format!("{part}/{}", trainable.name), tensor))
        })
    }

    /// Tells how many updates its tensors have seen, when they come from a checkpoint.
    pub fn set_steps(&mut self, steps: usize) {
        self.done = steps;
        for (_, state) in &mut self.all {
            if let State::AdamW { step, .. } = state {
                let _ = step.fill_(steps as f64);
            }
        }
    }

    /// Clips the gradients and applies them. Returns their 2-norm before clipping, a tensor of no
    /// dimensions, which nobody has waited for.
    pub fn step(&mut self, rate: f64) -> Result<Tensor> {
        let params: Vec<&Tensor> = self.all.iter().map(|(param, _)| &param.tensor).collect();
        let (norm, divisor) = update::gradient_norm(&params, self.max_grad_norm)?;
        self.done += 1;
        for decays in [true, false] {
            let update = Update {
                divisor: &divisor,
                step: self.done,
                rate,
                betas: self.betas,
                eps: EPS,
                weight_decay: if decays { self.weight_decay } else { 0.0 },
            };
            let mut together = Moments::default();
            for (param, state) in self.all.iter().filter(|(param, _)| param.decays == decays) {
                match state {
                    State::AdamW { first, second, step } => {
                        together.params.push(&param.tensor);
                        together.first.push(first);
                        together.second.push(second);
                        together.steps.push(step);
                    }
                    State::AdamW8bit(state) => update.adamw_8bit(&param.tensor, state)?,
                    State::Adafactor(state) => update.adafactor(&param.tensor, state)?,
                }
            }
            update.adamw(&together)?;
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde::Deserialize;
    use serde_json::{Value, json};
    use step::StepDef;
    use tch::Device;

    use super::*;
    use crate::tensor::golden;

    const STEPS: i64 = 4;

    fn training(optimiser: &str) -> Training {
        let params = json!({
            "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.0, "betas": [0.9, 0.99],
            "optimiser": optimiser,
        });
        let Value::Object(params) = params else { unreachable!("an object") };
        let params = (StepDef::of::<train::Lora>().resolve)(params).unwrap();
        train::Lora::deserialize(&params).unwrap().training()
    }

    /// The matrix and the vector as they start, on the optimiser's way.
    fn start(golden: &HashMap<String, Tensor>, optimiser: &str) -> (Vec<Tensor>, Optimiser) {
        let leaf = |name| golden[&format!("start.{name}")].copy().set_requires_grad(true);
        let params = ["matrix", "vector"].map(leaf);
        let trainables = params.iter().zip(["matrix", "vector"]).map(|(tensor, name)| Trainable {
            name: name.into(),
            tensor: tensor.shallow_clone(),
            decays: true,
        });
        let optimiser = Optimiser::new(trainables.collect(), &training(optimiser));
        (params.into(), optimiser)
    }

    fn go(
        golden: &HashMap<String, Tensor>,
        params: &[Tensor],
        optimiser: &mut Optimiser,
        step: i64,
    ) {
        for (param, name) in params.iter().zip(["matrix", "vector"]) {
            (param * golden[&format!("gradients.{name}")].get(step)).sum(Kind::Float).backward();
        }
        let _ = optimiser.step(1e-2).unwrap();
    }

    #[test]
    fn updates_are_those_of_transformers_and_bitsandbytes() {
        let golden = golden("optimisers");
        // A moment between two codes may fall to the other side for its last bit.
        for (name, allowed) in [("adafactor", 0), ("adamw-8bit", 3)] {
            let (params, mut optimiser) = start(&golden, name);
            (0..STEPS).for_each(|step| go(&golden, &params, &mut optimiser, step));
            for (param, part) in params.iter().zip(["matrix", "vector"]) {
                // Vectors of so few numbers keep their moments in float32.
                let Some(theirs) = golden.get(&format!("{name}.{part}")) else { continue };
                let differ = (param - theirs).abs().gt(2e-6).sum(Kind::Int64).int64_value(&[]);
                assert!(differ <= allowed, "{name}: {part}: {differ} of {}", param.numel());
            }
            for (part, ours) in optimiser.tensors() {
                let part = part.trim_end_matches("/matrix");
                let Some(theirs) = golden.get(&format!("{name}.{part}")) else { continue };
                let differ = ours.ne_tensor(theirs).sum(Kind::Int64).int64_value(&[]);
                assert!(differ <= allowed, "{name}: {part}: {differ} of {}", ours.numel());
            }
        }
    }

    #[test]
    fn an_optimiser_goes_on_where_a_checkpoint_was_written() {
        let golden = golden("optimisers");
        for name in ["adamw", "adamw-8bit", "adafactor"] {
            let (params, mut whole) = start(&golden, name);
            (0..STEPS).for_each(|step| go(&golden, &params, &mut whole, step));

            let dir = tempfile::tempdir().unwrap();
            let checkpoint = crate::resume::Checkpoint::of(dir.path(), "run".into());
            let (halves, mut first) = start(&golden, name);
            (0..STEPS / 2).for_each(|step| go(&golden, &halves, &mut first, step));
            checkpoint.save(2, &first).unwrap();
            let (again, mut second) = start(&golden, name);
            assert_eq!(checkpoint.load(&mut second).unwrap(), Some(2));
            (STEPS / 2..STEPS).for_each(|step| go(&golden, &again, &mut second, step));
            for (whole, again) in params.iter().zip(&again) {
                assert!(whole.device() == Device::Cpu && whole.equal(again), "{name}");
            }
        }
    }
}
