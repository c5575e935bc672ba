//! How much training computes: the floating-point operations of its products, from the model's own
//! numbers and its dataset's.
//!
//! What is small beside them (norms, activations, the optimiser) is not counted, nor is the
//! measuring of the validation loss. Time is in proportion, on one machine and for like models.

use checkpoint::config::Config;
use checkpoint::names;
use serde::Deserialize;
use step::{Known, Needs};

use crate::training::Training;
use crate::{Lora, memory};

/// The rows to train on, as dataset.json tells of them.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    pub rows: u64,
    pub tokens: u64,
    pub supervised: u64,
}

/// Of the dataset that an input names, where it has been made.
fn split(inputs: &Known) -> Option<Split> {
    let dataset = inputs.get("dataset")?.first()?.facts.dataset.as_ref()?;
    Split::deserialize(&dataset["splits"]["train"]).ok()
}

/// What training everything takes of the machine.
pub(crate) fn needs_of_all(config: Option<&Config>, training: &Training, inputs: &Known) -> Needs {
    let tflop = config.zip(split(inputs)).map(|(config, split)| of_all(config, training, split));
    Needs { tflop, ..memory::needs_of_all(config, training) }
}

/// What training an adapter takes of the machine.
pub(crate) fn needs_of_lora(config: Option<&Config>, lora: &Lora, inputs: &Known) -> Needs {
    let tflop = config.zip(split(inputs)).map(|(config, split)| of_lora(config, lora, split));
    Needs { tflop, ..memory::needs_of_lora(config, lora) }
}

/// 10¹² operations of training everything.
pub fn of_all(config: &Config, training: &Training, split: Split) -> f64 {
    tflop(config, training, split, 3.0, 0.0)
}

/// 10¹² operations of training an adapter: there is no gradient of frozen weights.
pub fn of_lora(config: &Config, lora: &Lora, split: Split) -> f64 {
    tflop(config, &lora.training(), split, 2.0, lora.parameters(config) as f64)
}

/// A product takes two operations for each number of a matrix and each token. The model's matrices
/// have `products` of them: with the input, for the input's gradient, for their own.
fn tflop(config: &Config, training: &Training, split: Split, products: f64, adapter: f64) -> f64 {
    let Split { rows, tokens, supervised } = split;
    let again = if training.gradient_checkpointing { 1.0 } else { 0.0 };
    let linears = names::linears(config.architecture).iter();
    let shapes = linears.filter_map(|part| names::linear_shape(config, part));
    let layers =
        config.num_layers * shapes.map(|shape| shape.iter().product::<usize>()).sum::<usize>();
    let head = (config.vocab_size * config.hidden_size) as f64;
    // Scores and what they weigh, of half the positions before a token on average; twice that on
    // the way back.
    let before = tokens as f64 / rows.max(1) as f64 / 2.0;
    let attention = (2 * config.num_layers * config.num_heads * config.head_dim) as f64 * before;
    let predicting = if training.prompt_weight > 0.0 { tokens } else { supervised } as f64;
    let each = layers as f64 * (products + again) + (adapter + attention) * (3.0 + again);
    2e-12 * training.epochs * (tokens as f64 * each + predicting * head * products)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::{Step, StepDef};

    use super::*;
    use crate::{Full, Pretrain};

    /// Six operations for each parameter and token (Kaplan et al., 2020), four where it is frozen.
    #[test]
    fn it_is_six_operations_a_parameter_and_token_and_four_of_a_frozen_one() {
        let params = json!({
            "hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 2048,
            "tied": true, "epochs": 2,
        });
        let pretrain = resolved::<Pretrain>(params);
        let config = pretrain.config(4096).unwrap();
        let split = Split { rows: 100, tokens: 1000, supervised: 1000 };
        let per = |tflop: f64| tflop / config.parameters() as f64 / (2.0 * 1000.0) * 1e12;
        let ratio = per(of_all(&config, &pretrain.training(), split)) / 6.0;
        assert!((0.99..1.01).contains(&ratio), "{ratio}");

        let lora = resolved::<Lora>(json!({"rank": 1, "epochs": 2}));
        let ratio = per(of_lora(&config, &lora, split)) / 4.0;
        assert!((0.99..1.01).contains(&ratio), "{ratio}");

        let again = resolved::<Full>(json!({"gradient_checkpointing": true, "epochs": 2}));
        let none = Split { supervised: 0, ..split };
        let ratio =
            of_all(&config, &again.training(), none) / of_all(&config, &pretrain.training(), none);
        assert!((ratio - 8.0 / 6.0).abs() < 1e-6, "{ratio}");
    }

    fn resolved<S: Step>(params: Value) -> S {
        let Value::Object(params) = params else { unreachable!("tests pass objects") };
        S::deserialize((StepDef::of::<S>().resolve)(params).unwrap()).unwrap()
    }
}
