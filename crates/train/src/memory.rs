//! What training takes at its peak, from the model's own numbers.
//!
//! Counted, not measured: weights, gradients, AdamW's two moments, and what the forward pass of
//! `worker/decoder.rs` keeps for the backward pass. The tests hold it to what runs were seen to take.

use checkpoint::config::Config;
use checkpoint::names;
use step::Memory;

use crate::Lora;
use crate::training::{Compute, Training};

/// libtorch itself and a worker's own pages.
const LIBRARY: u64 = 156_000_000;
/// CUDA's context and the work space of its products.
const CONTEXT: u64 = 700_000_000;
/// A gradient and two moments, in float32.
const TRAINED: u64 = 12;

/// Everything is trained, and held in float32.
pub fn pretrain(config: &Config, training: &Training) -> Memory {
    let parameters = config.parameters() as u64;
    memory(training, |width| {
        // Products in 16 bits keep a copy of each weight for the backward pass.
        let copies = if width < 4 { width * parameters } else { 0 };
        (4 + TRAINED) * parameters + copies + activations(config, training, width)
    })
}

/// The base is held in what is computed in, the adapter in float32.
pub fn lora(config: &Config, lora: &Lora) -> Memory {
    // A target that the base does not have is refused elsewhere.
    let targets = lora.targets(config.architecture).unwrap_or_default();
    let adapted = targets.into_iter().map(|target| {
        let mut parts = names::linears(config.architecture).iter();
        let part = parts.find(|part| names::module(part) == target);
        match part.and_then(|part| names::linear_shape(config, part)) {
            Some([rows, columns]) => config.num_layers * (rows + columns),
            // The head.
            None => config.vocab_size + config.hidden_size,
        }
    });
    let adapter = (lora.rank * adapted.sum::<usize>()) as u64;
    let training = lora.training();
    memory(&training, |width| {
        width * config.parameters() as u64
            + (4 + TRAINED) * adapter
            + activations(config, &training, width)
    })
}

fn memory(training: &Training, bytes: impl Fn(u64) -> u64) -> Memory {
    let width = |auto| match training.compute {
        Compute::Auto => auto,
        Compute::Float32 => 4,
        Compute::Bfloat16 => 2,
    };
    Memory { on_processor: LIBRARY + bytes(width(4)), on_accelerator: CONTEXT + bytes(width(2)) }
}

/// Bytes of one micro-batch, of so many bytes a number.
fn activations(config: &Config, training: &Training, width: u64) -> u64 {
    let hidden = config.hidden_size;
    let (queries, keys) =
        (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    // The residual stream and its norm twice; q, k, v, what attention gives and its copy in the
    // order of rows; gate, its SiLU, up, and their product.
    let layer = 4 * hidden + 3 * queries + 2 * keys + 4 * config.intermediate_size;
    // Values that are part of one matrix's product keep all of it.
    let fused = names::holder(config.architecture, "v_proj") != "v_proj";
    let layer = layer + if fused { queries + keys } else { 0 };
    // Norms in 16 bits keep two copies in float32, each of two norms.
    let norms = if width < 4 { 4 * 4 * hidden } else { 0 };
    let layers = config.num_layers as u64 * (width * layer as u64 + norms as u64);
    // Logits, their logarithms and the gradient, in float32.
    let head = 3 * 4 * config.vocab_size as u64;
    training.batch_tokens as u64 * (layers + head)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::definition::KnownInput;
    use step::{Facts, Kind, Known, StepDef};

    use super::*;
    use crate::Pretrain;

    /// Bytes on a processor, and what is known of the output.
    fn count<S: step::Step>(params: Value, input: &str, facts: Facts) -> (u64, Facts) {
        let def = StepDef::of::<S>();
        let Value::Object(params) = params else { unreachable!("tests pass objects") };
        let params = (def.resolve)(params).unwrap();
        let input_of = KnownInput { label: String::new(), kind: Kind::Model, facts };
        let known = Known::from([(input.to_string(), vec![input_of])]);
        let memory = (def.needs)(&params, &known).memory.unwrap();
        (memory.on_processor, (def.facts)(&params, &known))
    }

    #[test]
    fn it_is_what_runs_took_within_a_tenth() {
        let small = json!({
            "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
            "intermediate_size": 512, "batch_tokens": 256,
        });
        let large = json!({
            "hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4,
            "intermediate_size": 1408, "batch_tokens": 4096,
        });
        let lora = |rank: u64, targets: Value, tokens: u64| json!({"rank": rank, "target_modules": targets, "batch_tokens": tokens});
        // Peak resident megabytes of the worker, as `cargo xtask show` tells them.
        for (shape, pretrained, adapter, adapted) in [
            (small, 217.5, lora(32, json!("all-linear"), 256), 195.0),
            (large, 1970.4, lora(16, json!(["q_proj", "v_proj"]), 4096), 1672.5),
        ] {
            let vocabulary = Facts { vocabulary: Some(768), ..Facts::default() };
            let (base, model) = count::<Pretrain>(shape, "tokenizer", vocabulary);
            let (lora, _) = count::<Lora>(adapter, "base", model);
            for (counted, seen) in [(base, pretrained), (lora, adapted)] {
                let ratio = counted as f64 / (seen * 1e6);
                assert!((0.9..1.1).contains(&ratio), "{counted} counted, {seen} MB seen");
            }
        }
    }
}
