//! The decoder beside transformers and PEFT: what `golden/make.py` wrote down.

use std::collections::HashMap;
use std::path::PathBuf;

use checkpoint::weights::Weights;
use serde::Deserialize;
use serde_json::{Value, json};
use step::StepDef;

use super::*;
use crate::blockwise::Nf4;
use crate::data::Rows;
use crate::fit::gradients;
use crate::linear::Lora;
use crate::optimiser::{Optimiser, Trainable};
use crate::plan::Plan;
use crate::tensor;

const ARCHITECTURES: [&str; 7] =
    ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-short"];

fn folder(architecture: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/worker/golden").join(architecture)
}

fn model(architecture: &str) -> Decoder {
    model_in(architecture, Kind::Float)
}

fn model_in(architecture: &str, compute: Kind) -> Decoder {
    // Models this small are slower with two threads that wait for each other.
    tch::set_num_threads(1);
    let dir = folder(architecture);
    let config = Config::read(&dir).unwrap();
    let weights = Weights::open(&dir).unwrap();
    weights.check(&config).unwrap();
    Decoder::new(config, compute, |name, _| Ok(tensor::read(&weights, name)?.to_kind(compute)))
        .unwrap()
}

fn expected(architecture: &str) -> HashMap<String, Tensor> {
    tensor::golden(&format!("{architecture}/expected"))
}

/// Each row predicts its own next tokens.
fn batch(ids: &Tensor) -> Batch {
    let (rows, length) = ids.size2().unwrap();
    let places = Tensor::arange(rows * length, (Kind::Int64, Device::Cpu)).view([rows, length]);
    let predicting = places.narrow(1, 0, length - 1).reshape([-1]);
    let targets = ids.narrow(1, 1, length - 1).reshape([-1]);
    let weights = Tensor::ones([targets.numel() as i64], (Kind::Float, Device::Cpu));
    let lengths = ids.full_like(length);
    Batch { ids: ids.shallow_clone(), lengths, packed: None, predicting, targets, weights }
}

/// [B·T, V]
fn logits(model: &Decoder, batch: &Batch) -> Tensor {
    let places = Places::new(model, batch);
    let layers = 0..model.layers.len();
    let x = layers.fold(model.embed(batch), |x, i| model.layer(i, &x, &places, None));
    model.head.forward(&model.norm.forward(&x, model.compute), false)
}

/// Gives every layer but the head the adapter that PEFT had.
fn adapt(model: &mut Decoder, expected: &HashMap<String, Tensor>) -> Vec<(String, Tensor)> {
    let mut leaves = Vec::new();
    for linear in model.linears_mut().filter(|linear| linear.module() != "lm_head") {
        let name = linear.name.trim_end_matches(".weight").to_string();
        let [a, b] = ["lora_A", "lora_B"].map(|part| {
            let name = format!("{name}.{part}.weight");
            let leaf = expected[&format!("adapter.{name}")].copy().set_requires_grad(true);
            leaves.push((name, leaf.shallow_clone()));
            leaf
        });
        linear.lora = Some(Lora { a, b, scale: 6.0 / 3.0, dropout: 0.0 });
    }
    leaves
}

/// The largest distance, as a share of the largest value.
fn distance(ours: &Tensor, theirs: &Tensor) -> f64 {
    let largest = theirs.abs().max().double_value(&[]);
    (ours - theirs).abs().max().double_value(&[]) / largest
}

#[test]
fn logits_loss_and_gradients_are_those_of_transformers_and_peft() {
    for architecture in ARCHITECTURES {
        let (mut model, expected) = (model(architecture), expected(architecture));
        let batch = batch(&expected["ids"]);
        let logits = logits(&model, &batch);
        let off = distance(&logits, &expected["logits"].flatten(0, 1));
        assert!(off <= 1e-5, "{architecture}: logits off by {off}");

        let leaves = adapt(&mut model, &expected);
        let loss = model.loss(&batch, batch.targets.numel() as f64, None);
        let off = distance(&loss, &expected["loss"]);
        assert!(off <= 1e-5, "{architecture}: loss off by {off}");
        loss.backward();
        for (name, leaf) in leaves {
            let off = distance(&leaf.grad(), &expected[&format!("gradient.{name}")]);
            assert!(off <= 1e-5, "{architecture}: gradient of {name} off by {off}");
        }
    }
}

