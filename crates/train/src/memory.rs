//! What training takes at its peak, from the model's own numbers, and what would take less.
//!
//! Counted, not measured: weights, gradients, what the optimiser remembers, and what the forward
//! pass of `worker/decoder.rs` keeps for the backward pass. The tests hold it to what runs were seen
//! to take.

use checkpoint::config::Config;
use checkpoint::names;
use step::definition::{Memory, Needs, Saving};

use crate::training::{Algorithm, Compute, Device, Training};
use crate::{LOGITS_A_TILE, Lora};

/// libtorch itself and a worker's own pages.
const LIBRARY: u64 = 156_000_000;
/// CUDA's context and the work space of its products.
const CONTEXT: u64 = 700_000_000;

/// Everything is trained, and held in float32.
fn all(config: &Config, training: &Training) -> Memory {
    let parameters = config.parameters() as u64;
    memory(training, |width| {
        // Products in 16 bits keep a copy of each weight for the backward pass.
        let copies = if width < 4 { width * parameters } else { 0 };
        // The gradient of a tied matrix comes in two parts.
        let twice =
            if config.tied { 4 * (config.vocab_size * config.hidden_size) as u64 } else { 0 };
        // Gradients lie between what the way back needs, and leave holes of about their size.
        let holes = 4 * parameters;
        let weights = trained(training) * parameters + copies + twice + holes;
        weights + activations(config, training, width, 0.0)
    })
}

/// The base is held in what is computed in or in NF4, the adapter in float32.
fn lora(config: &Config, lora: &Lora, bits: u8, training: &Training) -> Memory {
    let adapter = lora.parameters(config) as u64;
    let shape = |part: &str| names::linear_shape(config, part).expect("a name of the list");
    let linears = names::linears(config.architecture).iter();
    let matrices = linears.map(|part| shape(part).iter().product::<usize>());
    let [in_layers, largest] =
        [config.num_layers * matrices.clone().sum::<usize>(), matrices.max().unwrap_or(0)]
            .map(|count| count as u64);
    memory(training, |width| {
        let all = config.parameters() as u64;
        let base = match bits {
            // Four bits a number, eight a block of 64; and one matrix at a time as it was.
            4 => width * (all - in_layers) + in_layers / 2 + in_layers / 64 + width * largest,
            _ => width * all,
        };
        base + trained(training) * adapter + activations(config, training, width, lora.dropout)
    })
}

/// What training everything takes of the machine.
pub fn needs_of_all(config: Option<&Config>, training: &Training) -> Needs {
    let changes: [Change<Training>; 3] = [checkpoint_gradients, remember_less, halve_batches];
    needs(training, training, &changes, config.map(|config| move |t: &Training| all(config, t)))
}

/// What training an adapter takes of the machine.
pub fn needs_of_lora(config: Option<&Config>, params: &Lora) -> Needs {
    type Held = (Training, u8);
    let changes: [Change<Held>; 3] = [
        |(training, _)| checkpoint_gradients(training),
        |(_, bits)| (std::mem::replace(bits, 4) != 4).then(|| "bits = 4".into()),
        |(training, _)| halve_batches(training),
    ];
    let training = params.training();
    let of = config.map(|config| move |(t, bits): &Held| lora(config, params, *bits, t));
    needs(&training, &(training.clone(), params.bits), &changes, of)
}

/// Makes a change and says how a recipe spells it; nothing, where it is made already.
type Change<T> = fn(&mut T) -> Option<String>;

fn checkpoint_gradients(training: &mut Training) -> Option<String> {
    let already = std::mem::replace(&mut training.gradient_checkpointing, true);
    (!already).then(|| "gradient_checkpointing = true".into())
}

fn remember_less(training: &mut Training) -> Option<String> {
    let before = std::mem::replace(&mut training.optimiser, Algorithm::Adamw8bit);
    (before == Algorithm::Adamw).then(|| "optimiser = \"adamw-8bit\"".into())
}

/// Half the micro-batch, and as large a step.
fn halve_batches(training: &mut Training) -> Option<String> {
    training.batch_tokens = training.batch_tokens.div_ceil(2);
    training.gradient_accumulation *= 2;
    let Training { batch_tokens, gradient_accumulation, .. } = training;
    Some(format!(
        "batch_tokens = {batch_tokens}` and `gradient_accumulation = {gradient_accumulation}"
    ))
}

/// The memory that `of` counts, where the model is known, and what the changes save of it, each on
/// top of those before it.
fn needs<T: Clone>(
    training: &Training,
    start: &T,
    changes: &[Change<T>],
    of: Option<impl Fn(&T) -> Memory>,
) -> Needs {
    let accelerator = training.device != Device::Cpu;
    let Some(of) = of else { return Needs { accelerator, ..Needs::default() } };
    let mut held = start.clone();
    let mut savings = Vec::new();
    for change in changes {
        if let Some(change) = change(&mut held) {
            savings.push(Saving { change, memory: of(&held) });
        }
    }
    Needs { accelerator, memory: Some(of(start)), savings, ..Needs::default() }
}

/// Bytes of a parameter that is trained: itself, its gradient, what is remembered of it.
fn trained(training: &Training) -> u64 {
    4 + 4
        + match training.optimiser {
            Algorithm::Adamw => 8,
            Algorithm::Adamw8bit => 2,
            Algorithm::Adafactor => 0,
        }
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
fn activations(config: &Config, training: &Training, width: u64, dropout: f64) -> u64 {
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
    let (layer, layers) = (width * layer as u64 + norms as u64, config.num_layers as u64);
    let dropped = u64::from(dropout > 0.0);
    let (kept, holes) = match training.gradient_checkpointing {
        // What goes into each, and one of them whole.
        true => (layers * width * hidden as u64 + layer, dropped * layer * 3 / 2),
        false => (layers * layer, dropped * layers * layer * 7 / 20),
    };
    // Seen in runs: a layer and a half on the way back, and what dropping numbers leaves in between.
    let layers = kept + layer * 3 / 2 + holes;
    let tokens = training.batch_tokens as u64;
    // A tile of logits and their gradient, in float32.
    let logits =
        (LOGITS_A_TILE.max(config.vocab_size) as u64).min(tokens * config.vocab_size as u64);
    tokens * layers + 2 * 4 * logits
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
    fn it_is_what_runs_took_within_a_fifth() {
        let small = json!({
            "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
            "intermediate_size": 512, "batch_tokens": 256,
        });
        let large = json!({
            "hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4,
            "intermediate_size": 1408, "batch_tokens": 4096,
        });
        let lora = |rank: u64, targets: Value, tokens: u64| json!({"rank": rank, "target_modules": targets, "batch_tokens": tokens});
        let with = |params: &Value, key: &str, value: Value| {
            let mut params = params.clone();
            params[key] = value;
            params
        };
        let all = |tokens: u64| lora(32, json!("all-linear"), tokens);
        let all16 = lora(16, json!("all-linear"), 4096);
        let qlora = with(&all16, "bits", json!(4));
        let checkpointed = |params: &Value| with(params, "gradient_checkpointing", json!(true));
        let less = with(&checkpointed(&large), "optimiser", json!("adamw-8bit"));
        let packed = with(&lora(8, json!(["q_proj"]), 2048), "packing", json!("always"));
        // Peak resident megabytes of the worker, as `cargo xtask show` tells them.
        let some = lora(16, json!(["q_proj", "v_proj"]), 4096);
        for (shape, pretrained, adapters) in [
            (&small, 218.1, vec![(with(&all(256), "dropout", json!(0.0)), 195.0), (packed, 345.2)]),
            (&less, 1183.0, vec![]),
            (
                &large,
                1941.0,
                vec![
                    (with(&all16, "dropout", json!(0.0)), 1928.0),
                    (all16, 2540.0),
                    (with(&some, "dropout", json!(0.0)), 1620.0),
                    (some, 1978.0),
                    (checkpointed(&qlora), 929.0),
                    (qlora, 2368.0),
                ],
            ),
        ] {
            let vocabulary = Facts { vocabulary: Some(768), ..Facts::default() };
            let (base, model) = count::<Pretrain>(shape.clone(), "tokenizer", vocabulary);
            let adapters = adapters
                .into_iter()
                .map(|(adapter, seen)| (count::<Lora>(adapter, "base", model.clone()).0, seen));
            for (counted, seen) in std::iter::once((base, pretrained)).chain(adapters) {
                let ratio = counted as f64 / (seen * 1e6);
                assert!((0.8..1.2).contains(&ratio), "{counted} counted, {seen} MB seen");
            }
        }
    }
}