/// What is fused for float32 on a processor is a chain of operations for every other kind.
#[test]
fn logits_are_the_same_without_fused_operations() {
    for architecture in ARCHITECTURES {
        let (model, expected) = (model_in(architecture, Kind::Double), expected(architecture));
        let batch = batch(&expected["ids"]);
        let logits = logits(&model, &batch);
        let off = distance(&logits, &expected["logits"].flatten(0, 1));
        assert!(off <= 1e-5, "{architecture}: logits off by {off}");
    }
}

#[test]
fn fifty_steps_stay_with_those_of_peft() {
    let params = json!({"learning_rate": 2e-3, "weight_decay": 0.01, "max_grad_norm": 0.0});
    let Value::Object(params) = params else { unreachable!("an object") };
    let params = (StepDef::of::<train::Lora>().resolve)(params).unwrap();
    let training = train::Lora::deserialize(&params).unwrap().training();
    for architecture in ARCHITECTURES {
        let (mut model, expected) = (model(architecture), expected(architecture));
        let batch = batch(&expected["ids"]);
        let trainables = adapt(&mut model, &expected);
        let trainables =
            trainables.into_iter().map(|(name, tensor)| Trainable { name, tensor, decays: true });
        let mut optimiser = Optimiser::new(trainables.collect(), &training);
        for (step, theirs) in Vec::<f64>::try_from(&expected["losses"]).unwrap().iter().enumerate()
        {
            let loss = model.loss(&batch, batch.targets.numel() as f64, None);
            loss.backward();
            let _ = optimiser.step(training.learning_rate).unwrap();
            let ours = loss.double_value(&[]);
            let off = (ours - theirs).abs() / theirs;
            assert!(off <= 1e-4, "{architecture}: step {step}: {ours}, not {theirs}");
        }
    }
}

#[test]
fn packed_rows_lose_what_they_lose_alone() {
    for architecture in ARCHITECTURES {
        let model = model(architecture);
        let ids: Vec<i32> = (0..47).map(|i| (i * 29 + 5) % 48).collect();
        let offsets = vec![0, 21, 30, 47];
        let rows = Rows::new("rows".into(), ids.clone(), vec![1; ids.len()], offsets).unwrap();
        let loss = |rows: &Rows, which: &[u32], packed: bool| {
            let batch = rows.batch(which, packed, 0.0, Device::Cpu);
            model.loss(&batch, 1.0, None).double_value(&[])
        };
        let alone: f64 = [[0], [1], [2]].iter().map(|row| loss(&rows, row, false)).sum();
        for packed in [true, false] {
            let together = loss(&rows, &[0, 1, 2], packed);
            assert!((together - alone).abs() <= 1e-5 * alone, "{architecture}: {together} {alone}");
        }
    }
}

/// Rows of unlike length, some of them with a prompt that is not supervised.
#[test]
fn micro_batches_together_are_one_batch() {
    let params = json!({"dropout": 0.0, "prompt_weight": 0.25});
    let Value::Object(params) = params else { unreachable!("an object") };
    let params = (StepDef::of::<train::Lora>().resolve)(params).unwrap();
    let training = train::Lora::deserialize(&params).unwrap().training();
    let ids: Vec<i32> = (0..47).map(|i| (i * 29 + 5) % 48).collect();
    let supervised = (0..47).map(|i| u8::from(i % 5 > 1)).collect();
    let rows = Rows::new("rows".into(), ids, supervised, vec![0, 21, 30, 47]).unwrap();
    let (mut model, expected) = (model("mistral"), expected("mistral"));
    let mut leaves = adapt(&mut model, &expected);
    let mut gradient = |packed, micros: &[&[u32]]| {
        let micros = micros.iter().map(|rows| rows.to_vec()).collect();
        let plan = Plan { packed, steps: vec![micros] };
        let loss = gradients(&model, &rows, &plan, 0, &training, Device::Cpu).unwrap();
        let all: Vec<Tensor> = leaves.iter().map(|(_, leaf)| leaf.grad().copy()).collect();
        leaves.iter_mut().for_each(|(_, leaf)| leaf.zero_grad());
        (loss, all)
    };
    let (loss, one) = gradient(false, &[&[0, 1, 2]]);
    for packed in [false, true] {
        let (other, several) = gradient(packed, &[&[2], &[0, 1]]);
        assert!(distance(&other, &loss) <= 1e-6);
        for (one, several) in one.iter().zip(&several) {
            assert!(distance(several, one) <= 1e-5);
        }
    }
}

/// Every parameter of a checkpoint is named again when it is written.
#[test]
fn weights_are_those_that_were_read() {
    for architecture in ARCHITECTURES {
        let model = model(architecture);
        let names: Vec<String> =
            model.weights().unwrap().into_iter().map(|(name, _)| name).collect();
        let expected = names::expected(&model.config);
        assert_eq!(names, expected.into_iter().map(|(name, _)| name).collect::<Vec<_>>());
    }
}

#[test]
fn checkpointing_gives_the_same_gradient_to_the_bit() {
    for architecture in ARCHITECTURES {
        for trained in [false, true] {
            let (mut model, expected) = (model(architecture), expected(architecture));
            let mut leaves = adapt(&mut model, &expected);
            model.linears_mut().filter_map(|l| l.lora.as_mut()).for_each(|l| l.dropout = 0.3);
            if trained {
                model.linears_mut().for_each(|linear| linear.lora = None);
                leaves = model.weights().unwrap();
                leaves.iter().for_each(|(_, leaf)| _ = leaf.set_requires_grad(true));
            }
            let batch = batch(&expected["ids"]);
            let mut gradient = |checkpointing| {
                let loss = model.backward(&batch, 44.0, Some(5), checkpointing).unwrap();
                let gradients = leaves.iter_mut().map(|(_, leaf)| leaf.grad().copy());
                let all: Vec<Tensor> = gradients.chain([loss]).collect();
                leaves.iter_mut().for_each(|(_, leaf)| leaf.zero_grad());
                all
            };
            let (kept, again) = (gradient(false), gradient(true));
            for (i, (kept, again)) in kept.iter().zip(&again).enumerate() {
                assert!(kept.equal(again), "{architecture}: {i} of {}", again);
            }
        }
    }
}

/// QLoRA's gradients are those of a model that holds the same numbers densely.
#[test]
fn nf4_trains_as_what_it_stands_for() {
    for architecture in ARCHITECTURES {
        let expected = expected(architecture);
        let batch = batch(&expected["ids"]);
        let gradients = |dense: bool| {
            let mut model = model(architecture);
            for linear in model.linears_mut().filter(|linear| linear.module() != "lm_head") {
                let nf4 = Nf4::quantise(&linear.weight.dense().unwrap(), Device::Cpu).unwrap();
                linear.weight = match dense {
                    true => nf4.dequantise(Kind::Float).unwrap().into(),
                    false => Weight::Nf4(nf4),
                };
            }
            let leaves = adapt(&mut model, &expected);
            let loss = model.backward(&batch, 44.0, None, false).unwrap();
            (loss, leaves.into_iter().map(|(_, leaf)| leaf.grad()).collect::<Vec<_>>())
        };
        let ((loss, packed), (dense_loss, dense)) = (gradients(false), gradients(true));
        assert!(loss.equal(&dense_loss), "{architecture}");
        assert!(packed.iter().zip(&dense).all(|(a, b)| a.equal(b)), "{architecture}");
        // And it is not the model of the full weights.
        assert!((loss - &expected["loss"]).abs().double_value(&[0]) > 1e-4, "{architecture}");
    }
}
